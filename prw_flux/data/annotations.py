"""What a folder of photos may say about its photos: the file annotations.json.

    {
      "images": {
        "caps.jpg": {
          "caption": "five caps on a wall",
          "things": [{"phrase": "yellow cap", "label": "cap", "box": [40, 38, 150, 153],
                      "mask": "masks/caps_0.png"}],
          "maps": {"depth": "depth/caps.png", "segmentation": "seg/caps.png"},
          "edits": [{"instruction": "make the yellow cap blue", "target": "edits/caps_blue.png",
                     "mask": "masks/caps_0.png"}]
        }
      },
      "subjects": {"my dog": {"class": "dog", "images": ["dog/0.jpg", "dog/1.jpg"]}}
    }

Every entry is optional. Boxes are (x0, y0, x1, y1) in the photo's upright pixels, maxima exclusive;
a thing needs a box or a mask. Masks, maps and targets have the photo's size; in a mask, values of
128 and above are set. A map is near-white depth, a segmentation (class indices in one channel or a
palette, or class colours), or white "lineart" or "softedge" lines on black. Paths are relative to
the folder and may not leave it. Files that serve as mask, map or target are not photos themselves.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, final

from prw_flux.data.input_files import are_numbers
from prw_flux.data.rows import is_text

MAPS: Final = ("depth", "segmentation", "lineart", "softedge")
Box = tuple[float, float, float, float]


class PhotoError(ValueError):
    """A folder of photos, or what is said about its photos, cannot be used; one sentence."""


@final
@dataclass(frozen=True, kw_only=True)
class ThingNote:
    """A thing as annotated: words, class, box in the photo's pixels, file of its mask."""

    phrase: str
    label: str
    box: Box | None
    mask: str | None


@final
@dataclass(frozen=True, kw_only=True)
class EditNote:
    """A true edit of a photo: the words, the file of the result, the file of the changed area."""

    instruction: str
    target: str
    mask: str | None


@final
@dataclass(frozen=True, kw_only=True)
class PhotoNote:
    """Everything said about one photo; file names are relative to the folder."""

    caption: str | None = None
    things: tuple[ThingNote, ...] = ()
    maps: Mapping[str, str] = field(default_factory=dict)
    edits: tuple[EditNote, ...] = ()

    def files(self) -> set[str]:
        """The files that it uses besides the photo."""
        masks = [*(thing.mask for thing in self.things), *(edit.mask for edit in self.edits)]
        return {*self.maps.values(), *(edit.target for edit in self.edits), *filter(None, masks)}


@final
@dataclass(frozen=True, kw_only=True)
class SubjectNote:
    """Photos of one and the same subject."""

    name: str
    label: str
    images: tuple[str, ...]


@final
@dataclass(frozen=True, kw_only=True)
class Annotations:
    """A parsed annotations.json."""

    photos: Mapping[str, PhotoNote] = field(default_factory=dict)
    subjects: tuple[SubjectNote, ...] = ()


def parse(raw: object, root: Path, where: str = "annotations.json") -> Annotations:
    """Checks and reads the content of an annotations.json.

    Args:
        raw: the decoded JSON.
        root: the folder that file names are relative to.
        where: name of the file, for messages.

    Raises:
        PhotoError: naming the entry and what is wrong with it: an unknown key, a wrong type, a
            file that is absent or outside the folder, a thing without box and mask.
    """
    top = _Node(raw, where, root)
    top.keys("images", "subjects")
    photos = {node.file_of(name): _photo(node) for name, node in top.items("images")}
    subjects = tuple(_subject(name, node) for name, node in top.items("subjects"))
    return Annotations(photos=photos, subjects=subjects)


def _photo(node: _Node) -> PhotoNote:
    node.keys("caption", "things", "maps", "edits")
    maps = dict(node.items("maps"))
    for name, value in maps.items():
        if name not in MAPS:
            value.fail(f"not a known map{_near(name, MAPS)}")
    return PhotoNote(
        caption=node.text("caption", optional=True) or None,
        things=tuple(_thing(item) for item in node.list("things")),
        maps={name: value.file() for name, value in maps.items()},
        edits=tuple(_edit(item) for item in node.list("edits")),
    )


def _thing(node: _Node) -> ThingNote:
    node.keys("phrase", "label", "box", "mask")
    box = node.value("box")
    if box is None and node.value("mask") is None:
        node.fail("a thing needs a box or a mask")
    return ThingNote(
        phrase=node.text("phrase"),
        label=node.text("label", optional=True),
        box=None if box is None else node.child("box").box(),
        mask=node.optional_file("mask"),
    )


def _edit(node: _Node) -> EditNote:
    node.keys("instruction", "target", "mask")
    return EditNote(
        instruction=node.text("instruction"),
        target=node.child("target").file(),
        mask=node.optional_file("mask"),
    )


def _subject(name: str, node: _Node) -> SubjectNote:
    node.keys("class", "images")
    images = tuple(item.file() for item in node.list("images"))
    if len(set(images)) < 2:
        node.fail("a subject needs at least two different photos")
    return SubjectNote(name=name, label=node.text("class"), images=tuple(dict.fromkeys(images)))


@final
class _Node:
    """A JSON value with the place it came from, so that every complaint can name it."""

    def __init__(self, raw: object, where: str, root: Path) -> None:
        self.raw, self.where, self.root = raw, where, root

    def fail(self, problem: str) -> None:
        raise PhotoError(f"{self.where}: {problem}")

    def mapping(self) -> Mapping[str, Any]:
        if not isinstance(self.raw, dict):
            raise PhotoError(f"{self.where}: expected an object, got {_short(self.raw)}")
        return self.raw

    def keys(self, *known: str) -> None:
        for key in self.mapping():
            if key not in known:
                self.fail(f"unknown key {key!r}{_near(key, known)}")

    def value(self, key: str) -> Any:
        return self.mapping().get(key)

    def child(self, key: str) -> _Node:
        return _Node(self.value(key), f"{self.where}: {key}", self.root)

    def items(self, key: str) -> list[tuple[str, _Node]]:
        child = self.child(key)
        if child.raw is None:
            return []
        return [
            (name, _Node(value, f"{child.where}[{name!r}]", self.root))
            for name, value in child.mapping().items()
        ]

    def list(self, key: str) -> list[_Node]:
        child = self.child(key)
        if child.raw is None:
            return []
        if not isinstance(child.raw, list):
            raise PhotoError(f"{child.where}: expected a list, got {_short(child.raw)}")
        return [_Node(value, f"{child.where}[{i}]", self.root) for i, value in enumerate(child.raw)]

    def text(self, key: str, *, optional: bool = False) -> str:
        value = self.value(key)
        if value is None and optional:
            return ""
        if not isinstance(value, str) or not (value.strip() or optional):
            raise PhotoError(f"{self.where}: {key} must be a text, got {_short(value)}")
        return value.strip()

    def box(self) -> Box:
        raw = self.raw
        if not isinstance(raw, list) or not are_numbers(raw, 4):
            raise PhotoError(f"{self.where}: expected [x0, y0, x1, y1], got {_short(raw)}")
        x0, y0, x1, y1 = (float(v) for v in raw)
        if not (x0 < x1 and y0 < y1):
            self.fail(f"needs x0 < x1 and y0 < y1, got {_short(raw)}")
        return x0, y0, x1, y1

    def optional_file(self, key: str) -> str | None:
        return None if self.value(key) is None else self.child(key).file()

    def file(self) -> str:
        if not isinstance(self.raw, str) or not self.raw:
            raise PhotoError(f"{self.where}: expected a file name, got {_short(self.raw)}")
        return self.file_of(self.raw)

    def file_of(self, name: str) -> str:
        """The name, normalised and relative to the folder, if the file is there and inside."""
        if "\0" in name or not is_text(name):
            self.fail(f"{name!a} is not a file name")
        lexical = os.path.normpath(name)
        inside = (self.root / lexical).resolve().is_relative_to(self.root.resolve())
        if os.path.isabs(name) or lexical.startswith("..") or not inside:
            self.fail(f"{name!r} lies outside the folder")
        if not (self.root / lexical).is_file():
            self.fail(f"no such file {name!r} in {self.root}")
        return Path(lexical).as_posix()


def _near(word: str, names: Iterable[str]) -> str:
    names = list(names)
    near = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(names)}"


def _short(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."
