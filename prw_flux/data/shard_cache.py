"""Copies of shards that are elsewhere, in a folder of bounded size.

Shards are copied whole, and what was not used for longest is thrown out; a file that is open then
stays readable. The environment decides where and how much: PRW_SHARD_CACHE, PRW_SHARD_CACHE_GIB.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final, final

from prw import atomic
from prw_flux.data.remote import Place, check_sha256, filesystem, name_of, reaching
from prw_flux.data.rows import DataError

LIMIT: Final = "PRW_SHARD_CACHE_GIB"
FOLDER: Final = "PRW_SHARD_CACHE"
GIB: Final = 20.0
TRIES: Final = 3
PAUSE = 1.0
"""Seconds before the second try; twice as many before the third."""

log = logging.getLogger(__name__)


@final
class ShardCache:
    """Copies of shards that are elsewhere, in a folder of bounded size.

    Several processes may share the folder: a shard is fetched once, by whoever comes first.

    Args:
        folder: None is the environment's PRW_SHARD_CACHE, else `prw-shards` in the cache folder of
            `datasets`.
        limit: bytes that the copies may take together; None is the environment's
            PRW_SHARD_CACHE_GIB, else 20 GiB.

    Attributes:
        fetched: how many shards were copied.
    """

    def __init__(self, folder: Path | None = None, limit: int | None = None) -> None:
        self._folder = folder
        self.limit = _default_limit() if limit is None else limit
        self.fetched = 0
        self._names: dict[str, str] = {}

    @cached_property
    def folder(self) -> Path:
        """Where the copies lie."""
        return self._folder or _default_folder()

    def local(
        self,
        place: Place,
        *,
        sha256: str | None = None,
        convert: Callable[[Path, Path], None] | None = None,
    ) -> Path:
        """A local file with the content of a place; the place itself where it is local.

        Args:
            place: of the shard.
            sha256: what it must have; also names the copy, so that a change is another copy.
            convert: called with the fetched file and an empty one, which is kept in its place.

        Raises:
            DataError: it cannot be fetched, is not what it should be, or is above the limit.
        """
        if isinstance(place, Path):
            return place
        path = self.folder / (sha256 or self._name(place))
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.is_file():
                self._fetch(place, path, sha256, convert)
            os.utime(path, ns=(time.time_ns(),) * 2)  # touch() is too coarse to order by
        return path

    def _name(self, url: str) -> str:
        """Of the URL and what tells its file's versions apart (size, date, tag)."""
        if url not in self._names:
            self._names[url] = version_of(url)
        return self._names[url]

    def _fetch(
        self,
        url: str,
        path: Path,
        sha256: str | None,
        convert: Callable[[Path, Path], None] | None,
    ) -> None:
        fs, there = filesystem(url)
        with reaching(url):
            size = int(fs.size(there) or 0)
        self._make_room(size, url)
        raw = path.with_suffix(".raw")
        try:
            copy_file(fs, there, raw, url)
            if sha256 is not None:
                check_sha256(raw, sha256, url)
            with atomic.replace_file(path) as new:
                if convert is None:
                    raw.replace(new)
                else:
                    convert(raw, new)
        finally:
            raw.unlink(missing_ok=True)
        self.fetched += 1
        self._make_room(0, url, keep=path)

    def _make_room(self, size: int, url: str, keep: Path | None = None) -> None:
        """Throw out what was not used for longest until `size` more bytes fit."""
        if size > self.limit:
            raise DataError(
                f"{url} has {size / 2**30:.1f} GiB, more than the cache may hold "
                f"({self.limit / 2**30:.1f} GiB); raise {LIMIT}"
            )
        shards = [one for one in self.folder.iterdir() if len(one.name) == 64]
        held = {}
        for one in shards:
            with suppress(FileNotFoundError):  # another process was faster
                held[one] = one.stat()
        total = sum(stat.st_size for stat in held.values())
        for one in sorted(held, key=lambda one: held[one].st_mtime):
            if total + size <= self.limit:
                return
            if one != keep:
                one.unlink(missing_ok=True)
                total -= held[one].st_size
                log.info("%s left the cache", one.name[:12])


def version_of(url: str) -> str:
    """64 hexadecimal digits of a URL and of what tells its file's versions apart.

    Raises:
        DataError: there is no such file, or it cannot be reached.
    """
    fs, path = filesystem(url)
    with reaching(url):
        fs.invalidate_cache(path)  # a listing that is remembered may be older than the file
        version = f"{url}\0{fs.ukey(path)}"
    return hashlib.sha256(version.encode()).hexdigest()


@contextmanager
def copied(place: Place) -> Iterator[Path]:
    """A local file with the content of a place, gone afterwards where the place is elsewhere.

    Raises:
        DataError: it cannot be read.
    """
    if isinstance(place, Path):
        yield place
        return
    fs, there = filesystem(place)
    with TemporaryDirectory(prefix="prw-") as folder:
        copy_file(fs, there, path := Path(folder) / name_of(place), place)
        yield path


def copy_file(fs: Any, there: str, new: Path, url: str) -> None:
    """Copy a file that is elsewhere, with a few tries.

    Raises:
        DataError: it cannot be read.
    """
    for attempt in range(TRIES):
        try:
            with reaching(url):
                fs.get_file(there, str(new))
            return
        except DataError:
            if attempt + 1 == TRIES:
                raise
            log.warning("%s could not be read, trying again", url)
            time.sleep(PAUSE * 2**attempt)


def _default_folder() -> Path:
    if os.environ.get(FOLDER):
        return Path(os.environ[FOLDER])
    import datasets

    return Path(datasets.config.HF_DATASETS_CACHE) / "prw-shards"


def _default_limit() -> int:
    text = os.environ.get(LIMIT, str(GIB))
    try:
        return int(float(text) * 2**30)
    except ValueError:
        raise DataError(f"{LIMIT} must be a number of GiB, got {text!r}") from None
