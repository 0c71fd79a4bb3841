"""A folder of photos as a data source for the tasks.

Photos without annotations feed inpainting, control (line maps) and editing (exact changes);
annotations.json adds things, maps, edit pairs and subjects (see annotations.py). listing.py says
which files are photos and where their captions come from.

Shapes: H, W pixels of the fitted picture; images uint8 [H, W, 3]; masks bool [H, W].
"""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final, NamedTuple, final

import numpy as np

from prw_flux.data import listing
from prw_flux.data.annotations import PhotoError, PhotoNote
from prw_flux.data.images import Box, Fit, Image, ImageError, open_image, open_map
from prw_flux.tasks import TASKS
from prw_flux.tasks.base import Example, Mask, Pair, Thing, digest_of, mask_box

CACHE_BYTES: Final = 256 * 2**20
MIN_VISIBLE: Final = 0.5
MIN_SIDE: Final = 3.0
NO_CAPTION: Final = "a photograph"

log = logging.getLogger(__name__)


class Entry(NamedTuple):
    """One way to make an example: a photo, one of its edits, or an ordered pair of a subject."""

    photo: str
    edit: int | None = None
    subject: str | None = None
    source: str | None = None


@final
class PhotoFolder:
    """A DataSource over the photos below a folder.

    Every photo is decoded once when the folder is opened, so that a damaged file is known before
    anything is trained; photos that cannot be used are left out and counted by reason. Fitted
    photos stay in memory up to 256 MiB.

    Args:
        path: the folder, searched recursively, hidden files left out; None stands for the
            public-domain photos inside the scikit-image package.
        size: side of the (square) result, or (height, width); multiples of 16.
        split: "train", "heldout" or "all". A photo's side is decided by a hash of its name, a
            subject's photos stay together, and both sides have at least one photo.
        heldout: share of photos in the held-out side.
        max_rejected: largest share of pictures that may be unusable.

    Raises:
        PhotoError: the folder is absent, empty, or has too many unusable pictures; the captions
            or annotations are wrong.
        ValueError: the size or the split is wrong.
    """

    def __init__(
        self,
        path: str | Path | None = None,
        size: int | tuple[int, int] = 96,
        split: str = "train",
        *,
        heldout: float = 0.1,
        max_rejected: float = 0.5,
    ) -> None:
        Fit(16, 16, size)
        self.size = size
        found = listing.open_default() if path is None else listing.open_folder(path)
        self._listing = found.side(split, heldout)
        self._kept = len(found.files) - len(self._listing.files) if split == "train" else 0
        self.name, self.root = f"photos:{found.name}", found.root
        if not self._listing.files:
            raise PhotoError(
                f"{self.root} has one photo, so there is none for split {split!r}: add another, or "
                "hold nothing out (held_out.samples=0 and sample_every=0)"
            )
        self.rejects: list[ImageError] = []
        self._cache: dict[str, Example] = {}
        self._room = CACHE_BYTES
        self._photos = [file for file in self._listing.files if self._usable(file)]
        if len(self.rejects) > max_rejected * len(self._listing.files) or not self._photos:
            raise PhotoError(f"too many unusable pictures in {self.root}: {self.summary()}")
        self._entries = {task: tuple(found) for task, found in self._list_entries() if found}

    def __len__(self) -> int:
        return len(self._photos)

    @property
    def rejected(self) -> Mapping[str, int]:
        """Pictures left out, by reason."""
        return Counter(error.reason for error in self.rejects)

    def fingerprint(self) -> str:
        """Of the size, the usable photos of this side (their bytes) and what is said about them.

        The files are read when it is first asked for.
        """
        return self._digest

    @cached_property
    def _digest(self) -> str:
        return digest_of(self.size, *self._listing.facts(self._photos))

    def summary(self) -> str:
        """One sentence: how many pictures are used, held out, and left out, and why."""
        used = f"{len(self._photos)} of {len(self._listing.files)} pictures used"
        used += f", {self._kept} more held out" if self._kept else ""
        if not self.rejects:
            return used
        reasons = ", ".join(f"{n} {reason}" for reason, n in sorted(self.rejected.items()))
        return f"{used}; left out: {reasons} (first: {self.rejects[0]})"

    def tasks(self) -> frozenset[str]:
        """The tasks that these photos and their annotations can feed."""
        return frozenset(self._entries)

    def count(self, task: str) -> int:
        """Number of different examples for a task; indices beyond it start again."""
        return len(self._of(task))

    def example(self, task: str, index: int) -> Example:
        """Example `index` of a task.

        Indices wrap round; each round has keys of its own, so that random masks differ. A task of
        the user's own is given every photo; its `missing` says which of them it can use.

        Raises:
            ValueError: no photo can feed the task, or the index is negative.
        """
        entries = self._of(task)
        if index < 0:
            raise ValueError(f"index {index} is negative")
        turn, position = divmod(index, len(entries))
        example = self._make(entries[position])
        return replace(example, key=f"{example.key}#{turn}") if turn else example

    def _of(self, task: str) -> Sequence[Entry]:
        if task not in TASKS:
            return self._entries["inpaint"]
        if task not in self._entries:
            known = ", ".join(sorted(self._entries))
            raise ValueError(f"no photo in {self.root} can feed the task {task!r}; fed: {known}")
        return self._entries[task]

    def _usable(self, file: str) -> bool:
        try:
            for index in range(len(self._listing.note(file).edits)):
                self._edit(file, index)
            self._photo(file)
        except ImageError as error:
            self.rejects.append(error)
            log.info("left out: %s", error)
            return False
        return True

    def _list_entries(self) -> Iterator[tuple[str, list[Entry]]]:
        photos = [Entry(file) for file in self._photos]
        yield "inpaint", photos
        yield "control", photos
        yield "ground", [entry for entry in photos if self._photo(entry.photo).things]
        edits = {file: len(self._listing.note(file).edits) for file in self._photos}
        yield (
            "edit",
            [Entry(file, edit=k) for file, n in edits.items() for k in (range(n) if n else [None])],
        )
        yield (
            "customise",
            [
                Entry(target, subject=group.name, source=source)
                for group in self._listing.notes.subjects
                for target in group.images
                for source in group.images
                if source != target and {source, target} <= set(self._photos)
            ],
        )

    def _make(self, entry: Entry) -> Example:
        if entry.edit is not None:
            return self._edit(entry.photo, entry.edit)
        example = self._photo(entry.photo)
        if entry.source is not None:
            label = next(g.label for g in self._listing.notes.subjects if g.name == entry.subject)
            text = example.caption if example.caption != NO_CAPTION else f"a photo of the {label}"
            source = self._photo(entry.source).image
            metadata = {"subject": entry.subject, "class": label}
            pair = Pair(source=source, text=text, target=example.image, metadata=metadata)
            return replace(example, key=f"{entry.source}->{example.key}", subject=pair)
        return example

    def _photo(self, file: str) -> Example:
        if file in self._cache:
            return self._cache[file]
        image = open_image(self.root / file)
        fit = Fit(image.shape[0], image.shape[1], self.size)
        note = self._listing.note(file)
        example = Example(
            key=file,
            image=fit.image(image),
            caption=self._listing.caption(file) or NO_CAPTION,
            things=tuple(self._things(file, note, fit)),
            maps={name: self._map(file, name, path, fit) for name, path in note.maps.items()},
        )
        return self._remember(example)

    def _remember(self, example: Example) -> Example:
        """Keeps the example in memory while there is room."""
        pair = example.edit
        arrays = [example.image, *example.maps.values(), *(t.mask for t in example.things)]
        arrays += [] if pair is None else [pair.target]
        need = sum(array.nbytes for array in arrays if array is not None)
        if need <= self._room:
            self._room -= need
            self._cache[example.key] = example
        return example

    def _things(self, file: str, note: PhotoNote, fit: Fit) -> Iterator[Thing]:
        """The annotated things of which the crop shows at least half."""
        for index, thing in enumerate(note.things):
            where = f"things[{index}] of {file}"
            mask = None if thing.mask is None else self._mask(thing.mask, where, fit)
            whole = thing.box
            if whole is None:
                assert thing.mask is not None
                whole = mask_box(self._raw_mask(thing.mask))
                if whole is None:
                    raise PhotoError(f"{where}: the mask {thing.mask} is empty")
            if whole[0] < 0 or whole[1] < 0 or whole[2] > fit.width or whole[3] > fit.height:
                raise PhotoError(
                    f"{where}: box {whole} is not inside {fit.width} x {fit.height} pixels"
                )
            box = fit.box(whole)
            side = min(box[2] - box[0], box[3] - box[1])
            clear = side >= MIN_SIDE and visible(whole, fit) >= MIN_VISIBLE
            if clear and (mask is None or mask.any()):
                yield Thing(phrase=thing.phrase, label=thing.label, box=box, mask=mask)

    def _raw_mask(self, path: str) -> Mask:
        values = open_map(self.root / path)
        return np.asarray((values if values.ndim == 2 else values.max(axis=-1)) >= 128)

    def _mask(self, path: str, where: str, fit: Fit) -> Mask:
        mask = self._raw_mask(path)
        _same_size(mask, fit, f"{where}: mask {path}")
        return fit.mask(mask)

    def _map(self, file: str, name: str, path: str, fit: Fit) -> Image:
        values = open_map(self.root / path)
        _same_size(values, fit, f"{name} map {path} of {file}")
        return fit.labels(values) if name == "segmentation" else fit.image(values)

    def _edit(self, file: str, index: int) -> Example:
        key = f"{file}@{index}"
        if key in self._cache:
            return self._cache[key]
        example, note = self._photo(file), self._listing.note(file).edits[index]
        height, width = open_image(self.root / file).shape[:2]
        fit = Fit(height, width, self.size)
        after = open_image(self.root / note.target)
        _same_size(after, fit, f"edit target {note.target} of {file}")
        metadata: dict[str, Any] = {"edit": "pair", "exact": False}
        if note.mask is not None:
            metadata["mask"] = self._mask(note.mask, f"edits[{index}] of {file}", fit)
        target = fit.image(after)
        pair = Pair(source=example.image, text=note.instruction, target=target, metadata=metadata)
        return self._remember(replace(example, key=key, edit=pair))


def _digest(path: Path) -> bytes:
    """Of a file; of one that is missing, nothing."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    except OSError:
        return b""


def visible(box: Box, fit: Fit) -> float:
    """The share of a box that the crop keeps."""
    x0, y0, x1, y1 = fit.window
    width = min(box[2], x1) - max(box[0], x0)
    height = min(box[3], y1) - max(box[1], y0)
    return max(0.0, width) * max(0.0, height) / ((box[2] - box[0]) * (box[3] - box[1]))


def _same_size(values: np.ndarray[Any, Any], fit: Fit, what: str) -> None:
    if values.shape[:2] != (fit.height, fit.width):
        have = f"{values.shape[1]} x {values.shape[0]}"
        raise PhotoError(f"{what} has {have} pixels, its photo {fit.width} x {fit.height}")
