"""The training loop: stage after stage, each unlocking one expert (CoLoGen, section 3).

Shapes: B samples, T target tokens, C packed latent channels.
"""

from __future__ import annotations

import logging
import resource
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import prw
from prw import PRWError
from prw.atomic import sweep
from prw_flux.adapter import PRWAdapter
from prw_flux.arithmetic import arithmetic
from prw_flux.config import RunConfig
from prw_flux.coredi.collapse import Watch
from prw_flux.coredi.training import FeatureStep
from prw_flux.curriculum import Stage
from prw_flux.data.choose import open_data, require_feeds
from prw_flux.flow import flow_loss, interpolate, resolution_shift, sample_times
from prw_flux.interrupt import Interrupted, Stop
from prw_flux.optimization import learning_rate, new_optimizer
from prw_flux.passes import source_pass
from prw_flux.progress import Quiet
from prw_flux.resume import Position, read_moments, read_position, restore_moments, save_state
from prw_flux.rundir import INDEX, RunFolder
from prw_flux.samples import Batch, Samples, stable_hash
from prw_flux.session import Session
from prw_flux.tasks import TASKS, DataSource

logger = logging.getLogger(__name__)

StageEnd = Callable[[RunFolder, int], None]


class TrainingError(PRWError, RuntimeError):
    """Training cannot go on; the state before the step that failed is saved."""


@dataclass(frozen=True, eq=False)
class StepLoss:
    """One forward: the flow matching loss, the veteran gate's, and the routings they came from.

    With a feature stream, its losses as well.
    """

    flow: Tensor
    gate: Tensor
    record: prw.Record
    features: FeatureStep | None = None

    @property
    def total(self) -> Tensor:
        """What is minimised."""
        total = self.flow + self.gate
        if self.features is not None:
            total = total + self.features.loss + self.features.penalty
        return total


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
        RunError: another process trains this run.
        Interrupted: `stop` asked for it; the state is saved.
        TrainingError: a loss or gradient is not finite; the state before it is saved.
    """
    with run.exclusively():
        for written in (run.state, run.adapter, run.coredi, run.path / INDEX, run.metrics):
            sweep(written)
        position = read_position(run)
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
        self.optimizer: torch.optim.AdamW | None = None

    def run_stage(self, number: int, position: Position) -> None:
        """Train what is left of a stage, then close it and save."""
        stage = self.config.stages[number]
        self.progress.begin(number, len(self.config.stages), stage)
        samples = self._samples(number, position)
        if position.step == 0:
            self._unlock(stage)
            self._begin_features(samples)
        self.adapter.note_trained(self.session.tasks[number].name)
        optimizer = self._optimizer(stage)
        began = time.perf_counter() - position.seconds
        for step in range(position.step, stage.steps):
            loss = self._loss(samples, stage, step)
            self._descend(optimizer, loss, stage, step, Position(number, step, position.seconds))
            self.progress.stepped(step + 1)
            position = Position(number, step + 1, time.perf_counter() - began)
            if self._is_logged(stage, step):
                self._log(loss, samples, stage, position)
            if self.stop.requested:
                self._leave(position)
            if (step + 1) % self.config.save_every == 0 and step + 1 < stage.steps:
                self._save_state(position)
        facts = {"seconds": round(position.seconds, 2), "rejected": dict(samples.rejected)}
        self.adapter.weave.close()
        if self.config.remember:
            self._consolidate(samples, stage)
        if self.coredi is not None:
            self.coredi.close_stage(stage.name)
            self.coredi.save(self.run.coredi)
        self.adapter.save_pretrained(self.run.adapter)
        self._save_state(Position(stage=number + 1))
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
            cache=self.session.tables.get(stage.name),
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

    # One step ---------------------------------------------------------------------------------

    def _loss(self, samples: Samples, stage: Stage, step: int) -> StepLoss:
        """Flow matching on the batch of this step, and the veteran gate on its routings.

        Times, noise, dropped captions and blank sources are drawn on the CPU from a generator of
        this step alone.
        """
        config, device = self.config, self.session.device
        draw = torch.Generator().manual_seed(stable_hash(config.seed, stage.name, "step", step))
        dropped = torch.rand(stage.batch_size, generator=draw) < config.caption_dropout
        batch = samples.batch(step, dropped.tolist()).drawn(config.draws)
        clean = batch.target_BTC
        shift = config.time_shift or resolution_shift(clean.shape[1])
        times = sample_times(clean.shape[0], draw, shift=shift)
        noise = torch.randn(clean.shape, generator=draw)
        blank = torch.rand(stage.batch_size, generator=draw) < config.source_dropout
        batch.source_BSC[blank] = 0.0
        clean, noise, times = clean.to(device), noise.to(device), times.to(device)
        key = stable_hash(config.seed, stage.name, "router", step)
        features = self._features(batch, times, draw)
        read: AbstractContextManager[Any] = nullcontext()
        if features is not None:
            read = features.reading(self.session.passes.transformer)
        with self._arithmetic(), self.adapter.weave.record(key=key) as record, read:
            noisy = interpolate(clean, noise, times)
            velocity = self._forward(batch, noisy, times, samples, record)
        return StepLoss(
            flow_loss(velocity, clean, noise),
            prw.veteran_gate_loss(record, stage.density, stage.weight),
            record,
            features,
        )

    def _features(self, batch: Batch, times: Tensor, draw: torch.Generator) -> FeatureStep | None:
        """Noisy features of the targets, drawn after everything that the image draws."""
        if self.coredi is None or batch.features_BRCD is None:
            return None
        return FeatureStep.begin(self.coredi, batch.features_BRCD, times, draw)

    def _forward(
        self, batch: Batch, noisy: Tensor, times: Tensor, samples: Samples, call: prw.Call
    ) -> Tensor:
        device = self.session.device
        guidance = torch.full((noisy.shape[0],), self.config.guidance, device=device)
        velocity: Tensor = self.session.passes(
            noisy,
            batch.target_ids_T3.to(device),
            batch.text_BLE.to(device),
            batch.pooled_BP.to(device),
            times,
            batch.source_BSC.to(device),
            batch.source_ids_S3.to(device),
            self._source_pooled(samples),
            guidance,
            call,
        )
        return velocity

    def _source_pooled(self, samples: Samples) -> Tensor | None:
        """[1, P] what modulates the source; None for the pooled caption."""
        kind = self.config.adapter.source_pooled
        if kind == "prompt":
            return None
        text = samples.task.sentence if kind == "task" else ""
        return samples.texts.gather(samples.texts.rows([text]))[1].to(self.session.device)

    def _descend(
        self,
        optimizer: torch.optim.AdamW,
        loss: StepLoss,
        stage: Stage,
        step: int,
        before: Position,
    ) -> None:
        with self._arithmetic():
            loss.total.backward()
        learning = list(self.adapter.weave.parameters())
        learning += [] if self.coredi is None else self.coredi.learners()
        norm = torch.nn.utils.clip_grad_norm_(learning, self.config.optimizer.clip)
        if not torch.isfinite(loss.total.detach() + norm):
            self._save_state(before)
            what = "loss" if not torch.isfinite(loss.total) else "gradient"
            raise TrainingError(
                f"the {what} of stage {stage.name!r} is not finite at step {step + 1}; the state "
                f"before it is kept in {self.run.state}: try a lower stages.{stage.name}.lr"
            )
        rate = learning_rate(self.config.optimizer, stage, step)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["factor"]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def _arithmetic(self) -> AbstractContextManager[None]:
        return arithmetic(self.session.device.type, self.config.precision)

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
            "usage_deterministic": self._quiet_usage(samples, stage, position.step - 1),
            "lr": learning_rate(self.config.optimizer, stage, position.step - 1),
            "seconds": round(position.seconds, 3),
            "memory_mib": memory_mib(),
        }
        if loss.features is not None:
            line |= loss.features.line(self.watch, position.step)
        self.run.log(line)
        self.progress.logged(line)

    def _quiet_usage(self, samples: Samples, stage: Stage, step: int) -> float:
        """Usage of the same batch without router noise, as generation routes."""
        with prw.Record() as record:
            self._route(samples, samples.batch(step), torch.full((stage.batch_size,), 0.5), record)
        return record.usage()

    def _consolidate(self, samples: Samples, stage: Stage) -> None:
        """Let the routers keep inputs of the stage just closed, and fit them to all they keep."""
        rows = self.config.remember
        draw = torch.Generator().manual_seed(stable_hash(self.config.seed, stage.name, "memory"))
        with self.adapter.weave.remember(stage.name, rows) as recall:
            for step in range(-(-rows // stage.batch_size)):
                batch = samples.batch(step)
                shift = self.config.time_shift or resolution_shift(batch.target_BTC.shape[1])
                self._route(
                    samples, batch, sample_times(stage.batch_size, draw, shift=shift), recall
                )
        self.adapter.weave.consolidate()

    @torch.no_grad()
    def _route(self, samples: Samples, batch: Batch, times_B: Tensor, call: prw.Call) -> None:
        """The source pass alone."""
        device = self.session.device
        pooled = self._source_pooled(samples)
        with self._arithmetic():
            source_pass(
                self.session.passes.transformer,
                batch.source_BSC.to(device),
                batch.source_ids_S3.to(device),
                batch.pooled_BP.to(device) if pooled is None else pooled,
                self.adapter.source_time(times_B.to(device)),
                self.adapter.source_guidance(
                    torch.full((len(times_B),), self.config.guidance, device=device)
                ),
                call,
            )

    def _save_state(self, position: Position) -> None:
        save_state(self.run, self.adapter, self.optimizer, position, self.coredi)

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
