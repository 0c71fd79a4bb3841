"""A folder of photos with its captions and annotations.json, as records (see annotations.py)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, final

import numpy as np

from prw_flux.data.annotations import PhotoNote, ThingNote
from prw_flux.data.images import Image, ImageError, open_map
from prw_flux.data.listing import open_default, open_folder
from prw_flux.data.photos import NO_CAPTION
from prw_flux.data.rows import Picture, Record, Reject, ThingBox
from prw_flux.tasks.base import digest_of, mask_box

UNCAPTIONED: Final = f"without a caption: {NO_CAPTION}"


@final
@dataclass(frozen=True, eq=False)
class FileMask:
    """A mask in a file; values of 128 and above are set."""

    path: Path

    def draw(self, height: int, width: int) -> Image:
        """uint8 [height, width], 255 inside.

        Raises:
            Reject: it is of another size.
            ImageError: it cannot be read.
        """
        values = open_map(self.path)
        if values.shape[:2] != (height, width):
            have = f"{values.shape[1]} x {values.shape[0]} pixels, its picture {width} x {height}"
            raise Reject("mask of another size", f"{self.path} has {have}")
        grey = values if values.ndim == 2 else values.max(axis=-1)
        return np.where(grey >= 128, 255, 0).astype(np.uint8)


@final
class PhotoRows:
    """The photos that can feed a task.

    Args:
        root: the folder; None is the public-domain photos of scikit-image.
        task: inpaint takes every photo, ground those with things, control those with maps, edit
            every annotated edit, customise every ordered pair of photos of a subject. A photo
            without a caption is called "a photograph" for inpaint and control, and counted.
        licence: of all photos.
        conditions_made: conditions will be made of the photos, so control takes every photo.

    Raises:
        PhotoError: the folder has no photos, or its annotations are wrong.
    """

    def __init__(
        self, root: Path | None, task: str, *, licence: str = "", conditions_made: bool = False
    ) -> None:
        self._listing = open_default() if root is None else open_folder(root)
        self.root, self._licence, self._made = self._listing.root, licence, conditions_made
        notes = []
        if root is not None:
            notes = sorted([*root.rglob("captions.json"), *root.glob("annotations.json")])
        self.inputs: tuple[Path | str, ...] = tuple(notes)
        self._found = list(self._pairs() if task == "customise" else self._photos(task))
        self.listed = digest_of(*((one.key, one.text) for one in self._found))

    def __len__(self) -> int:
        return len(self._found)

    def records(self, start: int = 0) -> Iterator[Record]:
        """The records from number `start` on."""
        return iter(self._found[start:])

    def _photos(self, task: str) -> Iterator[Record]:
        for file in self._listing.files:
            note, caption = self._listing.note(file), self._listing.caption(file) or ""
            if task == "edit":
                yield from self._edits(file, note)
            elif task == "ground" and note.things:
                yield self._record(file, caption, source=file, note=note)
            elif task == "inpaint" or (task == "control" and (note.maps or self._made)):
                record = self._record(file, caption or NO_CAPTION, target=file, note=note)
                yield record if caption else replace(record, changed=(UNCAPTIONED,))

    def _edits(self, file: str, note: PhotoNote) -> Iterator[Record]:
        for number, edit in enumerate(note.edits):
            key = f"{file}@{number}"
            yield self._record(
                key, edit.instruction, source=file, target=edit.target, mask=edit.mask
            )

    def _pairs(self) -> Iterator[Record]:
        for group in self._listing.notes.subjects:
            for target in group.images:
                text = self._listing.caption(target) or f"a photo of the {group.label}"
                for source in group.images:
                    if source != target:
                        yield self._record(
                            f"{source}->{target}", text, source=source, target=target
                        )

    def _record(
        self,
        key: str,
        text: str,
        *,
        source: str | None = None,
        target: str | None = None,
        mask: str | None = None,
        note: PhotoNote | None = None,
    ) -> Record:
        refused: tuple[str, str] | None = None
        boxes: tuple[ThingBox, ...] = ()
        maps = {} if note is None else note.maps
        try:
            boxes = tuple(self._thing(thing) for thing in (() if note is None else note.things))
        except ImageError as problem:
            refused = (problem.reason, str(problem))
        except Reject as problem:
            refused = (problem.reason, str(problem))
        return Record(
            where=key,
            key=key,
            text=text,
            source=self._picture(source),
            target=self._picture(target),
            mask=self._picture(mask),
            conditions={name: Picture(name=f, path=self.root / f) for name, f in maps.items()},
            boxes=boxes,
            licence=self._licence,
            refused=refused,
        )

    def _picture(self, file: str | None) -> Picture | None:
        return None if file is None else Picture(name=file, path=self.root / file)

    def _thing(self, thing: ThingNote) -> ThingBox:
        mask = None if thing.mask is None else FileMask(self.root / thing.mask)
        box = thing.box
        if box is None:
            assert mask is not None
            values = open_map(mask.path)
            box = mask_box(mask.draw(values.shape[0], values.shape[1]) > 0)
            if box is None:
                raise Reject("empty mask", f"{mask.path} has no white pixel")
        return ThingBox(box=box, phrase=thing.phrase, label=thing.label, mask=mask)
