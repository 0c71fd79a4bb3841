"""What a run measures between its steps, and who is told. None of it changes a bit of training."""

from __future__ import annotations

import logging
import resource
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Final, final

import torch

import prw
from prw import ConfigError
from prw.telemetry import merged, summarise
from prw_flux.coredi.collapse import Watch
from prw_flux.curriculum import Stage
from prw_flux.data.choose import open_held_out, require_feeds
from prw_flux.draws import held_out_stage
from prw_flux.grids import Grids
from prw_flux.held_out import HeldOut
from prw_flux.objective import Objective, StepLoss
from prw_flux.optimization import learning_rate
from prw_flux.progress import Quiet
from prw_flux.resume import Position, steps_before
from prw_flux.rundir import RunFolder
from prw_flux.sample_cache.wanted import held_out_count
from prw_flux.samples import Samples
from prw_flux.tasks import TASKS, DataSource
from prw_flux.tracking import Trackers, by_block, tracked

logger = logging.getLogger(__name__)

BLOCKS_EVERY: Final = 10
"""Lines of the log from one with the figures of every block to the next."""

Averaged = Callable[[], AbstractContextManager[None]]


@final
class Monitor:
    """Held-out loss, grids of pictures, routing per block, log and trackers of one run.

    Args:
        run: the folder.
        objective: of the run; every process measures, since a base may be spread over all.
        data: what is trained on, whose held-out side is opened where it is needed.
        step: steps of the curriculum that are done.
        averaged: inside it the adapter has the moving averages; None where the run has none.
        writes: whether this process is the one that writes.
        progress: told each line of the log.

    Raises:
        ConfigError: a tracker that cannot be used, or data without a held-out side.
    """

    def __init__(
        self,
        run: RunFolder,
        objective: Objective,
        data: DataSource,
        *,
        step: int = 0,
        averaged: Averaged | None = None,
        writes: bool = True,
        progress: Quiet | None = None,
    ) -> None:
        config = run.config
        self.run, self.config, self.objective = run, config, objective
        self.averaged, self.writes = averaged, writes
        self.progress = progress or Quiet()
        self.watch = Watch(config.coredi)
        self.data = open_held_out(config, data) if held_out_count(config) else None
        if writes and self.data is not None:
            warn_of_few(self.data, held_out_count(config))
        self.trackers = Trackers.open(run, step) if writes else Trackers()
        self._held_out: HeldOut | None = None
        self._grids: Grids | None = None

    def begin(self, number: int) -> None:
        """Stage `number` begins, or goes on: its held-out samples are encoded."""
        self._held_out, self._grids = None, None
        self.watch = Watch(self.config.coredi)
        task, stage = self.objective.session.tasks[number], self.config.stages[number]
        if self.data is None:
            return
        try:
            require_feeds(self.data, task, frozenset(TASKS))
        except ConfigError as problem:
            logger.warning("stage %s is trained without held-out samples: %s", stage.name, problem)
            return
        samples, config, size = self._samples(number, self.data), self.config, stage.batch_size
        if config.held_out.samples:
            self._held_out = HeldOut(
                samples, self.objective, seed=config.seed, stage=stage.name, size=size
            )
        if config.sample_every:
            self._grids = Grids(config, self.objective, samples, self.run.grids)

    def _samples(self, number: int, data: DataSource) -> Samples:
        config, session, stage = self.config, self.objective.session, self.config.stages[number]
        name = held_out_stage(stage.name)
        return Samples(
            data,
            session.tasks[number],
            session.pipe,
            stage=name,
            seed=config.seed,
            batch_size=stage.batch_size,
            count=config.held_out.samples,
            encoder=session.encoder,
            max_rejected=config.data.max_rejected,
            cache=session.tables.get(name),
            ranks=self.objective.ranks,
        )

    # After a step -----------------------------------------------------------------------------

    def after(self, loss: StepLoss, samples: Samples, stage: Stage, position: Position) -> None:
        """A step was taken: a line for the log and a grid of pictures, where they are due.

        Args:
            loss: of the step.
            samples: that the stage trains on.
            stage: that trains.
            position: after the step.
        """
        done = steps_before(self.config, position)
        if self._is_logged(stage, position.step):
            line = self._line(loss, samples, stage, position)
            self._log(line, stage, done)
            self.progress.logged(line)
        self._draw(stage, position.step, done)

    def _is_logged(self, stage: Stage, step: int) -> bool:
        ends = step in (1, stage.steps) or step % self.config.log_every == 0
        return ends or self._is_due(stage, step)

    def _is_due(self, stage: Stage, step: int) -> bool:
        """Whether held-out samples are looked at after `step` steps of a stage."""
        due = step % self.config.held_out.every == 0 or step == stage.steps
        return self._held_out is not None and due

    def _line(
        self, loss: StepLoss, samples: Samples, stage: Stage, position: Position
    ) -> dict[str, Any]:
        """All that is known after a step."""
        quiet = self.objective.quiet(samples, stage, position.step - 1)
        line: dict[str, Any] = {
            "stage": stage.name,
            "task": samples.task.name,
            "step": position.step,
            "loss": float(loss.flow),
            "gate_loss": float(loss.gate),
            "usage_noisy": self.objective.usage(loss.records),
            "usage_deterministic": self.objective.usage([quiet]),
            "lr": learning_rate(self.config.optimizer, stage, position.step - 1),
            "seconds": round(position.seconds, 3),
            "memory_mib": memory_mib(),
        }
        if loss.features is not None:
            line |= loss.features.line(self.watch, position.step)
        line |= self._routing(loss.records, quiet)
        return line | self._measured(stage, position.step)

    def _measured(self, stage: Stage, step: int) -> dict[str, float]:
        """Loss, usage and margin on held-out samples, nothing where they are not due.

        ``held_out_loss_ema`` is that of the moving averages, where the run has them.
        """
        if self._held_out is None or not self._is_due(stage, step):
            return {}
        found = self._held_out.measure()
        line = {
            "held_out_loss": found.loss,
            "held_out_usage": found.record.usage(),
            "held_out_margin": float(summarise(found.record).margin()),
        }
        if self.averaged is not None:
            with self.averaged():
                line["held_out_loss_ema"] = self._held_out.measure().loss
        return line

    def _routing(self, noisy: Sequence[prw.Record], quiet: prw.Record) -> dict[str, Any]:
        """Margins of the gate, and by block the usage in both modes and the margin.

        Args:
            noisy: of this process's forwards of the step.
            quiet: of the same samples without noise.
        """
        loud = merged(summarise(record) for record in noisy)
        still = summarise(quiet)
        blocks, calm = by_block(loud), by_block(still)
        return {
            "margin_noisy": float(loud.margin()),
            "margin_deterministic": float(still.margin()),
            "blocks": {
                "usage_noisy": blocks["usage"],
                "usage_deterministic": calm["usage"],
                "margin": calm["margin"],
            },
        }

    def _log(self, line: Mapping[str, Any], stage: Stage, done: int) -> None:
        """Write a line and tell the trackers.

        The figures of single blocks are written with every tenth line and those of held-out looks.
        """
        step, often = line["step"], BLOCKS_EVERY * self.config.log_every
        whole = step in (1, stage.steps) or step % often == 0 or "held_out_loss" in line
        if self.writes:
            self.run.log({k: v for k, v in line.items() if k != "blocks" or whole})
            self.trackers.log(tracked(line), done)

    def _draw(self, stage: Stage, step: int, done: int) -> None:
        """Draw a grid where one is due, with the averages where the run has them."""
        if self._grids is None or (step % self.config.sample_every and step != stage.steps):
            return
        if self.averaged is not None:
            with self.averaged():
                picture = self._grids.draw()
        else:
            picture = self._grids.draw()
        if self.writes:
            self._grids.write(picture, stage.name, step)
            self.trackers.picture(f"{stage.name}/samples", picture, done)

    def close(self) -> None:
        """Write what trackers still hold."""
        self.trackers.close()


def warn_of_few(data: DataSource, wanted: int) -> None:
    """Tell where held-out samples are made of fewer pictures."""
    if wanted > len(data):
        logger.warning(
            "%d held-out samples are wanted, and the held-out side of %s has %d: some are of one "
            "picture, and their mean says little about others; add data, or lower held_out.samples",
            wanted, data.name, len(data),
        )  # fmt: skip


def memory_mib() -> int:
    """Largest memory so far: of the GPU where there is one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() >> 20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
