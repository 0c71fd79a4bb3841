"""Files that are elsewhere: Hub data sets and anything else that fsspec opens.

A place is a local path or a URL: ``hf://datasets/OWNER/NAME/...``, ``s3://BUCKET/...``, ``gs://``,
``https://``. What they need is one package each, and a missing one is named.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Final, TypeAlias, final

from prw_flux.data.rows import DataError

Place: TypeAlias = Path | str
"""A local path, or a URL as a text."""

EDGE: Final = 1 << 20
PACKAGES: Final = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "abfs": "adlfs",
                   "az": "adlfs", "hf": "huggingface_hub", "http": "aiohttp",
                   "https": "aiohttp"}  # fmt: skip


def is_url(where: Place) -> bool:
    """Whether a place is elsewhere."""
    return isinstance(where, str) and re.match(r"[a-z][a-z0-9+.-]*://", where) is not None


def place_of(text: str) -> Place:
    """A place as a user writes it."""
    return text if is_url(text) else Path(text).expanduser()


def name_of(place: Place) -> str:
    """The file's name."""
    return place.name if isinstance(place, Path) else place.rstrip("/").rsplit("/", 1)[-1]


def found_files(where: Place, suffix: str) -> tuple[Place, ...]:
    """The files at a place, in the order of their names.

    Args:
        where: a file, a folder, or names with ``{000..007}`` and ``*``.
        suffix: of the files that are taken from a folder, with the dot.

    Raises:
        DataError: there are none.
    """
    found = [file for one in braces(str(where)) for file in _listed(one, suffix)]
    if not found:
        raise DataError(f"there are no {suffix} files at {where}")
    return tuple(found)


def braces(text: str) -> list[str]:
    """``a-{000..007}.tar`` and ``{a,b}.tar`` written out."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}", text)
    if match is None:
        return [text]
    low, high, words = match.groups()
    if words is not None:
        inner = words.split(",")
    else:
        width = len(low) if len(low) == len(high) else 0
        inner = [str(n).zfill(width) for n in range(int(low), int(high) + 1)]
    rests = braces(text[match.end() :])
    return [text[: match.start()] + a + b for a, b in itertools.product(inner, rests)]


def _listed(where: str, suffix: str) -> list[Place]:
    if not is_url(where):
        path = Path(where).expanduser()
        if "*" in where and not path.exists():
            root = Path(path.anchor or ".")
            return [*sorted(root.glob(str(path.relative_to(root) if path.anchor else path)))]
        return [*sorted(path.rglob(f"*{suffix}"))] if path.is_dir() else [path] * path.is_file()
    fs, path_there = filesystem(where)
    with reaching(where):
        if "*" in where:
            found = fs.glob(path_there)
        elif fs.isfile(path_there):
            found = [path_there]
        else:
            found = [one for one in fs.find(path_there) if one.endswith(suffix)]
        return [fs.unstrip_protocol(one) for one in sorted(found)]


def filesystem(url: str) -> tuple[Any, str]:
    """The file system of a URL, and the path in it.

    Raises:
        DataError: the package that knows it is not installed, or nothing does.
    """
    scheme = url.split("://", 1)[0]
    try:
        import fsspec
    except ImportError:
        raise DataError(f"{url} needs the package fsspec: pip install prw[train]") from None
    try:
        fs, path = fsspec.core.url_to_fs(url)
    except ImportError:
        package = PACKAGES.get(scheme, f"that opens {scheme}://")
        raise DataError(f"{url} needs the package {package}: pip install {package}") from None
    except ValueError as problem:
        raise DataError(f"{url} cannot be opened ({problem})") from None
    return fs, str(path)


@contextmanager
def reaching(url: str) -> Iterator[None]:
    """Turns whatever a file system raises into one sentence."""
    try:
        yield
    except DataError:
        raise
    except FileNotFoundError:
        raise DataError(f"there is no {url}") from None
    except PermissionError as problem:
        told = " ".join(str(problem).split())[:200]
        raise DataError(f"{url} may not be read ({told}); check your credentials") from problem
    except Exception as problem:
        told = " ".join(f"{type(problem).__name__}: {problem}".split())[:200]
        raise DataError(f"{url} cannot be read ({told})") from problem


@contextmanager
def opened(place: Place) -> Iterator[BinaryIO | RemoteFile]:
    """A place as a file that can be read anywhere in it, without a copy.

    Raises:
        DataError: there is no such file, or it cannot be reached.
    """
    if isinstance(place, Path):
        if not place.is_file():
            raise DataError(f"no such file {place}")
        with place.open("rb") as file:
            yield file
        return
    fs, path = filesystem(place)
    with reaching(place):
        remote = fs.open(path, "rb")
    with remote, RemoteFile(remote, place) as file:
        yield file


@final
class RemoteFile(io.RawIOBase):
    """A file that is elsewhere, whose every failure is one sentence.

    Args:
        file: as a file system opened it.
        url: for messages.
    """

    def __init__(self, file: Any, url: str) -> None:
        self._file, self._url = file, url

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def readinto(self, buffer: Any) -> int:
        """As of every file; raises DataError."""
        with reaching(self._url):
            data = self._file.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """As of every file."""
        return int(self._file.seek(offset, whence))

    def tell(self) -> int:
        """As of every file."""
        return int(self._file.tell())


def read_text(place: Place) -> str:
    """The content of a text file.

    Raises:
        DataError: it cannot be read.
    """
    with opened(place) as file:
        return file.read().decode("utf-8")


def below(folder: Place, name: str) -> Place:
    """A file in a folder."""
    return folder / name if isinstance(folder, Path) else f"{folder.rstrip('/')}/{name}"


def fingerprint(places: Iterable[Place]) -> str:
    """Of the names, sizes and both ends (1 MiB each) of files: a terabyte is not read twice."""
    digest = hashlib.blake2b(digest_size=16)
    for place in places:
        with opened(place) as file:
            size = file.seek(0, os.SEEK_END)
            digest.update(f"{name_of(place)}\0{size}\0".encode())
            file.seek(0)
            digest.update(file.read(EDGE))
            file.seek(max(0, size - EDGE))
            digest.update(file.read(EDGE))
    return digest.hexdigest()


def check_sha256(path: Path, wanted: str, what: str) -> None:
    """Compare a file with the hash that it should have.

    Raises:
        DataError: it is truncated or changed.
    """
    with path.open("rb") as file:
        have = hashlib.file_digest(file, "sha256").hexdigest()
    if have != wanted:
        raise DataError(
            f"{what} is truncated or has changed: its sha256 is {have[:12]}, not {wanted[:12]}"
        )
