"""Training data on disk: the one schema of every built data set, and what readers hand over.

A built data set is a folder of parquet shards that `datasets.load_dataset(folder)` opens. Columns:

    key         string  unique; seeds every random choice of its sample
    task        string  inpaint, ground, control, customise or edit
    source      Image   the picture that is given: of ground, customise and edit
    target      Image   the picture that is wanted: of all but ground, whose target the task paints
    mask        Image   white where an edit changed the picture, or null
    conditions  list of {name, method, image}: maps of the target (depth, segmentation, lineart,
                ...); the method is that of the extractor, empty where the map came with the data
    boxes       list of {box, phrase, label, mask}: the known things of the picture
    text        string  caption of the target; of edit the instruction; of ground the expression,
                        or empty where the phrases of the boxes are the expressions
    licence     string  where it is known, else empty

Boxes are (x0, y0, x1, y1) in pixels, maxima exclusive. Masks and conditions have the size of their
picture. Pictures are stored as the bytes that came, or as PNG where they had to be converted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol, TypeAlias, final

from prw import PRWError
from prw_flux.data.images import Box, Image

Row: TypeAlias = dict[str, Any]

REQUIRED: Final[Mapping[str, tuple[str, ...]]] = {
    "inpaint": ("target", "text"),
    "ground": ("source", "boxes"),
    "control": ("target", "conditions", "text"),
    "customise": ("source", "target", "text"),
    "edit": ("source", "target", "text"),
}
"""What a row of each task must have."""


CHOSEN: Final = ("low rating", "not rated")
"""Reasons that are a choice among good records, not a fault of the data."""


def is_text(word: str) -> bool:
    """Whether it can be stored; JSON may hold halves of a character (lone surrogates)."""
    try:
        word.encode()
    except UnicodeEncodeError:
        return False
    return True


class DataError(PRWError, ValueError):
    """Data cannot be built or read; one sentence that names the place."""


class Reject(Exception):
    """A record is left out, for a `reason` from a small set, to count by."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Picture:
    """A picture that has not been opened: a file, its bytes, or pixels made by a reader.

    Args:
        name: for messages.
        path, data, pixels: one of the three; pixels uint8 [H, W] or [H, W, 3].
        half: "left" or "right" of a picture that holds two side by side.
        border: pixels to take off each side (of the half).
        painted: of a mask: the photo itself, with the masked area painted white or cut out.
    """

    name: str
    path: Path | None = None
    data: bytes | None = None
    pixels: Image | None = None
    half: str | None = None
    border: int = 0
    painted: bool = False

    def read(self) -> bytes | None:
        """Its bytes, or None where it exists as pixels only.

        Raises:
            Reject: "missing", or "unreadable" (no permission, a disk that fails).
        """
        if self.pixels is not None or self.data is not None:
            return self.data
        if self.path is None or not self.path.is_file():
            raise Reject("missing", f"no such file: {self.name}")
        try:
            return self.path.read_bytes()
        except OSError as problem:
            raise Reject("unreadable", f"{self.name}: {problem.strerror}") from None


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class ThingBox:
    """A thing of a picture: its box, the words for it, its class, the pixels of its mask."""

    box: Box
    phrase: str
    label: str = ""
    mask: Mask | None = None


class Mask(Protocol):
    """A mask that is drawn when the size of its picture is known."""

    def draw(self, height: int, width: int) -> Image:
        """uint8 [height, width], 255 inside.

        Raises:
            Reject: it belongs to a picture of another size, or cannot be read.
        """


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Record:
    """One sample as a reader found it, before its pictures are opened.

    Args:
        where: the place in the input, for messages ("edits.json[3]", "a.parquet row 7").
        refused: why the reader itself leaves it out (reason, detail).
        changed: what the reader did to it, to be counted.
        others: as the columns of the schema.
    """

    where: str
    key: str
    text: str = ""
    source: Picture | None = None
    target: Picture | None = None
    mask: Picture | None = None
    conditions: Mapping[str, Picture] = field(default_factory=dict)
    boxes: tuple[ThingBox, ...] = ()
    licence: str = ""
    refused: tuple[str, str] | None = None
    changed: tuple[str, ...] = ()


class Reader(Protocol):
    """What makes records of one kind of input, always in the same order."""

    inputs: tuple[Path | str, ...]
    """The files (or URLs) that decide the records, without the pictures that they name."""
    listed: str
    """Digest of names and words that a folder alone decides; empty where a file lists them."""

    def __len__(self) -> int:
        """Number of records."""

    def records(self, start: int = 0) -> Iterator[Record]:
        """The records from number `start` on."""


def features() -> Any:
    """The schema as `datasets.Features`.

    Raises:
        DataError: the package datasets is not installed.
    """
    try:
        from datasets import Features, Image, List, Value
    except ImportError:
        raise DataError("data on disk needs the package datasets: pip install prw[train]") from None
    thing = {
        "box": List(Value("float32"), length=4),
        "phrase": Value("string"),
        "label": Value("string"),
        "mask": Image(),
    }
    condition = {"name": Value("string"), "method": Value("string"), "image": Image()}
    return Features(
        {
            "key": Value("string"),
            "task": Value("string"),
            "source": Image(),
            "target": Image(),
            "mask": Image(),
            "conditions": List(condition),
            "boxes": List(thing),
            "text": Value("string"),
            "licence": Value("string"),
        }
    )
