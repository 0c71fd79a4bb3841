"""What two gloo ranks check under Ulysses parallelism; `test_coexistence_ranks` starts them.

Each compares with one process that holds the whole sequence, and writes what went wrong, or
nothing, to ``<granularity>-<rank>.txt``.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from diffusers import ContextParallelConfig, FluxTransformer2DModel
from torch import Tensor
from two_processes import report

from prw_flux import PRWAdapter, SourceCache, attach, main_pass, source_pass
from prw_flux.encode import position_ids


def build(granularity: str) -> FluxTransformer2DModel:
    """The same on every rank, two experts between which the routers choose."""
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        in_channels=64, num_layers=1, num_single_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=16,
        axes_dims_rope=(4, 6, 6),
    ).eval()  # fmt: skip
    adapter = PRWAdapter.for_transformer(transformer, rank=4, granularity=granularity)
    for name in ("one", "two"):
        adapter.weave.unlock(name)
        for parameter in adapter.weave.parameters():
            parameter.data.add_(0.3 * torch.randn_like(parameter))
    attach(transformer, adapter.eval())
    return transformer


def passes(transformer: FluxTransformer2DModel, sizes: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Velocity, and all keys of the source."""
    rows, columns = sizes
    draw = torch.Generator().manual_seed(1)
    source = torch.randn(2, rows * columns, 64, generator=draw)
    source[:, : source.shape[1] // 2] += 2.0  # the halves would be routed in other ways
    pooled, time = torch.randn(2, 16, generator=draw), torch.full((2,), 0.5)
    ids = position_ids(rows, columns)
    cache: SourceCache = source_pass(transformer, source, ids, pooled[:1], torch.zeros(1))
    velocity = main_pass(
        transformer,
        torch.randn(2, 4, 64, generator=draw),
        position_ids(2, 2),
        torch.randn(2, 6, 32, generator=draw),
        None,
        pooled,
        time,
        cache=cache,
    )
    keys = torch.cat([slot.key_BSHD for slot in cache if slot.key_BSHD is not None], dim=0)
    return velocity, keys


@torch.no_grad()
def check(granularity: str, rank: int, _folder: Path) -> None:
    wanted, keys = passes(build(granularity), (2, 4))
    spread = build(granularity)
    spread.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))
    found, own = passes(spread, (2, 4))
    # fp32 sums in another order, through three blocks
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(own, keys.chunk(2, dim=1)[rank], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="9 tokens cannot be spread over 2 ranks"):
        passes(spread, (3, 3))


if __name__ == "__main__":
    torch.accelerator.device_count = lambda: 1  # diffusers divides by it, and a CPU counts as 0
    report({name: partial(check, name) for name in ("sample", "token")})
