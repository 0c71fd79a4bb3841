"""Emu Edit's test set (arXiv 2311.10089): edits without a true after-image.

The benchmark's folder holds `emu_edit.json`, exported from facebook/emu_edit_test_set:

    {"version": 1, "split": "test", "items": [
      {"id": "0", "image": "images/0.png", "instruction": "...",
       "input_caption": "...", "output_caption": "..."}, ...]}

`instruction` may be left out where nothing is generated. Results: `<id>.png`. Everything is
measured against the source: L1 in [0, 1], CLIP-I, DINO; CLIP-T (the paper's CLIP_out) against the
output caption; CLIP-dir, whether the picture changes as the captions do.
Some published numbers leave out rows whose two captions are equal: `captions` is "all" or
"changed", and part of the protocol.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

from prw_flux.data.images import open_image
from prw_flux.evaluation.benchmarks.base import (
    Benchmark,
    BenchmarkError,
    Encoders,
    Item,
    Line,
    inside,
    means,
    read_index,
)
from prw_flux.evaluation.metrics import cosine, directional_similarity, l1
from prw_flux.tasks.base import Image

FILE: Final = "emu_edit.json"
VERSION: Final = 1
SIZES: Final[Mapping[str, int]] = {"test": 3589, "validation": 2022}
CAPTIONS: Final = ("all", "changed")


@final
@dataclass(frozen=True, kw_only=True)
class CaptionedEdit(Item):
    """One edit: the source picture and the captions before and after."""

    given: Path
    before: str
    after: str


@final
class EmuEdit(Benchmark[CaptionedEdit]):
    """The benchmark's folder.

    Args:
        folder: as above.
        captions: "all", or "changed": CLIP-T and CLIP-dir only where the two captions differ.

    Raises:
        BenchmarkError: emu_edit.json is not there, of another version, or an item is unusable.
    """

    name = "emu_edit"

    def __init__(self, folder: Path, *, captions: str = "all") -> None:
        if captions not in CAPTIONS:
            raise BenchmarkError(f"captions must be all or changed, got {captions!r}")
        data, self.items = read_index(folder / FILE, "the edits", VERSION, _edit)
        self.split, self.captions = str(data.get("split", "unnamed")), captions
        if SIZES.get(self.split) != len(self.items):
            known = " and ".join(f"{name} {size}" for name, size in SIZES.items())
            self.notes = (
                f"{folder} holds {len(self.items)} items of split {self.split!r}, the published "
                f"ones are {known}: not the same set",
            )

    @property
    def folder_name(self) -> str:
        """The benchmark and its split."""
        return f"{self.name}-{self.split}"

    def score(self, item: CaptionedEdit, output: Image, encoders: Encoders) -> dict[str, Any]:
        """L1 and similarities to the source; CLIP-T and CLIP-dir with a CLIP."""
        source = open_image(item.given)
        row: dict[str, Any] = {"L1": l1(output, source)}
        for name, (value,) in encoders.similarities([output, source]).items():
            row[name] = value
        clip = encoders.clip
        if clip is not None and (self.captions == "all" or item.before != item.after):
            after_picture, before_picture = clip.images([output, source])[:, None]
            after, before = clip.texts([item.after, item.before])[:, None]
            row["CLIP-T"] = float(cosine(after_picture, after)[0])
            row["CLIP-dir"] = float(
                directional_similarity(before_picture, after_picture, before, after)[0]
            )
        return row

    def lines(self, rows: Sequence[Mapping[str, Any]], encoders: Encoders) -> list[Line]:
        """One row, against the source."""
        names = ("L1", *encoders.named(), "CLIP-T", "CLIP-dir")
        protocol = {"bench": self.name, "split": self.split, "items": self.covered(rows),
                    "reference": "source", "captions": self.captions,
                    **encoders.protocol()}  # fmt: skip
        metrics = means(rows, {name: name for name in names})
        return [Line(label="against the source", metrics=metrics, protocol=protocol, n=len(rows))]


def _edit(folder: Path, row: Any, where: str) -> CaptionedEdit:
    try:
        key, image = str(row["id"]), str(row["image"])
        before, after = str(row["input_caption"]), str(row["output_caption"])
    except (KeyError, TypeError) as problem:
        raise BenchmarkError(
            f"{where} needs id, image, input_caption and output_caption ({problem!r})."
        ) from None
    inside(where, f"{key}.png", image)
    return CaptionedEdit(key=key, output=f"{key}.png", given=folder / image, before=before,
                         after=after, text=str(row.get("instruction") or ""))  # fmt: skip
