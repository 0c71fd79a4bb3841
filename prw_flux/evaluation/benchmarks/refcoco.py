"""Referring expressions (RefCOCO, RefCOCO+, RefCOCOg): the mark that was drawn, read back.

The benchmark's folder holds `refs.json`:

    {"version": 1, "name": "refcoco-val", "items": [
      {"id": "0", "image": "images/a.jpg", "expression": "the left cup",
       "box": [x0, y0, x1, y1], "mask": "masks/0.png", "colour": "magenta"}, ...]}

with boxes in pixels of the image, exclusive ends; `mask` (white on black) where the mark is to be a
mask, else it is a box; `colour` of the mark, magenta if left out. The REFER tools store pickles,
which are not read here, because opening one runs what it says. Results: `<id>.png`, the whole
picture with the mark over it; another size is brought to the source's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

from prw_flux.data.images import ImageError, open_image, open_map
from prw_flux.evaluation.benchmarks.base import (
    Benchmark,
    BenchmarkError,
    Encoders,
    Item,
    Line,
    inside,
    read_index,
)
from prw_flux.evaluation.metrics import (
    box_accuracy,
    cumulative_iou,
    mask_overlap,
    mean_iou,
    resized_like,
)
from prw_flux.tasks.base import Box, Image, Thing, box_iou
from prw_flux.tasks.grounding import PALETTE, read_overlay, request

FILE: Final = "refs.json"
VERSION: Final = 1


@final
@dataclass(frozen=True, kw_only=True)
class Reference(Item):
    """One expression: picture, true box, true mask or None, colour of the mark."""

    given: Path
    box: Box
    mask: Path | None
    colour: str


@final
class RefCoco(Benchmark[Reference]):
    """The benchmark's folder.

    Raises:
        BenchmarkError: refs.json is not there, of another version, or an item of it is unusable.
    """

    name = "refcoco"
    task = "ground"

    def __init__(self, folder: Path) -> None:
        data, self.items = read_index(folder / FILE, "the expressions", VERSION, _reference)
        self.split = str(data.get("name", "unnamed"))

    @property
    def folder_name(self) -> str:
        """The benchmark, and the name that the file gives itself."""
        return f"{self.name}-{self.split.removeprefix('refcoco-')}"

    def score(self, item: Reference, output: Image, encoders: Encoders) -> dict[str, Any]:
        """The box that was read and, where a mask was asked for, intersection and union."""
        source = open_image(item.given)
        seen = read_overlay(resized_like(output, source), source, item.colour)
        row: dict[str, Any] = {
            "box": seen.box, "wanted": item.box, "confidence": seen.confidence,
            "box IoU": box_iou(seen.box, item.box) if seen.box else 0.0,
        }  # fmt: skip
        if item.mask is not None:
            wanted = open_map(item.mask) >= 128
            if wanted.shape != source.shape[:2]:
                raise ImageError(
                    item.mask, "size", f"the mask is {wanted.shape}, its picture {source.shape[:2]}"
                )
            row["overlap"] = mask_overlap(seen.mask, wanted)
        return row

    def lines(self, rows: Sequence[Mapping[str, Any]], encoders: Encoders) -> list[Line]:
        """One row: Acc@0.5 over all items, cIoU and mIoU over those with a mask."""
        overlaps = [row["overlap"] for row in rows if "overlap" in row]
        metrics = {"Acc@0.5": box_accuracy([r["box"] for r in rows], [r["wanted"] for r in rows])}
        if overlaps:
            metrics |= {"cIoU": cumulative_iou(overlaps), "mIoU": mean_iou(overlaps)}
        protocol = {"bench": self.name, "split": self.split, "items": self.covered(rows),
                    "read-out": "projection"}  # fmt: skip
        return [Line(label=self.split, metrics=metrics, protocol=protocol, n=len(rows))]


def _reference(folder: Path, row: Any, where: str) -> Reference:
    try:
        key, image, mask = str(row["id"]), str(row["image"]), row.get("mask")
        x0, y0, x1, y1 = (float(value) for value in row["box"])
        colour = str(row.get("colour", "magenta"))
    except (AttributeError, KeyError, TypeError, ValueError) as problem:
        raise BenchmarkError(f"{where} needs id, image and box ({problem!r}).") from None
    if not (x0 < x1 and y0 < y1):
        raise BenchmarkError(f"{where}: the box needs x0 < x1 and y0 < y1, got {row['box']}.")
    if colour not in PALETTE:
        raise BenchmarkError(f"{where}: unknown colour {colour!r}; known: {', '.join(PALETTE)}.")
    inside(where, f"{key}.png", image, *([str(mask)] if mask else []))
    words, text = str(row.get("expression") or ""), ""
    if words:
        thing = Thing(phrase=words, box=(x0, y0, x1, y1))
        text = request("mask" if mask else "box", thing, colour)
    return Reference(key=key, output=f"{key}.png", given=folder / image, box=(x0, y0, x1, y1),
                     mask=folder / str(mask) if mask else None, colour=colour,
                     text=text)  # fmt: skip
