"""Grounding: the named thing is marked by a transparent overlay in a named colour.

The overlay is filled, never an outline: a filled mark survives FLUX's autoencoder with a box IoU
of 0.97 at 256 pixels, an outline two pixels wide with 0.10. `read_overlay` is the inverse: it
turns a generated picture back into a box and a mask.

Shapes: H, W pixels; images uint8 [H, W, 3]; masks bool [H, W]; boxes (x0, y0, x1, y1) exclusive.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Final, NamedTuple, TypeAlias, final

import cv2
import numpy as np

from prw_flux.tasks.base import (
    Box,
    Example,
    Image,
    Mask,
    Task,
    TaskReject,
    Thing,
    Triple,
    definite,
    fill_box,
    mask_box,
)

ALPHA: Final = 0.5
MIN_MARK: Final = 0.001
PALETTE: Final[Mapping[str, tuple[int, int, int]]] = {
    "magenta": (255, 0, 255),
    "red": (255, 0, 0),
    "green": (0, 255, 0),
    "blue": (0, 0, 255),
    "yellow": (255, 255, 0),
    "cyan": (0, 255, 255),
    "orange": (255, 128, 0),
}
Colour: TypeAlias = str | tuple[int, int, int]


class Overlay(NamedTuple):
    """What `read_overlay` found: box (None if nothing), mask bool [H, W], confidence in [0, 1]."""

    box: Box | None
    mask: Mask
    confidence: float


@final
@dataclass(frozen=True)
class Ground(Task):
    """Marks what the text names, in one of three forms.

    * box: "mark the small red circle in magenta", the filled box of that thing;
    * mask: "cover the small red circle in magenta", its pixels;
    * instance: "mark one circle in magenta", the filled box of a random thing of the class.

    Metadata: "kind" (the form), "box", "colour", "phrase", "thing" (index), "boxes" (every
    acceptable answer: one for box and mask, all things of the class for instance) and, for the
    mask form, "mask".
    """

    name: ClassVar[str] = "ground"
    sentence: ClassVar[str] = "Mark the named object in the picture."

    colours: tuple[str, ...] = ("magenta",)
    """Names from PALETTE to choose from; one is drawn per sample."""
    forms: tuple[tuple[str, float], ...] = (("box", 0.5), ("mask", 0.25), ("instance", 0.25))
    """Forms and their weights; a form that the picture cannot give is left out."""

    def __post_init__(self) -> None:
        for colour in self.colours:
            rgb(colour)
        unknown = [form for form, _ in self.forms if form not in ("box", "mask", "instance")]
        if unknown or not self.forms or not self.colours:
            raise ValueError(f"forms {unknown} are not among box, mask, instance; or none is given")

    def missing(self, example: Example) -> str | None:
        """A thing with a box that words can name."""
        if not example.things:
            return "no thing with a box"
        if not any(self.candidates(example, form) for form, _ in self.forms):
            return "no thing that a phrase names alone"
        return None

    def candidates(self, example: Example, form: str) -> list[int]:
        """Indices of the things that the form can mark without ambiguity."""
        if form == "instance":
            return [i for i, thing in enumerate(example.things) if thing.label]
        times = Counter(definite(thing.phrase) for thing in example.things)
        return [
            i
            for i, thing in enumerate(example.things)
            if times[definite(thing.phrase)] == 1 and (form == "box" or thing.mask is not None)
        ]

    def make(self, example: Example, rng: np.random.Generator) -> Triple:
        """The picture, the request, the picture with the overlay."""
        possible = {form: self.candidates(example, form) for form, _ in self.forms}
        weights = np.array([weight if possible[form] else 0.0 for form, weight in self.forms])
        if weights.sum() <= 0:
            raise TaskReject("no form with a weight fits")
        form = self.forms[int(rng.choice(len(weights), p=weights / weights.sum()))][0]
        index = int(rng.choice(possible[form]))
        colour = str(rng.choice(self.colours))
        thing = example.things[index]
        height, width = example.image.shape[:2]
        area = thing.region(height, width) if form == "mask" else fill_box(thing.box, height, width)
        if not area.any():
            raise TaskReject("the thing covers no pixel")
        same = [t for t in example.things if form == "instance" and t.label == thing.label]
        extra = {"mask": area} if form == "mask" else {}
        return self.triple(
            example,
            form,
            example.image,
            request(form, thing, colour),
            paint_overlay(example.image, area, colour),
            box=thing.box,
            boxes=[t.box for t in same] or [thing.box],
            colour=colour,
            phrase=thing.phrase,
            thing=index,
            **extra,
        )


def request(form: str, thing: Thing, colour: str) -> str:
    """The text of a grounding sample."""
    if form == "instance":
        return f"mark one {thing.label} in {colour}"
    verb = "cover" if form == "mask" else "mark"
    return f"{verb} {definite(thing.phrase)} in {colour}"


def rgb(colour: Colour) -> tuple[int, int, int]:
    """The RGB value of a palette name; a triple is returned as it is.

    Raises:
        ValueError: the name is not in PALETTE.
    """
    if isinstance(colour, str):
        if colour not in PALETTE:
            raise ValueError(f"unknown overlay colour {colour!r}; known: {', '.join(PALETTE)}")
        return PALETTE[colour]
    return colour


def paint_overlay(image: Image, area: Mask, colour: Colour, alpha: float = ALPHA) -> Image:
    """`(1 - alpha) image + alpha colour` inside the area, rounded; the rest is untouched."""
    marked = image.copy()
    blend = (1 - alpha) * image[area].astype(np.float64) + alpha * np.array(rgb(colour), float)
    marked[area] = np.rint(blend).astype(np.uint8)
    return marked


def read_overlay(
    output: Image, source: Image, colour: Colour = "magenta", alpha: float = ALPHA
) -> Overlay:
    """Finds the overlay in `output` by projection on the direction source -> colour.

        a = <output - source, colour - source> / |colour - source|^2

    is alpha on marked pixels and 0 elsewhere. Pixels with a > alpha / 2 are marked; a 3 x 3 median
    removes specks; the largest 4-connected component, with the marked pixels that touch it (the
    median rounds corners off), is the answer and its extent the box. Where
    the source already has the overlay's colour (distance under 16 of 441 levels) the overlay
    cannot be seen: such a pixel counts as marked if the median of its visible neighbours is.

    Confidence = mean of min(a / alpha, 1) over the component, times the component's share of all
    marked pixels: 1 for an exact target, low for pale or scattered marks, 0 for none. A component
    of at most 0.1 % of the picture is no mark: that much an autoencoder invents.

    Args:
        output: uint8 [H, W, 3], the generated picture.
        source: uint8 [H, W, 3], the picture that was to be marked.

    Raises:
        ValueError: the shapes differ, or the colour is unknown.
    """
    if output.shape != source.shape:
        raise ValueError(f"output {output.shape} and source {source.shape} differ in shape")
    src = source.astype(np.float32)
    direction = np.array(rgb(colour), np.float32) - src
    norm2 = (direction**2).sum(-1)
    visible = norm2 >= 16.0**2
    a = ((output.astype(np.float32) - src) * direction).sum(-1) / np.maximum(norm2, 1.0)
    marked = np.where(visible, a > alpha / 2, _spread(a > alpha / 2, visible)).astype(np.uint8)
    smooth = np.asarray(cv2.medianBlur(marked, 3), np.uint8)
    count, labels, stats, _ = cv2.connectedComponentsWithStats(smooth, connectivity=4)
    largest = int(stats[1:, cv2.CC_STAT_AREA].max()) if count > 1 else 0
    if largest <= MIN_MARK * marked.size:
        return Overlay(None, np.zeros(marked.shape, bool), 0.0)
    core = labels == 1 + int(np.argmax(stats[1:, cv2.CC_STAT_AREA]))
    reach = cv2.dilate(core.astype(np.uint8), np.ones((3, 3), np.uint8))
    mask: Mask = np.asarray(core | ((reach > 0) & (marked > 0)))
    strength = np.clip(a[mask & visible] / alpha, 0, 1)
    share = core.sum() / smooth.sum()
    return Overlay(mask_box(mask), mask, float(strength.mean() * share) if strength.size else 0.0)


def _spread(marked: Mask, visible: Mask) -> Mask:
    """Majority of the visible pixels in a 9 x 9 window; False where none is visible."""
    votes = cv2.blur((marked & visible).astype(np.float32), (9, 9))
    voters = cv2.blur(visible.astype(np.float32), (9, 9))
    majority: Mask = np.asarray((voters > 0) & (votes > 0.5 * voters))
    return majority
