"""What the readers share: JSON with places for complaints, and files that stay in their folder."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from prw_flux.data.rows import DataError, Picture, is_text


def read_json(path: Path) -> Any:
    """The content of a JSON file, or the lines of a .jsonl file as a list.

    Raises:
        DataError: it is absent or not JSON.
    """
    if not path.is_file():
        raise DataError(f"no such file {path}")
    try:
        text = path.read_text("utf-8-sig")
        if path.suffix == ".jsonl":
            return [json.loads(line) for line in text.splitlines() if line.strip()]
        return json.loads(text)
    except (ValueError, RecursionError) as problem:
        raise DataError(f"{path} is not valid JSON ({problem})") from None


def entries(value: Any, where: str) -> Sequence[Mapping[str, Any]]:
    """A list of objects.

    Raises:
        DataError: it is something else, naming the first element that is no object.
    """
    if not isinstance(value, list):
        raise DataError(f"{where}: expected a list, got {short(value)}")
    for number, entry in enumerate(value):
        if not isinstance(entry, dict):
            raise DataError(f"{where}[{number}]: expected an object, got {short(entry)}")
    return value


def value_of(
    entry: Mapping[str, Any], names: Sequence[str], kind: type | tuple[type, ...], where: str
) -> Any:
    """The value under the first of some names.

    Raises:
        DataError: none is there, or the value is of another type.
    """
    found = optional_of(entry, names, kind, where)
    if found is None:
        told = " or ".join(map(repr, names))
        raise DataError(f"{where} has no {told}{near(names[0], entry)}")
    return found


def optional_of(
    entry: Mapping[str, Any], names: Sequence[str], kind: type | tuple[type, ...], where: str
) -> Any:
    """As `value_of`; None where none of the names is there.

    Raises:
        DataError: the value is of another type.
    """
    for name in names:
        value = entry.get(name)
        if value is None:
            continue
        if not isinstance(value, kind) or isinstance(value, bool):
            kinds = kind if isinstance(kind, tuple) else (kind,)
            told = " or ".join(WORDS.get(one, one.__name__) for one in kinds)
            raise DataError(f"{where}: {name} must be {told}, got {short(value)}")
        return value
    return None


WORDS: Final[Mapping[type, str]] = {
    str: "a text",
    int: "a whole number",
    float: "a number",
    list: "a list",
    dict: "an object",
}


def are_numbers(value: Any, count: int) -> bool:
    """Whether it is a list of so many numbers; whole ones that no float can hold are none."""
    return (
        isinstance(value, list)
        and len(value) == count
        and all(isinstance(v, float) or (type(v) is int and abs(v) < 2**53) for v in value)
    )


def picture_in(root: Path, name: str, where: str) -> Picture:
    """A picture by its name in a folder, which it may not leave.

    Raises:
        DataError: the name leads out of the folder.
    """
    lexical = os.path.normpath(name)
    path = root / lexical
    if "\0" in name or not is_text(name):
        raise DataError(f"{where}: {name!a} is not a file name")
    if os.path.isabs(name) or lexical.startswith("..") or not _inside(path, root):
        raise DataError(f"{where}: {name!r} lies outside the folder {root}")
    return Picture(name=str(path), path=path)


def _inside(path: Path, root: Path) -> bool:
    return path.resolve().is_relative_to(root.resolve())


def near(word: str, names: Iterable[str]) -> str:
    """What to add to "there is no `word`": the nearest name, else all of them."""
    known = list(names)
    match = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return (
        f"; did you mean {match[0]!r}?" if match else f"; there is {', '.join(known) or 'nothing'}"
    )


def short(value: object) -> str:
    """A value for a message."""
    shown = repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."
