"""The training loop: stage after stage, each unlocking one expert (CoLoGen, section 3)."""

from __future__ import annotations

import logging
import resource
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch

from prw import PRWError
from prw.atomic import sweep
from prw.distributed import average, broadcast
from prw_flux.adapter import PRWAdapter
from prw_flux.config import RunConfig
from prw_flux.coredi.collapse import Watch
from prw_flux.curriculum import Stage
from prw_flux.data.choose import open_data, require_feeds
from prw_flux.interrupt import Interrupted, Stop
from prw_flux.objective import Objective, StepLoss
from prw_flux.optimization import learning_rate, new_optimizer
from prw_flux.progress import Quiet
from prw_flux.ranks import Ranks, noticing, require_even
from prw_flux.resume import Position, read_moments, read_position, restore_moments, save_state
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
    ranks: Ranks | None = None,
) -> None:
    """Train the stages of a run that are not finished, from where its state says.

    Args:
        run: the folder; `session` must hold the adapter of its state.
        session: base and adapter, from `open_session`.
        data: from `open_training_data`.
        progress: told what happens.
        stop: asked after every step whether to save and leave.
        on_stage_end: called with the run and the number of each stage that has been finished, on
            the first rank.
        ranks: the processes that train together; every one calls this, and the first writes.

    Raises:
        ConfigError: a batch cannot be split evenly.
        RunError: another process trains this run.
        Interrupted: `stop` asked for it; the state is saved.
        TrainingError: a loss or gradient is not finite; the state before it is saved.
        RankLost: another rank is gone.
    """
    ranks = ranks or Ranks()
    require_even(run.config, ranks.count)
    remedy = f"continue from the last saved state with prw-flux train --resume {run.path}"
    with ExitStack() as held, noticing(remedy):

        def begin() -> Position:
            held.enter_context(run.exclusively())
            for written in (run.state, run.adapter, run.coredi, run.path / INDEX, run.metrics):
                sweep(written)
            position = read_position(run)
            run.forget_log_after(position.stage, position.step)
            return position

        position = ranks.once(begin)
        if run.config.remember and ranks.first:
            _warn_of_stages_without_memory(session.adapter)
        trainer = Trainer(run, session, data, progress or Quiet(), stop or Stop(), ranks)
        for number in range(position.stage, len(run.config.stages)):
            trainer.run_stage(number, position)
            position = Position(stage=number + 1)
            if on_stage_end is not None and ranks.first:
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
        self,
        run: RunFolder,
        session: Session,
        data: DataSource,
        progress: Quiet,
        stop: Stop,
        ranks: Ranks | None = None,
    ) -> None:
        self.run, self.session, self.data = run, session, data
        self.progress, self.stop, self.ranks = progress, stop, ranks or Ranks()
        self.config = run.config
        self.adapter, self.coredi = session.adapter, session.coredi
        self.watch = Watch(run.config.coredi)
        self.objective = Objective(run.config, session, self.ranks)
        self.optimizer: torch.optim.AdamW | None = None

    def run_stage(self, number: int, position: Position) -> None:
        """Train what is left of a stage, then close it and save."""
        stage = self.config.stages[number]
        self.progress.begin(number, len(self.config.stages), stage)
        samples = self._samples(number, position)
        if position.step == 0:
            self._unlock(stage)
            self._begin_features(samples)
        self._share_weights()
        self.adapter.note_trained(self.session.tasks[number].name)
        optimizer = self._optimizer(stage)
        began = time.perf_counter() - position.seconds
        for step in range(position.step, stage.steps):
            loss = self._gradients(samples, stage, step)
            self._descend(optimizer, loss, stage, Position(number, step, position.seconds))
            self.progress.stepped(step + 1)
            position = Position(number, step + 1, time.perf_counter() - began)
            if self._is_logged(stage, step):
                self._log(loss, samples, stage, position)
            if self._stopping():
                self._leave(position)
            if (step + 1) % self.config.save_every == 0 and step + 1 < stage.steps:
                self._save_state(position)
        rejected = self._rejected(samples)
        facts = {"seconds": round(position.seconds, 2), "rejected": rejected}
        self.adapter.weave.close()
        if self.config.remember:
            self.objective.consolidate(samples, stage)
        if self.coredi is not None:
            self.coredi.close_stage(stage.name)

        def finish() -> None:
            if self.coredi is not None:
                self.coredi.save(self.run.coredi)
            self.adapter.save_pretrained(self.run.adapter)
            save_state(self.run, self.adapter, optimizer, Position(stage=number + 1), self.coredi)
            self.run.finish_stage(number, facts)

        self.ranks.once(finish)

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
        )

        def tick(done: int) -> None:
            if self._stopping():
                self._leave(position)
            self.progress.encoded(done, config.data.samples or 0)

        self.session.rest(False)
        samples.prepare(tick)
        if samples.count is not None:
            self.objective.know_sentence(samples)
            self.session.rest(True)
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

    def _share_weights(self) -> None:
        """Every rank begins a stage with the first one's weights, whatever drew them."""
        broadcast(self.adapter.weave)
        if self.coredi is not None:
            for tensor in (*self.coredi.parameters(), *self.coredi.buffers()):
                self.ranks.spread(tensor)

    def _rejected(self, samples: Samples) -> dict[str, int]:
        """Rejected draws by reason; of all ranks, where each draws its own samples."""
        if samples.count is not None:
            return dict(samples.rejected)
        return dict(sum(self.ranks.gathered(samples.rejected), Counter()))

    def _optimizer(self, stage: Stage) -> torch.optim.AdamW:
        """The run's optimizer, holding what learns now; router moments survive the stages."""
        if self.optimizer is None:
            self.optimizer = new_optimizer(self.adapter, self.config.optimizer, self.coredi)
            moments = read_moments(self.run)
            restore_moments(self.optimizer, self.adapter, moments, self.coredi)
        else:
            self.adapter.weave.sync(self.optimizer)
        return self.optimizer

    # One step ---------------------------------------------------------------------------------

    def _gradients(self, samples: Samples, stage: Stage, step: int) -> StepLoss:
        """Forwards and backwards of a step; every rank then has the gradient of the whole batch."""
        parts = []
        for part in self.objective.parts(samples, stage, step):
            with self.objective.arithmetic():
                part.total.backward()
            parts.append(part)
        self.ranks.wait()  # over gloo: nobody waits on a device for a rank that is gone
        gate = self.objective.gate(parts, stage)
        gate.backward()
        average(self._learning())
        return self.objective.of_step(parts, gate)

    def _descend(
        self, optimizer: torch.optim.AdamW, loss: StepLoss, stage: Stage, before: Position
    ) -> None:
        norm = torch.nn.utils.clip_grad_norm_(self._learning(), self.config.optimizer.clip)
        if not torch.isfinite(loss.total + norm):
            self._save_state(before)
            what = "loss" if not torch.isfinite(loss.total) else "gradient"
            raise TrainingError(
                f"the {what} of stage {stage.name!r} is not finite at step {before.step + 1}; the "
                f"state before it is kept in {self.run.state}: try a lower stages.{stage.name}.lr"
            )
        rate = learning_rate(self.config.optimizer, stage, before.step)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["factor"]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def _learning(self) -> list[torch.nn.Parameter]:
        """What learns now, on every rank in the same order."""
        learning = list(self.adapter.weave.parameters())
        return learning + ([] if self.coredi is None else self.coredi.learners())

    def _stopping(self) -> bool:
        """Whether any rank was told to stop; every rank then knows."""
        number = self.ranks.largest(self.stop.number or 0)
        if number:
            self.stop.number = number
        return bool(number)

    # Between steps ----------------------------------------------------------------------------

    def _is_logged(self, stage: Stage, step: int) -> bool:
        return step == 0 or (step + 1) % self.config.log_every == 0 or step + 1 == stage.steps

    def _log(self, loss: StepLoss, samples: Samples, stage: Stage, position: Position) -> None:
        line: dict[str, Any] = {
            "stage": stage.name,
            "task": samples.task.name,
            "step": position.step,
            "loss": float(loss.flow),
            "gate_loss": float(loss.gate),
            "usage_noisy": self.objective.usage(loss.records),
            "usage_deterministic": self.objective.quiet_usage(samples, stage, position.step - 1),
            "lr": learning_rate(self.config.optimizer, stage, position.step - 1),
            "seconds": round(position.seconds, 3),
            "memory_mib": memory_mib(),
        }
        if loss.features is not None:
            line |= loss.features.line(self.watch, position.step)
        if self.ranks.first:
            self.run.log(line)
        self.progress.logged(line)

    def _save_state(self, position: Position) -> None:
        self.ranks.once(
            lambda: save_state(self.run, self.adapter, self.optimizer, position, self.coredi)
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
