"""How much memory FLUX.1, an adapter and the recorded sources take, from configurations alone.

The models are built on the meta device, where a tensor has a shape and no memory. Not counted are
the CUDA context and activations: of one block at a time, where some 15 tensors of tokens x width
live at once, about half a GiB at 1024 pixels in bf16 (an estimate).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from prw_flux.adapter import PRWAdapter
from prw_flux.stored import FLOAT8

GIB: Final = 2**30
BITS: Final[Mapping[str, float]] = {"bf16": 16, "fp8": 8, "int8": 8, "nf4": 4.5}
"""Per weight of a linear layer; nf4 has a float32 scale for each 64 weights. The rest is bf16."""
CACHES: Final[Mapping[str, torch.dtype]] = {"bf16": torch.bfloat16, "fp8": FLOAT8}
_T5: Final = {"vocab_size": 32128, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24,
              "num_heads": 64, "feed_forward_proj": "gated-gelu",
              "tie_word_embeddings": False}  # fmt: skip
_CLIP: Final = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
                "num_attention_heads": 12, "vocab_size": 49408}  # fmt: skip
_VAE: Final = {"down_block_types": ("DownEncoderBlock2D",) * 4,
               "up_block_types": ("UpDecoderBlock2D",) * 4,
               "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2,
               "latent_channels": 16, "use_quant_conv": False,
               "use_post_quant_conv": False}  # fmt: skip


@dataclass(frozen=True)
class Budget:
    """Bytes of each part, at one precision of transformer and T5.

    Attributes:
        transformer, t5, clip, vae: weights.
        adapter: experts in bf16, routers in float32.
        sources: keys and values of all references.
    """

    transformer: int
    t5: int
    clip: int
    vae: int
    adapter: int
    sources: int

    @property
    def denoising(self) -> int:
        """While denoising with `enable_model_cpu_offload`: transformer, adapter and sources."""
        return self.transformer + self.adapter + self.sources

    @property
    def together(self) -> int:
        """Everything on the accelerator."""
        return self.denoising + self.t5 + self.clip + self.vae


def flux1(**changes: Any) -> FluxTransformer2DModel:
    """The transformer of FLUX.1-dev on the meta device, with `changes` to its configuration."""
    with torch.device("meta"):
        model: FluxTransformer2DModel = FluxTransformer2DModel(guidance_embeds=True, **changes)
    return model


def source_bytes(
    transformer: FluxTransformer2DModel,
    height: int,
    width: int,
    dtype: torch.dtype = torch.bfloat16,
) -> int:
    """Bytes of one recorded source: 2 blocks S heads (D itemsize + 4 [float8]), S = h w / 256.

    Args:
        transformer: its configuration is read.
        height, width: of the source, in pixels.
        dtype: of storage; float8 has a float32 scale per token and head.
    """
    config = transformer.config
    tokens = (height // 16) * (width // 16)
    row = config.attention_head_dim * dtype.itemsize + (4 if dtype == FLOAT8 else 0)
    layers = config.num_layers + config.num_single_layers
    return int(2 * layers * tokens * config.num_attention_heads * row)


def budget(
    *,
    base: str = "bf16",
    cache: str = "bf16",
    size: int = 1024,
    references: int = 1,
    rank: int = 128,
    experts: int = 5,
) -> Budget:
    """What editing with FLUX.1 takes.

    Args:
        base: precision of transformer and T5, a key of `BITS`.
        cache: of the recorded sources, a key of `CACHES`.
        size: side of a source in pixels.
        references: how many sources are recorded.
        rank, experts: of the adapter.

    Raises:
        ValueError: for an unknown precision, or a number below 1.
    """
    if base not in BITS or cache not in CACHES:
        known = f"{', '.join(BITS)} (base), {', '.join(CACHES)} (cache)"
        raise ValueError(f"There is no precision {base!r} / {cache!r}: known are {known}.")
    if min(size // 16, references, rank, experts) < 1:
        raise ValueError("size must be at least 16, references, rank and experts at least 1.")
    transformer = flux1()
    with torch.device("meta"):
        t5, clip = T5EncoderModel(T5Config(**_T5)), CLIPTextModel(CLIPTextConfig(**_CLIP))
        vae = AutoencoderKL(**_VAE)
    one = source_bytes(transformer, size, size, CACHES[cache])
    return Budget(
        transformer=weights(transformer, BITS[base]),
        t5=weights(t5, BITS[base]),
        clip=weights(clip, 16),
        vae=weights(vae, 16),
        adapter=_adapter_bytes(rank, experts),
        sources=one * references,
    )


@cache
def _adapter_bytes(rank: int, experts: int) -> int:
    """Of a trained adapter of FLUX.1, experts in bf16 and routers in float32."""
    config = flux1().config
    inner = config.num_attention_heads * config.attention_head_dim
    with torch.device("meta"):
        adapter = PRWAdapter(config.num_layers, config.num_single_layers, inner, rank=rank)
        for index in range(experts):
            adapter.weave.unlock(f"stage{index}")
        adapter.weave.close()
    adapter.to(torch.bfloat16)
    return sum(t.numel() * t.element_size() for t in adapter.state_dict().values())


def weights(model: nn.Module, bits: float) -> int:
    """Bytes of a model with the weights of linear layers in `bits`, everything else in 16."""
    linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    every = sum(parameter.numel() for parameter in model.parameters())
    return int((linear * bits + (every - linear) * 16) / 8)
