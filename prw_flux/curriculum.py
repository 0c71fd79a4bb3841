"""The five steps of CoLoGen, in the order in which their experts are unlocked."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from prw import ConfigError
from prw_flux.schema import settle

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,63}")


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One step of a curriculum: it unlocks one expert and trains it on one task.

    Attributes:
        task: a task of `prw_flux.tasks`, or ``package.module:object``.
        name: of the stage and of its expert; by default that of the task.
        steps: optimizer steps.
        batch_size: samples per step.
        lr: learning rate of the experts.
        density: share of the routing that the newest expert should take (CoLoGen, Eq. 10).
        weight: factor of that loss; the first stage, which has one expert, needs none.

    Raises:
        ConfigError: a value that cannot work.
    """

    task: str
    name: str = ""
    steps: int
    batch_size: int
    lr: float = 1e-4
    density: float = 0.8
    weight: float = 0.5

    def __post_init__(self) -> None:
        settle(self)
        if not self.name:
            object.__setattr__(self, "name", self.task.partition(":")[2].lower() or self.task)
        if not NAME.fullmatch(self.name):
            raise ConfigError(f"name {self.name!r} is no name: use letters, digits, _ and -")
        for field in ("steps", "batch_size"):
            if getattr(self, field) < 1:
                raise ConfigError(f"{field} must be at least 1, got {getattr(self, field)}")
        if not 0.0 < self.lr < 1e3:
            raise ConfigError(f"lr must be a positive number, got {self.lr}")
        if not 0.0 <= self.density <= 1.0:
            raise ConfigError(f"density must lie in [0, 1], got {self.density}")
        if not 0.0 <= self.weight < 1e6:
            raise ConfigError(f"weight must be at least 0, got {self.weight}")


PAPER: Final = (
    Stage(task="inpaint", steps=200_000, batch_size=256, density=1.0, weight=0.0),
    Stage(task="ground", steps=200_000, batch_size=256),
    Stage(task="control", steps=400_000, batch_size=128),
    Stage(task="customise", steps=50_000, batch_size=128),
    Stage(task="edit", steps=200_000, batch_size=128),
)
"""CoLoGen, Table 1: iterations, batch sizes, learning rate, densities and weights."""


def scaled(
    stages: Sequence[Stage],
    factor: float = 1.0,
    *,
    batch_size: int | None = None,
    lr: float | None = None,
) -> tuple[Stage, ...]:
    """The same curriculum with fewer or more steps; densities and weights stay what they are.

    Args:
        factor: of every stage's steps, which stay at least 1.
        batch_size, lr: of every stage; None keeps them.

    Raises:
        ConfigError: if the factor is not positive.
    """
    if not factor > 0:
        raise ConfigError(f"a curriculum is scaled by a positive factor, got {factor}")
    return tuple(
        replace(
            stage,
            steps=max(1, round(stage.steps * factor)),
            batch_size=stage.batch_size if batch_size is None else batch_size,
            lr=stage.lr if lr is None else lr,
        )
        for stage in stages
    )
