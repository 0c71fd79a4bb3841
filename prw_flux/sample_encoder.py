"""From drawn samples to encoded ones, with the encoders of a pipeline.

Shapes: B samples of one size, C packed latent channels, R x C grid and D width of semantic
features.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from prw_flux.coredi.encoders import FeatureEncoder
from prw_flux.encode import encode_image, pack, to_pixels
from prw_flux.encoded import Encoded, Grid, Texts
from prw_flux.tasks import Image, Triple


def alike(triples: Iterable[Triple]) -> list[list[Triple]]:
    """Samples, those of one size together."""
    groups: dict[Any, list[Triple]] = {}
    for triple in triples:
        groups.setdefault((triple.source.shape, triple.target.shape), []).append(triple)
    return list(groups.values())


def semantic(encoder: FeatureEncoder, images: Sequence[Image], grid: Grid) -> Tensor:
    """Features [B, R, C, D] in bf16 on the CPU of pictures of one size, one place per token."""
    return encoder(to_pixels(np.stack(images)), grid).to("cpu", torch.bfloat16).contiguous()


@final
class SampleEncoder:
    """Encodes samples; whatever it makes is in bf16, contiguous, on the CPU.

    Args:
        pipe: a FLUX.1 pipeline, whose autoencoder is used.
        texts: of the stage.
        feature_encoder: of the targets' semantic features, where they are wanted.
    """

    def __init__(
        self, pipe: Any, texts: Texts, feature_encoder: FeatureEncoder | None = None
    ) -> None:
        self.pipe, self.texts, self.feature_encoder = pipe, texts, feature_encoder

    def parts(self, triples: Sequence[Triple]) -> list[Encoded]:
        """Samples, those of one size together."""
        return [
            Encoded.of(*self.pictures(group), self.texts.rows([triple.text for triple in group]))
            for group in alike(triples)
        ]

    def pictures(self, triples: Sequence[Triple]) -> tuple[list[Tensor], tuple[Grid, Grid]]:
        """Sources, targets and, where wanted, features of samples of one size; both grids."""
        source, source_grid = self.latents([triple.source for triple in triples])
        targets = [triple.target for triple in triples]
        target, target_grid = self.latents(targets)
        found = [source, target]
        if self.feature_encoder is not None:
            found.append(semantic(self.feature_encoder, targets, target_grid))
        return found, (source_grid, target_grid)

    def latents(self, images: Sequence[Image]) -> tuple[Tensor, Grid]:
        """Packed latents [B, tokens, C] of pictures of one size, and the grid of tokens."""
        vae = self.pipe.vae
        pixels = to_pixels(np.stack(images)).contiguous(memory_format=torch.channels_last)
        with torch.autocast(vae.device.type, torch.bfloat16):
            latents = encode_image(vae, pixels)
        grid = latents.shape[-2] // 2, latents.shape[-1] // 2
        return pack(latents).to("cpu", torch.bfloat16).contiguous(), grid
