"""FLUX.1-dev itself, on the meta device: shapes and counts without a byte of weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel

from prw_flux import PRWAdapter, attach, attached, source_pass

# transformer/config.json of black-forest-labs/FLUX.1-dev
DEV: dict[str, Any] = {
    "patch_size": 1,
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
}
BLOCKS = 19 + 38
WIDTH = 24 * 128
EXPERT = BLOCKS * 2 * 2 * 128 * WIDTH  # K and V, A and B, rank 128 of 3072


@pytest.fixture(scope="module")
def transformer() -> FluxTransformer2DModel:
    with torch.device("meta"):
        return FluxTransformer2DModel(**DEV).eval()


def size(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_the_base_has_its_published_size(transformer: FluxTransformer2DModel) -> None:
    assert size(transformer) == 11_901_408_320
    assert {p.device.type for p in transformer.parameters()} == {"meta"}


def test_five_experts_of_rank_128(transformer: FluxTransformer2DModel) -> None:
    """89.65 M parameters each over 57 blocks; a router has a signal and a noise column per expert,
    of the width of a block."""
    adapter = PRWAdapter.for_transformer(transformer)
    assert len(adapter.pools) == BLOCKS and adapter.device.type == "meta"
    assert EXPERT == 89_653_248
    for count in range(1, 6):
        adapter.weave.unlock(f"stage{count}")
        assert size(adapter) == count * (EXPERT + BLOCKS * 2 * WIDTH)
    for pool in adapter.pools:
        assert [size(pool.expert(index)) for index in range(5)] == [4 * 128 * WIDTH] * 5
    routers = sum(size(pool.columns) for pool in adapter.pools)
    assert routers == 5 * BLOCKS * 2 * WIDTH == 1_751_040
    assert 5 * EXPERT == 448_266_240
    assert round(100 * size(adapter) / size(transformer), 2) == 3.78
    learning = sum(p.numel() for p in adapter.weave.parameters())
    assert learning == EXPERT + routers  # the newest expert, and every column of the routers


def test_without_noise_a_router_has_one_column_per_expert(
    transformer: FluxTransformer2DModel,
) -> None:
    adapter = PRWAdapter.for_transformer(transformer, noise=False)
    adapter.weave.unlock("one")
    assert size(adapter) == EXPERT + BLOCKS * WIDTH


@torch.no_grad()
def test_a_source_of_a_megapixel_leaves_2_67_gib(transformer: FluxTransformer2DModel) -> None:
    """The stock forward, every shape of it, with 4096 tokens in bfloat16."""
    adapter = PRWAdapter.for_transformer(transformer)
    attach(transformer, adapter)
    assert attached(transformer) is adapter
    with torch.device("meta"):
        cache = source_pass(
            transformer,
            torch.empty(1, 4096, 64),
            torch.empty(4096, 3),
            torch.empty(1, 768),
            torch.empty(1),
        )
    assert {tuple(slot.key_BSHD.shape) for slot in cache} == {(1, 4096, 24, 128)}
    assert round(cache.nbytes / 2 / 2**30, 2) == 2.67  # recorded in float32 here
