"""Stopping on request: a signal is remembered, the work at hand is finished, the state saved."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class Interrupted(Exception):
    """Work ended because of a signal, its state saved; `status` is the shell's 128 + signal."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.number = number
        self.status = 128 + number


class Requested(BaseException):
    """A signal arrived inside `Stop.at_once`. No Exception: nothing that reads data swallows it."""


class Stop:
    """Remembers Ctrl-C and SIGTERM while its ``with`` block is open; a second Ctrl-C is immediate.

    Outside the main thread, where Python delivers no signals, it never stops anything.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.number: int | None = None
        self._before: dict[int, Any] = {}
        self._at_once = False

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            self._before = {n: signal.signal(n, self._remember) for n in self.SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.number is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.number = number
        if self._at_once:
            raise Requested

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """While open, a signal ends the block: for reads that may take long and change nothing.

        Raises:
            Requested: one has arrived. In other threads than the main one, never.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        self._at_once = True
        try:
            if self.requested:
                raise Requested
            yield
        finally:
            self._at_once = False

    @property
    def requested(self) -> bool:
        """Whether a signal has arrived."""
        return self.number is not None
