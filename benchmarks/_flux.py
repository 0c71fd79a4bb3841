"""Random FLUX transformers for `benchmarks.pipeline`: five ways to take a step, and their checks.

Shapes: B samples, N noisy, S source and L text tokens, C packed latent channels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn

from prw_flux import PRWAdapter
from prw_flux.attach import attach
from prw_flux.encode import position_ids
from prw_flux.passes import main_pass, source_pass

SIZES: Final[dict[str, dict[str, Any]]] = {
    "tiny": {"num_layers": 2, "num_single_layers": 6, "attention_head_dim": 32,
             "num_attention_heads": 4, "axes_dims_rope": (8, 12, 12),
             "joint_attention_dim": 256, "pooled_projection_dim": 128},
    "mid": {"num_layers": 2, "num_single_layers": 4, "attention_head_dim": 64,
            "num_attention_heads": 12, "axes_dims_rope": (8, 28, 28),
            "joint_attention_dim": 256, "pooled_projection_dim": 128},
    "full": {"num_layers": 19, "num_single_layers": 38, "attention_head_dim": 128,
             "num_attention_heads": 24, "joint_attention_dim": 4096, "pooled_projection_dim": 768},
}  # fmt: skip
"""Random weights: the shape of tiny-flux, a wider one, and transformer/config.json of FLUX.1-dev.

``mid`` on 1024 + 128 tokens spends the share of FLUX.1-dev at 1024 pixels on attention: per block
that is S / (6 width) of the linear layers, 1152 / (6 * 768) = 4608 / (6 * 3072).
"""
EXPERTS: Final = 5
RANKS: Final = {"tiny": 16, "mid": 32, "full": 128}


@dataclass(frozen=True)
class Inputs:
    """One denoising step: latents, positions, text, times."""

    noisy_BNC: Tensor
    source_BSC: Tensor
    ids_N3: Tensor
    text_BLE: Tensor
    pooled_BP: Tensor
    time_B: Tensor


def transformer(size: str, device: str, dtype: torch.dtype) -> FluxTransformer2DModel:
    """Random weights, made where they stay; cast while they are made, so that no copy is wider."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = FluxTransformer2DModel(
                patch_size=1, in_channels=64, guidance_embeds=True, **SIZES[size]
            )
    finally:
        torch.set_default_dtype(before)
    return model.eval()


def experts(model: FluxTransformer2DModel, rank: int, count: int = EXPERTS) -> PRWAdapter:
    """An adapter of experts that all do something, attached; it is made where the model is."""
    adapter = PRWAdapter.for_transformer(model, rank=rank)
    for stage in range(count):
        adapter.weave.unlock(f"stage-{stage}")
        for parameter in adapter.weave.parameters():
            nn.init.normal_(parameter, std=0.02)
    adapter.weave.close()
    nn.Module.to(adapter, dtype=model.dtype)  # routers stay wide
    attach(model, adapter.eval())
    return adapter


def build(size: str, device: str) -> tuple[FluxTransformer2DModel, PRWAdapter]:
    """A random transformer with five experts; bfloat16 on a GPU, float32 on a CPU."""
    torch.manual_seed(0)
    model = transformer(size, device, torch.bfloat16 if device == "cuda" else torch.float32)
    return model, experts(model, RANKS[size])


def draw(
    model: FluxTransformer2DModel, grid: int, device: str, text: int = 64, batch: int = 1
) -> Inputs:
    """Random inputs with as many source as noisy tokens, `grid` squared."""
    config = model.config

    def normal(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, device=device).to(model.dtype)

    return Inputs(
        normal(grid * grid, 64), normal(grid * grid, 64),
        position_ids(grid, grid, device=device), normal(text, config.joint_attention_dim),
        normal(config.pooled_projection_dim), torch.full((batch,), 0.5, device=device),
    )  # fmt: skip


def five_ways(model: FluxTransformer2DModel, given: Inputs) -> dict[str, Callable[[], Any]]:
    """One step each, returning the velocity; ``source`` returns the cache."""
    zero = torch.zeros_like(given.time_B)

    def record(time_B: Tensor) -> Any:
        return source_pass(model, given.source_BSC, given.ids_N3, given.pooled_BP, time_B)

    def velocity(cache: Any) -> Tensor:
        return main_pass(model, given.noisy_BNC, given.ids_N3, given.text_BLE, None,
                         given.pooled_BP, given.time_B, cache=cache)  # fmt: skip

    def joint() -> Tensor:
        both_B2NC = torch.cat([given.noisy_BNC, given.source_BSC], 1)
        marked_N3 = given.ids_N3 + torch.tensor([1.0, 0.0, 0.0], device=given.ids_N3.device)
        out: Tensor = model(
            hidden_states=both_B2NC, encoder_hidden_states=given.text_BLE,
            pooled_projections=given.pooled_BP, timestep=given.time_B,
            img_ids=torch.cat([given.ids_N3, marked_N3]),
            txt_ids=given.ids_N3.new_zeros(given.text_BLE.shape[1], 3),
            guidance=torch.ones_like(given.time_B), return_dict=False,
        )[0]  # fmt: skip
        return out[:, : given.noisy_BNC.shape[1]]

    cache = record(zero)
    return {
        "text": lambda: velocity(None),
        "joint": joint,
        "current": lambda: velocity(record(given.time_B)),
        "cached": lambda: velocity(cache),
        "source": lambda: record(zero),
    }


def wrong(
    model: FluxTransformer2DModel, given: Inputs, variants: dict[str, Callable[[], Any]]
) -> str:
    """What is wrong with the results; "" for nothing."""
    for name in ("text", "joint", "current", "cached"):
        if not torch.isfinite(variants[name]()).all():
            return f"the velocity of {name} is not finite"
    fresh = main_pass(model, given.noisy_BNC, given.ids_N3, given.text_BLE, None, given.pooled_BP,
                      given.time_B, cache=variants["source"]())  # fmt: skip
    if not torch.equal(variants["cached"](), fresh):
        return "the cache does not give the bits of a fresh recording"
    if torch.equal(fresh, variants["text"]()):
        return "the source changes nothing"
    apart = distance_to_one_pass()
    return "" if apart < 1e-9 else f"two passes are {apart:.1e} from one masked joint attention"


def distance_to_one_pass() -> float:
    """Two passes against one joint attention under CoLoGen's mask, in fp64 on a small model.

    The stock transformer has no experts, so the adapter here has one whose contribution is zero.
    """
    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        patch_size=1, in_channels=64, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=256, pooled_projection_dim=128,
        guidance_embeds=True, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    nn.Module.to(model, torch.float64)
    given = draw(model, 4, "cpu")
    text, noisy = given.text_BLE.shape[1], given.noisy_BNC.shape[1]
    count = text + 2 * noisy
    allowed = torch.ones(count, count, dtype=torch.bool)
    allowed[text + noisy :, : text + noisy] = False
    one: Tensor = model(
        hidden_states=torch.cat([given.noisy_BNC, given.source_BSC], 1),
        encoder_hidden_states=given.text_BLE, pooled_projections=given.pooled_BP,
        timestep=given.time_B, img_ids=torch.cat([given.ids_N3, given.ids_N3]),
        txt_ids=given.ids_N3.new_zeros(text, 3), guidance=torch.ones(1),
        joint_attention_kwargs={"attention_mask": allowed[None, None]}, return_dict=False,
    )[0]  # fmt: skip
    adapter = PRWAdapter.for_transformer(model, rank=4).double()
    adapter.weave.unlock("one")
    attach(model, adapter)
    cache = source_pass(model, given.source_BSC, given.ids_N3, given.pooled_BP, given.time_B)
    two = main_pass(model, given.noisy_BNC, given.ids_N3, given.text_BLE, None, given.pooled_BP,
                    given.time_B, cache=cache)  # fmt: skip
    return float((one[:, :noisy] - two).abs().max())
