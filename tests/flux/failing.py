"""A disk that fails: every write of a block is counted, and one of them goes wrong."""

from __future__ import annotations

import errno
import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

CALLS = {os: ("fsync",), Path: ("write_text", "mkdir", "rename", "replace", "chmod")}
SAVERS = ("prw.checkpoint", "prw_flux.resume", "prw_flux.coredi.model")
"""Modules that write tensors by their own name `save_file`."""


def full() -> None:
    """What a full disk says."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@contextmanager
def failing(at: int, act: Callable[[], None] = full) -> Iterator[list[str]]:
    """Inside, the write number `at` and all later ones leave half a file and call `act`.

    Yields the names of the writes so far.
    """
    done: list[str] = []

    def wrapped(name: str, original: Any) -> Any:
        def write(*args: Any, **kwargs: Any) -> Any:
            done.append(name)
            if len(done) <= at:
                return original(*args, **kwargs)
            if name in ("write_text", "save_file"):
                original(*args, **kwargs)
                file = Path(args[0] if name == "write_text" else args[1])
                os.truncate(file, file.stat().st_size // 2)
            return act()

        return write

    with ExitStack() as held:
        for owner, names in CALLS.items():
            for name in names:
                new = wrapped(name, getattr(owner, name))
                held.enter_context(patch.object(owner, name, new))
        for module in map(importlib.import_module, SAVERS):
            new = wrapped("save_file", vars(module)["save_file"])
            held.enter_context(patch.object(module, "save_file", new))
        yield done
