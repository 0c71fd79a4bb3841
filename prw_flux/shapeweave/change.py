"""Changes to a scene: the eight edits, each with its instruction and its exact after-scene."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from prw_flux.shapeweave.caption import article, describe, located
from prw_flux.shapeweave.scene import (
    BACKGROUNDS,
    COLOURS,
    PLACES,
    SHAPES,
    SIZES,
    TEXTURES,
    Item,
    Scene,
    draw_item,
)


@dataclass(frozen=True, kw_only=True)
class Change:
    """``after`` is the scene that ``instruction`` asks for; ``index`` the changed item of it.

    ``index`` is None when the item was removed or the background changed.
    """

    kind: str
    instruction: str
    before: Scene
    after: Scene
    index: int | None


def _other(rng: np.random.Generator, choices: list[str], current: str) -> str:
    return str(rng.choice([c for c in choices if c != current]))


def _recolour(scene: Scene, index: int, rng: np.random.Generator) -> tuple[str, Item]:
    item = scene.items[index]
    colour = _other(rng, list(COLOURS), item.colour)
    return f"make the {describe(item)} {colour}", replace(item, colour=colour)


def _retexture(scene: Scene, index: int, rng: np.random.Generator) -> tuple[str, Item]:
    item = scene.items[index]
    texture = _other(rng, list(TEXTURES), item.texture)
    return f"make the {describe(item)} {texture}", replace(item, texture=texture)


def _resize(scene: Scene, index: int, rng: np.random.Generator) -> tuple[str, Item]:
    item = scene.items[index]
    size = _other(rng, list(SIZES), item.size)
    return f"make the {describe(item)} {size}", replace(item, size=size)


def _reshape(scene: Scene, index: int, rng: np.random.Generator) -> tuple[str, Item]:
    item = scene.items[index]
    shape = _other(rng, list(SHAPES), item.shape)
    return f"turn the {describe(item)} into {article(shape)}", replace(item, shape=shape)


def _move(scene: Scene, index: int, rng: np.random.Generator) -> tuple[str, Item]:
    item = scene.items[index]
    place = int(rng.choice(free_places(scene)))
    return f"move the {describe(item)} to the {PLACES[place]}", replace(item, place=place)


_ITEM_CHANGES: dict[str, Callable[[Scene, int, np.random.Generator], tuple[str, Item]]] = {
    "recolour": _recolour,
    "retexture": _retexture,
    "resize": _resize,
    "reshape": _reshape,
    "move": _move,
}
KINDS = (*_ITEM_CHANGES, "add", "remove", "background")


def free_places(scene: Scene) -> list[int]:
    """Cells of the grid that no item occupies."""
    taken = {item.place for item in scene.items}
    return [place for place in range(len(PLACES)) if place not in taken]


def draw_change(scene: Scene, rng: np.random.Generator, kind: str | None = None) -> Change:
    """A change of the given kind (default: uniform over those that leave a grammatical scene)."""
    if kind is None:
        fewer, more = len(scene.items) > 1, len(scene.items) < 2
        allowed = [k for k in KINDS if (k != "remove" or fewer) and (k != "add" or more)]
        kind = str(rng.choice(allowed))
    if kind == "add":
        item = draw_item(rng, int(rng.choice(free_places(scene))))
        after = replace(scene, items=(*scene.items, item))
        return Change(kind=kind, instruction=f"add {located(item)}", before=scene, after=after,
                      index=len(scene.items))  # fmt: skip
    if kind == "background":
        name = _other(rng, list(BACKGROUNDS), scene.background)
        return Change(kind=kind, instruction=f"change the background to {name}", before=scene,
                      after=replace(scene, background=name), index=None)  # fmt: skip
    index = int(rng.integers(len(scene.items)))
    if kind == "remove":
        words = f"remove the {describe(scene.items[index])}"
        return Change(kind=kind, instruction=words, before=scene,
                      after=scene.with_item(index, None), index=None)  # fmt: skip
    words, item = _ITEM_CHANGES[kind](scene, index, rng)
    return Change(kind=kind, instruction=words, before=scene,
                  after=scene.with_item(index, item), index=index)  # fmt: skip
