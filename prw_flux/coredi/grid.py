"""From a feature grid to packed tokens, and back to a picture.

Shapes: B images, R x C feature grid, K channels, T = rows * columns tokens, F channels of a token:
4 K in the layout "latent" (2 x 2 places of the latent grid), K in the layout "token".
"""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from prw import ConfigError
from prw_flux.encode import pack, unpack

Layout = Literal["latent", "token"]


def token_width(channels: int, layout: Layout) -> int:
    """F for K channels."""
    return 4 * channels if layout == "latent" else channels


def place(z_BRCK: Tensor, tokens: tuple[int, int], layout: Layout) -> Tensor:
    """Feature tokens [B, T, F] beside a grid of rows x columns image tokens.

    "latent": bilinear to the latent grid (twice as many rows and columns), then packed as latents
    are (ReDi). "token": one feature vector for every token.

    Raises:
        ConfigError: a feature grid that does not fit.
    """
    rows, columns = tokens
    height, width = z_BRCK.shape[1:3]
    if layout == "token":
        if (height, width) != (rows, columns):
            raise ConfigError(
                f"a feature grid of {height} x {width} does not match {rows} x {columns} tokens: "
                f"the encoder must give {rows} x {columns}"
            )
        return z_BRCK.flatten(1, 2)
    fits = 2 * rows % height == 0 and 2 * columns % width == 0
    if not fits or 2 * rows // height != 2 * columns // width:
        raise ConfigError(
            f"a feature grid of {height} x {width} does not match a latent grid of {2 * rows} x "
            f"{2 * columns}: it must divide both sides alike, as {rows} x {columns} does"
        )
    maps_BKHW = F.interpolate(
        rearrange(z_BRCK, "b r c k -> b k r c"),
        size=(2 * rows, 2 * columns),
        mode="bilinear",
        align_corners=False,
    )
    return pack(maps_BKHW)


def maps(tokens_BTF: Tensor, tokens: tuple[int, int], layout: Layout) -> Tensor:
    """Feature tokens as maps [B, K, H, W], for pictures."""
    rows, columns = tokens
    if layout == "latent":
        return unpack(tokens_BTF, 2 * rows, 2 * columns)
    return rearrange(tokens_BTF, "b (r c) k -> b k r c", r=rows)
