"""The objective of a step: flow matching on its batch, and the veteran gate on its routings.

Shapes: B samples, T target tokens, C packed latent channels.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

import prw
from prw_flux.arithmetic import arithmetic
from prw_flux.config import RunConfig
from prw_flux.coredi.training import FeatureStep
from prw_flux.curriculum import Stage
from prw_flux.flow import flow_loss, interpolate, resolution_shift, sample_times
from prw_flux.passes import source_pass
from prw_flux.samples import Batch, Samples, stable_hash
from prw_flux.session import Session


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


@final
class Objective:
    """What a run minimises, and what it asks its routers between steps.

    Args:
        config: of the run.
        session: base and adapter.
    """

    def __init__(self, config: RunConfig, session: Session) -> None:
        self.config, self.session = config, session

    def arithmetic(self) -> AbstractContextManager[None]:
        """In what forwards and backwards run."""
        return arithmetic(self.session.device.type, self.config.precision)

    def loss(self, samples: Samples, stage: Stage, step: int) -> StepLoss:
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
        with self.arithmetic(), self.session.adapter.weave.record(key=key) as record, read:
            noisy = interpolate(clean, noise, times)
            velocity = self.velocity(batch, noisy, times, samples, record)
        return StepLoss(
            flow_loss(velocity, clean, noise),
            prw.veteran_gate_loss(record, stage.density, stage.weight),
            record,
            features,
        )

    def _features(self, batch: Batch, times: Tensor, draw: torch.Generator) -> FeatureStep | None:
        """Noisy features of the targets, drawn after everything that the image draws."""
        if self.session.coredi is None or batch.features_BRCD is None:
            return None
        return FeatureStep.begin(self.session.coredi, batch.features_BRCD, times, draw)

    def velocity(
        self, batch: Batch, noisy: Tensor, times: Tensor, samples: Samples, call: prw.Call
    ) -> Tensor:
        """Both passes on a batch: what the model says the velocity of `noisy` [B, T, C] is."""
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

    def quiet_usage(self, samples: Samples, stage: Stage, step: int) -> float:
        """Usage of the same batch without router noise, as generation routes."""
        with prw.Record() as record:
            self._route(samples, samples.batch(step), torch.full((stage.batch_size,), 0.5), record)
        return record.usage()

    def consolidate(self, samples: Samples, stage: Stage) -> None:
        """Let the routers keep inputs of the stage just closed, and fit them to all they keep."""
        rows = self.config.remember
        draw = torch.Generator().manual_seed(stable_hash(self.config.seed, stage.name, "memory"))
        with self.session.adapter.weave.remember(stage.name, rows) as recall:
            for step in range(-(-rows // stage.batch_size)):
                batch = samples.batch(step)
                shift = self.config.time_shift or resolution_shift(batch.target_BTC.shape[1])
                self._route(
                    samples, batch, sample_times(stage.batch_size, draw, shift=shift), recall
                )
        self.session.adapter.weave.consolidate()

    @torch.no_grad()
    def _route(self, samples: Samples, batch: Batch, times_B: Tensor, call: prw.Call) -> None:
        """The source pass alone."""
        device = self.session.device
        pooled = self._source_pooled(samples)
        with self.arithmetic():
            source_pass(
                self.session.passes.transformer,
                batch.source_BSC.to(device),
                batch.source_ids_S3.to(device),
                batch.pooled_BP.to(device) if pooled is None else pooled,
                self.session.adapter.source_time(times_B.to(device)),
                self.session.adapter.source_guidance(
                    torch.full((len(times_B),), self.config.guidance, device=device)
                ),
                call,
            )
