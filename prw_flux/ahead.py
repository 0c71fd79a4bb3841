"""Making what the next steps need in another thread, while this one computes."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Final, Generic, TypeAlias, TypeVar, final

import torch

logger = logging.getLogger(__name__)

T = TypeVar("T")
Check: TypeAlias = Callable[[], None]

PATIENCE: Final = 5.0
"""Seconds that a thread which nobody needs any more has for the read that it is in."""


class Ended(BaseException):
    """Nobody waits for what is being made. No Exception: nothing that reads data swallows it."""


@final
class Ahead(Generic[T]):
    """What some steps need, made one after another in another thread, before it is asked for.

    One thread makes everything in the order of the steps, so that what it reads, draws and counts
    is what it would be without: only when is another matter. What went wrong is raised where the
    step that it belongs to is asked for. It must not draw from torch's global generators.

    Use as a context manager: the thread lives while it is open.

    Args:
        make: of a step, called in the other thread. Its second argument is to be called now and
            then; it raises Ended where the context has closed.
        steps: all that will be asked for, in this order.
        depth: how many may be made and not yet taken, at least 1.
    """

    def __init__(self, make: Callable[[int, Check], T], steps: range, depth: int) -> None:
        self._make, self._steps, self._taken = make, steps, 0
        # queues in C: a signal that ends a wait in them leaves no lock behind
        self._ready: SimpleQueue[Future[T]] = SimpleQueue()
        self._room: SimpleQueue[None] = SimpleQueue()
        for _ in range(depth):
            self._room.put(None)
        self._failed: Future[T] | None = None
        self._closed = False
        self._device = torch.cuda.current_device() if torch.cuda.is_initialized() else None
        # daemon: a read that never returns must not keep the process alive
        self._thread = threading.Thread(target=self._work, daemon=True, name="preparing batches")

    def __enter__(self) -> Ahead[T]:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._closed = True
        self._room.put(None)
        self._thread.join(PATIENCE)
        if self._thread.is_alive():
            logger.warning("a read of data has not returned for %.0f s and is left alone", PATIENCE)

    def take(self, step: int) -> T:
        """What `make` returned for a step; waits for it.

        Raises:
            ValueError: it is another one's turn.
            BaseException: what `make` raised, also when it is asked again.
        """
        if self._taken >= len(self._steps) or step != self._steps[self._taken]:
            raise ValueError(f"step {step} is not the next of {self._steps}, {self._taken} taken")
        found = self._failed or self._ready.get()
        if found.exception() is not None:
            self._failed = found
        result = found.result()
        self._taken += 1
        self._room.put(None)
        return result

    def _work(self) -> None:
        if self._device is not None:
            torch.cuda.set_device(self._device)  # a thread begins with the first one
        torch.get_num_threads()  # takes over what set_num_threads said: without, all cores
        # autocast's cache is the process's, emptied where a thread leaves its outermost autocast;
        # this one is left when nobody is in a step
        with torch.autocast("cpu", enabled=False):
            for step in self._steps:
                self._room.get()
                if self._closed or not self._went_well(step):
                    break
            while not self._closed:
                self._room.get()

    def _went_well(self, step: int) -> bool:
        found: Future[T] = Future()
        try:
            found.set_result(self._make(step, self._check))
        except Ended:
            return False
        except BaseException as problem:
            found.set_exception(problem)
        self._ready.put(found)
        return found.exception() is None

    def _check(self) -> None:
        if self._closed:
            raise Ended
