"""What a task is: an example and a seed go in, a (source, text, target) triple comes out.

Shapes: H, W height and width in pixels. Images are uint8 [H, W, 3] RGB, masks are bool [H, W],
boxes are (x0, y0, x1, y1) in pixels with x1 and y1 exclusive.

A task is a pure function: the same example (recognised by its key) and the same seed give the
same triple on every machine, in every process and in every order. A task never guesses: where the
truth that it needs is absent, `Task.missing` says so in words.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, TypeAlias, final, runtime_checkable

import numpy as np
from numpy.typing import NDArray

Image: TypeAlias = NDArray[np.uint8]
"""uint8 ``[H, W, 3]``, RGB."""
Mask: TypeAlias = NDArray[np.bool_]
"""bool ``[H, W]``, True inside."""
Box: TypeAlias = tuple[float, float, float, float]
"""x0, y0, x1, y1 in pixels, x1 and y1 exclusive."""


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Thing:
    """One object of a picture.

    Args:
        phrase: words that refer to it, without an article ("small red circle").
        box: its extent (x0, y0, x1, y1), pixels, exclusive maxima.
        mask: its pixels, bool [H, W], or None where only the box is known.
        label: its class ("circle").
    """

    phrase: str
    box: Box
    mask: Mask | None = None
    label: str = ""

    def region(self, height: int, width: int) -> Mask:
        """The mask where there is one, else the filled box; bool [height, width]."""
        return self.mask if self.mask is not None else fill_box(self.box, height, width)


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Pair:
    """A true before/after pair with the words that lead from one to the other."""

    source: Image
    text: str
    target: Image
    metadata: Mapping[str, Any] = field(default_factory=dict)


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Example:
    """Everything that is *known* about one picture.

    Args:
        key: stable name, unique in its data source; it seeds every random choice.
        image: uint8 [H, W, 3].
        caption: what the picture shows.
        things: the objects whose boxes (and masks) are known.
        maps: true maps only, by condition name ("depth", "segmentation", "lineart", "softedge");
            uint8 [H, W] or [H, W, 3]. A two-dimensional segmentation holds class indices.
        edit: a true editing pair.
        subject: a pair of two pictures of the same subject.
        metadata: free. `caption_without_positions` replaces the caption wherever the source
            already says where things are.
    """

    key: str
    image: Image
    caption: str
    things: tuple[Thing, ...] = ()
    maps: Mapping[str, NDArray[np.uint8]] = field(default_factory=dict)
    edit: Pair | None = None
    subject: Pair | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @property
    def concept(self) -> str:
        """The caption for tasks whose source shows the places: positions left out if known."""
        return str(self.metadata.get("caption_without_positions", self.caption))


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Triple:
    """One training sample: uint8 source and target (their sizes may differ), and the text.

    `metadata` always has "task", "key" and "kind"; apart from arrays its values are JSON values.
    """

    source: Image
    text: str
    target: Image
    metadata: Mapping[str, Any]


class TaskReject(Exception):
    """This example cannot give a sample of this task.

    Args:
        reason: short and from a small set of sentences, so that callers can count by it.
        counts: rejected draws by reason, where the task drew more than once.
    """

    def __init__(self, reason: str, counts: Mapping[str, int] | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.counts: Mapping[str, int] = dict(counts or {})


class Task(ABC):
    """A kind of sample. Subclasses set the class attributes and write `missing` and `make`."""

    name: ClassVar[str]
    """One lower-case word, the task's name in recipes, files and on the command line."""
    sentence: ClassVar[str]
    """A fixed sentence that describes the task to the router (pooled text of the source pass)."""
    aligned: ClassVar[bool] = True
    """Whether pixel (y, x) of the source lies at pixel (y, x) of the target."""

    @abstractmethod
    def missing(self, example: Example) -> str | None:
        """What the example lacks for this task, in words, or None if nothing."""

    @abstractmethod
    def make(self, example: Example, rng: np.random.Generator) -> Triple:
        """One sample; every random choice comes from `rng`. May raise TaskReject."""

    def __call__(self, example: Example, seed: int) -> Triple:
        """The sample of (example.key, seed).

        Raises:
            TaskReject: something is missing, or every bounded attempt failed.
        """
        reason = self.missing(example)
        if reason is not None:
            raise TaskReject(reason)
        return self.make(example, keyed_rng(seed, self.name, example.key))

    def triple(
        self, example: Example, kind: str, source: Image, text: str, target: Image, **metadata: Any
    ) -> Triple:
        """A Triple with the three metadata entries that each one must have."""
        entries = {"task": self.name, "key": example.key, "kind": kind, **metadata}
        return Triple(source=source, text=text, target=target, metadata=entries)


@runtime_checkable
class DataSource(Protocol):
    """Where examples come from. `example` is pure: (task, index) always gives the same one."""

    @property
    def name(self) -> str:
        """Short name for logs and reports."""

    def tasks(self) -> frozenset[str]:
        """Names of the tasks that it can feed."""

    def example(self, task: str, index: int) -> Example:
        """Example `index` (any non-negative integer) drawn to suit the task.

        May raise TaskReject where what is stored there is damaged. Training asks for one after
        another, from a thread of its own unless ``data.prefetch`` is 0.
        """

    def __len__(self) -> int:
        """Number of different pictures; a very large number where they are generated."""

    def fingerprint(self) -> str:
        """Cheap to ask for; changes when the examples do, and is kept by a run.

        It depends on the content and on what chooses and orders it (seed, split, size), not on
        where the content lies.
        """


def digest_of(*facts: object) -> str:
    """32 hexadecimal digits of some facts, by their `repr`: texts, numbers and tuples of them."""
    return hashlib.blake2b(repr(facts).encode(), digest_size=16).hexdigest()


def keyed_rng(seed: int, *names: str) -> np.random.Generator:
    """A PCG64 generator that depends on the seed and the names alone (blake2b of both)."""
    text = "\0".join((str(int(seed)), *names))
    digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest, "little")))


def fill_box(box: Box, height: int, width: int) -> Mask:
    """The pixels whose centre lies in the box; bool [height, width]."""
    x0, y0, x1, y1 = box
    rows = np.arange(height) + 0.5
    columns = np.arange(width) + 0.5
    inside: Mask = ((rows >= y0) & (rows < y1))[:, None] & ((columns >= x0) & (columns < x1))
    return inside


def mask_box(mask: Mask) -> Box | None:
    """The extent of a mask, or None where it is empty."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if rows.size == 0:
        return None
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)


def box_iou(a: Box, b: Box) -> float:
    """Intersection over union of two boxes; 0 where the union is empty."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    both = max(width, 0.0) * max(height, 0.0)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both
    return both / union if union > 0 else 0.0


def mask_iou(a: Mask, b: Mask) -> float:
    """Intersection over union of two masks of one shape; 0 where both are empty."""
    union = int(np.count_nonzero(a | b))
    return int(np.count_nonzero(a & b)) / union if union else 0.0


def definite(phrase: str) -> str:
    """The phrase with exactly one "the" in front: "a red cap", "the red cap" -> "the red cap"."""
    words = phrase.split()
    if words and words[0].lower() in ("the", "a", "an"):
        words = words[1:]
    return " ".join(["the", *words])
