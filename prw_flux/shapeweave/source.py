"""ShapeWeave as a data source: scenes drawn to suit each task, everything about them known.

Example ``index`` of a task is a pure function of (seed, split, task, index). The "train" split
never shows held-out content, the "heldout" split shows nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from prw_flux.shapeweave.caption import caption, describe, located
from prw_flux.shapeweave.change import Change, draw_change
from prw_flux.shapeweave.render import (
    depth_map,
    item_mask,
    lineart_map,
    render,
    segmentation_map,
    softedge_map,
)
from prw_flux.shapeweave.scene import (
    BACKGROUNDS,
    PLACES,
    Item,
    Scene,
    draw_glyph,
    draw_item,
    draw_jitter,
    draw_scene,
)
from prw_flux.tasks.base import Example, Pair, Thing, digest_of, keyed_rng

TASKS: Final = ("inpaint", "ground", "control", "customise", "edit")
SPLITS: Final = ("train", "heldout")
ENDLESS: Final = 2**31
GRAMMAR: Final = 1
"""To be raised when the same seed gives other scenes than before."""

DrawMap: TypeAlias = Callable[[Scene, int], NDArray[np.uint8]]
MAPS: Final[Mapping[str, DrawMap]] = {
    "lineart": lineart_map,
    "softedge": softedge_map,
    "depth": depth_map,
    "segmentation": segmentation_map,
}
"""The exact maps; drawn for control and for tasks of the user's own, which may need them."""


class ShapeWeave:
    """The procedural data source.

    Args:
        size: side of the pictures in pixels; a multiple of 16, at least 64.
        seed: another seed, another sequence of scenes.
        split: "train" or "heldout".
    """

    name = "shapeweave"

    def __init__(self, size: int = 96, seed: int = 0, split: str = "train") -> None:
        if size % 16 or size < 64:
            raise ValueError(f"ShapeWeave size {size}: choose a multiple of 16, at least 64")
        if split not in SPLITS:
            raise ValueError(f"unknown split {split!r}; choose one of {', '.join(SPLITS)}")
        self.size, self.seed, self.split = size, seed, split

    def __len__(self) -> int:
        return ENDLESS

    def fingerprint(self) -> str:
        """Of the grammar's version, size, seed and split."""
        return digest_of(self.name, GRAMMAR, self.size, self.seed, self.split)

    def tasks(self) -> frozenset[str]:
        """All five tasks of the curriculum."""
        return frozenset(TASKS)

    def example(self, task: str, index: int) -> Example:
        """Example ``index`` for ``task``; metadata["scene"] is the scene of ``image``.

        A task of the user's own gets plain scenes, with an editing pair as well.
        """
        rng = keyed_rng(self.seed, "shapeweave", self.split, task, str(index))
        key = f"shapeweave-{self.split}-{self.seed}-{task}-{index}"
        if task == "customise":
            return self._subject_example(rng, key)
        scene = self._scene(rng, distinct=task in ("ground", "edit"))
        change = None if task in ("inpaint", "ground", "control") else self._change(rng, scene)
        maps = {} if task in ("inpaint", "ground", "edit") else MAPS
        return self._example(key, scene, change, maps)

    def _accepts(self, *scenes: Scene) -> bool:
        held_out = any(scene.held_out() for scene in scenes)
        return held_out == (self.split == "heldout")

    def _scene(self, rng: np.random.Generator, distinct: bool) -> Scene:
        """A scene of this split; ``distinct`` pairs share two attributes but not the phrase."""
        while True:
            scene = draw_scene(rng, count=2 if distinct and rng.random() < 0.8 else None)
            if distinct and len(scene.items) == 2:
                scene = scene.with_item(1, distractor(rng, scene.items[0], scene.items[1].place))
            if self._accepts(scene):
                return scene

    def _change(self, rng: np.random.Generator, scene: Scene) -> Change:
        while True:
            change = draw_change(scene, rng)
            if self.split == "heldout" or self._accepts(change.after):
                return change

    def _example(
        self, key: str, scene: Scene, change: Change | None, maps: Mapping[str, DrawMap]
    ) -> Example:
        image = render(scene, self.size)
        edit = None
        if change is not None:
            edit = Pair(
                source=image,
                text=change.instruction,
                target=render(change.after, self.size),
                metadata={"change": change},
            )
        return Example(
            key=key,
            image=image,
            caption=caption(scene),
            things=tuple(thing(item, self.size) for item in scene.items),
            maps={name: draw(scene, self.size) for name, draw in maps.items()},
            edit=edit,
            metadata={"scene": scene, "caption_without_positions": caption(scene, positions=False)},
        )

    def _subject_example(self, rng: np.random.Generator, key: str) -> Example:
        while True:
            before, after = draw_subject(rng)
            if self._accepts(after):
                break
        text = subject_caption(after)
        target = render(after, self.size)
        pair = Pair(source=render(before, self.size), text=text, target=target,
                    metadata={"before": before})  # fmt: skip
        return Example(key=key, image=target, caption=text, subject=pair,
                       things=tuple(thing(item, self.size) for item in after.items),
                       metadata={"scene": after})  # fmt: skip


def thing(item: Item, size: int) -> Thing:
    """An item as an annotated object of a picture of side ``size``."""
    x0, y0, x1, y1 = (value * size for value in item.box())
    return Thing(phrase=describe(item), box=(x0, y0, x1, y1), mask=item_mask(item, size),
                 label="emblem" if item.glyph else item.shape)  # fmt: skip


def distractor(rng: np.random.Generator, item: Item, place: int) -> Item:
    """An item that differs from ``item`` in exactly two of shape, colour, texture and size."""
    while True:
        other = replace(draw_item(rng, place), place=place)
        same = sum(getattr(item, a) == getattr(other, a)
                   for a in ("shape", "colour", "texture", "size"))  # fmt: skip
        if same == 2:
            return other


def draw_subject(rng: np.random.Generator) -> tuple[Scene, Scene]:
    """One glyph alone, and the same glyph at another place, half of the time beside an item."""
    places = [int(place) for place in rng.choice(len(PLACES), size=3, replace=False)]
    glyph = draw_glyph(rng, places[0])
    first, second = (str(b) for b in rng.choice(list(BACKGROUNDS), size=2, replace=False))
    moved = replace(glyph, place=places[1], jitter=draw_jitter(rng))
    beside = (draw_item(rng, places[2]),) if rng.random() < 0.5 else ()
    return (Scene(background=first, items=(glyph,)),
            Scene(background=second, items=(moved, *beside)))  # fmt: skip


def subject_caption(scene: Scene) -> str:
    """Places for all, no words for the glyph: this object at the top right on a sky background."""
    first, *rest = scene.items
    words = [f"this object at the {PLACES[first.place]}", *(located(item) for item in rest)]
    return " and ".join(words) + f" on a {scene.background} background"
