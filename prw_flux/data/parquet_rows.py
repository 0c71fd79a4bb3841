"""Parquet files of other data sets, by a map from their columns to ours.

A column of a struct is written with dots (description.item). Pictures are stored as `datasets`
does, {bytes, path}, or as bytes; a text column may hold lists of texts, of which the last that is
not empty is taken. `KNOWN` has the maps of published data sets, with the columns that their cards
list; they were tried on small files of these schemas, not on the terabytes themselves.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, final

from prw_flux.data.column_map import ColumnMap, require
from prw_flux.data.input_files import near
from prw_flux.data.remote import Place, found_files, name_of, opened
from prw_flux.data.rows import DataError, Picture, Record
from prw_flux.data.shard_cache import ShardCache

BATCH: Final = 32
BORDER: Final = 8
MIN_QUALITY: Final = 5


@final
class ParquetRows:
    """The rows of parquet files.

    Args:
        path: a file, or a folder of files, taken in the order of their names; or a URL of them
            (`prw_flux.data.remote`), of which one file after the other is copied into a cache.
        task: what the records are for.
        columns: the map.
        licence: of rows without a licence column.
        cache: of files that are elsewhere.
        conditions_made: conditions will be made of the targets, so no column needs to have any.

    Raises:
        DataError: there are no files, or a file lacks a column or has another type in it.
        ConfigError: the map lacks what the task needs.
    """

    def __init__(
        self,
        path: Place,
        task: str,
        columns: ColumnMap,
        *,
        licence: str = "",
        conditions_made: bool = False,
        cache: ShardCache | None = None,
    ) -> None:
        self.inputs = found_files(path, ".parquet")
        self.listed = ""
        self._cache = cache or ShardCache()
        require(task, columns, conditions_made)
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
            local = self._cache.local(path)
            for number, row in _rows_of(local, self._map, skip):
                records = self._of(row, path, number) if row else self._lost(path, number)
                yield from list(records)[turn:]
                turn = 0
            skip = 0

    def _lost(self, path: Place, number: int) -> Iterator[Record]:
        """A row that cannot be read."""
        where = f"{name_of(path)} row {number}"
        told = "damaged shard", f"{where} cannot be read: {name_of(path)} is damaged there"
        for side in range(self._per_row):
            yield Record(where=where, key=f"{where}/{side}", refused=told)

    def _of(self, row: Mapping[str, Any], path: Place, number: int) -> Iterator[Record]:
        file = name_of(path)
        where, columns = f"{file} row {number}", self._map

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
        key = "/".join(named) or f"{file.removesuffix('.parquet')}:{number}"
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


def _checked(path: Place, columns: ColumnMap) -> int:
    """The number of rows of a file whose columns are there and of the right types.

    A column of nothing but nulls has no type and is right.
    """
    import pyarrow
    import pyarrow.parquet as parquet

    try:
        with opened(path) as source, parquet.ParquetFile(source) as file:
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
                raise DataError(f"{name_of(path)} has no column {column!r}{near(part, names)}")
            kind = kind.field(part).type
        if column in columns.pictures and not _holds_pictures(kind):
            raise DataError(f"{name_of(path)}: column {column} must hold pictures, it is {kind}")
        if column in texts and not _holds_texts(kind):
            raise DataError(f"{name_of(path)}: column {column} must hold texts, it is {kind}")
        if column == columns.rated and not pyarrow.types.is_struct(kind):
            raise DataError(f"{name_of(path)}: column {column} must be a struct, it is {kind}")
    return rows


def _holds_pictures(kind: Any) -> bool:
    import pyarrow.types as types

    if types.is_struct(kind):
        return any(one.name == "bytes" for one in kind)
    return bool(types.is_binary(kind) or types.is_large_binary(kind) or types.is_null(kind))


def _holds_texts(kind: Any) -> bool:
    import pyarrow.types as types

    if types.is_list(kind) or types.is_large_list(kind):
        return _holds_texts(kind.value_type)
    return bool(types.is_string(kind) or types.is_large_string(kind) or types.is_null(kind))


def _rows_of(
    path: Path, columns: ColumnMap, skip: int
) -> Iterator[tuple[int, Mapping[str, Any] | None]]:
    """Number and content of every row from `skip` on; None where a row group cannot be read."""
    import pyarrow
    import pyarrow.parquet as parquet

    first = 0
    with parquet.ParquetFile(path) as file:
        for group in range(file.num_row_groups):
            end = first + file.metadata.row_group(group).num_rows
            if end > skip:
                number = first
                try:
                    batches = file.iter_batches(BATCH, row_groups=[group], columns=columns.columns)
                    for row in (row for batch in batches for row in batch.to_pylist()):
                        if number >= skip:
                            yield number, row
                        number += 1
                except (OSError, pyarrow.ArrowException):
                    yield from ((lost, None) for lost in range(max(number, skip), end))
            first = end


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
    low = ", ".join(f"{name} {rating}" for name, rating in value.items() if rating < MIN_QUALITY)
    return ("low rating", f"{where} is rated {low}, below {MIN_QUALITY}") if low else None
