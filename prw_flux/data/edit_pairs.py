"""Pairs of pictures, before and after, in a folder: a list of them, or folders side by side.

With a list, one of `LISTS` in the folder, JSON or lines of JSON; per pair the file names and words
under any of the names below, e.g.

    [{"id": "cap", "before": "cap_0.png", "after": "cap_1.png", "mask": "cap_mask.png",
      "instruction": "make the yellow cap blue", "licence": "CC0"}]

Without one, the folders `source/` and `target/` (and `mask/`, if there are masks) with pictures of
the same names, and the words in a text file of that name in `text/` or beside the target.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, final

from prw_flux.data.input_files import entries, optional_of, picture_in, read_json, value_of
from prw_flux.data.listing import SUFFIXES
from prw_flux.data.rows import DataError, Picture, Record
from prw_flux.tasks.base import digest_of

LISTS: Final = ("edits.json", "pairs.json", "metadata.json", "metadata.jsonl")
SOURCE: Final = ("source", "before", "input")
TARGET: Final = ("target", "after", "output", "edited")
TEXT: Final = ("instruction", "text", "prompt", "caption")
KEY: Final = ("key", "id")
LICENCE: Final = ("licence", "license")


@final
class EditPairs:
    """The pairs of a folder.

    Args:
        root: the folder.
        licence: of pairs that name none.

    Raises:
        DataError: there are no pairs, or the list is wrong, naming the entry and the field.
    """

    def __init__(self, root: Path, *, licence: str = "") -> None:
        if not root.is_dir():
            raise DataError(f"{root} is not a folder of pairs")
        self.root = root
        lists = [root / name for name in LISTS if (root / name).is_file()]
        self.inputs: tuple[Path | str, ...] = tuple(lists[:1])
        self._records = list(_listed(lists[0], licence) if lists else _side_by_side(root, licence))
        self.listed = "" if lists else digest_of(*((one.key, one.text) for one in self._records))
        if not self._records:
            raise DataError(
                f"{root} has no pairs: neither {', '.join(LISTS)} nor source/ and target/"
            )

    def __len__(self) -> int:
        return len(self._records)

    def records(self, start: int = 0) -> Iterator[Record]:
        """The pairs from number `start` on."""
        return iter(self._records[start:])


def _listed(path: Path, licence: str) -> Iterator[Record]:
    for number, entry in enumerate(entries(read_json(path), path.name)):
        where = f"{path.name}[{number}]"
        own = optional_of(entry, KEY, (str, int), where)
        yield Record(
            where=where,
            key=str(number if own in (None, "") else own),
            text=optional_of(entry, TEXT, str, where) or "",
            source=picture_in(path.parent, value_of(entry, SOURCE, str, where), where),
            target=picture_in(path.parent, value_of(entry, TARGET, str, where), where),
            mask=_mask(entry, path.parent, where),
            licence=optional_of(entry, LICENCE, str, where) or licence,
        )


def _mask(entry: Mapping[str, Any], root: Path, where: str) -> Picture | None:
    name = optional_of(entry, ("mask",), str, where)
    return None if name is None else picture_in(root, name, where)


def _side_by_side(root: Path, licence: str) -> Iterator[Record]:
    targets, masks = _pictures(root / "target"), _pictures(root / "mask")
    for key, source in sorted(_pictures(root / "source").items()):
        texts = [root / "text" / f"{key}.txt", root / "target" / f"{key}.txt"]
        text = next((path.read_text("utf-8", "replace") for path in texts if path.is_file()), "")
        yield Record(
            where=f"source/{source.name}",
            key=key,
            text=text,
            source=Picture(name=str(source), path=source),
            target=_picture(targets.get(key)),
            mask=_picture(masks.get(key)),
            licence=licence,
        )


def _pictures(folder: Path) -> dict[str, Path]:
    """The pictures of a folder by their path without the suffix.

    Raises:
        DataError: two differ in the suffix alone.
    """
    found: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() not in SUFFIXES:
            continue
        key = path.relative_to(folder).with_suffix("").as_posix()
        if key in found:
            raise DataError(
                f"{path} and {found[key].name} would be one and the same side of a pair: rename or "
                "remove one"
            )
        found[key] = path
    return found


def _picture(path: Path | None) -> Picture | None:
    return None if path is None else Picture(name=str(path), path=path)
