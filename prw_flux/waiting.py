"""Saying that a reader is slow, while it is."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

logger = logging.getLogger(__name__)

PATIENCE: Final = 1.0
"""Seconds before anybody is told, and between two times."""
WORTH_A_LINE: Final = 60.0
"""Seconds from one warning in the log to the next."""


@contextmanager
def waiting(tell: Callable[[float], None], patience: float = PATIENCE) -> Iterator[None]:
    """Call `tell` with the seconds that the block has taken, again and again while it is open.

    It runs in another thread, so the block may hang in a read without the screen standing still.
    """
    began = time.monotonic()
    over = threading.Event()

    def watch() -> None:
        warned = 0.0
        while not over.wait(patience):
            seconds = time.monotonic() - began
            tell(seconds)
            if seconds - warned >= WORTH_A_LINE:
                logger.warning("training has waited for data for %.0f seconds", seconds)
                warned = seconds

    watcher = threading.Thread(target=watch, daemon=True, name="waiting for data")
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()
