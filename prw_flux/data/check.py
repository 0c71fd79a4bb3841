"""Looking at a built data set again: are its bytes those that were written, is every row usable?

Per shard: the sha256 of the file, the columns, then of every row each picture is decoded, masks and
conditions have the size of their picture, boxes lie inside it, and what the task needs is there.
What was found is kept in check.json after every shard, so that a check that was stopped goes on; a
shard whose hash has changed since is looked at again. Of data that is elsewhere the version that
the file system tells stands for the hash, and check.json is in the folder of the shard cache.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from pathlib import Path
from typing import Any, Final

from prw import atomic
from prw_flux.data.images import ImageError, open_image, open_map
from prw_flux.data.manifest import MANIFEST, Manifest, read_manifest, sha256
from prw_flux.data.remote import Place, below, filesystem, name_of, opened, reaching
from prw_flux.data.rows import REQUIRED, DataError, Row, features
from prw_flux.data.shard_cache import ShardCache, copied, version_of

FOUND: Final = "check.json"
BATCH: Final = 32


def check(
    out: Place,
    *,
    workers: int = 4,
    tick: Callable[[int, int], None] = lambda done, total: None,
) -> list[str]:
    """What is wrong with a data set, one sentence each; nothing where it is whole.

    Args:
        out: its folder, or a URL; of a URL one shard after the other is copied and removed again.
        workers: threads that decode pictures.
        tick: told how many of how many rows were looked at.

    Raises:
        DataError: the folder is no data set, or cannot be reached.
    """
    manifest, there = read_manifest(out), _files(out)
    problems = _missing(out, manifest, there)
    notes = _notes(out)
    found = _found_before(notes)
    total = sum(shard["rows"] for shard in manifest.shards)
    done = 0
    with ThreadPoolExecutor(workers) as pool:
        for shard in manifest.shards:
            if shard["file"] not in there:
                continue
            place = below(out, shard["file"])
            local = sha256(place) if isinstance(place, Path) else ""
            mark = f"{local or version_of(str(place))} {shard['sha256']}"
            if mark not in found:
                with copied(place) as path:
                    have = local or sha256(path)
                    wrong = [] if have == shard["sha256"] else [_changed(have, shard["sha256"])]
                    for rows in _rows(path) if not wrong else ():
                        wrong += filter(None, pool.map(_wrong, rows, repeat(manifest.task)))
                        tick(done + rows[-1][0] + 1, total)
                found[mark] = wrong
                _save(notes, found)
            done += shard["rows"]
            tick(done, total)
            problems += [f"{shard['file']} {told}" for told in found[mark]]
    return problems


def _changed(have: str, wanted: str) -> str:
    return (
        f"has changed since it was built (sha256 {have[:12]}, not {wanted[:12]}); remove it and "
        "run the same `data build` again"
    )


def _files(out: Place) -> set[str]:
    """The names of the shards that are there."""
    if isinstance(out, Path):
        return {path.relative_to(out).as_posix() for path in out.glob("data/*")}
    fs, path = filesystem(out)
    with reaching(out):
        fs.invalidate_cache(path)
        return {f"data/{name_of(one)}" for one in fs.find(f"{path.rstrip('/')}/data")}


def _missing(out: Place, manifest: Manifest, found: set[str]) -> list[str]:
    problems = []
    if not manifest.done:
        problems.append(f"{out} is not finished; run the same `data build` again")
    known = {shard["file"] for shard in manifest.shards}
    problems += [
        f"{name} is missing; run the same `data build` again" for name in sorted(known - found)
    ]
    problems += [f"{name} is not in {MANIFEST}; remove it" for name in sorted(found - known)]
    return problems


def _notes(out: Place) -> Path:
    """Where the findings are kept: in the folder, of a URL in the folder of the shard cache."""
    if isinstance(out, Path):
        return out / FOUND
    return ShardCache().folder / f"check-{hashlib.sha256(out.encode()).hexdigest()[:16]}.json"


def _found_before(notes: Path) -> dict[str, list[str]]:
    try:
        raw = json.loads(notes.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return raw if isinstance(raw, dict) else {}


def _save(notes: Path, found: dict[str, list[str]]) -> None:
    with atomic.replace_file(notes) as new:
        new.write_text(json.dumps(found, indent=1))


def _rows(path: Path) -> Iterator[list[tuple[int, Row]]]:
    import pyarrow.parquet as parquet

    with parquet.ParquetFile(path) as file:
        if file.schema_arrow.names != list(features()):
            raise DataError(f"{path} has the columns {file.schema_arrow.names}; build it again")
        first = 0
        for batch in file.iter_batches(BATCH):
            rows = batch.to_pylist()
            yield list(enumerate(rows, start=first))
            first += len(rows)


def _wrong(place: tuple[int, Row], task: str) -> str:
    """What is wrong with a row, or nothing."""
    number, row = place
    try:
        told = _complaint(row, task)
    except ImageError as problem:
        told = str(problem)
    return f"row {number}: {told}" if told else ""


def _complaint(row: Row, task: str) -> str:
    if row["task"] != task:
        return f"its task is {row['task']!r}, not {task!r}"
    for column in REQUIRED[task]:
        if not row[column]:
            return f"{column} is missing"
    size = None
    for column in ("source", "target"):
        if row[column] is not None:
            size = open_image(f"column {column}", data=row[column]["bytes"]).shape[:2]
    assert size is not None
    maps = {f"condition {entry['name']}": entry["image"] for entry in row["conditions"]}
    maps |= {f"mask of box {i}": thing["mask"] for i, thing in enumerate(row["boxes"])}
    for name, stored in {**maps, "mask": row["mask"]}.items():
        if stored is not None:
            have = open_map(name, data=stored["bytes"]).shape[:2]
            if have != size:
                return f"{name} has {have[1]} x {have[0]} pixels, its picture {size[1]} x {size[0]}"
    for x0, y0, x1, y1 in (thing["box"] for thing in row["boxes"]):
        if not (0 <= x0 < x1 <= size[1] and 0 <= y0 < y1 <= size[0]):
            return f"box {(x0, y0, x1, y1)} is not inside {size[1]} x {size[0]}"
    return ""


def sample_rows(out: Place, count: int) -> list[Row]:
    """Some rows of a data set, evenly spread over it; of a URL only their row groups are read.

    Raises:
        DataError: the folder is no data set, or a shard is missing.
    """
    manifest = read_manifest(out)
    count = min(count, manifest.kept)
    wanted = [manifest.kept * i // count for i in range(count)]
    rows: list[Row] = []
    first = 0
    for shard in manifest.shards:
        here = [number - first for number in wanted if first <= number < first + shard["rows"]]
        first += shard["rows"]
        if not here:
            continue
        path = below(out, shard["file"])
        if isinstance(path, Path) and not path.is_file():
            raise DataError(f"{path} is missing; run the same `data build` again")
        with opened(path) as file:
            rows += _pick(file, here)
    return rows


def _pick(source: Any, numbers: list[int]) -> list[Row]:
    """Rows of a file by number; only their row groups are read."""
    import pyarrow.parquet as parquet

    rows: list[Row] = []
    with parquet.ParquetFile(source) as file:
        first = 0
        for group in range(file.num_row_groups):
            size = file.metadata.row_group(group).num_rows
            here = [number - first for number in numbers if first <= number < first + size]
            if here:
                rows += file.read_row_group(group).take(here).to_pylist()
            first += size
    return rows
