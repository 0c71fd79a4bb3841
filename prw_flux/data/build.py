"""Building a data set: records in, parquet shards out, whole or not at all, resumed where it ended.

    OUT/data/train-00000.parquet ...   the rows (schema: rows.py)
    OUT/build.json                     what it was built from, shards with their sha256, rejects

A shard and then the new build.json are put in place in one step each. A build that was killed goes
on after its last shard; a shard that build.json does not know is written again. One that stopped
because too much was left out, or whose input has changed since, begins again: pictures that were
mended are looked at once more.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any, Final

from PIL import Image as PILImage

from prw import ConfigError
from prw_flux.data.extractors import Extractor
from prw_flux.data.manifest import MANIFEST, Manifest, read_manifest
from prw_flux.data.remote import fingerprint
from prw_flux.data.rows import REQUIRED, DataError, Reader, Reject, Row
from prw_flux.data.shards import CHUNK, Making, known_keys, mend, unless_twice, write_shard

JUDGED_FROM: Final = 100
BUCKET: Final = 16
INPUT: Final = ("fingerprint", "listed", "records")
"""What `made_from` says of the content of the input; the rest is what was asked for."""

log = logging.getLogger(__name__)


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
            them, with the same one it begins again, as the data will have been mended. Shards that
            are missing or truncated are made again, also of a finished data set.
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
    making = Making(task, extractors, workers)
    mend(out, manifest, reader, making)
    if manifest.done:
        _judge(out, manifest, max_rejected, last=True)
        return manifest
    keys = known_keys(out, manifest.shards)
    rows: list[Row] = []
    size = 0
    for record, found, changes in making.rows(reader.records(manifest.read)):
        manifest.read += 1
        row = unless_twice(record, found, keys)
        if isinstance(row, Reject):
            manifest.note(row)
        else:
            rows.append(row)
            size += _weight(row)
            manifest.sizes[_bucket(row)] += 1
            manifest.converted.update(changes)
        if len(rows) >= shard_rows or size >= shard_bytes:
            write_shard(out, manifest, rows)
            rows, size = [], 0
            _judge(out, manifest, max_rejected)
        if manifest.read % CHUNK == 0:
            tick(manifest.read, len(reader))
    tick(manifest.read, len(reader))
    _judge(out, manifest, max_rejected, last=True)
    manifest.done = True
    write_shard(out, manifest, rows)
    return manifest


def _opened(out: Path, task: str, made_from: dict[str, Any], max_rejected: float) -> Manifest:
    """The manifest to go on with, or a new one; raises DataError where it is another data set's."""
    if not (out / MANIFEST).is_file():
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise DataError(f"{out} exists and is not a data set; choose another folder")
        return _begun(out, Manifest(task=task, made_from=made_from))
    manifest = read_manifest(out)
    old, new = {"task": manifest.task, **manifest.made_from}, {"task": task, **made_from}
    if "listed" not in old:  # built by an older version, which did not note it
        new.pop("listed", None)
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
    manifest.stopped, manifest.made_from = None, made_from
    if manifest.shards:  # an older version did not note where a shard ends
        manifest.shards[-1].setdefault("read", manifest.read)
    known = {out / shard["file"] for shard in manifest.shards}
    for left in (out / "data").glob("*"):
        if left not in known:
            left.unlink()
    return manifest


def _begun(out: Path, manifest: Manifest) -> Manifest:
    manifest.save(out)
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


def _judge(out: Path, manifest: Manifest, max_rejected: float, *, last: bool = False) -> None:
    if not last and manifest.read < JUDGED_FROM:
        return
    if manifest.share > max_rejected:
        if not manifest.done:
            replace(read_manifest(out), stopped=manifest.share).save(out)
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
