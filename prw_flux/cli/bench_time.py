"""How long the parts of a command took, by the clock and by the processor."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import final


@final
class Stopwatch:
    """Times of named parts, in order. Processor time is this process's, all threads together: on
    a machine that is shared with others it is the figure that can be compared."""

    def __init__(self) -> None:
        self._parts: dict[str, dict[str, float]] = {}

    @contextmanager
    def timing(self, name: str, items: int) -> Iterator[None]:
        """Times the block, in which `items` things are done."""
        clock, processor = time.perf_counter(), time.process_time()
        try:
            yield
        finally:
            self._parts[name] = {
                "items": items,
                "seconds": round(time.perf_counter() - clock, 3),
                "processor": round(time.process_time() - processor, 3),
            }

    def to_json(self) -> dict[str, dict[str, float]]:
        """By part: items, seconds, processor seconds."""
        return self._parts

    def __str__(self) -> str:
        """As in: pictures 2560 in 190.2 s (187.0 s of processor), scores ..."""
        return ", ".join(
            f"{name} {part['items']:.0f} in {part['seconds']:.1f} s ({part['processor']:.1f} s of "
            "processor)" for name, part in self._parts.items()
        )  # fmt: skip
