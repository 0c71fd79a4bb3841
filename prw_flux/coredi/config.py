"""The settings of the feature stream."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from prw import ConfigError
from prw_flux.schema import settle


@dataclass(frozen=True, kw_only=True)
class CoReDiConfig:
    """A stream of semantic features beside the image latents (CoReDi, arXiv 2604.17492).

    What the paper states, what is reconstructed and what was found here: docs, "Features beside
    the image". `REDI` is its predecessor (arXiv 2504.16064), a projection that does not learn.

    Attributes:
        enabled: whether a run trains the stream.
        encoder: whose features: folder or Hub id of a DINOv2, or ``package.module:function`` that
            returns a `FeatureEncoder`.
        channels: the projection has so many.
        layout: "latent" resizes the projected features to the grid of latents and packs 2 x 2 of
            them, as ReDi does; "token" takes one feature vector per token (pixel space).
        tokens: "merged" adds both streams in one token, "separate" doubles the tokens.
        learn_projection: False keeps the principal components, as ReDi does.
        normalise: "batch" normalisation without affine, over all ranks; "none" as in ReDi's code.
        stop_gradient: whether the projection gets no gradient from the target of its own stream.
        orthogonality, covariance, similarity: weights of the three regularisers.
        weight: of the feature loss beside that of the image.
        drop: share of samples that train with features set to zero, for representation guidance.
        lr: learning rate of projection and stream, as a factor of the stage's.
        fit_images: images whose features give the principal components.
        constant: what to do with a channel of the encoder that never varies: "error", or "drop".
        warn_rank: effective rank, as a share of `channels`, below which training warns.

    Raises:
        ConfigError: a value that cannot work.
    """

    enabled: bool = False
    encoder: str = "facebook/dinov2-with-registers-base"
    channels: int = 8
    layout: Literal["latent", "token"] = "latent"
    tokens: Literal["merged", "separate"] = "merged"
    learn_projection: bool = True
    normalise: Literal["batch", "none"] = "batch"
    stop_gradient: bool = True
    orthogonality: float = 0.0
    covariance: float = 0.1
    similarity: float = 0.0
    weight: float = 1.0
    drop: float = 0.2
    lr: float = 1.0
    fit_images: int = 1024
    constant: Literal["error", "drop"] = "error"
    warn_rank: float = 0.5

    def __post_init__(self) -> None:
        settle(self)
        if not self.encoder:
            raise ConfigError("encoder must name a DINOv2 or package.module:function, got nothing")
        for name in ("channels", "fit_images"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("orthogonality", "covariance", "similarity", "weight", "lr"):
            if not 0.0 <= getattr(self, name) < 1e6:
                raise ConfigError(f"{name} must be at least 0, got {getattr(self, name)}")
        for name in ("drop", "warn_rank"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ConfigError(f"{name} must lie in [0, 1], got {getattr(self, name)}")


REDI = CoReDiConfig(learn_projection=False, normalise="none", covariance=0.0)
"""ReDi: principal components of standardised features, fixed and not normalised."""
