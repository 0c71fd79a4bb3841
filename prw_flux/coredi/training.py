"""The feature stream's part of a training step.

Shapes: B samples, R x C grid of image tokens, D encoder width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, final

import torch
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from torch import Tensor

from prw.distributed import ranks
from prw_flux.coredi.collapse import Watch, facts
from prw_flux.coredi.model import CoReDi, Noised
from prw_flux.coredi.statistics import sum_over_ranks
from prw_flux.coredi.stream import Joint, joined


@final
@dataclass(eq=False)
class FeatureStep:
    """What a step adds: noisy features before the forward, losses after it.

    Attributes:
        loss: of the features, weighted; set when `reading` closes.
        penalty: the regularisers, weighted.
    """

    coredi: CoReDi
    noised: Noised
    loss: Tensor
    penalty: Tensor

    @classmethod
    def begin(
        cls,
        coredi: CoReDi,
        features_BRCD: Tensor,
        times_B: Tensor,
        draw: torch.Generator,
        part: range | None = None,
        whole: int = 0,
    ) -> FeatureStep:
        """Project and noise features with one place per image token, as in `CoReDi.noised`."""
        rows, columns = features_BRCD.shape[1:3]
        given = features_BRCD.to(times_B.device)
        noised = coredi.noised(given, (rows, columns), times_B, draw, part, whole)
        zero = times_B.new_zeros(())
        return cls(coredi, noised, zero, zero)

    @contextmanager
    def reading(self, transformer: FluxTransformer2DModel) -> Iterator[Joint]:
        """While open, one forward of `transformer` reads the features; then the losses are set."""
        with joined(transformer, self.coredi.stream, self.noised.noisy_BTF) as joint:
            yield joint
        self.loss, self.penalty = self.coredi.loss(joint.velocity_BTF, self.noised)

    def line(self, watch: Watch, step: int) -> dict[str, Any]:
        """What the log says, of all ranks; warns where the features collapse."""
        found = facts(self.coredi, self.noised)
        watch.look(found, step)
        sums = sum_over_ranks(torch.stack([self.loss, self.penalty]).detach())
        loss, penalty = (sums / ranks()).tolist()
        return {"feature_loss": loss, "feature_penalty": penalty, **found}
