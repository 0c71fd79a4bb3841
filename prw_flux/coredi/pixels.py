"""Pixel space: patches of pixels as the tokens of the same transformer, without an autoencoder.

A FLUX-shaped transformer with ``in_channels = 3 p^2`` reads them; its feature stream takes the
layout "token". Shapes: B images, h x w pixels, T tokens, p side of a patch.
"""

from __future__ import annotations

from einops import rearrange
from torch import Tensor

from prw import ConfigError


def patchify(pixels_B3hw: Tensor, patch: int) -> Tensor:
    """[B, 3, h, w] -> [B, h/p * w/p, 3 p^2], channel slowest.

    Raises:
        ConfigError: sides that are no multiples of the patch.
    """
    height, width = pixels_B3hw.shape[-2:]
    if height % patch or width % patch:
        raise ConfigError(f"{height} x {width} pixels do not divide into patches of {patch}")
    return rearrange(pixels_B3hw, "b c (h i) (w j) -> b (h w) (c i j)", i=patch, j=patch)


def unpatchify(tokens_BTC: Tensor, height: int, width: int, patch: int) -> Tensor:
    """Inverse of `patchify` for pictures of height x width."""
    return rearrange(
        tokens_BTC, "b (h w) (c i j) -> b c (h i) (w j)", h=height // patch, i=patch, j=patch
    )


def velocity_of_clean(clean: Tensor, noisy: Tensor, t_B: Tensor, floor: float = 0.05) -> Tensor:
    """v = (x_t - x_0) / max(t, floor), for a transformer that predicts the clean picture.

    JiT's x-prediction (arXiv 2511.13720), with time from data to noise: predicting x_0 is easier
    than v where tokens are wide. Reconstructed: the text does not name CoReDi's pixel backbone.
    """
    t = t_B.clamp_min(floor).view(-1, *[1] * (noisy.ndim - 1))
    return (noisy - clean) / t
