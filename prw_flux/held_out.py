"""The loss on samples that are never trained on, with times and noise that never change.

Shapes: B samples of a batch, T target tokens, C packed latent channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch

import prw
from prw_flux.batch_order import stable_hash
from prw_flux.flow import interpolate, resolution_shift, sample_times, velocity_target
from prw_flux.objective import Objective
from prw_flux.samples import Samples


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Measured:
    """What held-out samples said.

    Attributes:
        loss: mean over samples of mean |v - (eps - x_0)|^2.
        record: their routings, without noise, as generation routes.
    """

    loss: float
    record: prw.Record


@final
class HeldOut:
    """The fixed samples of one stage.

    The loss of a run's stage at any step, or of two runs with one seed, can be compared as it is:
    sample i always has the time and the noise that (seed, stage, i) give. Routers have no noise,
    captions and sources are never dropped. With a feature stream, the model reads noisy features of
    the target as it does in training, and their noise is fixed as well.

    Args:
        samples: of the held-out side; encoded here, or read from a cache.
        objective: of the run.
        seed, stage: of the run.
        size: samples per forward.

    Raises:
        SampleError: no usable sample.
    """

    def __init__(
        self, samples: Samples, objective: Objective, *, seed: int, stage: str, size: int
    ) -> None:
        with objective.session.awake():
            samples.prepare()
            objective.know_sentence(samples)
        self.samples, self.objective, self.size = samples, objective, size
        self.seed, self.stage = seed, stage

    @torch.no_grad()
    def measure(self) -> Measured:
        """The loss now; training is left as it was, bit for bit."""
        losses, objective = [], self.objective
        device = objective.session.device
        with prw.Record() as record:
            for numbers, batch in self.samples.every(self.size):
                clean_BTC = batch.target_BTC
                shift = objective.config.time_shift or resolution_shift(clean_BTC.shape[1])
                draws = [self._draw(number) for number in numbers]
                times_B = torch.cat([sample_times(1, draw, shift=shift) for draw in draws])
                noises = [torch.randn(clean_BTC.shape[1:], generator=draw) for draw in draws]
                times_B, noise_BTC = times_B.to(device), torch.stack(noises).to(device)
                clean_BTC = clean_BTC.to(device)
                noisy_BTC = interpolate(clean_BTC, noise_BTC, times_B)
                with objective.arithmetic(), objective.reading(batch, times_B, draws):
                    velocity = objective.velocity(batch, noisy_BTC, times_B, self.samples, record)
                error = velocity.float() - velocity_target(clean_BTC, noise_BTC)
                losses.append(error.square().flatten(1).mean(dim=1).cpu())
        return Measured(loss=float(torch.cat(losses).mean()), record=record)

    def _draw(self, number: int) -> torch.Generator:
        """Of the time and then the noises of a sample."""
        key = stable_hash(self.seed, self.stage, "held out", number)
        return torch.Generator().manual_seed(key)
