"""Means and covariances over batch, places and ranks, and the rank of what varies.

Shapes: N feature vectors on this rank, K channels.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from prw.distributed import ranks


class _SumOverRanks(torch.autograd.Function):
    """Sum over ranks; the gradient of the sum of all ranks' losses is again a sum over ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        total = grads[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total


def sum_over_ranks(x: Tensor) -> Tensor:
    """`x` summed over all ranks, differentiable; `x` itself in one process."""
    if ranks() == 1:
        return x
    total: Tensor = _SumOverRanks.apply(x)  # type: ignore[no-untyped-call]
    return total


def mean_and_covariance(x_NK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean [K], covariance [K, K] (divided by the count) and the count, over all ranks.

    Ranks may hold different numbers of vectors. The result has the dtype of `x_NK`, under
    autocast too.
    """
    with torch.autocast(x_NK.device.type, enabled=False):
        count = x_NK.new_tensor([float(x_NK.shape[0])])
        sums = sum_over_ranks(torch.cat([x_NK.sum(dim=0), count]))
        total = sums[-1].detach()
        mean_K = sums[:-1] / total
        centred_NK = x_NK - mean_K
        return mean_K, sum_over_ranks(centred_NK.mT @ centred_NK) / total, total


def effective_rank(x: Tensor) -> Tensor:
    """exp(H(p)), p the eigenvalues of the covariance of `x`, normalised to sum 1.

    Roy and Vetterli's effective rank (EUSIPCO 2007), of the covariance: K for K channels that are
    uncorrelated and of one variance, 1 where all are multiples of one. Nothing that varies has
    rank 0. Over all ranks.

    Args:
        x: [..., K]

    Returns:
        Scalar in float64, without gradient.
    """
    x_NK = x.detach().flatten(0, -2).double()
    values_K = torch.linalg.eigvalsh(mean_and_covariance(x_NK)[1]).clamp_min(0.0)
    p_K = values_K / values_K.sum().clamp_min(torch.finfo(torch.float64).tiny)
    rank = torch.special.entr(p_K).sum().exp()
    return torch.where(values_K.sum() > 0.0, rank, torch.zeros_like(rank))
