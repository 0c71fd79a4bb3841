"""Editing: a picture and an instruction, answered by the picture after the edit.

A true pair is used where the data source has one. Otherwise the edit is one whose result can be
computed exactly: a change of the whole picture, or a new colour for one thing inside its mask.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar, Final, NamedTuple, final

import cv2
import numpy as np
from numpy.typing import NDArray

from prw_flux.tasks.base import Example, Image, Mask, Task, TaskReject, Triple, definite


class Change(NamedTuple):
    """An exact change of the whole picture and the ways to ask for it."""

    instructions: tuple[str, ...]
    apply: Callable[[Image], Image]


class Recolour(NamedTuple):
    """A thing that can be recoloured: its index and the colours that its lightness allows."""

    thing: int
    colours: tuple[str, ...]


def _linear(matrix: NDArray[np.float64], offset: float = 0.0) -> Callable[[Image], Image]:
    """x -> clip(matrix x + offset), per pixel."""

    def apply(image: Image) -> Image:
        mixed = image.astype(np.float64) @ matrix.T + offset
        return np.asarray(np.rint(np.clip(mixed, 0, 255)), np.uint8)

    return apply


_LUMA = np.tile(np.array([0.299, 0.587, 0.114]), (3, 1))
_SEPIA = np.array([[0.393, 0.769, 0.189], [0.349, 0.686, 0.168], [0.272, 0.534, 0.131]])

CHANGES: Final[Mapping[str, Change]] = MappingProxyType(
    {
        "greyscale": Change(
            ("turn the picture black and white", "remove all colour"), _linear(_LUMA)
        ),
        "sepia": Change(("give the picture a sepia tone", "make it look sepia"), _linear(_SEPIA)),
        "invert": Change(
            ("invert the colours", "turn the picture into a negative"), _linear(-np.eye(3), 255.0)
        ),
        "warmer": Change(("make the colours warmer",), _linear(np.diag([1.15, 1.02, 0.8]))),
        "cooler": Change(("make the colours cooler",), _linear(np.diag([0.8, 1.0, 1.15]))),
        "brighter": Change(("make the picture brighter",), _linear(0.75 * np.eye(3), 64.0)),
        "darker": Change(("make the picture darker",), _linear(0.55 * np.eye(3))),
        "mirror": Change(
            ("mirror the picture", "flip the picture left to right"),
            lambda image: np.ascontiguousarray(image[:, ::-1]),
        ),
        "upside-down": Change(
            ("turn the picture upside down",),
            lambda image: np.ascontiguousarray(image[::-1, ::-1]),
        ),
    }
)

COLOURS: Final[Mapping[str, tuple[int, int, int]]] = MappingProxyType(
    {
        "red": (215, 30, 40),
        "orange": (240, 130, 20),
        "yellow": (245, 215, 40),
        "green": (40, 150, 60),
        "cyan": (40, 200, 215),
        "blue": (40, 80, 215),
        "purple": (130, 50, 180),
        "pink": (245, 130, 185),
    }
)
LIGHTNESS_REACH: Final = 22.0
MIN_CHANGE: Final = 35.0


@final
@dataclass(frozen=True)
class Edit(Task):
    """Follows an instruction.

    Metadata: "kind" is "pair", "whole" or "recolour"; "edit" names the change; "exact" says
    whether the target was computed. A recolour adds "thing", "phrase", "box", "colour", "mask".
    """

    name: ClassVar[str] = "edit"
    sentence: ClassVar[str] = "Change the picture as the instruction says."

    recolour_share: float = 0.7
    """How often a thing is recoloured where one can be, instead of a whole-picture change."""

    def missing(self, example: Example) -> str | None:
        """Nothing: without a pair, an exact change is computed."""
        return None

    def make(self, example: Example, rng: np.random.Generator) -> Triple:
        """The true pair, else an exact change of one thing or of the whole picture."""
        if example.edit is not None:
            return self._pair(example)
        options = recolours(example)
        if options and rng.random() < self.recolour_share:
            return self._recolour(example, options[int(rng.integers(len(options)))], rng)
        for name in rng.permutation(list(CHANGES)):
            change = CHANGES[str(name)]
            target = change.apply(example.image)
            if np.abs(target.astype(int) - example.image).mean() < 2:
                continue
            text = change.instructions[int(rng.integers(len(change.instructions)))]
            return self.triple(
                example, "whole", example.image, text, target, edit=str(name), exact=True
            )
        raise TaskReject("no change alters the picture")

    def _pair(self, example: Example) -> Triple:
        pair = example.edit
        assert pair is not None
        fixed = ("task", "key", "kind")
        extra = {key: value for key, value in pair.metadata.items() if key not in fixed}
        extra = {"edit": "pair", "exact": False, **extra}
        return self.triple(example, "pair", pair.source, pair.text, pair.target, **extra)

    def _recolour(self, example: Example, option: Recolour, rng: np.random.Generator) -> Triple:
        thing = example.things[option.thing]
        assert thing.mask is not None
        colour = str(rng.choice(option.colours))
        verb = str(rng.choice(["make", "paint", "turn"]))
        return self.triple(
            example,
            "recolour",
            example.image,
            f"{verb} {definite(thing.phrase)} {colour}",
            recolour(example.image, thing.mask, COLOURS[colour]),
            edit="recolour",
            exact=True,
            thing=option.thing,
            phrase=thing.phrase,
            box=thing.box,
            colour=colour,
            mask=thing.mask,
        )


def recolours(example: Example) -> list[Recolour]:
    """The things with a mask and a phrase of their own, with the colours they can truly take.

    Lightness is kept, so a colour is offered only where its own lightness is within 22 units of
    the thing's mean L*, and where it differs from the thing's present colour by 35 units of
    (a*, b*): a black cap cannot become yellow, and a blue one is not made blue.
    """
    phrases = [definite(thing.phrase) for thing in example.things]
    options = []
    for index, thing in enumerate(example.things):
        if thing.mask is None or not thing.mask.any() or phrases.count(phrases[index]) > 1:
            continue
        mean = to_lab(example.image[thing.mask]).mean(axis=0)
        colours = []
        for name, value in COLOURS.items():
            lab = to_lab(np.array([value], np.uint8))[0]
            apart = float(np.hypot(*(lab[1:] - mean[1:])))
            if abs(lab[0] - mean[0]) <= LIGHTNESS_REACH and apart >= MIN_CHANGE:
                colours.append(name)
        if colours:
            options.append(Recolour(index, tuple(colours)))
    return options


def recolour(image: Image, mask: Mask, colour: tuple[int, int, int]) -> Image:
    """Gives the masked pixels the hue and chroma of `colour` and keeps each one's lightness L*.

    Where (L*, a*, b*) of the colour lies outside RGB, chroma shrinks in steps of 1/16 until it is
    inside, so lightness, and with it all shading, survives. Pixels outside the mask are untouched.
    """
    changed = image.copy()
    lightness = to_lab(image[mask])[:, 0]
    hue = to_lab(np.array([colour], np.uint8))[0, 1:]
    best = np.repeat(image[mask].mean(axis=-1, keepdims=True), 3, axis=-1) / 255
    for step in range(17):
        lab = np.concatenate([lightness[:, None], np.tile(hue * (step / 16), (len(best), 1))], 1)
        linear = lab_to_linear(lab)
        inside = np.all((linear > -1e-3) & (linear < 1 + 1e-3), axis=-1)
        best[inside] = encode_srgb(np.clip(linear[inside], 0, 1))
    changed[mask] = np.rint(np.clip(best, 0, 1) * 255).astype(np.uint8)
    return changed


_TO_XYZ = np.array(
    [
        [0.4124564, 0.3575761, 0.1804375],
        [0.2126729, 0.7151522, 0.0721750],
        [0.0193339, 0.1191920, 0.9503041],
    ]
)
_WHITE = _TO_XYZ.sum(axis=1)


def to_lab(pixels: NDArray[np.uint8]) -> NDArray[np.float64]:
    """sRGB uint8 [N, 3] -> CIE L*a*b* (D65) float64 [N, 3]."""
    row = pixels.reshape(1, -1, 3).astype(np.float32) / 255
    return np.asarray(cv2.cvtColor(row, cv2.COLOR_RGB2Lab)[0], np.float64)


def lab_to_linear(lab: NDArray[np.float64]) -> NDArray[np.float64]:
    """CIE L*a*b* [N, 3] -> linear RGB [N, 3], not clipped: values outside [0, 1] are no colours."""
    fy = (lab[:, 0] + 16) / 116
    f = np.stack([fy + lab[:, 1] / 500, fy, fy - lab[:, 2] / 200], axis=-1)
    xyz = np.where(f > 6 / 29, f**3, 3 * (6 / 29) ** 2 * (f - 4 / 29)) * _WHITE
    linear: NDArray[np.float64] = xyz @ np.linalg.inv(_TO_XYZ).T
    return linear


def encode_srgb(linear: NDArray[np.float64]) -> NDArray[np.float64]:
    """Linear RGB in [0, 1] -> sRGB in [0, 1]."""
    encoded: NDArray[np.float64] = np.where(
        linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055
    )
    return encoded
