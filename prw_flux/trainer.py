"""The training loop: stage after stage, each unlocking one expert (CoLoGen, section 3)."""

from __future__ import annotations

import logging
import resource
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from prw import PRWError
from prw.atomic import sweep
from prw_flux.adapter import PRWAdapter
from prw_flux.config import RunConfig
from prw_flux.coredi.collapse import Watch
from prw_flux.curriculum import Stage
from prw_flux.data.choose import open_data, require_feeds
from prw_flux.interrupt import Interrupted, Stop
from prw_flux.objective import Objective, StepLoss
from prw_flux.optimization import learning_rate, new_optimizer
from prw_flux.progress import Quiet
from prw_flux.resume import (
    Position,
    named_parameters,
    read_average,
    read_moments,
    read_position,
    require_same_data,
    restore_moments,
    save_state,
)
from prw_flux.rundir import INDEX, RunFolder
from prw_flux.samples import Samples, stable_hash
from prw_flux.session import Session
from prw_flux.tasks import TASKS, DataSource

logger = logging.getLogger(__name__)

StageEnd = Callable[[RunFolder, int], None]


class TrainingError(PRWError, RuntimeError):
    """Training cannot go on; the state before the step that failed is saved."""


def open_training_data(config: RunConfig, session: Session) -> DataSource:
    """The run's data source, checked against every stage before anything is trained.

    Raises:
        ConfigError: there is no such source, or it cannot feed a task.
    """
    data = open_data(
        config.data.source, size=config.size, seed=config.seed, photos=config.data.photos
    )
    for task in session.tasks:
        require_feeds(data, task, frozenset(TASKS))
    return data


def train(
    run: RunFolder,
    session: Session,
    data: DataSource,
    *,
    progress: Quiet | None = None,
    stop: Stop | None = None,
    on_stage_end: StageEnd | None = None,
) -> None:
    """Train the stages of a run that are not finished, from where its state says.

    Args:
        run: the folder; `session` must hold the adapter of its state.
        session: base and adapter, from `open_session`.
        data: from `open_training_data`.
        progress: told what happens.
        stop: asked after every step whether to save and leave.
        on_stage_end: called with the run and the number of each stage that has been finished.

    Raises:
        RunError: another process trains this run, or its configuration or data have changed.
        Interrupted: `stop` asked for it; the state is saved.
        TrainingError: a loss or gradient is not finite; the state before it is saved.
    """
    with run.exclusively():
        for written in (run.adapter, run.coredi, run.path / INDEX, run.metrics):
            sweep(written)
        position = read_position(run)
        require_same_data(run, data)
        state = run.state()
        run.states.settle_on(state)
        run.agree(position.stage, {} if state is None else state.facts["ended"])
        run.forget_log_after(position.stage, position.step)
        if run.config.remember:
            _warn_of_stages_without_memory(session.adapter)
        trainer = Trainer(run, session, data, progress or Quiet(), stop or Stop())
        for number in range(position.stage, len(run.config.stages)):
            trainer.run_stage(number, position)
            position = Position(stage=number + 1)
            if on_stage_end is not None:
                on_stage_end(run, number)


def _warn_of_stages_without_memory(adapter: PRWAdapter) -> None:
    pools = adapter.weave.pools.values()
    finished = [stage for stage in adapter.weave.stages if not stage.open]
    blank = [s.name for s in finished if not all(len(p.columns.memory(s.index)) for p in pools)]
    if blank:
        logger.warning(
            "nothing is remembered of %s, trained with remember=0: free routers may forget it",
            ", ".join(blank),
        )


class Trainer:
    """One run in memory; see `train`."""

    def __init__(
        self, run: RunFolder, session: Session, data: DataSource, progress: Quiet, stop: Stop
    ) -> None:
        self.run, self.session, self.data = run, session, data
        self.progress, self.stop = progress, stop
        self.config = run.config
        self.adapter, self.coredi = session.adapter, session.coredi
        self.watch = Watch(run.config.coredi)
        self.objective = Objective(run.config, session)
        self.optimizer: torch.optim.AdamW | None = None
        self.average = read_average(run, self.adapter, self.coredi)

    def run_stage(self, number: int, position: Position) -> None:
        """Train what is left of a stage, then close it and save."""
        stage = self.config.stages[number]
        self.progress.begin(number, len(self.config.stages), stage)
        samples = self._samples(number, position)
        if position.step == 0:
            self._unlock(stage)
            self._begin_features(samples)
            if self.average is not None:
                self.average.begin(self._learners())
        self.adapter.note_trained(self.session.tasks[number].name)
        optimizer = self._optimizer(stage)
        began = time.perf_counter() - position.seconds
        for step in range(position.step, stage.steps):
            loss = self.objective.loss(samples, stage, step)
            self._descend(optimizer, loss, stage, step, Position(number, step, position.seconds))
            if self.average is not None:
                self.average.update(self._learners())
            self.progress.stepped(step + 1)
            position = Position(number, step + 1, time.perf_counter() - began)
            if self._is_logged(stage, step):
                self._log(loss, samples, stage, position)
            if self.stop.requested:
                self._leave(position)
            if (step + 1) % self.config.save_every == 0 and step + 1 < stage.steps:
                self._save_state(position)
        facts = {"seconds": round(position.seconds, 2), "rejected": dict(samples.rejected)}
        if self.average is not None:
            self.average.settle(self._learners())
        self.adapter.weave.close()
        if self.config.remember:
            self.objective.consolidate(samples, stage)
        if self.coredi is not None:
            self.coredi.close_stage(stage.name)
            self.coredi.save(self.run.coredi)
        self.adapter.save_pretrained(self.run.adapter)
        self._save_state(Position(stage=number + 1), facts)
        self.run.finish_stage(number, facts)

    # Preparation ------------------------------------------------------------------------------

    def _samples(self, number: int, position: Position) -> Samples:
        stage, config = self.config.stages[number], self.config
        samples = Samples(
            self.data,
            self.session.tasks[number],
            self.session.pipe,
            stage=stage.name,
            seed=config.seed,
            batch_size=stage.batch_size,
            count=config.data.samples,
            encoder=self.session.encoder,
            max_rejected=config.data.max_rejected,
        )

        def tick(done: int) -> None:
            if self.stop.requested:
                self._leave(position)
            self.progress.encoded(done, config.data.samples or 0)

        samples.prepare(tick)
        return samples

    def _unlock(self, stage: Stage) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(stable_hash(self.config.seed, stage.name, "initialisation"))
            self.adapter.weave.unlock(stage.name)

    def _begin_features(self, samples: Samples) -> None:
        """The first stage with a feature stream gives it its principal components."""
        self.watch = Watch(self.config.coredi)
        if self.coredi is not None and not bool(self.coredi.projection.fitted):
            features = samples.features(self.config.coredi.fit_images)
            self.coredi.projection.fit(features, self.config.coredi.constant)

    def _optimizer(self, stage: Stage) -> torch.optim.AdamW:
        """The run's optimizer, holding what learns now; router moments survive the stages."""
        if self.optimizer is None:
            self.optimizer = new_optimizer(self.adapter, self.config.optimizer, self.coredi)
            moments = read_moments(self.run)
            restore_moments(self.optimizer, self.adapter, moments, self.coredi)
        else:
            self.adapter.weave.sync(self.optimizer)
        return self.optimizer

    def _learners(self) -> list[tuple[str, torch.nn.Parameter]]:
        """What learns in the open stage, by name."""
        named = named_parameters(self.adapter, self.coredi)
        return [(name, parameter) for name, parameter in named if parameter.requires_grad]

    # One step ---------------------------------------------------------------------------------

    def _descend(
        self,
        optimizer: torch.optim.AdamW,
        loss: StepLoss,
        stage: Stage,
        step: int,
        before: Position,
    ) -> None:
        with self.objective.arithmetic():
            loss.total.backward()
        learning = list(self.adapter.weave.parameters())
        learning += [] if self.coredi is None else self.coredi.learners()
        norm = torch.nn.utils.clip_grad_norm_(learning, self.config.optimizer.clip)
        if not torch.isfinite(loss.total.detach() + norm):
            self._save_state(before)
            what = "loss" if not torch.isfinite(loss.total) else "gradient"
            raise TrainingError(
                f"the {what} of stage {stage.name!r} is not finite at step {step + 1}; the state "
                f"before it is kept in {self.run.states.folder}: try a lower stages.{stage.name}.lr"
            )
        rate = learning_rate(self.config.optimizer, stage, step)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["factor"]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    # Between steps ----------------------------------------------------------------------------

    def _is_logged(self, stage: Stage, step: int) -> bool:
        return step == 0 or (step + 1) % self.config.log_every == 0 or step + 1 == stage.steps

    def _log(self, loss: StepLoss, samples: Samples, stage: Stage, position: Position) -> None:
        line: dict[str, Any] = {
            "stage": stage.name,
            "task": samples.task.name,
            "step": position.step,
            "loss": float(loss.flow.detach()),
            "gate_loss": float(loss.gate.detach()),
            "usage_noisy": loss.record.usage(),
            "usage_deterministic": self.objective.quiet_usage(samples, stage, position.step - 1),
            "lr": learning_rate(self.config.optimizer, stage, position.step - 1),
            "seconds": round(position.seconds, 3),
            "memory_mib": memory_mib(),
        }
        if loss.features is not None:
            line |= loss.features.line(self.watch, position.step)
        self.run.log(line)
        self.progress.logged(line)

    def _save_state(self, position: Position, ended: Mapping[str, Any] | None = None) -> None:
        save_state(
            self.run, self.adapter, self.optimizer, position, self.coredi, self.average, ended
        )

    def _leave(self, position: Position) -> None:
        """Save and raise; a stage that has not begun is left as the stage before it ended."""
        assert self.stop.number is not None
        if position.step:
            self._save_state(position)
        stage = self.config.stages[position.stage].name
        raise Interrupted(
            self.stop.number,
            f"stopped after step {position.step} of stage {stage!r}; continue with "
            f"prw-flux train --resume {self.run.path}",
        )


def memory_mib() -> int:
    """Largest memory so far: of the GPU where there is one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() >> 20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
