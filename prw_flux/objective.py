"""The objective of a step: flow matching on its batch, and the veteran gate on its routings.

Everything random is drawn for the whole batch, from what the seed, the stage and the step say, and
each micro-batch of each rank takes its samples' part: how a batch is split changes rounding only.

Shapes: B samples, m draws of each, T target tokens, C packed latent channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

import prw
from prw.call import totals
from prw.distributed import broadcast
from prw_flux.arithmetic import arithmetic
from prw_flux.batch_order import stable_hash
from prw_flux.config import RunConfig
from prw_flux.coredi.stream import joined
from prw_flux.coredi.training import FeaturePart, FeatureStep
from prw_flux.curriculum import Stage
from prw_flux.encoded import Batch
from prw_flux.flow import flow_loss, interpolate, resolution_shift, sample_times
from prw_flux.passes import source_pass
from prw_flux.ranks import Ranks
from prw_flux.samples import Samples
from prw_flux.session import Session


@dataclass(frozen=True, eq=False)
class PartLoss:
    """The losses of a micro-batch, as its part of the step's, and the routings of its forward.

    With a feature stream, that of its features as well.
    """

    flow: Tensor
    record: prw.Record
    features: FeaturePart | None = None

    @property
    def total(self) -> Tensor:
        """What is minimised, beside what is the whole step's: the veteran gate, regularisers."""
        return self.flow if self.features is None else self.flow + self.features.loss


@dataclass(frozen=True, eq=False)
class StepLoss:
    """The losses of a step, over all micro-batches and ranks, without graph.

    Attributes:
        flow: flow matching.
        gate: the veteran gate's.
        total: everything that was minimised.
        records: the routings of this rank.
        features: of this rank, where there is a feature stream.
    """

    flow: Tensor
    gate: Tensor
    total: Tensor
    records: tuple[prw.Record, ...]
    features: FeatureStep | None = None


@dataclass(frozen=True, eq=False)
class Drawn:
    """What is random in the targets of a batch: times [B m] and noise [B m, T, C]."""

    times_B: Tensor
    noise_BTC: Tensor

    @classmethod
    def of(cls, count: int, like_BTC: Tensor, draw: torch.Generator, shift: float | None) -> Drawn:
        """For `count` noisy latents shaped like these."""
        times = sample_times(count, draw, shift=shift or resolution_shift(like_BTC.shape[1]))
        return cls(times, torch.randn(count, *like_BTC.shape[1:], generator=draw))

    def part(self, start: int, stop: int) -> Drawn:
        """Of some latents."""
        return Drawn(self.times_B[start:stop], self.noise_BTC[start:stop])


def features_of(parts: Sequence[PartLoss]) -> FeatureStep | None:
    """What all micro-batches of a step share, where there is a feature stream."""
    found = parts[0].features
    return None if found is None else found.step


@final
class Objective:
    """What a run minimises, and what it asks its routers between steps.

    Args:
        config: of the run.
        session: base and adapter.
        ranks: which of each batch is this process's.
    """

    def __init__(self, config: RunConfig, session: Session, ranks: Ranks | None = None) -> None:
        self.config, self.session = config, session
        self.ranks = ranks or Ranks()

    def arithmetic(self, *, alone: bool = True) -> AbstractContextManager[None]:
        """In what forwards and backwards run; see `arithmetic`."""
        return arithmetic(self.session.device.type, self.config.precision, alone=alone)

    def parts(self, samples: Samples, stage: Stage, step: int) -> Iterator[PartLoss]:
        """The losses of this rank's micro-batches, one after another; they add up to its step's.

        The backward of each belongs before the next, that of `FeatureStep` after the last.
        """
        config = self.config
        draw = torch.Generator().manual_seed(stable_hash(config.seed, stage.name, "step", step))
        dropped = torch.rand(stage.batch_size, generator=draw) < config.caption_dropout
        share = self.ranks.share(stage.batch_size)
        batch = samples.batch(step, dropped.tolist(), share)
        count = stage.batch_size * config.draws
        drawn = Drawn.of(count, batch.target_BTC, draw, config.time_shift)
        blank = torch.rand(stage.batch_size, generator=draw) < config.source_dropout
        batch.source_BSC[blank[share.start : share.stop]] = 0.0
        key = stable_hash(config.seed, stage.name, "router", step)
        features = self._features(batch, drawn.times_B, draw, share)
        size = len(share) // config.accumulate
        for start in range(0, len(share), size):
            first = share.start + start
            mine = batch.part(start, start + size).drawn(config.draws)
            noise = drawn.part(first * config.draws, (first + size) * config.draws)
            read = None
            if features is not None:
                read = features.part(start * config.draws, (start + size) * config.draws)
            flow, record = self._flow(samples, mine, noise, read, key, first)
            yield PartLoss(flow / config.accumulate, record, read)

    def gate(self, parts: Sequence[PartLoss], stage: Stage) -> Tensor:
        """The veteran gate's loss of a step: the usage of the whole batch is counted before.

        It has no graph in common with the forwards, so its backward may come after theirs.
        """
        records = [part.record for part in parts]
        return prw.veteran_gate_loss(records, stage.density, stage.weight)

    def of_step(self, parts: Sequence[PartLoss], gate: Tensor) -> StepLoss:
        """A step's losses from those of its micro-batches, and the means over ranks."""
        sums = [torch.stack([x.detach() for x in column]).sum() for column in
                zip(*((part.flow, part.total) for part in parts), strict=True)]  # fmt: skip
        features = features_of(parts)
        if features is not None:
            sums[1] = sums[1] + features.penalty.detach()
        flow, rest = self.ranks.mean(torch.stack(sums))
        gate = gate.detach()
        records = tuple(part.record for part in parts)
        return StepLoss(flow, gate, rest + gate, records, features)

    def _flow(
        self,
        samples: Samples,
        batch: Batch,
        drawn: Drawn,
        features: FeaturePart | None,
        key: int,
        first: int,
    ) -> tuple[Tensor, prw.Record]:
        """Flow matching on a micro-batch, whose samples begin at `first`, and its routings."""
        device, weave = self.session.device, self.session.adapter.weave
        clean, noise = batch.target_BTC.to(device), drawn.noise_BTC.to(device)
        times = drawn.times_B.to(device)
        read: AbstractContextManager[Any] = nullcontext()
        if features is not None:
            read = features.reading(self.session.passes.transformer)
        train = self.arithmetic(alone=False)  # the next batches are being made
        with train, weave.record(key=key, first=first) as record, read:
            noisy = interpolate(clean, noise, times)
            velocity = self.velocity(batch, noisy, times, samples, record)
        return flow_loss(velocity, clean, noise), record

    def _features(
        self, batch: Batch, times_B: Tensor, draw: torch.Generator, share: range
    ) -> FeatureStep | None:
        """Noisy features of this rank's targets, drawn after everything that the image draws."""
        if self.session.coredi is None or batch.features_BRCD is None:
            return None
        count = self.config.draws
        part = range(share.start * count, share.stop * count)
        features_BRCD = batch.features_BRCD.repeat_interleave(count, dim=0)
        mine_B = times_B[part.start : part.stop].to(self.session.device)
        return FeatureStep.begin(
            self.session.coredi, features_BRCD, mine_B, draw, part, len(times_B)
        )

    def reading(
        self, batch: Batch, times_B: Tensor, draws: Sequence[torch.Generator]
    ) -> AbstractContextManager[Any]:
        """While open, a forward that is not trained on reads noisy features of its targets.

        Args:
            batch: whose features, if it has any.
            times_B: of the targets.
            draws: of the features' noise, one per target.
        """
        coredi, features = self.session.coredi, batch.features_BRCD
        if coredi is None or features is None:
            return nullcontext()
        rows, columns = features.shape[1:3]
        noisy = coredi.measured(features.to(times_B.device), (rows, columns), times_B, draws)
        return joined(self.session.passes.transformer, coredi.stream, noisy)

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
            self.source_pooled(samples),
            guidance,
            call,
        )
        return velocity

    def source_pooled(self, samples: Samples) -> Tensor | None:
        """[1, P] what modulates the source, encoded if need be; None for the pooled caption."""
        text = self.session.adapter.source_text(samples.task.sentence)
        if text is None:
            return None
        return samples.alone(text)[1].to(self.session.device)

    # Between steps ----------------------------------------------------------------------------

    def know_sentence(self, samples: Samples) -> None:
        """Encode what modulates the source, while the text encoders are there."""
        self.source_pooled(samples)

    def quiet(self, samples: Samples, stage: Stage, step: int) -> prw.Record:
        """Routings of this rank's part of a batch without router noise, as generation routes."""
        share = self.ranks.share(stage.batch_size)
        batch = samples.batch(step, share=share)
        with prw.Record() as record:
            times = torch.full((len(share),), 0.5)
            self._route(samples, batch, times, record, len(share) // self.config.accumulate)
        return record

    def usage(self, records: Sequence[prw.Record]) -> float:
        """U, the share that the newest expert received on all ranks."""
        used, counted = totals(records)
        return float(self.ranks.mean(used.double()) / self.ranks.mean(counted.double()))

    def consolidate(self, samples: Samples, stage: Stage) -> None:
        """Let the routers keep inputs of the stage just closed, and fit them to all they keep.

        Every rank reads the same samples, so that all remember the same; the first one's columns,
        which other devices may have rounded differently, are then everybody's.
        """
        rows, weave = self.config.remember, self.session.adapter.weave
        size = stage.batch_size // (self.ranks.count * self.config.accumulate)
        draw = torch.Generator().manual_seed(stable_hash(self.config.seed, stage.name, "memory"))
        with weave.remember(stage.name, rows) as recall:
            for step in range(-(-rows // stage.batch_size)):
                batch = samples.batch(step)
                shift = self.config.time_shift or resolution_shift(batch.target_BTC.shape[1])
                times = sample_times(stage.batch_size, draw, shift=shift)
                self._route(samples, batch, times, recall, size)
        weave.consolidate()
        broadcast(weave)

    @torch.no_grad()
    def _route(
        self, samples: Samples, batch: Batch, times_B: Tensor, call: prw.Call, size: int
    ) -> None:
        """The source pass alone, `size` samples at a time."""
        device = self.session.device
        pooled = self.source_pooled(samples)
        for start in range(0, len(times_B), size):
            part, times = batch.part(start, start + size), times_B[start : start + size]
            with self.arithmetic():
                source_pass(
                    self.session.passes.transformer,
                    part.source_BSC.to(device),
                    part.source_ids_S3.to(device),
                    part.pooled_BP.to(device) if pooled is None else pooled,
                    self.session.adapter.source_time(times.to(device)),
                    self.session.adapter.source_guidance(
                        torch.full((len(times),), self.config.guidance, device=device)
                    ),
                    call,
                )
