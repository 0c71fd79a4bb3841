"""When stages begin inside a `transformers.Trainer`, and the data of each. Extra ``peft``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any, Literal

import torch
from torch.utils.data import Sampler
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from prw.errors import ConfigError, StageError
from prw.ledger import Ledger
from prw.noise import group_id
from prw.weaving import Weave


class StageCallback(TrainerCallback):
    """Unlocks one stage after another and keeps the optimizer in step.

    It holds no progress of its own: the stage follows from the trainer's state, so a resumed
    training goes on where it was. When all stages have had their time, the last one is closed at
    the end of `train`.

    Args:
        weave: whose stages begin.
        stages: in order, how long each lasts.
        unit: ``"steps"`` of the optimizer, or ``"epochs"``.

    Raises:
        ConfigError: no weave, no stage, or one that lasts less than one unit.
        StageError: names that cannot be stages.
    """

    def __init__(
        self,
        weave: Weave,
        stages: Mapping[str, int],
        unit: Literal["steps", "epochs"] = "steps",
    ) -> None:
        if not isinstance(weave, Weave):
            raise ConfigError(f"weave must be a prw.Weave, got a {type(weave).__name__}")
        lengths = stages.values() if isinstance(stages, Mapping) else [0]
        if not stages or not all(type(length) is int and length > 0 for length in lengths):
            raise ConfigError(
                f"stages must map names to whole numbers above 0, such as {{'first': 100}}, got "
                f"{stages!r}"
            )
        if unit not in ("steps", "epochs"):
            raise ConfigError(f'unit must be "steps" or "epochs", got {unit!r}')
        ledger = Ledger()
        for name in stages:
            ledger = ledger.unlock(name)
        self.weave = weave
        self.stages = dict(stages)
        self.unit = unit

    @property
    def total(self) -> int:
        """How long all stages last together."""
        return sum(self.stages.values())

    def progress(self, state: TrainerState) -> int:
        """How many whole units are behind the trainer."""
        return int(state.global_step if self.unit == "steps" else state.epoch or 0)

    def stage(self, progress: int) -> str:
        """The stage that is open after so many units; the last one after all."""
        ends = accumulate(self.stages.values())
        open_now = (name for name, end in zip(self.stages, ends, strict=True) if progress < end)
        return next(open_now, list(self.stages)[-1])

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: torch.optim.Optimizer | None = None,
        **kwargs: Any,
    ) -> None:
        """Open the stage whose time has come.

        Here and not at the beginning of an epoch, because here a resumed trainer has its random
        state back, from which a new expert is drawn.

        Raises:
            StageError: the stage was trained before, or the one before it was not.
            ConfigError: there are several processes.
        """
        name = self.stage(self.progress(state))
        if self.weave.newest == name:
            return
        there, order = self.weave.ledger.names, list(self.stages)
        if name in there:
            raise StageError(
                f"stage {name!r} is closed already; leave it out of the callback, or go on from a "
                "checkpoint with resume_from_checkpoint"
            )
        before = order[order.index(name) - 1] if order.index(name) else None
        if before is not None and before not in there:
            raise StageError(f"stage {name!r} should begin, but {before!r} was never trained")
        if args.world_size > 1 or args.deepspeed:
            raise ConfigError(
                f"stage {name!r} cannot begin inside train() over {args.world_size} processes, "
                "which know only the parameters there were at its beginning; unlock() each stage "
                "before a train() of its own, without this callback"
            )
        self.weave.unlock(name)
        if optimizer is not None:
            self.weave.sync(optimizer)

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Close the last stage if it had its time."""
        if self.progress(state) >= self.total and self.weave.newest == list(self.stages)[-1]:
            self.weave.close()


class StageSampler(Sampler[int]):
    """Rows of several datasets, laid end to end, so that each stage sees only its own.

    A pure function of the seed: within a stage, permutations of its dataset follow each other.

    Args:
        sizes: rows of each stage's dataset.
        rows: how many rows each stage takes.
        seed: of the permutations.
    """

    def __init__(self, sizes: Sequence[int], rows: Sequence[int], seed: int) -> None:
        self.sizes, self.rows, self.seed = list(sizes), list(rows), seed

    def __len__(self) -> int:
        return sum(self.rows)

    def __iter__(self) -> Iterator[int]:
        offset = 0
        for stage, (size, rows) in enumerate(zip(self.sizes, self.rows, strict=True)):
            draw = torch.Generator().manual_seed(group_id(f"data/{self.seed}/{stage}") >> 1)
            for begin in range(0, rows, size):
                order = torch.randperm(size, generator=draw)[: rows - begin]
                yield from (order + offset).tolist()
            offset += size
