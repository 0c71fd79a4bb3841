"""The training loop: stage after stage, each unlocking one expert (CoLoGen, section 3)."""

from __future__ import annotations

import logging
import resource
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from prw import PRWError
from prw.atomic import sweep
from prw.distributed import average, broadcast
from prw_flux.adapter import PRWAdapter
from prw_flux.batch_order import stable_hash
from prw_flux.config import RunConfig
from prw_flux.coredi.collapse import Watch
from prw_flux.curriculum import Stage
from prw_flux.data.choose import open_run_data, require_feeds
from prw_flux.interrupt import Interrupted, Requested, Stop
from prw_flux.monitor import Monitor
from prw_flux.objective import Objective, StepLoss, features_of
from prw_flux.optimization import learning_rate, new_optimizer
from prw_flux.progress import Quiet
from prw_flux.ranks import Ranks, noticing, require_even
from prw_flux.resume import (
    Position,
    named_parameters,
    read_average,
    read_moments,
    read_position,
    require_same_data,
    restore_moments,
    save_state,
    steps_before,
)
from prw_flux.rundir import INDEX, RunFolder
from prw_flux.samples import Samples
from prw_flux.session import Session
from prw_flux.tasks import TASKS, DataSource
from prw_flux.waiting import waiting

logger = logging.getLogger(__name__)

StageEnd = Callable[[RunFolder, int], None]


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
        held.enter_context(trainer.watched(position))
        trainer.progress.plan(run.config.stages, position.stage, position.step)
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
        self.average = read_average(run, self.adapter, self.coredi)
        self.monitor: Monitor | None = None
        self.position = Position()

    @contextmanager
    def watched(self, position: Position) -> Iterator[None]:
        """While open, steps are measured and told, as the configuration says.

        Raises:
            ConfigError: see `Monitor`.
        """
        average = self.average
        self.monitor = Monitor(
            self.run,
            self.objective,
            self.data,
            step=steps_before(self.config, position),
            averaged=None if average is None else lambda: average.applied(self._learners()),
            writes=self.ranks.first,
        )
        try:
            yield
        finally:
            self.monitor.close()

    def run_stage(self, number: int, position: Position) -> None:
        """Train what is left of a stage, then close it and save."""
        stage = self.config.stages[number]
        self.position = position
        self.progress.begin(number, len(self.config.stages), stage)
        samples = self._samples(number, position)
        if position.step == 0:
            self._unlock(stage)
            self._begin_features(samples)
        self._share_weights()
        if self.average is not None and position.step == 0:
            self.average.begin(self._learners())
        if self.monitor is not None:
            self.monitor.begin(number)
        self.adapter.note_trained(self.session.tasks[number].name)
        share = self.ranks.share(stage.batch_size)
        with samples.ahead(range(position.step, stage.steps), share, self.config.data.prefetch):
            position = self._steps(number, samples, position)
        facts = {"seconds": round(position.seconds, 2), **self._drawn(samples)}
        if self.average is not None:
            self.average.settle(self._learners())
        self.adapter.weave.close()
        if self.config.remember:
            self.objective.consolidate(samples, stage)
        if self.coredi is not None:
            self.coredi.close_stage(stage.name)

        def finish() -> None:
            if self.coredi is not None:
                self.coredi.save(self.run.coredi)
            self.adapter.save_pretrained(self.run.adapter)
            self._write_state(Position(stage=number + 1), facts)
            self.run.finish_stage(number, facts)

        self.ranks.once(finish)

    def _steps(self, number: int, samples: Samples, position: Position) -> Position:
        """What is left of a stage's steps; where they end."""
        stage = self.config.stages[number]
        optimizer = self._optimizer(stage)
        began = time.perf_counter() - position.seconds
        for step in range(position.step, stage.steps):
            loss = self._gradients(samples, stage, step)
            self._descend(optimizer, loss, stage, Position(number, step, position.seconds))
            if self.average is not None:
                self.average.update(self._learners())
            self.progress.stepped(step + 1)
            position = self.position = Position(number, step + 1, time.perf_counter() - began)
            self._measure(loss, samples, stage, position)
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

    def _drawn(self, samples: Samples) -> dict[str, dict[str, int]]:
        """Draws by kind, rejected ones by reason; of all ranks where each draws its own."""
        found = {"rejected": samples.tally.rejected, "kinds": samples.tally.kinds}
        if samples.count is None and samples.cache is None:
            found = {k: sum(self.ranks.gathered(v), Counter()) for k, v in found.items()}
        return {name: dict(counts) for name, counts in found.items()}

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
            with self.objective.arithmetic(alone=False):
                part.total.backward()
            parts.append(part)
        self.ranks.wait()  # over gloo: nobody waits on a device for a rank that is gone
        gate = self.objective.gate(parts, stage)
        gate.backward()
        features = features_of(parts)
        if features is not None:
            features.backward()
        average(self._learning())
        return self.objective.of_step(parts, gate)

    def _descend(
        self, optimizer: torch.optim.AdamW, loss: StepLoss, stage: Stage, before: Position
    ) -> None:
        norm = torch.nn.utils.clip_grad_norm_(self._learning(), self.config.optimizer.clip)
        if not torch.isfinite(loss.total + norm):
            if before.step:  # else it is what the stage before ended with, saved there
                self._save_state(before)
            what = "loss" if not torch.isfinite(loss.total) else "gradient"
            raise TrainingError(
                f"the {what} of stage {stage.name!r} is not finite at step {before.step + 1}; the "
                f"state before it is kept in {self.run.states.folder}: try a lower "
                f"stages.{stage.name}.lr"
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

    def _learners(self) -> list[tuple[str, torch.nn.Parameter]]:
        """The same, by name."""
        named = named_parameters(self.adapter, self.coredi)
        learning = {id(parameter) for parameter in self._learning()}
        return [(name, parameter) for name, parameter in named if id(parameter) in learning]

    def _stopping(self) -> bool:
        """Whether any rank was told to stop; every rank then knows."""
        number = self.ranks.largest(self.stop.number or 0)
        if number:
            self.stop.number = number
        return bool(number)

    # Between steps ----------------------------------------------------------------------------

    def _is_logged(self, stage: Stage, step: int) -> bool:
        due = self.monitor is not None and self.monitor.is_due(stage, step)
        return due or step == 1 or step % self.config.log_every == 0 or step == stage.steps

    def _measure(self, loss: StepLoss, samples: Samples, stage: Stage, position: Position) -> None:
        if self._is_logged(stage, position.step):
            self._log(loss, samples, stage, position)
        if self.monitor is not None:
            done = steps_before(self.config, position)
            self.monitor.look(stage, position.step, done)

    def _log(self, loss: StepLoss, samples: Samples, stage: Stage, position: Position) -> None:
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
        if self.monitor is not None:
            line |= self.monitor.routing(loss.records, quiet)
            line |= self.monitor.held_out(stage, position.step)
            self.monitor.log(line, stage, steps_before(self.config, position))
        self.progress.logged(line)

    def _save_state(self, position: Position) -> None:
        self.ranks.once(lambda: self._write_state(position))

    def _write_state(self, position: Position, ended: Mapping[str, Any] | None = None) -> None:
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
