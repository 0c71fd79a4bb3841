"""A training step of CoLoGen: time and peak memory, checkpointed, on a bf16 or fp8 base."""

from __future__ import annotations

import time
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from torch import nn

import prw
from benchmarks._common import spread, synchronise
from benchmarks._flux import EXPERTS, Inputs, draw, experts
from prw_flux import TwoPass
from prw_flux.arithmetic import arithmetic
from prw_flux.flow import flow_loss, interpolate


def new_module(model: FluxTransformer2DModel, rank: int) -> TwoPass:
    """The last of five experts learns, in float32, on a checkpointed base in bf16."""
    nn.Module.to(model, dtype=torch.bfloat16)
    adapter = experts(model, rank, EXPERTS - 1)
    nn.Module.to(adapter, dtype=torch.float32)
    adapter.weave.unlock("newest")
    model.enable_gradient_checkpointing()
    module = TwoPass(model, adapter)
    module.train()
    model.train()  # diffusers checkpoints in training mode only
    return module


def step(
    module: TwoPass, given: Inputs, optimizer: torch.optim.Optimizer, number: int, device: str
) -> None:
    """Flow matching and the veteran gate; raises FloatingPointError for what must not be timed."""
    weave = module.adapter.weave
    noise = torch.randn_like(given.noisy_BNC)
    with arithmetic(device, "bf16"), weave.record(key=number) as record:
        velocity = module(
            interpolate(given.noisy_BNC, noise, given.time_B), given.ids_N3, given.text_BLE,
            given.pooled_BP, given.time_B, given.source_BSC, given.ids_N3, call=record,
        )  # fmt: skip
    loss = flow_loss(velocity, given.noisy_BNC, noise)
    with arithmetic(device, "bf16"):  # blocks are computed again, with the same kernels
        (loss + prw.veteran_gate_loss(record, 0.8, 0.5)).backward()
    norm = nn.utils.clip_grad_norm_(list(weave.parameters()), 1.0)
    if not torch.isfinite(loss.detach() + norm) or norm == 0:
        raise FloatingPointError(f"loss {float(loss)}, norm of the gradient {float(norm)}")
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def training(
    model: FluxTransformer2DModel,
    rank: int,
    *,
    grid: int,
    text: int,
    batches: tuple[int, ...],
    rounds: int,
    device: str,
) -> list[dict[str, Any]]:
    """One row per batch size and kind of base; afterwards the base is stored in fp8.

    A batch that does not fit into memory gives a row that says so.
    """
    module = new_module(model, rank)
    rows = []
    for base in ("bf16", "fp8"):
        if base == "fp8":  # casting changes weights that the adapter has taken a sample of: last
            model.enable_layerwise_casting(
                storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16
            )
        for batch in batches:
            row: dict[str, Any] = {"base": base, "batch": batch, "pixels": 16 * grid}
            try:
                row |= _timed(module, draw(model, grid, device, text, batch), rounds, device)
            except torch.OutOfMemoryError:
                row["problem"] = "out of memory"
            rows.append(row)
    return rows


def _timed(module: TwoPass, given: Inputs, rounds: int, device: str) -> dict[str, Any]:
    optimizer = torch.optim.AdamW(module.adapter.weave.parameters(), lr=1e-4)
    optimizer.zero_grad(set_to_none=True)  # of a batch that did not fit
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for number in range(2 + rounds):
        synchronise(device)
        started = time.perf_counter()
        step(module, given, optimizer, number, device)
        synchronise(device)
        seconds.append(time.perf_counter() - started)
    peak = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else None
    return {**spread(seconds[2:]), "peak_GiB": None if peak is None else round(peak, 2)}
