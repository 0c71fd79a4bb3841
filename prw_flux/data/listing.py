"""What is in a folder of photos: files, captions, annotations, and the split into two sides.

A caption comes from annotations.json, from a `captions.json` ({"file": "caption"}, in the folder or
any folder below it), or from a text file beside the photo (`cap.jpg`, `cap.txt`), in this order.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final, final

from prw_flux.data import default_photos
from prw_flux.data.annotations import Annotations, PhotoError, PhotoNote
from prw_flux.data.annotations import parse as parse_annotations

SUFFIXES: Final = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif"})
SPLITS: Final = ("train", "heldout", "all")


@final
@dataclass(frozen=True, kw_only=True)
class Listing:
    """The photos of a folder and what is known about them, before any is decoded.

    Args:
        name: short name for reports.
        root: the folder.
        files: its photos, sorted, relative to root.
        notes: the annotations.
        captions: from the captions.json files.
    """

    name: str
    root: Path
    files: tuple[str, ...]
    notes: Annotations
    captions: Mapping[str, str] = field(default_factory=dict)

    def note(self, file: str) -> PhotoNote:
        """What the annotations say about a photo."""
        return self.notes.photos.get(file, PhotoNote())

    def caption(self, file: str) -> str | None:
        """The caption of a photo, if there is one."""
        return self.note(file).caption or self.captions.get(file) or self._sidecar(file) or None

    def facts(self, files: Iterable[str]) -> Iterator[tuple[str, ...]]:
        """What decides the examples of some photos: names, words, and a digest of every file.

        Paths are relative to the folder, so a folder that was moved says the same.
        """
        for file in sorted(files):
            note = self.note(file)
            used = [file, *sorted(note.files())]
            told = json.dumps(asdict(note), sort_keys=True)
            yield file, self.caption(file) or "", told, *(_digest(self.root / one) for one in used)
        for group in self.notes.subjects:
            yield group.name, group.label, *group.images

    def side(self, split: str, heldout: float) -> Listing:
        """One side of the split: "train", "heldout" or "all"; a subject's photos stay together.

        A unit (a subject, else a photo) is held out if the hash of its name, as a fraction of its
        range, is below `heldout`; the lowest one always is and the highest never is, so neither
        side of two or more units is empty.

        Raises:
            ValueError: the split is unknown.
        """
        if split not in SPLITS:
            raise ValueError(f"unknown split {split!r}; known: {', '.join(SPLITS)}")
        if split == "all":
            return self
        unit = {file: group.name for group in self.notes.subjects for file in group.images}
        place = {name: _fraction(name) for name in {unit.get(f, f) for f in self.files}}
        lowest, highest = min(place, key=place.__getitem__), max(place, key=place.__getitem__)
        out = {name for name, x in place.items() if x < heldout or name == lowest} - {highest}
        keep = [f for f in self.files if (unit.get(f, f) in out) == (split == "heldout")]
        return replace(self, files=tuple(keep))

    def _sidecar(self, file: str) -> str:
        path = (self.root / file).with_suffix(".txt")
        text = path.read_text("utf-8", errors="replace") if path.is_file() else ""
        return " ".join(text.split())


def open_default() -> Listing:
    """The public-domain photos inside the scikit-image package.

    Raises:
        PhotoError: the package is not installed.
    """
    root = default_photos.folder()
    files = [] if root is None else [f for f in default_photos.PHOTOS if (root / f).is_file()]
    if root is None or not files:
        raise PhotoError(
            "the default photos come with scikit-image: install it, or name a folder of photos"
        )
    raw = {"images": {file: default_photos.PHOTOS[file] for file in files}}
    notes = parse_annotations(raw, root, "default photos")
    return Listing(name=default_photos.NAME, root=root, files=tuple(files), notes=notes)


def open_folder(path: str | Path) -> Listing:
    """The photos below a folder.

    Raises:
        PhotoError: the folder is absent or has no pictures; captions or annotations are wrong.
    """
    root = Path(path)
    if not root.is_dir():
        problem = "is a file, not a folder" if root.exists() else "does not exist"
        raise PhotoError(f"photo folder {root} {problem}")
    notes = Annotations()
    if (root / "annotations.json").is_file():
        notes = parse_annotations(_read_json(root / "annotations.json"), root)
    not_photos: set[str] = set().union(*(note.files() for note in notes.photos.values()))
    files = [file for file in _pictures(root) if file not in not_photos]
    if not files:
        raise PhotoError(f"photo folder {root} has no pictures ({', '.join(sorted(SUFFIXES))})")
    name = root.resolve().name
    return Listing(
        name=name, root=root, files=tuple(files), notes=notes, captions=_read_captions(root)
    )


def _pictures(root: Path) -> list[str]:
    """Files below root that are named like pictures, sorted; hidden files and folders left out."""
    found = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [
            (Path(folder) / name).relative_to(root).as_posix()
            for name in files
            if not name.startswith(".") and Path(name).suffix.lower() in SUFFIXES
        ]
    return sorted(found)


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text("utf-8-sig"))
    except (ValueError, RecursionError) as problem:
        raise PhotoError(f"{path} is not valid JSON ({problem})") from problem


def _read_captions(root: Path) -> dict[str, str]:
    captions: dict[str, str] = {}
    for path in sorted(root.rglob("captions.json")):
        raw = _read_json(path)
        if not isinstance(raw, dict) or not all(isinstance(v, str) for v in raw.values()):
            raise PhotoError(f'{path} must have the form {{"file": "caption"}}')
        below = path.parent.relative_to(root)
        captions |= {
            (below / name).as_posix(): " ".join(text.split()) for name, text in raw.items()
        }
    return captions


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _fraction(name: str) -> float:
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") / 2**64
