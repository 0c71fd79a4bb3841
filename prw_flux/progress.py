"""What a person watching a run sees; without a terminal, nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from prw_flux.curriculum import Stage


class Quiet:
    """Shows nothing; the methods are told what happens."""

    def __enter__(self) -> Quiet:
        return self

    def __exit__(self, *exception: object) -> None:
        return None

    def plan(self, stages: Sequence[Stage], number: int, done: int) -> None:
        """Training begins, or goes on, after `done` steps of stage `number`."""

    def begin(self, number: int, total: int, stage: Stage) -> None:
        """Stage `number` of `total` begins, or goes on after a resume."""

    def encoded(self, done: int, total: int) -> None:
        """So many of the stage's samples are encoded."""

    def stepped(self, done: int) -> None:
        """So many steps of the stage are done."""

    def waiting(self, seconds: float) -> None:
        """Training has waited so long for data and still does; told from another thread."""

    def logged(self, line: Mapping[str, Any]) -> None:
        """A line was added to the log."""

    def measured(self, what: str, done: int, total: int) -> None:
        """So many pictures of one part of the evaluation are generated."""


class Bars(Quiet):
    """A bar per stage: steps, loss, usage of the newest expert with and without noise, time left.

    Of several stages, one more bar is the whole curriculum, in samples: a step with twice the batch
    counts twice, so that the time left follows from the speed of any stage.

    Args:
        console: where to draw.
    """

    def __init__(self, console: Console) -> None:
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[state]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            refresh_per_second=4,
        )
        self._stages: Sequence[Stage] = ()
        self._whole: TaskID | None = None
        self._before, self._state = 0, ""
        self._label = ""
        self._stage: Stage | None = None
        self._bar: TaskID | None = None

    def __enter__(self) -> Bars:
        self._bars.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bars.stop()

    def plan(self, stages: Sequence[Stage], number: int, done: int) -> None:
        self._stages = stages
        if 1 < len(stages) > number:
            seen = samples_of(stages[:number]) + done * stages[number].batch_size
            total = samples_of(stages)
            self._whole = self._bars.add_task(
                "all stages", total=total, completed=seen, state="samples"
            )

    def begin(self, number: int, total: int, stage: Stage) -> None:
        self._before = samples_of(self._stages[:number])
        self._label, self._stage = f"stage {number + 1}/{total} {stage.name}", stage
        self._bar = None

    def encoded(self, done: int, total: int) -> None:
        if self._bar is None:
            self._bar = self._bars.add_task(self._label, total=total, state="encoding samples")
        self._bars.update(self._bar, completed=done)
        if done >= total:
            self._bars.remove_task(self._bar)
            self._bar = None

    def stepped(self, done: int) -> None:
        assert self._stage is not None
        if self._bar is None:
            total = self._stage.steps
            self._bar = self._bars.add_task(self._label, total=total, completed=done, state="")
        self._bars.update(self._bar, completed=done, state=self._state)
        if self._whole is not None:
            trained = self._before + done * self._stage.batch_size
            self._bars.update(self._whole, completed=trained)

    def waiting(self, seconds: float) -> None:
        if self._bar is not None:
            self._bars.update(self._bar, state=f"waiting for data {seconds:.0f} s")

    def logged(self, line: Mapping[str, Any]) -> None:
        if self._bar is not None:
            usage = f"usage {line['usage_noisy']:.2f}/{line['usage_deterministic']:.2f}"
            self._state = f"loss {line['loss']:.4f}  {usage}"
            if "held_out_loss" in line:
                self._state += f"  held out {line['held_out_loss']:.4f}"
            self._bars.update(self._bar, state=self._state)

    def measured(self, what: str, done: int, total: int) -> None:
        if self._bar is None:
            self._bar = self._bars.add_task("evaluation", total=total, state="")
        self._bars.update(self._bar, total=total, completed=done, state=what)


def samples_of(stages: Sequence[Stage]) -> int:
    """How many samples stages train on, repeats counted."""
    return sum(stage.steps * stage.batch_size for stage in stages)


def watching(console: Console, *, quiet: bool = False) -> Quiet:
    """Bars on a terminal, nothing elsewhere."""
    return Bars(console) if console.is_terminal and not quiet else Quiet()
