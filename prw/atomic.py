"""Replacing a folder or a file in one step: a crash leaves the old or the new, never half."""

from __future__ import annotations

import ctypes
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_HERE = -100  # AT_FDCWD: paths are relative to the working directory
_EXCHANGE = 2  # RENAME_EXCHANGE


@contextmanager
def replace_folder(path: str | Path) -> Iterator[Path]:
    """Yield an empty folder beside `path`; when the block ends well it takes the place of `path`.

    All files are synced to disk before, and may be read by whom the umask lets, which safetensors
    0.8 forgets. When the block raises, the new folder is removed and `path` is untouched.

    Raises:
        NotADirectoryError: `path` is a file or a device, which is left alone.
    """
    path = Path(os.path.abspath(path))
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"{path} is no folder; choose another name")
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = path.with_name(f".{path.name}.{uuid.uuid4().hex}.new")
    folder.mkdir()
    try:
        yield folder
        for file in [*folder.rglob("*"), folder]:
            if file.is_file():
                file.chmod(folder.stat().st_mode & 0o666)
            _fsync(file)
        _install(folder, path)
        _fsync(path.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def replace_file(path: str | Path) -> Iterator[Path]:
    """Yield the name of a file beside `path`; when the block ends well it takes `path`'s place.

    It is synced to disk before, and may be read by whom the umask lets. When the block raises, it
    is removed and `path` is untouched.

    Raises:
        FileExistsError: `path` is a folder or a device, which is left alone.
    """
    path = Path(os.path.abspath(path))
    if path.exists() and not path.is_file():
        raise FileExistsError(f"{path} is no file; choose another name")
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.{uuid.uuid4().hex}.new")
    new.touch()
    mode = new.stat().st_mode & 0o666
    try:
        yield new
        new.chmod(mode)
        _fsync(new)
        new.replace(path)
        _fsync(path.parent)
    finally:
        new.unlink(missing_ok=True)


def settle(path: str | Path) -> None:
    """Put back the folder that a crash caught halfway, where the system cannot exchange two."""
    path = Path(os.path.abspath(path))
    if not path.exists() and _previous(path).is_dir():
        _previous(path).rename(path)


def sweep(path: str | Path) -> None:
    """Remove what writers of `path` left beside it when they were killed; nobody may be writing."""
    path = Path(os.path.abspath(path))
    for left in path.parent.glob(f".{path.name}.*.new"):
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def _install(new: Path, path: Path) -> None:
    settle(path)
    if not path.exists():
        new.rename(path)
    elif not _exchange(new, path):
        shutil.rmtree(_previous(path), ignore_errors=True)
        path.rename(_previous(path))
        new.rename(path)
        shutil.rmtree(_previous(path))


def _previous(path: Path) -> Path:
    return path.with_name(f".{path.name}.previous")


def _exchange(one: Path, other: Path) -> bool:
    """Swap two folders in one system call, where the system and its file system have one."""
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    if renameat2 is None:
        return False
    status: int = renameat2(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE)
    return status == 0


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
