"""What tiny-flux is pretrained on: pictures with captions that say everything, or less.

The base plays the part that FLUX plays for real pictures: it knows the words and can draw what
they say, but it has never seen a source image. So its captions come in five forms: with places,
without places, followed by an instruction whose result is drawn, with one object marked by a
translucent box, and with an emblem, a pattern that the caption names but does not describe.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from prw_flux.shapeweave.caption import caption
from prw_flux.shapeweave.change import draw_change
from prw_flux.shapeweave.render import render
from prw_flux.shapeweave.scene import (
    BACKGROUNDS,
    COLOURS,
    PLACES,
    SHAPES,
    SIZES,
    TEXTURES,
    Scene,
    draw_glyph,
    draw_scene,
)
from prw_flux.shapeweave.source import thing
from prw_flux.tasks.base import fill_box
from prw_flux.tasks.grounding import PALETTE, paint_overlay, request

MARK_COLOUR = "magenta"
FORMS = {"places": 0.44, "no places": 0.22, "instruction": 0.14, "marked": 0.10, "emblem": 0.10}


@dataclass(frozen=True, kw_only=True)
class Content:
    """A scene, the caption it is drawn from, and what is marked in it."""

    scene: Scene
    text: str
    form: str
    mark: tuple[int, str] | None = None
    """Index of a marked item and the form of the mark, "box" or "mask"."""


def draw_content(rng: np.random.Generator, form: str | None = None) -> Content:
    """A training pair of the given form (default: drawn by ``FORMS``); never held-out content."""
    if form is None:
        form = str(rng.choice(list(FORMS), p=list(FORMS.values())))
    while True:
        content = _DRAW[form](rng)
        if not content.scene.held_out():
            return content


def _places(rng: np.random.Generator) -> Content:
    scene = draw_scene(rng)
    return Content(scene=scene, text=caption(scene), form="places")


def _no_places(rng: np.random.Generator) -> Content:
    scene = draw_scene(rng)
    return Content(scene=scene, text=caption(scene, positions=False), form="no places")


def _instruction(rng: np.random.Generator) -> Content:
    change = draw_change(draw_scene(rng), rng)
    text = with_instruction(change.before, change.instruction, rng)
    return Content(scene=change.after, text=text, form="instruction")


def _marked(rng: np.random.Generator) -> Content:
    scene = draw_scene(rng)
    index = int(rng.integers(len(scene.items)))
    form = str(rng.choice(["box", "mask", "instance"], p=[0.5, 0.25, 0.25]))
    words = request(form, thing(scene.items[index], 96), MARK_COLOUR)
    mark = (index, "mask" if form == "mask" else "box")
    return Content(scene=scene, text=with_instruction(scene, words, rng), form="marked", mark=mark)


def with_instruction(scene: Scene, instruction: str, rng: np.random.Generator) -> str:
    """The caption without places, then the instruction; two times in five the instruction alone."""
    if rng.random() < 0.4:
        return instruction
    return f"{caption(scene, positions=False)}, {instruction}"


def _emblem(rng: np.random.Generator) -> Content:
    scene = draw_scene(rng, count=2)
    scene = scene.with_item(0, draw_glyph(rng, scene.items[0].place))
    if rng.random() < 0.5:
        scene = replace(scene, items=scene.items[:1])
    return Content(scene=scene, text=caption(scene), form="emblem")


_DRAW = {
    "places": _places,
    "no places": _no_places,
    "instruction": _instruction,
    "marked": _marked,
    "emblem": _emblem,
}


def paint(content: Content, size: int = 96) -> NDArray[np.uint8]:
    """The picture of a content, uint8 [size, size, 3]."""
    image = render(content.scene, size)
    if content.mark is None:
        return image
    index, form = content.mark
    marked = thing(content.scene.items[index], size)
    area = marked.region(size, size) if form == "mask" else fill_box(marked.box, size, size)
    return paint_overlay(image, area, MARK_COLOUR)


def vocabulary() -> list[str]:
    """Every word that a caption, an instruction or a task sentence can hold, sorted."""
    words = {
        *"a an and at the on in to into of from this object with its background emblem".split(),
        *"make turn move add remove change mark cover one fill hole named picture draw".split(),
        *"follows map show same new scene instruction says as that object".split(),
        *SHAPES, *COLOURS, *TEXTURES, *SIZES, *BACKGROUNDS, *PALETTE,
    }  # fmt: skip
    for place in PLACES:
        words.update(place.split())
    return sorted(words)


__all__ = ["Content", "draw_content", "paint", "vocabulary"]
