"""One expert: a low-rank pair per projection, each matrix a parameter of its own.

A slice of a stacked tensor cannot be frozen: weight decay moves it. Hence one tensor each.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class Expert(nn.Module):
    """Low-rank residuals ``B_p A_p x * alpha / rank`` of the projections ``p`` of one pool.

    ``A`` is Gaussian with standard deviation 1/rank and ``B`` is zero, so a new expert leaves the
    model's function unchanged.

    Args:
        in_features: D.
        projections: O of each projection, by name.
        rank: R.
        alpha: numerator of the scaling.
        like: a tensor with the device and dtype of the new parameters.
    """

    def __init__(
        self,
        in_features: int,
        projections: Mapping[str, int],
        *,
        rank: int,
        alpha: float,
        like: Tensor,
    ) -> None:
        super().__init__()
        self.rank = rank
        self.alpha = alpha
        self.A = nn.ParameterDict()
        self.B = nn.ParameterDict()
        for name, out_features in projections.items():
            drawn = torch.randn(rank, in_features) / rank  # on CPU: one seed, any device
            self.A[name] = nn.Parameter(drawn.to(like))
            self.B[name] = nn.Parameter(like.new_zeros(out_features, rank))

    @property
    def scaling(self) -> float:
        """``alpha / rank``."""
        return self.alpha / self.rank
