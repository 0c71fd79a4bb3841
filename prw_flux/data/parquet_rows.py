"""Parquet files of other data sets, by a map from their columns to ours.

A column of a struct is written with dots (description.item). Pictures are stored as `datasets`
does, {bytes, path}, or as bytes; a text column may hold lists of texts, of which the last that is
not empty is taken. `KNOWN` has the maps of published data sets, with the columns that their cards
list; they were tried on small files of these schemas, not on the terabytes themselves.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Final, final

from prw import ConfigError
from prw_flux.data.annotations import MAPS
from prw_flux.data.input_files import near, short
from prw_flux.data.rows import REQUIRED, DataError, Picture, Record

BATCH: Final = 32
BORDER: Final = 8
MIN_QUALITY: Final = 5


@final
@dataclass(frozen=True, kw_only=True)
class ColumnMap:
    """Which column gives what; None and empty are left out.

    Args:
        source, target, mask, text, licence: columns.
        key: columns whose values, joined by "/", are the key; none is file and row.
        conditions: column by name of the map.
        painted: the mask column holds the photo with the masked area white or cut out.
        sides: the target column holds two pictures side by side, each a source of the other, with
            a border of 8 pixels; `text` is of the left one, `text_right` of the other.
        rated: a struct of ratings, each of which must be at least 5.
    """

    source: str | None = None
    target: str | None = None
    mask: str | None = None
    text: str | None = None
    licence: str | None = None
    key: tuple[str, ...] = ()
    conditions: Mapping[str, str] = field(default_factory=dict)
    painted: bool = False
    sides: bool = False
    text_right: str | None = None
    rated: str | None = None

    @property
    def pictures(self) -> list[str]:
        """The columns of pictures."""
        own = (self.source, self.target, self.mask)
        return [*filter(None, own), *self.conditions.values()]

    @property
    def columns(self) -> list[str]:
        """All columns."""
        rest = (self.text, self.licence, self.text_right, self.rated)
        return [*self.pictures, *filter(None, rest), *self.key]


KNOWN: Final[Mapping[str, tuple[str, ColumnMap]]] = {
    "magicbrush": (
        "edit",
        ColumnMap(
            source="source_img",
            target="target_img",
            mask="mask_img",
            painted=True,
            text="instruction",
            key=("img_id", "turn_index"),
        ),
    ),
    "omniedit": (
        "edit",
        ColumnMap(
            source="src_img", target="edited_img", text="edited_prompt_list", key=("omni_edit_id",)
        ),
    ),
    "subjects200k": (
        "customise",
        ColumnMap(
            target="image",
            sides=True,
            text="description.description_0",
            text_right="description.description_1",
            rated="quality_assessment",
        ),
    ),
    "multigen-depth": (
        "control",
        ColumnMap(target="image", text="text", conditions={"depth": "control_depth"}),
    ),
    "ade20k": (
        "control",
        ColumnMap(target="image", text="prompt", conditions={"segmentation": "control_seg"}),
    ),
}
"""Task and map of published data sets: MagicBrush, OmniEdit, Subjects200K, MultiGen-20M_depth,
Captioned_ADE20K."""


def column_map(pairs: Sequence[str]) -> ColumnMap:
    """A map from texts "source=before", "text=caption", "depth=control_depth".

    Raises:
        ConfigError: a text has no "=", or there is nothing of that name.
    """
    plain: dict[str, Any] = {}
    conditions: dict[str, str] = {}
    names = [f.name for f in fields(ColumnMap) if f.type in ("str | None", "tuple[str, ...]")]
    for pair in pairs:
        name, equals, column = pair.partition("=")
        if not equals or not column:
            raise ConfigError(f"--map {pair!r} must have the form name=column")
        if name in MAPS or name == "canny":
            conditions[name] = column
        elif name in names:
            plain[name] = tuple(column.split(",")) if name == "key" else column
        else:
            raise ConfigError(f"--map has nothing called {name!r}{near(name, [*names, *MAPS])}")
    return ColumnMap(**plain, conditions=conditions)


@final
class ParquetRows:
    """The rows of parquet files.

    Args:
        path: a file, or a folder of files, taken in the order of their names.
        task: what the records are for.
        columns: the map.
        licence: of rows without a licence column.
        conditions_made: conditions will be made of the targets, so no column needs to have any.

    Raises:
        DataError: there are no files, or a file lacks a column or has another type in it.
        ConfigError: the map lacks what the task needs.
    """

    def __init__(
        self,
        path: Path,
        task: str,
        columns: ColumnMap,
        *,
        licence: str = "",
        conditions_made: bool = False,
    ) -> None:
        self.inputs = tuple(sorted(path.rglob("*.parquet"))) if path.is_dir() else (path,)
        if not self.inputs or not self.inputs[0].is_file():
            raise DataError(f"there are no parquet files at {path}")
        _require(task, columns, conditions_made)
        self._map, self._licence = columns, licence
        self._rows = [_checked(file, columns) for file in self.inputs]
        self._per_row = 2 if columns.sides else 1

    def __len__(self) -> int:
        return sum(self._rows) * self._per_row

    def records(self, start: int = 0) -> Iterator[Record]:
        """The records from number `start` on; whole row groups before it are not read."""
        skip, turn = divmod(start, self._per_row)
        for path, rows in zip(self.inputs, self._rows, strict=True):
            if skip >= rows:
                skip -= rows
                continue
            for number, row in _rows_of(path, self._map, skip):
                yield from list(self._of(row, path, number))[turn:]
                turn = 0
            skip = 0

    def _of(self, row: Mapping[str, Any], path: Path, number: int) -> Iterator[Record]:
        where, columns = f"{path.name} row {number}", self._map

        def picture(column: str | None, **how: Any) -> Picture | None:
            return _picture(_get(row, column), f"{where}, column {column}", **how)

        common: dict[str, Any] = {
            "where": where,
            "mask": picture(columns.mask, painted=columns.painted),
            "conditions": {
                name: found
                for name, column in columns.conditions.items()
                if (found := picture(column)) is not None
            },
            "licence": _text(_get(row, columns.licence)) or self._licence,
            "refused": _unrated(_get(row, columns.rated), where) if columns.rated else None,
        }
        named = [str(_get(row, column)) for column in columns.key]
        key = "/".join(named) or f"{path.stem}:{number}"
        if not columns.sides:
            source, target = picture(columns.source), picture(columns.target)
            text = _text(_get(row, columns.text))
            yield Record(key=key, text=text, source=source, target=target, **common)
            return
        halves = [picture(columns.target, half=half, border=BORDER) for half in ("left", "right")]
        texts = [_text(_get(row, column)) for column in (columns.text, columns.text_right)]
        for side in (1, 0):
            yield Record(
                key=f"{key}/{side}",
                text=texts[side],
                source=halves[1 - side],
                target=halves[side],
                **common,
            )


def _require(task: str, columns: ColumnMap, conditions_made: bool) -> None:
    for need in REQUIRED[task]:
        if need == "conditions" and conditions_made:
            continue
        if need == "boxes":
            raise ConfigError(f"the task {task!r} needs boxes, which parquet maps do not have")
        have = columns.target if need == "source" and columns.sides else getattr(columns, need)
        if not have:
            hint = "depth=COLUMN" if need == "conditions" else f"{need}=COLUMN"
            raise ConfigError(f"the task {task!r} needs --map {hint}")


def _checked(path: Path, columns: ColumnMap) -> int:
    """The number of rows of a file whose columns are there and of the right types."""
    import pyarrow
    import pyarrow.parquet as parquet

    try:
        with parquet.ParquetFile(path) as file:
            schema, rows = file.schema_arrow, int(file.metadata.num_rows)
    except (OSError, pyarrow.ArrowException) as problem:
        told = " ".join(str(problem).split())
        raise DataError(f"{path} is not a parquet file, or is damaged ({told})") from None
    texts = {columns.text, columns.text_right, columns.licence}
    for column in columns.columns:
        kind = schema
        for part in column.split("."):
            names = [one.name for one in kind]
            if part not in names:
                raise DataError(f"{path.name} has no column {column!r}{near(part, names)}")
            kind = kind.field(part).type
        if column in columns.pictures and not _holds_pictures(kind):
            raise DataError(f"{path.name}: column {column} must hold pictures, it is {kind}")
        if column in texts and not _holds_texts(kind):
            raise DataError(f"{path.name}: column {column} must hold texts, it is {kind}")
        if column == columns.rated and not pyarrow.types.is_struct(kind):
            raise DataError(f"{path.name}: column {column} must be a struct, it is {kind}")
    return rows


def _holds_pictures(kind: Any) -> bool:
    import pyarrow.types as types

    if types.is_struct(kind):
        return any(one.name == "bytes" for one in kind)
    return bool(types.is_binary(kind) or types.is_large_binary(kind))


def _holds_texts(kind: Any) -> bool:
    import pyarrow.types as types

    if types.is_list(kind) or types.is_large_list(kind):
        return _holds_texts(kind.value_type)
    return bool(types.is_string(kind) or types.is_large_string(kind))


def _rows_of(path: Path, columns: ColumnMap, skip: int) -> Iterator[tuple[int, Mapping[str, Any]]]:
    import pyarrow.parquet as parquet

    with parquet.ParquetFile(path) as file:
        first = 0
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            if first + rows > skip:
                number = first
                batches = file.iter_batches(BATCH, row_groups=[group], columns=columns.columns)
                for row in (row for batch in batches for row in batch.to_pylist()):
                    if number >= skip:
                        yield number, row
                    number += 1
            first += rows


def _get(row: Mapping[str, Any], column: str | None) -> Any:
    value: Any = row
    for part in () if column is None else column.split("."):
        value = None if value is None else value.get(part)
    return None if column is None else value


def _picture(value: Any, name: str, **how: Any) -> Picture | None:
    if isinstance(value, dict):
        value = value.get("bytes")
    return None if value is None else Picture(name=name, data=value, **how)


def _text(value: Any) -> str:
    if isinstance(value, list):
        return next((text for text in reversed(value) if text and text.strip()), "")
    return str(value or "")


def _unrated(value: Any, where: str) -> tuple[str, str] | None:
    """Why a row with such ratings is left out."""
    ratings = [] if value is None else list(value.values())
    if not ratings or any(rating is None for rating in ratings):
        return "not rated", f"{where} has no ratings"
    if min(ratings) < MIN_QUALITY:
        return "low rating", f"{where} is rated {short(value)}"
    return None
