"""The training loop: stage after stage, each unlocking one expert (CoLoGen, section 3)."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from prw import PRWError
from prw.atomic import sweep
from prw.distributed import average
from prw_flux.adapter import PRWAdapter
from prw_flux.batch_order import stable_hash
from prw_flux.config import RunConfig
from prw_flux.curriculum import Stage
from prw_flux.data.choose import open_run_data, require_feeds
from prw_flux.interrupt import Interrupted, Requested, Stop
from prw_flux.learners import Learners
from prw_flux.monitor import Monitor
from prw_flux.objective import Objective, StepLoss, features_of
from prw_flux.optimization import learning_rate
from prw_flux.progress import Quiet
from prw_flux.ranks import Ranks, noticing, require_even
from prw_flux.resume import Position, read_position, require_same_data, steps_before
from prw_flux.rundir import INDEX, RunFolder
from prw_flux.samples import Samples
from prw_flux.session import Session
from prw_flux.tasks import TASKS, DataSource
from prw_flux.waiting import waiting

logger = logging.getLogger(__name__)


class TrainingError(PRWError, RuntimeError):
    """Training cannot go on; the state before the step that failed is saved."""


def open_training_data(config: RunConfig, session: Session) -> DataSource:
    """The run's data source, checked against every stage before anything is trained.

    Raises:
        ConfigError: there is no such source, or it cannot feed a task.
    """
    data = open_run_data(config)
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
    ranks: Ranks | None = None,
) -> None:
    """Train the stages of a run that are not finished, from where its state says.

    Args:
        run: the folder; `session` must hold the adapter of its state.
        session: base and adapter, from `open_session`.
        data: from `open_training_data`.
        progress: told what happens.
        stop: asked after every step whether to save and leave.
        ranks: the processes that train together; every one calls this, and the first writes.

    Raises:
        ConfigError: a batch cannot be split evenly, a tracker is missing, or nothing is held out.
        RunError: another process trains this run, or its configuration or data have changed.
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
            for written in (run.adapter, run.coredi, run.path / INDEX, run.metrics):
                sweep(written)
            position, state = read_position(run), run.state()
            require_same_data(run, data)
            run.states.settle_on(state)
            run.agree(position.stage, {} if state is None else state.facts["ended"])
            run.forget_log_after(position.stage, position.step)
            return position

        position = ranks.once(begin)
        if run.config.remember and ranks.first:
            _warn_of_stages_without_memory(session.adapter)
        trainer = Trainer(run, session, data, progress or Quiet(), stop or Stop(), ranks)
        monitor = held.enter_context(trainer.watched(position))
        trainer.progress.plan(run.config.stages, position.stage, position.step)
        for number in range(position.stage, len(run.config.stages)):
            trainer.run_stage(number, position, monitor)
            position = Position(stage=number + 1)


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
        self.objective = Objective(run.config, session, self.ranks)
        self.learners = Learners(run, session)
        self.position = Position()

    @contextmanager
    def watched(self, position: Position) -> Iterator[Monitor]:
        """While open, steps are measured and told, as the configuration says.

        Raises:
            ConfigError: see `Monitor`.
        """
        monitor = Monitor(
            self.run,
            self.objective,
            self.data,
            step=steps_before(self.config, position),
            averaged=self.learners.averaged,
            writes=self.ranks.first,
            progress=self.progress,
        )
        try:
            yield monitor
        finally:
            monitor.close()

    def run_stage(self, number: int, position: Position, monitor: Monitor) -> None:
        """Train what is left of a stage, then close it and save."""
        stage = self.config.stages[number]
        self.position = position
        self.progress.begin(number, len(self.config.stages), stage)
        samples = self._samples(number, position)
        if position.step == 0:
            self._unlock(stage)
            self._begin_features(samples)
        self.learners.spread(self.ranks)
        if position.step == 0:
            self.learners.begin_averages()
        monitor.begin(number)
        self.adapter.note_trained(self.session.tasks[number].name)
        share = self.ranks.share(stage.batch_size)
        with samples.ahead(range(position.step, stage.steps), share, self.config.data.prefetch):
            position = self._steps(number, samples, position, monitor)
        facts = {"seconds": round(position.seconds, 2), **self._drawn(samples)}
        self.learners.settle()
        self.adapter.weave.close()
        if self.config.remember:
            self.objective.consolidate(samples, stage)
        if self.coredi is not None:
            self.coredi.close_stage(stage.name)

        def finish() -> None:
            self.learners.save()
            self.learners.save_state(Position(stage=number + 1), facts)
            self.run.finish_stage(number, facts)

        self.ranks.once(finish)

    def _steps(
        self, number: int, samples: Samples, position: Position, monitor: Monitor
    ) -> Position:
        """What is left of a stage's steps; where they end."""
        stage, clip = self.config.stages[number], self.config.optimizer.clip
        self.learners.hold(self.config.optimizer)
        began = time.perf_counter() - position.seconds
        for step in range(position.step, stage.steps):
            loss = self._gradients(samples, stage, step)
            norm = torch.nn.utils.clip_grad_norm_(self.learners.parameters(), clip)
            before = Position(number, step, position.seconds)
            self._require_finite(loss.total, norm, stage, before)
            self.learners.step(learning_rate(self.config.optimizer, stage, step))
            self.progress.stepped(step + 1)
            position = self.position = Position(number, step + 1, time.perf_counter() - began)
            monitor.after(loss, samples, stage, position)
            if self._stopping():
                self._leave(position)
            if (step + 1) % self.config.save_every == 0 and step + 1 < stage.steps:
                self._save_state(position)
        return position

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
            reading=self._reading,
            encoding=self.session.encoding,
            cache=self.session.tables.get(stage.name),
            ranks=self.ranks,
        )

        def tick(done: int) -> None:
            if self._stopping():
                self._leave(position)
            self.progress.encoded(done, config.data.samples or 0)

        self.session.rest(False)
        samples.prepare(tick)
        self.objective.know_sentence(samples)
        if samples.count is not None:
            self.session.rest(True)
        return samples

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """While data is waited for: says that it takes long, and may be left by a signal.

        Several ranks leave together, between steps.
        """
        try:
            with waiting(self.progress.waiting), ExitStack() as held:
                if self.ranks.count == 1:
                    held.enter_context(self.stop.at_once())
                yield
        except Requested:
            self._leave(self.position)

    def _unlock(self, stage: Stage) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(stable_hash(self.config.seed, stage.name, "initialisation"))
            self.adapter.weave.unlock(stage.name)

    def _begin_features(self, samples: Samples) -> None:
        """The first stage with a feature stream gives it its principal components."""
        if self.coredi is not None and not bool(self.coredi.projection.fitted):
            features = samples.features(self.config.coredi.fit_images)
            self.coredi.projection.fit(features, self.config.coredi.constant)

    def _drawn(self, samples: Samples) -> dict[str, dict[str, int]]:
        """Draws by kind, rejected ones by reason; of all ranks where each draws its own."""
        found = {"rejected": samples.tally.rejected, "kinds": samples.tally.kinds}
        if samples.count is None and samples.cache is None:
            found = {k: sum(self.ranks.gathered(v), Counter()) for k, v in found.items()}
        return {name: dict(counts) for name, counts in found.items()}

    # One step ---------------------------------------------------------------------------------

    def _gradients(self, samples: Samples, stage: Stage, step: int) -> StepLoss:
        """Forwards and backwards of a step; every rank then has the gradient of the whole batch."""
        parts = []
        for part in self.objective.parts(samples, stage, step):
            with self.objective.arithmetic(alone=False):
                part.total.backward()
            parts.append(part)
        self.ranks.wait()  # over gloo: nobody waits on a device for a rank that is gone
        gate = self.objective.gate(parts, stage)
        gate.backward()
        features = features_of(parts)
        if features is not None:
            features.backward()
        average(self.learners.parameters())
        return self.objective.of_step(parts, gate)

    def _require_finite(self, loss: Tensor, norm: Tensor, stage: Stage, before: Position) -> None:
        """Stop, with the state before the step, where its loss or its gradients are not finite."""
        if torch.isfinite(loss + norm):
            return
        if before.step:  # else it is what the stage before ended with, saved there
            self._save_state(before)
        what = "loss" if not torch.isfinite(loss) else "gradient"
        raise TrainingError(
            f"the {what} of stage {stage.name!r} is not finite at step {before.step + 1}; the "
            f"state before it is kept in {self.run.states.folder}: try a lower "
            f"stages.{stage.name}.lr"
        )

    # Stopping ---------------------------------------------------------------------------------

    def _stopping(self) -> bool:
        """Whether any rank was told to stop; every rank then knows."""
        number = self.ranks.largest(self.stop.number or 0)
        if number:
            self.stop.number = number
        return bool(number)

    def _save_state(self, position: Position) -> None:
        self.ranks.once(lambda: self.learners.save_state(position))

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
