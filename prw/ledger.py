"""The stage ledger: which stages there are, in order, and which one is open. Pure values."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, replace

from prw.errors import StageError

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}")


@dataclass(frozen=True)
class Stage:
    """One step of the curriculum. It owns the expert with its index.

    Attributes:
        name: unique, part of file names.
        index: position, from 0.
        open: whether it is the stage that goes on now, the only time its expert learns by itself.
        exempt: whether `Ledger.freeze` or `Ledger.thaw` turned that rule around for this expert.
    """

    name: str
    index: int
    open: bool
    exempt: bool = False

    @property
    def learns(self) -> bool:
        """Whether the expert of this stage learns now."""
        return self.open != self.exempt


@dataclass(frozen=True)
class Ledger:
    """An immutable list of stages; every change returns a new ledger.

    A ledger is valid when indices count from 0, names are unique, at most one stage is open, and
    nothing is exempt while none is.
    """

    stages: tuple[Stage, ...] = ()

    def __post_init__(self) -> None:
        for index, stage in enumerate(self.stages):
            if not isinstance(stage.name, str) or not _NAME.fullmatch(stage.name):
                raise StageError(
                    f"{stage.name!r} cannot name a stage: use 1 to 64 letters, digits, '_', '-' "
                    "or '.', beginning with a letter, a digit or '_'"
                )
            if stage.index != index:
                raise StageError(f"stage {stage.name!r} has index {stage.index}, expected {index}")
        if len({stage.name.casefold() for stage in self.stages}) != len(self.stages):
            raise StageError(f"stage names must differ, got {', '.join(self.names)}")
        if sum(stage.open for stage in self.stages) > 1:
            raise StageError("at most one stage can be open")
        thawed = next((stage.name for stage in self.stages if stage.exempt), None)
        if thawed is not None and self.newest is None:
            raise StageError(f"the expert {thawed!r} cannot learn while no stage is open")

    def __len__(self) -> int:
        return len(self.stages)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all stages, oldest first."""
        return tuple(stage.name for stage in self.stages)

    @property
    def newest(self) -> Stage | None:
        """The open stage, whose expert learns; None between stages."""
        return next((stage for stage in self.stages if stage.open), None)

    def __getitem__(self, name: str) -> Stage:
        """The stage called `name`; raises StageError, naming the nearest, when there is none."""
        for stage in self.stages:
            if stage.name == name:
                return stage
        near = difflib.get_close_matches(str(name), self.names, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(self.names)}"
        raise StageError(f"there is no stage {name!r}; {hint if self.stages else 'unlock one'}")

    def unlock(self, name: str) -> Ledger:
        """Close the open stage, if any, and open a new one at the end."""
        if name in self.names:
            raise StageError(f"stage {name!r} exists already; stage names must differ")
        return Ledger((*self.close().stages, Stage(name, len(self), open=True)))

    def close(self) -> Ledger:
        """Close the open stage, if any; every expert follows the rule again."""
        return Ledger(tuple(replace(stage, open=False, exempt=False) for stage in self.stages))

    def rollback(self, name: str) -> Ledger:
        """Drop every stage after `name`, which ends up closed."""
        kept = self.close()
        return Ledger(kept.stages[: self[name].index + 1])

    def rename(self, old: str, new: str) -> Ledger:
        """Give the stage `old` another name."""
        stage = self[old]
        if new in self.names:
            raise StageError(f"stage {new!r} exists already; stage names must differ")
        return self._with(replace(stage, name=new))

    def freeze(self, name: str) -> Ledger:
        """Let the expert of a stage learn no longer, until the open stage ends."""
        stage = self[name]
        return self._with(replace(stage, exempt=stage.open))

    def thaw(self, name: str) -> Ledger:
        """Let the expert of a stage learn until the open stage ends.

        Raises:
            StageError: there is no such stage, or none is open.
        """
        stage = self[name]
        if self.newest is None:
            raise StageError(f"no stage is open, so {name!r} cannot learn; unlock a stage first")
        return self._with(replace(stage, exempt=not stage.open))

    def _with(self, changed: Stage) -> Ledger:
        return Ledger(tuple(changed if s.index == changed.index else s for s in self.stages))
