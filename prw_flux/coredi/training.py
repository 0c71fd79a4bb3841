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
    """What a step adds: noisy features before its forwards, losses after them.

    Features are projected and normalised, and the regularisers taken, over the whole batch. Its
    micro-batches read parts, whose backwards end at `leaves`; `backward` comes after them all and
    takes their gradients on to the projection.

    Attributes:
        loss: of the features, weighted, so far; without graph.
        penalty: the regularisers, weighted.
    """

    coredi: CoReDi
    noised: Noised
    leaves: Noised
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
        return cls(coredi, noised, noised.leaves(), zero, coredi.penalty(noised))

    def part(self, start: int, stop: int) -> FeaturePart:
        """What a micro-batch reads."""
        share = (stop - start) / len(self.leaves.keep_B)
        return FeaturePart(self, self.leaves.part(start, stop), share, self.loss.new_zeros(()))

    def backward(self) -> None:
        """The gradients of all losses in what comes before the transformer."""
        grown = [(self.noised.noisy_BTF, self.leaves.noisy_BTF.grad),
                 (self.noised.clean_BTF, self.leaves.clean_BTF.grad)]  # fmt: skip
        roots = [(tensor, grad) for tensor, grad in grown if grad is not None]
        if self.penalty.requires_grad:
            roots.append((self.penalty, torch.ones_like(self.penalty)))
        if roots:
            torch.autograd.backward([tensor for tensor, _ in roots], [grad for _, grad in roots])

    def line(self, watch: Watch, step: int) -> dict[str, Any]:
        """What the log says, of all ranks; warns where the features collapse."""
        found = facts(self.coredi, self.noised)
        watch.look(found, step)
        sums = sum_over_ranks(torch.stack([self.loss, self.penalty]).detach())
        loss, penalty = (sums / ranks()).tolist()
        return {"feature_loss": loss, "feature_penalty": penalty, **found}


@final
@dataclass(eq=False)
class FeaturePart:
    """What a micro-batch adds.

    Attributes:
        step: that it belongs to.
        noised: its part of the leaves.
        share: of the step's pictures.
        loss: of its features, as its part of the step's; set when `reading` closes.
    """

    step: FeatureStep
    noised: Noised
    share: float
    loss: Tensor

    @contextmanager
    def reading(self, transformer: FluxTransformer2DModel) -> Iterator[Joint]:
        """While open, one forward of `transformer` reads the features; then the loss is set."""
        coredi = self.step.coredi
        with joined(transformer, coredi.stream, self.noised.noisy_BTF) as joint:
            yield joint
        self.loss = self.share * coredi.flow(joint.velocity_BTF, self.noised)
        self.step.loss = self.step.loss + self.loss.detach()
