"""Masks as annotations give them: polygons, and run lengths in the plain and the packed form.

Run lengths go down the columns, first the length of the zeros. The packed form, made by COCO's
tools, is a text: each number is the difference to the number two before it (from the fourth on),
cut into groups of five bits, lowest first; a character is 48 + the group, plus 32 if more follow,
and bit 4 of the last group is the sign.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import numpy as np
from PIL import Image as PILImage
from PIL import ImageDraw

from prw_flux.data.images import Image
from prw_flux.data.input_files import short
from prw_flux.data.rows import DataError, Reject


@final
@dataclass(frozen=True, eq=False)
class Polygons:
    """The union of polygons, each x0, y0, x1, y1, ... in pixels."""

    points: Sequence[Sequence[float]]

    def draw(self, height: int, width: int) -> Image:
        """uint8 [height, width], 255 inside; a pixel that the outline touches is inside.

        Raises:
            Reject: a point is no place.
        """
        if not all(abs(value) < 2**31 for polygon in self.points for value in polygon):
            raise Reject("damaged mask", "a polygon has a point that is not finite")
        canvas = PILImage.new("L", (width, height))
        pen = ImageDraw.Draw(canvas)
        for polygon in self.points:
            pen.polygon(list(polygon), fill=255, outline=255)
        return np.array(canvas, np.uint8)


@final
@dataclass(frozen=True, eq=False)
class RunLengths:
    """A mask of `height` x `width` as run lengths down its columns."""

    counts: Sequence[int]
    height: int
    width: int

    def draw(self, height: int, width: int) -> Image:
        """uint8 [height, width], 255 inside.

        Raises:
            Reject: it is of another size, or the runs do not fill it.
        """
        if (height, width) != (self.height, self.width):
            have = f"{self.width} x {self.height} pixels, its picture {width} x {height}"
            raise Reject("mask of another size", f"a mask has {have}")
        if sum(self.counts) != height * width or min(self.counts, default=0) < 0:
            raise Reject(
                "damaged mask", f"the runs of a mask do not fill {width} x {height} pixels"
            )
        values = np.zeros(len(self.counts), np.uint8)
        values[1::2] = 255
        return np.ascontiguousarray(np.repeat(values, self.counts).reshape(width, height).T)


def unpack(text: str) -> list[int]:
    """The run lengths of a packed text.

    Raises:
        ValueError: it ends within a number.
    """
    counts: list[int] = []
    value = bits = 0
    for character in text:
        group = ord(character) - 48
        value |= (group & 31) << bits
        bits += 5
        if group & 32:
            continue
        if group & 16:
            value -= 1 << bits
        counts.append(value + (counts[-2] if len(counts) > 2 else 0))
        value = bits = 0
    if bits:
        raise ValueError("the text ends within a number")
    return counts


def read_mask(raw: Any, where: str) -> Polygons | RunLengths | None:
    """A "segmentation" of COCO or LVIS; None where it is absent or empty.

    Raises:
        DataError: it has none of the three forms.
    """
    if not raw:
        return None
    if isinstance(raw, list) and all(_is_polygon(polygon) for polygon in raw):
        return Polygons(raw)
    if isinstance(raw, dict) and _are_whole(raw.get("size")) and len(raw["size"]) == 2:
        counts = raw.get("counts")
        try:
            counts = unpack(counts) if isinstance(counts, str) else counts
        except ValueError as problem:
            raise DataError(f"{where}: segmentation counts: {problem}") from None
        if isinstance(counts, list) and _are_whole(counts):
            return RunLengths(counts, *raw["size"])
    raise DataError(
        f"{where}: segmentation must be polygons of at least 3 points or run lengths with "
        f"size and counts, got {short(raw)}"
    )


def _are_whole(values: Any) -> bool:
    """Whether it is a list of whole numbers that are no absurdity."""
    return isinstance(values, list) and all(isinstance(n, int) and abs(n) < 2**31 for n in values)


def _is_polygon(points: Any) -> bool:
    return (
        isinstance(points, list)
        and len(points) >= 6
        and len(points) % 2 == 0
        and all(isinstance(value, int | float) for value in points)
    )
