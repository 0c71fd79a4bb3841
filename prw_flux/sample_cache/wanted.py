"""The samples of a run that a cache is to have: of every stage those that train, then those held
out."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Final, final

from prw_flux.config import RunConfig
from prw_flux.curriculum import Stage
from prw_flux.data.choose import feeds, open_held_out
from prw_flux.draws import Draws, held_out_stage
from prw_flux.tasks import TASKS, DataSource, Task

DRAWN: Final = 4
"""Held-out samples of a grid of pictures."""


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Wanted:
    """`count` samples of one side of a stage.

    Attributes:
        draws: what makes them; `draws.stage` is their name.
        stage: the stage's.
    """

    draws: Draws
    count: int
    stage: str

    @property
    def held_out(self) -> bool:
        """Whether they are never trained on."""
        return self.draws.stage != self.stage

    @property
    def told(self) -> str:
        """For people."""
        return f"{'held-out ' * self.held_out}samples of stage {self.stage!r}"


def sample_count(config: RunConfig, stage: Stage) -> int:
    """How many samples a stage has: data.samples, or what its steps draw one after the other.

    With a feature stream, also those whose features give the principal components.
    """
    if config.data.samples is not None:
        return config.data.samples
    drawn = max(stage.steps, -(-config.remember // stage.batch_size)) * stage.batch_size
    return max(drawn, config.coredi.fit_images) if config.coredi.enabled else drawn


def held_out_count(config: RunConfig) -> int:
    """How many held-out samples a stage needs: those that are measured, and those of the grids."""
    return max(config.held_out.samples, DRAWN if config.sample_every else 0)


def wanted(
    config: RunConfig, data: DataSource, tasks: Sequence[Task], finished: Collection[str] = ()
) -> list[Wanted]:
    """What the stages of a run read.

    Args:
        config, data, tasks: the run, its data source, the task of each stage.
        finished: stages that read nothing any more.

    Raises:
        ConfigError, PhotoError: held-out samples are asked for, and the source has none.
    """
    count, found = held_out_count(config), []
    other = open_held_out(config, data) if count else None

    def draws(side: DataSource, task: Task, name: str) -> Draws:
        limit = config.data.max_rejected
        return Draws(side, task, stage=name, seed=config.seed, max_rejected=limit)

    for stage, task in zip(config.stages, tasks, strict=True):
        name = stage.name
        if name in finished:
            continue
        trained = draws(data, task, name)
        found.append(Wanted(draws=trained, count=sample_count(config, stage), stage=name))
        if other is not None and feeds(other, task, frozenset(TASKS)):
            held = draws(other, task, held_out_stage(name))
            found.append(Wanted(draws=held, count=count, stage=name))
    return found
