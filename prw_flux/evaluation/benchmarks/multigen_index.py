"""Reading multigen.json: the items, maps and classes of one condition."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

from prw_flux.evaluation.benchmarks.base import BenchmarkError, Item, inside, read_index
from prw_flux.evaluation.metrics import Confusion

FILE: Final = "multigen.json"
VERSION: Final = 1
CONDITIONS: Final[Mapping[str, str]] = {
    "canny": "edge", "hed": "lineart", "lineart": "lineart", "depth": "depth", "seg": "",
}  # fmt: skip
"""Conditions, and the ending of the map's file, which the public script shares for two."""
SIZES: Final[Mapping[str, int]] = {
    "MultiGen-20M_canny_eval": 5000, "MultiGen-20M_depth_eval": 5000,
    "Captioned_ADE20K": 2000, "Captioned_COCOStuff": 5000,
}  # fmt: skip


@final
@dataclass(frozen=True, kw_only=True)
class Controlled(Item):
    """One picture: its number, its group, the real picture, map and labels where they are given."""

    id: str
    group: int
    image: Path
    control: Path | None
    label: Path | None


def read(folder: Path) -> tuple[dict[str, Any], tuple[Controlled, ...]]:
    """What the file says, and its items, checked against the condition.

    Raises:
        BenchmarkError: the file is not there, of another version, or an item is unusable.
    """
    data, items = read_index(folder / FILE, "the captions", VERSION, controlled)
    condition = str(data.get("condition"))
    if condition not in CONDITIONS:
        raise BenchmarkError(
            f"{folder / FILE}: unknown condition {condition!r}; known: {', '.join(CONDITIONS)}."
        )
    require_maps(condition, items, folder / FILE)
    return data, items


def condition_of(folder: Path) -> str:
    """The condition that a folder's multigen.json states.

    Raises:
        BenchmarkError: as `read`.
    """
    return str(read(folder)[0]["condition"])


def classes(data: Mapping[str, Any], condition: str, where: Path) -> tuple[int, Confusion | None]:
    """The first class's number, and an empty matrix; 0 and None where there are no classes.

    Raises:
        BenchmarkError: a condition of classes without their numbers.
    """
    if condition != "seg":
        return 0, None
    try:
        count, first, ignore = int(data["classes"]), int(data["first"]), data.get("ignore")
    except (KeyError, TypeError, ValueError) as problem:
        raise BenchmarkError(f"{where} needs classes and first ({problem!r}).") from None
    return first, Confusion(count, None if ignore is None else int(ignore) - first)


def require_maps(condition: str, items: Sequence[Controlled], where: Path) -> None:
    """Raise BenchmarkError for an item with a map too few or too many."""
    wanted = {"depth": ("control",), "seg": ("control", "label")}.get(condition, ())
    for item in items:
        for name in ("control", "label"):
            if (getattr(item, name) is None) == (name in wanted):
                verb = "needs" if name in wanted else "does not take"
                raise BenchmarkError(f"{where}: item {item.id!r} {verb} a {name}.")


def controlled(folder: Path, row: Any, where: str) -> Controlled:
    """One item of the file; `read_index` says where it stands."""
    try:
        key, image, text = str(row["id"]), str(row["image"]), str(row["text"])
        more = {name: str(row[name]) for name in ("control", "label") if row.get(name)}
    except (AttributeError, KeyError, TypeError) as problem:
        raise BenchmarkError(f"{where} needs id, image and text ({problem!r}).") from None
    inside(where, f"{key}.png", image, *more.values())
    found = {name: folder / name_ for name, name_ in more.items()}
    return Controlled(key=key, id=key, output=f"{key}.png", text=text, group=0,
                      image=folder / image, given=folder / image, control=found.get("control"),
                      label=found.get("label"))  # fmt: skip
