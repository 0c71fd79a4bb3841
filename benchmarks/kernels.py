"""Routed LoRA beside what people use today: correctness first, then time, memory and launches.

    python -m benchmarks.kernels [--device cpu|cuda] [--suite cpu|flux|llm] [--quick]
                                 [--json FILE] [--compare OLD.json] [--plot FILE.png]
                                 [--page PAGE.md] [--read FILE.json]

``base``     the frozen linears alone; it is part of every other row
``plain``    one unrouted LoRA: the peft library's own layer, where it is installed
``ours``     `prw_kernels.routed_linear`, backend "auto": on a GPU the base is part of the operator
``loop``     PEFT's loop over adapters (`_mixed_batch_forward`), with index tensors
``tuned``    the same loop with index_select and index_add_, which PEFT does not use
``dense``    X-LoRA: every expert on every token
``grouped``  sorted rows and `torch.nn.functional.grouped_mm`, differentiated by autograd

Outputs and every gradient of each routed variant are compared with the reference in fp64, at the
size that is timed, before anything is timed; a wrong one ends the run with status 1. On a CPU there
is one thread and times are process time. On CUDA they are taken between events with the L2 cache
flushed, and up to 4096 tokens from a CUDA graph, too.

Every round draws a new batch and a new routing; ratios are medians of the ratios within a round.
``roof`` is the time in which this machine could do the work at its own measured rates. `--page`
writes the tables between the comments ``kernels cpu: begin`` (or ``cuda``) and ``end`` of a page;
`--read` takes an earlier --json in place of a run.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import _report
from benchmarks._ceilings import clocks, copy_rate, gemm_rate, graphed, roofline, seconds
from benchmarks._common import interleaved, keep, machine, new_file, parser, spread
from benchmarks._kernels_page import tables
from benchmarks._page import require_marks, write_between
from benchmarks._peers import ROUTED, Plain, Problem, base, error, gradients, saved_bytes, truth
from benchmarks._shapes import Shape, suite

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 5e-3}
"""Of the largest value: some ten roundings of the dtype's epsilon, sums of some 1,000 in fp32."""
GRAPHED = 4096
PRODUCTS = ("mm", "addmm", "addmm_", "bmm", "_grouped_mm")
MOVES = ("index_select", "sort", "cat", "scatter_", "copy_", "clone", "searchsorted")


def main(arguments: list[str] | None = None) -> int:
    """Check, time, print; 1 where a result is wrong."""
    found = parser("kernels", __doc__ or "")
    found.add_argument("--suite", choices=("cpu", "flux", "llm"))
    found.add_argument(
        "--compare", type=_report.earlier, help="an earlier --json of the same suite"
    )
    found.add_argument("--plot", type=new_file, help="draw the ratios to the base here")
    found.add_argument("--page", type=Path, help="write the tables into this page")
    found.add_argument("--read", type=_report.earlier, help="an earlier --json: nothing is run")
    args = found.parse_args(arguments)
    require_marks(found, args.page, f"kernels {args.device}")
    result = args.read or run(args)
    if result is None:
        return 1
    if args.compare:
        _report.compare(result, args.compare)
    keep(result, args.json)
    if args.plot:
        _report.plot(result, args.plot)
    if args.page:
        write_between(args.page, f"kernels {args.device}", tables(result, args.compare))
    return 0


def run(args: argparse.Namespace) -> dict[str, Any] | None:
    """Check and time every shape; None where a result is wrong."""
    if args.device == "cpu":
        torch.set_num_threads(1)  # process time counts every thread
    shapes = suite(args.suite or ("cpu" if args.device == "cpu" else "flux"), args.quick)
    rates = {s.dtype: round(gemm_rate(args.device, s.kind) / 1e9, 1) for s in shapes}
    result: dict[str, Any] = {
        "benchmark": "kernels", **machine(args.device), "clocks": clocks(args.device),
        "gemm_GFLOP_per_s": rates, "copy_GB_per_s": round(copy_rate(args.device) / 1e9, 1),
        "rows": [], "variants": {},
    }  # fmt: skip
    _report.head(result)
    for shape in shapes:
        errors = verdict(shape, args.device)
        bad = [name for name, value in errors.items() if not value < TOLERANCE[shape.kind]]
        if bad:
            print(f"WRONG {shape.name}: {', '.join(bad)} in {errors}", file=sys.stderr)
            return None
        for backward in (False, True):
            row = timed(shape, args, backward) | {"error": errors["ours"]}
            times = row.pop("times")
            result["variants"] |= {f"{row['name']} {n}": v for n, v in times.items()}
            result["rows"].append(row)
            _report.line(row)
    result["summary"] = _report.summary(result["rows"])
    return result


def verdict(shape: Shape, device: str) -> dict[str, float]:
    """The worst relative error of every routed variant."""
    p = Problem(shape, device)
    exact = truth(p)
    return {name: error(p, way, exact) for name, way in ROUTED.items()}


def timed(shape: Shape, args: argparse.Namespace, backward: bool) -> dict[str, Any]:
    """Times of all variants of one shape, and what ours costs beside them."""
    p = Problem(shape, args.device)
    plain = Plain(p)
    ways = {"base": (base, [p.x]), "plain": (plain, plain.leaves(p))}
    ways |= {name: (way, p.leaves()) for name, way in ROUTED.items()}
    runs: dict[str, Callable[[], object]] = {}
    for name, (way, leaves) in ways.items():
        if backward:
            runs[name] = lambda way=way, leaves=leaves: gradients(way(p), p, leaves)
        else:
            runs[name] = torch.no_grad()(partial(way, p))
    took = interleaved(
        runs, rounds=3 if args.quick else 9, warmup=1 if args.quick else 2, device=args.device,
        timer=partial(seconds, device=args.device), fresh=p.refresh,
    )  # fmt: skip
    over = {name: ratio(took[name], took["ours"]) for name in ("loop", "tuned", "dense", "grouped")}
    row = {
        "name": f"{shape.name} {'forward+backward' if backward else 'forward'}",
        "shape": asdict(shape),
        "backward": backward,
        "plain_is": plain.name,
        "times": {name: spread(values) for name, values in took.items()},
        "base_ms": spread(took["base"])["median_ms"],
        "ours_ms": spread(took["ours"]),
        "ours_over": {
            "base": ratio(took["ours"], took["base"]),
            "plain": ratio(took["ours"], took["plain"]),
            "roof": round(
                statistics.median(took["ours"]) / roofline(shape, args.device, backward), 3
            ),
        },
        "over_ours": over,
        "over_base": {name: ratio(values, took["base"]) for name, values in took.items()},
    }
    if backward:
        row["saved_bytes_per_token"] = {
            name: round(saved_bytes(p, partial(ways[name][0], p)) / shape.tokens)
            for name in ("plain", "ours", "loop")
        }
    return row | spent(runs["ours"], row, args.device) | on_cuda(runs, shape, args.device)


def ratio(over: list[float], under: list[float]) -> float:
    """Median of the ratios within a round."""
    return round(statistics.median(a / b for a, b in zip(over, under, strict=True)), 3)


class Spent(TorchDispatchMode):
    """Process time of operators by kind: products, moves of rows, the rest."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds = {"products": 0.0, "moves": 0.0, "elementwise": 0.0}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        kind = "products" if name in PRODUCTS else "moves" if name in MOVES else "elementwise"
        started = time.process_time()
        found = func(*args, **(kwargs or {}))
        self.seconds[kind] += time.process_time() - started
        return found


def spent(run: Callable[[], object], row: dict[str, Any], device: str) -> dict[str, Any]:
    """Milliseconds of ours by kind of work on a CPU; Python and bookkeeping are what is left."""
    if device != "cpu":
        return {"spent_ms": None}
    rounds = []
    for _ in range(3):
        with Spent() as mode:
            run()
        rounds.append(mode.seconds)
    found = {kind: 1e3 * statistics.median(r[kind] for r in rounds) for kind in rounds[0]}
    found["lora_products"] = max(0.0, found.pop("products") - row["base_ms"])
    found = {"base": row["base_ms"], **found}
    found["python"] = max(0.0, row["ours_ms"]["median_ms"] - sum(found.values()))
    return {"spent_ms": {kind: round(value, 3) for kind, value in found.items()}}


def on_cuda(runs: dict[str, Callable[[], object]], shape: Shape, device: str) -> dict[str, Any]:
    """Peak memory, launches, and for few tokens the times of CUDA graphs; nothing on a CPU."""
    if device == "cpu":
        return {"peak_MB": None, "launches": None, "graph_ms": None}
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    runs["ours"]()
    peak = torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        runs["ours"]()
        torch.cuda.synchronize()
    kernels = [e for e in profiled.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    graphs = None
    if shape.tokens <= GRAPHED:
        replays = {name: graphed(runs[name]) for name in ("base", "plain", "ours")}
        graphs = {
            name: spread([seconds(replay, device) for _ in range(20)])["median_ms"]
            for name, replay in replays.items() if replay
        }  # fmt: skip
        if "ours" in graphs:
            graphs["ours / base"] = round(graphs["ours"] / graphs["base"], 3)
    return {"peak_MB": round(peak / 2**20, 1), "launches": len(kernels), "graph_ms": graphs}


if __name__ == "__main__":
    sys.exit(main())
