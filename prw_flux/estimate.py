"""What a run takes, before anything runs: memory, arithmetic, disk, from its configuration alone.

The base is built on the meta device. Activations are scaled from two counts of saved tensors of
FLUX.1-dev: 0.68 MiB per token with recomputed blocks and 5.3 without, at 512 and at 1024 pixels.
The CUDA context and fragmentation, one or two GiB, are not counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

import torch
from diffusers import FluxTransformer2DModel
from torch import nn

from prw_flux.config import RunConfig
from prw_flux.curriculum import Stage
from prw_flux.locate import resolve_base
from prw_flux.memory import BITS, GIB, budget, flux1, weights

TEXT: Final = 512
"""Text tokens of FLUX.1; a base of its own may have fewer, which is then a little less."""
SAVED: Final = {True: 0.68 * 2**20, False: 5.3 * 2**20}
"""Bytes of activations per token of FLUX.1-dev, with and without recomputed blocks."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What the last stage of a run takes, the largest; bytes of one rank unless it says otherwise.

    Attributes:
        base: the frozen transformer.
        adapter: all experts and routers, in fp32.
        learning: gradients and both moments of what learns in one stage.
        activations: of one micro-batch.
        encoders: text encoders and autoencoder, where they stay on the device.
        host: latents and texts of a stage that were encoded before it, in main memory.
        disk: adapter and state of a run.
        tflop: of one step of each stage, all ranks together.
    """

    base: int
    adapter: int
    learning: int
    activations: int
    encoders: int
    host: int
    disk: int
    tflop: tuple[float, ...]

    @property
    def device(self) -> int:
        """On the accelerator while training."""
        return self.base + self.adapter + self.learning + self.activations + self.encoders


def estimate(config: RunConfig, ranks: int = 1) -> Estimate:
    """What a run takes.

    Args:
        config: of the run.
        ranks: that train together.
    """
    model = transformer_of(config)
    one = _expert_bytes(model, config.adapter.rank)
    adapter = len(config.stages) * one
    tokens = (config.size // 16) ** 2
    micro = max(stage.batch_size for stage in config.stages) // (ranks * config.accumulate)
    rows = micro * (tokens + config.draws * (tokens + TEXT))
    scale = _layers(model) * model.inner_dim / (57 * 3072)
    resting = config.data.samples is not None
    latents = 2 * tokens * model.config.in_channels * 2
    texts = TEXT * model.config.joint_attention_dim * 2
    flux = model.config.joint_attention_dim == 4096  # another base has other encoders, tiny ones
    stored = config.base.quantisation
    bits: dict[str, float] = {"fp32": 32, **BITS}
    return Estimate(
        base=weights(model, bits[config.precision if stored == "none" else stored]),
        adapter=adapter,
        learning=3 * one,
        activations=int(rows * SAVED[config.checkpointing] * scale),
        encoders=_encoders() if flux and not resting else 0,
        host=(config.data.samples or 0) * (latents + texts),
        disk=2 * adapter + 2 * one,
        tflop=tuple(step_tflop(model, config, stage) for stage in config.stages),
    )


def step_tflop(model: FluxTransformer2DModel, config: RunConfig, stage: Stage) -> float:
    """Of a step: the passes, once more where blocks are recomputed, and as much backward.

    The base has no gradients of its own, so a backward costs what a forward does. A forward is two
    operations per weight and token, and ``4 queries keys width`` per block of attention.
    """
    tokens = (config.size // 16) ** 2
    source = _forward(model, tokens, tokens)
    main = _forward(model, tokens + TEXT, 2 * tokens + TEXT)
    passes = source + config.draws * main
    times = 3 if config.checkpointing else 2
    return float(stage.batch_size * passes * times / 1e12)


def _forward(model: FluxTransformer2DModel, queries: int, keys: int) -> float:
    """Operations of one forward of one sample."""
    attention = 4.0 * _layers(model) * queries * keys * model.inner_dim
    return float(2.0 * _weights_per_token(model) * queries + attention)


def _weights_per_token(model: FluxTransformer2DModel) -> int:
    """Weights that a token is multiplied with; a double block has one half for text tokens."""

    def linear(blocks: nn.Module) -> int:
        return sum(
            layer.weight.numel()
            for name, layer in blocks.named_modules()
            if isinstance(layer, nn.Linear) and ".norm" not in f".{name}"
        )

    return linear(model.transformer_blocks) // 2 + linear(model.single_transformer_blocks)


def transformer_of(config: RunConfig) -> FluxTransformer2DModel:
    """The base on the meta device; of a Hub id that is not here, FLUX.1-dev."""
    folder = Path(resolve_base(config.base.path)) / "transformer"
    if not folder.is_dir():
        return _flux_dev()
    with torch.device("meta"):
        found: Any = FluxTransformer2DModel.from_config(FluxTransformer2DModel.load_config(folder))
    model: FluxTransformer2DModel = found
    return model


def _layers(model: FluxTransformer2DModel) -> int:
    return int(model.config.num_layers + model.config.num_single_layers)


def _expert_bytes(model: FluxTransformer2DModel, rank: int) -> int:
    """Of one expert of K and V in all blocks with its router columns, in fp32."""
    width = int(model.inner_dim)
    return 4 * _layers(model) * width * (4 * min(rank, width) + 2)


def _encoders() -> int:
    """Of FLUX.1's text encoders and autoencoder, in bf16."""
    parts = budget()
    return parts.t5 + parts.clip + parts.vae


@cache
def _flux_dev() -> FluxTransformer2DModel:
    return flux1()


def told(config: RunConfig, found: Estimate) -> dict[str, Any]:
    """An estimate for people and scripts: GiB, and TFLOP per stage."""
    parts = ("base", "adapter", "learning", "activations", "encoders", "device", "host", "disk")
    sizes = {name: round(getattr(found, name) / GIB, 2) for name in parts}
    work = {
        stage.name: round(stage.steps * tflop, 1)
        for stage, tflop in zip(config.stages, found.tflop, strict=True)
    }
    return {"GiB": sizes, "TFLOP": work}
