"""Folders of pictures that are elsewhere: a local copy, brought up to date before it is read.

    CACHE/folders/DIGEST-NAME/         the files
    CACHE/folders/DIGEST-NAME.version  the version of each (size, date, tag): none comes twice

Pictures in a folder are read one by one and out of order, so the folder is copied whole. All copies
together are bounded by the limit of the cache (shard_cache.py); what is larger belongs into shards.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from prw import atomic
from prw_flux.data.remote import filesystem, is_url, name_of, reaching
from prw_flux.data.rows import DataError
from prw_flux.data.shard_cache import LIMIT, ShardCache, copy_file

FOLDERS: Final = "folders"
WORKERS: Final = 8
NOTED: Final = 200
"""Files between two writings of the index."""
VERSION: Final = ("size", "ETag", "etag", "LastModified", "mtime", "created", "sha256", "blob_id")
"""What tells the versions of a file apart, as far as a file system says it."""


def local_folder(where: str | Path) -> Path:
    """A local folder (or file) with the content of a place; the place itself where it is local.

    Args:
        where: a path, or the URL of a folder or of one file.

    Raises:
        DataError: it cannot be reached, has no files, is above the limit of the cache, or has names
            that lead out of the folder.
    """
    if not is_url(where):
        return Path(where)
    url = str(where).rstrip("/")
    fs, there = filesystem(url)
    with reaching(url):
        fs.invalidate_cache(there)
        single = fs.isfile(there)
        listed: dict[str, Any] = fs.find(there, detail=True)
    base = there.rsplit("/", 1)[0] if single else there
    found = {name[len(base) :].lstrip("/"): info for name, info in listed.items()}
    if not found:
        raise DataError(f"there are no files at {url}")
    cache = ShardCache()
    digest = hashlib.sha256(url.encode()).hexdigest()[:12]
    folder = cache.folder / FOLDERS / f"{digest}-{name_of(url)}"
    _require_inside(found, folder, url)
    folder.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f"{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _require_room(found, folder, url, cache.limit)
        _bring(fs, base, found, folder, url)
    return folder / name_of(url) if single else folder


def _bring(fs: Any, base: str, found: Mapping[str, Any], folder: Path, url: str) -> None:
    """Copy what is new or has changed, remove what is gone."""
    index = folder.with_name(f"{folder.name}.version")
    wanted = {name: [str(info.get(one)) for one in VERSION] for name, info in found.items()}
    try:
        have = json.loads(index.read_text("utf-8"))
    except (OSError, ValueError):
        have = {}
    for path in folder.rglob("*"):
        if path.is_file() and path.relative_to(folder).as_posix() not in wanted:
            path.unlink()
    due = [n for n in wanted if have.get(n) != wanted[n] or not (folder / n).is_file()]

    def copy(name: str) -> None:
        with atomic.replace_file(folder / name) as new:
            copy_file(fs, f"{base}/{name}", new, f"{url}/{name}")

    def note() -> None:
        with atomic.replace_file(index) as new:
            new.write_text(json.dumps({name: have[name] for name in wanted if name in have}))

    try:
        with ThreadPoolExecutor(WORKERS) as pool:
            for number, (name, _) in enumerate(zip(due, pool.map(copy, due), strict=True), 1):
                have[name] = wanted[name]
                if number % NOTED == 0:  # a kill runs no finally
                    note()
    finally:
        note()


def _require_inside(found: Mapping[str, Any], folder: Path, url: str) -> None:
    for name in found:
        if ".." in name.split("/") or os.path.isabs(name) or "\0" in name:
            raise DataError(f"{url} has a file {name!r}, which leads out of the folder {folder}")


def _require_room(found: Mapping[str, Any], folder: Path, url: str, limit: int) -> None:
    size = sum(int(info.get("size") or 0) for info in found.values())
    others = {
        other: _size(other)
        for other in folder.parent.iterdir()
        if other.is_dir() and other != folder
    }
    if size > limit:
        raise DataError(
            f"{url} has {size / 2**30:.1f} GiB of files, more than the cache may hold "
            f"({limit / 2**30:.1f} GiB); pack them into tars or parquet, or raise {LIMIT}"
        )
    if size + sum(others.values()) > limit:
        largest = max(others, key=others.__getitem__)
        raise DataError(
            f"there is no room in the cache ({limit / 2**30:.1f} GiB) for the {size / 2**30:.1f} "
            f"GiB of {url}; remove {largest}, or raise {LIMIT}"
        )


def _size(folder: Path) -> int:
    """Of all files, while another process may rename some."""
    found = 0
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):
            found += path.stat().st_size if path.is_file() else 0
    return found
