"""The linear projection of encoder features that learns with the diffusion model.

``z_K = BN(((f - mean) / std) P)``: P begins as the principal components of the standardised
features (ReDi), BN has no affine part (CoReDi, reconstructed).

Shapes: B images, R x C feature grid, N all feature vectors, D encoder width, K channels.
"""

from __future__ import annotations

from typing import Literal, final

import torch
from torch import Tensor, nn

from prw import ConfigError
from prw.distributed import ranks
from prw_flux.coredi.statistics import mean_and_covariance


@final
class Projection(nn.Module):
    """See the module; `fit` comes before the first forward.

    Args:
        width: D.
        channels: K.
        learn: whether P is a parameter that learns.
        normalise: "batch" or "none".
        eps, momentum: of the batch normalisation.

    Raises:
        ConfigError: more channels than the encoder has.
    """

    mean_D: Tensor
    std_D: Tensor
    running_mean_K: Tensor
    running_var_K: Tensor
    fitted: Tensor

    def __init__(
        self,
        width: int,
        channels: int,
        *,
        learn: bool = True,
        normalise: Literal["batch", "none"] = "batch",
        eps: float = 1e-5,
        momentum: float = 0.1,
    ) -> None:
        super().__init__()
        if channels > width:
            raise ConfigError(
                f"channels must be at most the encoder's width {width}, got {channels}"
            )
        self.normalise, self.eps, self.momentum = normalise, eps, momentum
        self.weight_DK = nn.Parameter(torch.zeros(width, channels), requires_grad=learn)
        self.register_buffer("mean_D", torch.zeros(width))
        self.register_buffer("std_D", torch.ones(width))
        self.register_buffer("running_mean_K", torch.zeros(channels))
        self.register_buffer("running_var_K", torch.ones(channels))
        self.register_buffer("fitted", torch.zeros((), dtype=torch.bool))

    @torch.no_grad()
    def fit(self, features: Tensor, constant: Literal["error", "drop"] = "error") -> None:
        """Take statistics and principal components from features; also the running statistics.

        The sign of a component is that which makes its largest entry positive, so that equal
        features give equal projections. Over all ranks: each brings features of its own.

        Args:
            features: [..., D], of as many images as can be had.
            constant: a channel that never varies is an "error", or gets no weight ("drop").

        Raises:
            ConfigError: another width, too few vectors or directions, values that are not finite,
                or channels that never vary.
        """
        self._require_width(features)
        x_ND = features.flatten(0, -2).double()
        if not torch.isfinite(x_ND).all():
            raise ConfigError("the encoder gives features that are not finite: check its weights")
        mean_D, covariance_DD, count = mean_and_covariance(x_ND)
        std_D = covariance_DD.diagonal().sqrt()
        still_D = std_D <= 1e-6 * mean_D.abs().clamp_min(1e-6)
        if bool(still_D.any()) and constant == "error":
            raise ConfigError(_constant(still_D, int(count)))
        std_D = torch.where(still_D, torch.ones_like(std_D), std_D)
        correlation_DD = covariance_DD / torch.outer(std_D, std_D)
        values_K, top_DK = _components(correlation_DD, still_D, self.weight_DK.shape[1], int(count))
        self.weight_DK.copy_(top_DK)
        self.mean_D.copy_(mean_D)
        self.std_D.copy_(std_D)
        self.running_mean_K.zero_()
        self.running_var_K.copy_(values_K * (count / (count - 1.0)))
        self.fitted.fill_(True)

    def linear(self, features: Tensor) -> Tensor:
        """What comes before the normalisation, in float32: [..., D] -> [..., K].

        Raises:
            ConfigError: features of another width, or `fit` has not been called.
        """
        self._require_width(features)
        if not bool(self.fitted):
            raise ConfigError("the projection has no principal components yet: call fit first")
        with torch.autocast(features.device.type, enabled=False):
            unit = (features.to(self.weight_DK.dtype) - self.mean_D) / self.std_D
            return unit @ self.weight_DK

    def forward(self, features_BRCD: Tensor) -> Tensor:
        """Projected features [B, R, C, K].

        In training the batch of all ranks is normalised and the running statistics follow it; in
        evaluation the running statistics normalise.

        Raises:
            ConfigError: as `linear`; or a batch of one image in training.
        """
        z_BRCK = self.linear(features_BRCD)
        if self.normalise == "none":
            return z_BRCK
        if not self.training:
            return (z_BRCK - self.running_mean_K) * torch.rsqrt(self.running_var_K + self.eps)
        if z_BRCK.shape[0] * ranks() < 2:
            raise ConfigError(
                "batch normalisation needs two images or more in training, got a batch of one: "
                "raise batch_size, or set coredi.normalise=none"
            )
        mean_K, covariance_KK, count = mean_and_covariance(z_BRCK.flatten(0, -2))
        var_K = covariance_KK.diagonal()
        with torch.no_grad():
            self.running_mean_K.lerp_(mean_K, self.momentum)
            self.running_var_K.lerp_(var_K * (count / (count - 1.0)), self.momentum)
        return (z_BRCK - mean_K) * torch.rsqrt(var_K + self.eps)

    def _require_width(self, features: Tensor) -> None:
        if features.shape[-1] != self.weight_DK.shape[0]:
            raise ConfigError(
                f"the encoder gives features of width {features.shape[-1]}, the projection was "
                f"made for {self.weight_DK.shape[0]}: use the encoder it was made with"
            )


def _components(
    correlation_DD: Tensor, still_D: Tensor, channels: int, count: int
) -> tuple[Tensor, Tensor]:
    """The largest eigenvalues [K] of a correlation and their vectors [D, K], none on still rows.

    Raises:
        ConfigError: fewer directions than channels.
    """
    moves_D = (~still_D).double()
    values_D, vectors_DD = torch.linalg.eigh(correlation_DD * torch.outer(moves_D, moves_D))
    directions = int((values_D > 1e-9 * values_D[-1].clamp_min(1e-30)).sum())
    if directions < channels:
        raise ConfigError(
            f"{count} feature vectors of width {len(still_D)} span {directions} directions, "
            f"channels is {channels}: raise coredi.fit_images, or lower coredi.channels"
        )
    top_DK = vectors_DD[:, -channels:].flip(1).masked_fill(still_D[:, None], 0.0)
    largest_K = top_DK.gather(0, top_DK.abs().argmax(dim=0, keepdim=True))[0]
    return values_D[-channels:].flip(0), top_DK * torch.where(largest_K < 0.0, -1.0, 1.0)


def _constant(still_D: Tensor, count: int) -> str:
    """The sentence for channels of the encoder that never vary."""
    indices = torch.nonzero(still_D).flatten().tolist()
    some = ", ".join(map(str, indices[:5])) + (", ..." if len(indices) > 5 else "")
    return (
        f"{len(indices)} of the encoder's {len(still_D)} channels never vary over {count} feature "
        f"vectors ({some}): fit on more varied images, or set coredi.constant=drop"
    )
