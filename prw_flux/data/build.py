"""Building a data set: records in, parquet shards out, whole or not at all, resumed where it ended.

    OUT/data/train-00000.parquet ...   the rows (schema: rows.py)
    OUT/build.json                     what it was built from, shards with their sha256, rejects

A shard and then the new build.json are put in place in one step each. A build that was killed goes
on after its last shard; a shard that build.json does not know is written again. One that stopped
because too much was left out, or whose input has changed since, begins again: pictures that were
mended are looked at once more.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any, Final, final

from PIL import Image as PILImage

from prw import ConfigError, atomic
from prw_flux.data.extractors import Extractor
from prw_flux.data.remote import Place, below, fingerprint, read_text
from prw_flux.data.row_checks import RowMaker
from prw_flux.data.rows import CHOSEN, REQUIRED, DataError, Reader, Record, Reject, Row, features

MANIFEST: Final = "build.json"
FORMAT: Final = 2
EXAMPLES: Final = 5
JUDGED_FROM: Final = 100
CHUNK: Final = 32
ROW_GROUP: Final = 100
BUCKET: Final = 16
INPUT: Final = ("fingerprint", "listed", "records")
"""What `made_from` says of the content of the input; the rest is what was asked for."""

log = logging.getLogger(__name__)


@final
@dataclass(kw_only=True)
class Manifest:
    """The content of build.json.

    Args:
        task: of all rows.
        made_from: kind of input, its files and options; a resumed build must agree.
        read, kept: records looked at, rows written.
        rejected: records left out, by reason.
        examples: the first few of every reason.
        converted: changes to pictures and rows, counted.
        sizes: rows by the size of their picture, in steps of 16 pixels.
        shards: file, rows, bytes and sha256 of each.
        done: whether all records were read.
        stopped: the share that was left out where the build stopped for it.
    """

    task: str
    made_from: dict[str, Any]
    read: int = 0
    kept: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    converted: Counter[str] = field(default_factory=Counter)
    sizes: Counter[str] = field(default_factory=Counter)
    shards: list[dict[str, Any]] = field(default_factory=list)
    done: bool = False
    stopped: float | None = None

    @property
    def share(self) -> float:
        """Of the records that could be judged, those that cannot be used.

        What was left out by choice (`CHOSEN`) is no fault of the data and counts on neither side.
        """
        chosen = sum(self.rejected[reason] for reason in CHOSEN)
        return (sum(self.rejected.values()) - chosen) / max(1, self.read - chosen)

    def told(self) -> str:
        """One sentence: rows, rejects by reason."""
        used = f"{self.read - sum(self.rejected.values()):,} of {self.read:,} records used"
        if not self.rejected:
            return used
        reasons = ", ".join(f"{n:,} {reason}" for reason, n in self.rejected.most_common())
        first = next(iter(self.examples.values()))[0]
        return f"{used}; left out: {reasons} (first: {first})"


def read_manifest(out: Place) -> Manifest:
    """The manifest of a data set, which may be elsewhere.

    Raises:
        DataError: there is none, it cannot be reached, or it is damaged or of another format.
    """
    path = below(out, MANIFEST)
    if isinstance(path, Path) and not path.is_file():
        raise DataError(f"{out} has no {MANIFEST}: it was not made by `prw-flux data build`")
    try:
        raw = json.loads(read_text(path))
        if raw.pop("format") != FORMAT:
            raise DataError(f"{path} is of another format than {FORMAT}; build the data again")
        counters = {name: Counter(raw[name]) for name in ("rejected", "converted", "sizes")}
        return Manifest(**{**raw, **counters})
    except (ValueError, KeyError, TypeError, AttributeError) as problem:
        if isinstance(problem, DataError):
            raise
        raise DataError(f"{path} is damaged ({problem}); build the data again") from None


def build(
    reader: Reader,
    task: str,
    out: Path,
    *,
    made_from: dict[str, Any],
    extractors: Sequence[Extractor] = (),
    max_rejected: float = 0.05,
    shard_rows: int = 10_000,
    shard_bytes: int = 512 * 2**20,
    workers: int = 4,
    tick: Callable[[int, int], None] = lambda done, total: None,
) -> Manifest:
    """Build a data set, or go on with it.

    Args:
        reader: gives the records.
        task: what the rows are for.
        out: the folder.
        made_from: what to note about the input; a fingerprint of its files is added.
        extractors: make conditions of every target.
        max_rejected: largest share of records that may be unusable, judged after each shard from
            the hundredth record on, and at the end. Records left out by choice do not count.
        shard_rows, shard_bytes: a shard ends at the first of the two.
        workers: threads that decode pictures.
        tick: told how many of how many records are done.

    Raises:
        ConfigError: a number is out of range.
        DataError: the folder holds something else, too many records are left out, or none is
            usable. Shards that are done stay: with a larger `max_rejected` the build goes on after
            them, with the same one it begins again, as the data will have been mended.
    """
    if task not in REQUIRED:
        raise DataError(f"there is no task {task!r}; there are {', '.join(REQUIRED)}")
    if not 0 <= max_rejected <= 1:
        raise ConfigError(f"max_rejected must be a share from 0 to 1, got {max_rejected}")
    if min(shard_rows, shard_bytes, workers) < 1:
        given = f"shards of {shard_rows} rows or {shard_bytes} bytes and {workers} workers"
        raise ConfigError(f"shards and workers must be at least 1, got {given}")
    made_from = json.loads(json.dumps(made_from))
    made_from |= {"fingerprint": fingerprint(reader.inputs), "records": len(reader)}
    made_from |= {"listed": reader.listed} if reader.listed else {}
    made_from |= {f"method of {one.condition}": one.method for one in extractors}
    manifest = _opened(out, task, made_from, max_rejected)
    if manifest.done:
        _judge(out, manifest, max_rejected, last=True)
        return manifest
    schema = features().arrow_schema
    keys = _known_keys(out, manifest)
    rows: list[Row] = []
    size = 0

    def make() -> RowMaker:
        return RowMaker(task, extractors)

    with ThreadPoolExecutor(workers) as pool:
        for record, found, changes in _in_order(pool, make, reader.records(manifest.read)):
            manifest.read += 1
            row = _unless_twice(record, found, keys)
            if isinstance(row, Reject):
                _note(manifest, row)
            else:
                rows.append(row)
                size += _weight(row)
                manifest.sizes[_bucket(row)] += 1
                manifest.converted.update(changes)
            if len(rows) >= shard_rows or size >= shard_bytes:
                _close_shard(out, manifest, rows, schema)
                rows, size = [], 0
                _judge(out, manifest, max_rejected)
            if manifest.read % CHUNK == 0:
                tick(manifest.read, len(reader))
    tick(manifest.read, len(reader))
    _judge(out, manifest, max_rejected, last=True)
    manifest.done = True
    _close_shard(out, manifest, rows, schema)
    return manifest


def _opened(out: Path, task: str, made_from: dict[str, Any], max_rejected: float) -> Manifest:
    """The manifest to go on with, or a new one; raises DataError where it is another data set's."""
    if not (out / MANIFEST).is_file():
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise DataError(f"{out} exists and is not a data set; choose another folder")
        return _begun(out, Manifest(task=task, made_from=made_from))
    manifest = read_manifest(out)
    old, new = {"task": manifest.task, **manifest.made_from}, {"task": task, **made_from}
    changed = [name for name in sorted({*old, *new}) if old.get(name) != new.get(name)]
    why = ""
    if changed:
        asked = [name for name in changed if name not in INPUT]
        if manifest.done or (asked and manifest.shards):
            raise DataError(_another(out, old, new, asked or changed))
        why = f"{asked[0]} is another" if asked else "its input has changed"
    elif not manifest.done and manifest.stopped is not None and manifest.stopped > max_rejected:
        why = f"it stopped with {manifest.stopped:.1%} left out, above {max_rejected:.1%}"
    if why:
        if manifest.shards:
            log.warning("%s begins again without its %d rows: %s", out, manifest.kept, why)
        manifest = _begun(out, Manifest(task=task, made_from=made_from))
    manifest.stopped = None
    known = {out / shard["file"] for shard in manifest.shards}
    for left in (out / "data").glob("*"):
        if left not in known:
            left.unlink()
    return manifest


def _begun(out: Path, manifest: Manifest) -> Manifest:
    _save(out, manifest)
    return manifest


def _another(out: Path, old: dict[str, Any], new: dict[str, Any], changed: list[str]) -> str:
    """Why a folder cannot be gone on with; what was asked for is named before the input."""
    name = changed[0]
    if name in INPUT:
        return (
            f"the input of {out} has changed since it was built ({name} {old.get(name)!r}, now "
            f"{new.get(name)!r}); choose another folder, or remove it to build again"
        )
    return (
        f"{out} was begun with {name} {old.get(name)!r}, not {new.get(name)!r}; choose another "
        "folder, or remove it"
    )


def _known_keys(out: Path, manifest: Manifest) -> set[int]:
    """The keys of the finished shards, 8 bytes of each."""
    import pyarrow.parquet as parquet

    found: set[int] = set()
    for shard in manifest.shards:
        table = parquet.read_table(out / shard["file"], columns=["key"])
        found.update(map(_short_key, table.column("key").to_pylist()))
    return found


def _in_order(
    pool: ThreadPoolExecutor, make: Callable[[], RowMaker], records: Iterator[Record]
) -> Iterator[tuple[Record, Row | Reject, list[str]]]:
    def attempt(record: Record) -> tuple[Record, Row | Reject, list[str]]:
        maker = make()
        try:
            return record, maker(record), maker.converted
        except Reject as refusal:
            return record, refusal, []

    while chunk := list(islice(records, CHUNK)):
        yield from pool.map(attempt, chunk)


def _unless_twice(record: Record, found: Row | Reject, keys: set[int]) -> Row | Reject:
    if isinstance(found, Reject):
        return found
    short = _short_key(record.key)
    if short in keys:
        return Reject("duplicate key", f"{record.where}: the key {record.key!r} was there before")
    keys.add(short)
    return found


def _short_key(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")


def _note(manifest: Manifest, refusal: Reject) -> None:
    manifest.rejected[refusal.reason] += 1
    examples = manifest.examples.setdefault(refusal.reason, [])
    if len(examples) < EXAMPLES:
        examples.append(str(refusal))


def _judge(out: Path, manifest: Manifest, max_rejected: float, *, last: bool = False) -> None:
    if not last and manifest.read < JUDGED_FROM:
        return
    if manifest.share > max_rejected:
        if not manifest.done:
            _save(out, replace(read_manifest(out), stopped=manifest.share))
        raise DataError(
            f"{manifest.share:.1%} of the records cannot be used, above the limit of "
            f"{max_rejected:.1%}: {manifest.told()}; mend the data and build again, or raise "
            "--max-rejected"
        )
    if last and not manifest.kept and not manifest.sizes:
        told = f"no record can be used: {manifest.told()}" if manifest.read else ""
        raise DataError(told or "there are no records")


def _weight(row: Row) -> int:
    pictures = [row["source"], row["target"], row["mask"]]
    pictures += [entry["image"] for entry in row["conditions"]]
    pictures += [entry["mask"] for entry in row["boxes"]]
    return sum(len(picture["bytes"]) for picture in pictures if picture is not None)


def _bucket(row: Row) -> str:
    picture = row["target"] or row["source"]
    with PILImage.open(BytesIO(picture["bytes"])) as opened:
        width, height = (side // BUCKET * BUCKET for side in opened.size)
    return f"{width} x {height}"


def _close_shard(out: Path, manifest: Manifest, rows: list[Row], schema: Any) -> None:
    import pyarrow
    import pyarrow.parquet as parquet

    if rows:
        name = f"data/train-{len(manifest.shards):05d}.parquet"
        table = pyarrow.Table.from_pylist(rows, schema=schema)
        with atomic.replace_file(out / name) as new:
            parquet.write_table(
                table, new, row_group_size=ROW_GROUP, use_dictionary=["task", "licence"]
            )
            entry = {"file": name, "rows": len(rows), "bytes": new.stat().st_size}
            manifest.shards.append({**entry, "sha256": sha256(new)})
        manifest.kept += len(rows)
    _save(out, manifest)


def _save(out: Path, manifest: Manifest) -> None:
    with atomic.replace_file(out / MANIFEST) as new:
        new.write_text(json.dumps({"format": FORMAT, **vars(manifest)}, indent=1))


def sha256(path: Path) -> str:
    """Of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
