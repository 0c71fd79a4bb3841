"""The shards of a data set: rows made of records in order, written, and made again when damaged."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, Final, NamedTuple

from prw import atomic
from prw_flux.data.extractors import Extractor
from prw_flux.data.manifest import Manifest, sha256
from prw_flux.data.row_checks import RowMaker
from prw_flux.data.rows import DataError, Reader, Record, Reject, Row, features

CHUNK: Final = 32
ROW_GROUP: Final = 100

log = logging.getLogger(__name__)


class Making(NamedTuple):
    """How rows are made: for which task, with which maps, in how many threads."""

    task: str
    extractors: Sequence[Extractor]
    workers: int

    def rows(self, records: Iterator[Record]) -> Iterator[tuple[Record, Row | Reject, list[str]]]:
        """Every record with its row or why there is none, and what was converted; in order."""

        def attempt(record: Record) -> tuple[Record, Row | Reject, list[str]]:
            maker = RowMaker(self.task, self.extractors)
            try:
                return record, maker(record), maker.converted
            except Reject as refusal:
                return record, refusal, []

        with ThreadPoolExecutor(self.workers) as pool:
            while chunk := list(islice(records, CHUNK)):
                yield from pool.map(attempt, chunk)


def known_keys(out: Path, shards: Iterable[Mapping[str, Any]]) -> set[int]:
    """The keys of finished shards, 8 bytes of each."""
    import pyarrow.parquet as parquet

    found: set[int] = set()
    for shard in shards:
        table = parquet.read_table(out / shard["file"], columns=["key"])
        found.update(map(_short_key, table.column("key").to_pylist()))
    return found


def unless_twice(record: Record, found: Row | Reject, keys: set[int]) -> Row | Reject:
    """A row, or that its key was there before; a new key is added."""
    if isinstance(found, Reject):
        return found
    short = _short_key(record.key)
    if short in keys:
        return Reject("duplicate key", f"{record.where}: the key {record.key!r} was there before")
    keys.add(short)
    return found


def write_shard(out: Path, manifest: Manifest, rows: list[Row]) -> None:
    """Put a shard of the last records that were read in place, then the manifest that knows it."""
    if rows:
        first = manifest.shards[-1]["read"] if manifest.shards else 0
        name = f"data/train-{len(manifest.shards):05d}.parquet"
        with atomic.replace_file(out / name) as new:
            _write(new, rows)
            entry = {"file": name, "rows": len(rows), "bytes": new.stat().st_size}
            entry |= {"sha256": sha256(new), "first": first, "read": manifest.read}
        manifest.shards.append(entry)
        manifest.kept += len(rows)
    manifest.save(out)


def mend(out: Path, manifest: Manifest, reader: Reader, making: Making) -> None:
    """Make the shards again that are missing or truncated; all others stay.

    Raises:
        DataError: such a shard does not come out as it was, byte for byte.
    """
    sizes = {file.relative_to(out).as_posix(): file.stat().st_size for file in out.glob("data/*")}
    damaged = [one for one in manifest.shards if sizes.get(one["file"]) != one["bytes"]]
    if not damaged:
        return
    keys = known_keys(out, (one for one in manifest.shards if one not in damaged))
    for shard in damaged:
        if "first" not in shard:  # built by an older version
            raise DataError(f"{out / shard['file']} is damaged; remove {out} and build again")
        log.warning("%s is missing or truncated and is made again", out / shard["file"])
        first, end = shard["first"], shard["read"]
        made = making.rows(islice(reader.records(first), end - first))
        found = [unless_twice(record, row, keys) for record, row, _ in made]
        with atomic.replace_file(out / shard["file"]) as new:
            _write(new, [row for row in found if not isinstance(row, Reject)])
            if sha256(new) != shard["sha256"]:
                raise DataError(
                    f"{out / shard['file']} is missing or truncated, and does not come out as it "
                    f"was: its pictures, or pyarrow or Pillow, are others since; remove {out} and "
                    "build again"
                )


def _write(path: Path, rows: list[Row]) -> None:
    import pyarrow
    import pyarrow.parquet as parquet

    table = pyarrow.Table.from_pylist(rows, schema=features().arrow_schema)
    parquet.write_table(table, path, row_group_size=ROW_GROUP, use_dictionary=["task", "licence"])


def _short_key(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")
