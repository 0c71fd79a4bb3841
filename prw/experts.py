"""Experts: a low-rank pair per projection, each matrix a parameter of its own.

A slice of a stacked tensor cannot be frozen, because weight decay moves it. Hence one tensor each.

Shape suffixes: D input width, O output width, R rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


class Expert(nn.Module):
    """Low-rank residuals ``B_p A_p x * alpha / rank`` of the projections ``p`` of one pool.

    Args:
        in_features: D.
        projections: O of each projection, by name.
        ranks: R of each projection.
        scaling: ``alpha / R``, the same for all of them.
        like: a tensor with the device and dtype of the new parameters, which are zero.
        memory: False makes them views of one zero, for `put` to replace: a checkpoint of a
            gigabyte is then loaded without two of zeros being written first.
    """

    def __init__(
        self,
        in_features: int,
        projections: Mapping[str, int],
        ranks: Mapping[str, int],
        scaling: float,
        like: Tensor,
        memory: bool = True,
    ) -> None:
        super().__init__()

        def zeros(*shape: int) -> Tensor:
            return like.new_zeros(shape) if memory else like.new_zeros(()).expand(shape)

        # Lists in the order of the projections: a dict refuses layers called "keys" or "values".
        self.order = {name: index for index, name in enumerate(projections)}
        self.A = nn.ParameterList(zeros(ranks[p], in_features) for p in projections)
        self.B = nn.ParameterList(zeros(o, ranks[p]) for p, o in projections.items())
        self._alphas = [scaling * ranks[p] for p in projections]

    def rank(self, projection: str) -> int:
        """R of one projection."""
        return int(self.A[self.order[projection]].shape[0])

    def alpha(self, projection: str) -> float:
        """The numerator of the scaling of one projection."""
        return self._alphas[self.order[projection]]

    def scaling(self, projection: str) -> float:
        """``alpha / rank`` of one projection."""
        return self.alpha(projection) / self.rank(projection)

    @torch.no_grad()
    def draw(self) -> None:
        """Gaussian ``A`` with standard deviation 1/rank; ``B`` stays zero: the model is unchanged.

        Drawn on the CPU from torch's default generator, so one seed gives one expert anywhere.
        """
        for A_RD in self.A:
            A_RD.copy_(torch.randn(A_RD.shape) / A_RD.shape[0])

    def pair(self, projection: str) -> tuple[Tensor, Tensor]:
        """``A [R, D]`` and ``B [O, R]`` of one projection."""
        index = self.order[projection]
        return self.A[index], self.B[index]

    def frozen_pair(self, projection: str) -> tuple[Tensor, Tensor]:
        """The same pair, out of autograd's reach."""
        A_RD, B_OR = self.pair(projection)
        return A_RD.detach(), B_OR.detach()

    def put(self, projection: str, A_RD: Tensor, B_OR: Tensor, alpha: float) -> None:
        """Replace the pair of one projection, in the given dtype; the rank is that of the pair."""
        index = self.order[projection]
        device = self.A[index].device
        self.A[index] = nn.Parameter(A_RD.detach().to(device))
        self.B[index] = nn.Parameter(B_OR.detach().to(device))
        self._alphas[index] = alpha


@dataclass(frozen=True)
class Factors:
    """The factors of some experts and their scalings, per projection and expert."""

    A: list[list[Tensor]]
    B: list[list[Tensor]]
    scaling: list[list[float]]


def factors(
    experts: Sequence[Expert],
    learns: Sequence[bool],
    projections: Sequence[str],
    dtype: torch.dtype,
) -> Factors:
    """The factors of the given experts, detached unless they learn.

    So no gradient can reach a veteran, whatever its ``requires_grad`` was set to since. An expert
    that was imported keeps the dtype of its file; all are computed in one, at least `dtype`.
    """
    given = Factors([], [], [])
    for expert in experts:
        for parameter in expert.parameters():
            dtype = torch.promote_types(dtype, parameter.dtype)
    for projection in projections:
        pairs = [
            expert.pair(projection) if live else expert.frozen_pair(projection)
            for expert, live in zip(experts, learns, strict=True)
        ]
        given.A.append([A_RD.to(dtype) for A_RD, _ in pairs])
        given.B.append([B_OR.to(dtype) for _, B_OR in pairs])
        given.scaling.append([expert.scaling(projection) for expert in experts])
    return given
