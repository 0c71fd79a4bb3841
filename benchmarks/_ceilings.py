"""What this machine can do at best, measured, and how its time is taken."""

from __future__ import annotations

import statistics
import subprocess
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

from benchmarks._shapes import Shape


def measured(run: Callable[[], object], device: str, rounds: int = 7) -> float:
    """Median seconds of one run, after two that do not count."""
    return statistics.median([seconds(run, device) for _ in range(rounds + 2)][2:])


def seconds(run: Callable[[], object], device: str) -> float:
    """One run: process time on a CPU; on CUDA between two events, with the L2 cache flushed."""
    if device == "cpu":
        started = time.process_time()
        run()
        return time.process_time() - started
    _flush()
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    stop.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(stop)) / 1e3


def _flush() -> None:
    _scratch().zero_()


@cache
def _scratch() -> torch.Tensor:
    return torch.empty(256 * 2**20, dtype=torch.int8, device="cuda")  # twice the largest L2


def graphed(run: Callable[[], object]) -> Callable[[], None] | None:
    """The same work as a CUDA graph; None where it cannot be captured, because it waits."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            run()
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    return graph.replay


@cache
def gemm_rate(device: str, dtype: torch.dtype) -> float:
    """FLOP per second of a large square product."""
    size = 1536 if device == "cpu" else 8192
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / measured(lambda: a @ b, device)


@cache
def copy_rate(device: str) -> float:
    """Bytes read and written per second by a copy that fits in no cache."""
    a = torch.empty((128 if device == "cpu" else 1024) * 2**20, dtype=torch.int8, device=device)
    b = torch.empty_like(a)
    return 2 * a.numel() / measured(lambda: b.copy_(a), device)


def roofline(shape: Shape, device: str, backward: bool) -> float:
    """Seconds that nothing on this machine beats: every FLOP once, or x, y and the like once.

    A base product per pass (forward, dx), three LoRA products of each factor in a training step.
    """
    T, D, P = shape.tokens, shape.width, shape.projections
    base, lora = 2 * T * D * D * P, 4 * T * D * shape.rank * P
    flops = 2 * base + 3 * lora if backward else base + lora
    moved = T * D * (1 + P) * (2 if backward else 1) + D * D * P
    moved *= torch.empty((), dtype=shape.kind).element_size()
    return max(flops / gemm_rate(device, shape.kind), moved / copy_rate(device))


def clocks(device: str) -> str:
    """Clock and driver, as the system tells them."""
    if device == "cpu":
        info = Path("/proc/cpuinfo")
        lines = info.read_text().splitlines() if info.is_file() else []
        found = [line.partition(":")[2].strip() for line in lines if line.startswith("cpu MHz")]
        return f"{found[0]} MHz" if found else "unknown"
    fields = "clocks.sm,clocks.max.sm,power.limit,driver_version"
    told = subprocess.run(
        ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader", "-i", "0"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return told.stdout.strip() or "unknown"
