"""What a source costs at any size, counted on the meta device: operations, bytes, attaching."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks._flux import EXPERTS, RANKS, SIZES, draw, five_ways, transformer
from prw_flux import PRWAdapter
from prw_flux.attach import attach


@torch.no_grad()
def counted(size: str, grid: int, text: int, steps: int) -> dict[str, Any]:
    """TFLOP of each way to take a step, ratios of a whole generation, and bytes of the cache.

    Routing asks for values, which the meta device has none of, so the adapter has no expert here
    and the work of one expert per source token (A and B of K and V: 8 width rank) is added. The
    routers read one row per block, which is left out.
    """
    model = transformer(size, "meta", torch.float32)
    attach(model, PRWAdapter.for_transformer(model, rank=RANKS[size]))
    with torch.device("meta"):
        ways = five_ways(model, draw(model, grid, "meta", text))
    work = {}
    for name, way in ways.items():
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            way()
        work[name] = counter.get_total_flops() / 1e12
    shape = SIZES[size]
    blocks = shape["num_layers"] + shape["num_single_layers"]
    width = shape["attention_head_dim"] * shape["num_attention_heads"]
    expert = blocks * grid * grid * 8 * width * RANKS[size] / 1e12
    work["source"] += expert
    work["current"] += expert
    with torch.device("meta"):
        cache = ways["source"]()
        stored = {
            name: round(cache.to(dtype).nbytes / 2**30, 3)
            for name, dtype in (("bf16", torch.bfloat16), ("fp8", torch.float8_e4m3fn))
        }
    ours = work["source"] + steps * work["cached"]
    return {
        "size": size,
        "tokens": {"noisy": grid * grid, "source": grid * grid, "text": text},
        "steps": steps,
        "TFLOP": {name: round(value, 5 if value < 1 else 2) for name, value in work.items()},
        "joint_over_ours": round(steps * work["joint"] / ours, 3),
        "current_over_ours": round(steps * work["current"] / ours, 3),
        "ours_over_text": round(ours / (steps * work["text"]), 3),
        "cache_GiB": stored,
    }


def attaching(size: str, device: str) -> dict[str, float]:
    """Seconds to make five experts for a transformer, and to attach them (the first time)."""
    model = transformer(size, device, torch.float32)
    started = time.perf_counter()
    adapter = PRWAdapter.for_transformer(model, rank=RANKS[size])
    for stage in range(EXPERTS):
        adapter.weave.unlock(f"stage-{stage}")
    adapter.weave.close()
    made = time.perf_counter()
    attach(model, adapter)
    return {
        "make_s": round(made - started, 4),
        "attach_s": round(time.perf_counter() - made, 4),
        "expert_parameters": sum(p.numel() for p in adapter.parameters()),
    }
