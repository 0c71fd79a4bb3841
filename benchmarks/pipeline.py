"""What a source image costs: one denoising step of a FLUX transformer, five ways.

    python -m benchmarks.pipeline [--device cpu|cuda] [--size tiny|mid|full] [--quick] [--json FILE]

``text``     text to image, the stock transformer
``joint``    source tokens beside the noisy ones in the stock transformer, as Kontext does
``current``  source pass and main pass in every step (`source_timestep="current"`)
``cached``   main pass on recorded keys and values (`source_timestep="zero"`)
``source``   the source pass that is recorded once

Operations and bytes are counted on the meta device, for FLUX.1-dev and for what is timed. Text to
image through an attached pipeline is timed in pairs with FluxPipeline. ``--size full`` is
FLUX.1-dev's configuration with random weights, for a GPU, with training steps at 512 pixels too
(``--training`` asks for them at another size).

Before anything is timed, both passes must give the velocity of one joint attention in which the
source sees only itself (in fp64, where the two agree to rounding), the cache the bits of a fresh
recording, every variant a finite velocity that the source changes, and text to image the bits of
FluxPipeline: a wrong result has no speed. On a CPU the clock is that of the process, in one thread.
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

import torch
from diffusers import FluxTransformer2DModel

from benchmarks._common import interleaved, keep, machine, parser, spread
from benchmarks._flops import attaching, counted
from benchmarks._flux import EXPERTS, RANKS, SIZES, build, draw, five_ways, wrong
from benchmarks._pipeline_report import tell
from benchmarks._text_to_image import text_to_image
from benchmarks._training import training
from prw_flux import PRWAdapter


def main(arguments: list[str] | None = None) -> int:
    """Check, time, print; 1 where a result is wrong."""
    found = parser("pipeline", __doc__ or "")
    found.add_argument("--size", choices=tuple(SIZES), default="mid")
    found.add_argument("--steps", type=int, default=28, help="of the generation that is summed up")
    found.add_argument("--training", action="store_true", help="time training steps, too")
    args = found.parse_args(arguments)
    if args.size == "full" and args.device == "cpu":
        found.error("--size full takes 24 GB of weights in bf16 and needs a GPU: --device cuda")
    args.clock = time.perf_counter if args.device == "cuda" else time.process_time
    if args.device == "cpu":
        torch.set_num_threads(1)
    model, adapter = build(args.size, args.device)
    try:
        with torch.inference_mode():
            measured = [measure(model, args, *shape) for shape in shapes(args)]
            beside = pairs(model, adapter, args)
        trained = train(model, args) if args.training or args.size == "full" else []
    except ArithmeticError as problem:
        print(f"no times: {problem}", file=sys.stderr)
        return 1
    grids = (64,) if args.quick else (32, 64)
    result = {
        "benchmark": "pipeline",
        **machine(args.device),
        "size": args.size,
        "parameters": sum(p.numel() for p in model.parameters()),
        "experts": EXPERTS,
        "rank": RANKS[args.size],
        "dtype": str(next(adapter.parameters()).dtype),
        "clock": args.clock.__name__,
        "steps": args.steps,
        "variants": {k: v for one in measured for k, v in one.pop("variants").items()},
        "generations": measured,
        "text_to_image": beside,
        "training": trained,
        "counted": [counted("full", side, 512, args.steps) for side in grids],
        "attach_full_width": attaching("full", "meta"),
    }
    tell(result)
    keep(result, args.json)
    return 0


def shapes(args: argparse.Namespace) -> list[tuple[int, int]]:
    """Side of the token grid, and text tokens; an eighth of the noisy ones as at 1024 pixels."""
    if args.size == "full":
        return [(32, 512), (64, 512)]
    return [(16, 32)] if args.quick else [(32, 128)]


def measure(
    model: FluxTransformer2DModel, args: argparse.Namespace, grid: int, text: int
) -> dict[str, Any]:
    """Times of the five ways at one size, and what they make of a whole generation.

    Raises:
        ArithmeticError: a result is wrong.
    """
    given = draw(model, grid, args.device, text)
    ways = five_ways(model, given)
    problem = wrong(model, given, ways)
    if problem:
        raise ArithmeticError(problem)
    rounds, warmup = (5, 1) if args.quick else (15, 2)
    seconds = interleaved(
        ways, rounds=rounds, warmup=warmup, device=args.device, clock=args.clock,
        fresh=lambda: None,
    )  # fmt: skip
    work = counted(args.size, grid, text, args.steps)
    return {
        "pixels": 16 * grid,
        "rounds": rounds,
        "variants": {f"{name} {16 * grid}px": spread(values) for name, values in seconds.items()},
        "time": generation(seconds, args.steps),
        "flops": {name: work[name] for name in ("joint_over_ours", "current_over_ours",
                                                "ours_over_text")},
    }  # fmt: skip


def generation(seconds: dict[str, list[float]], steps: int) -> dict[str, float]:
    """Ratios of whole generations: ours records the source once, then takes cached steps.

    From medians, so that a slow moment of the machine does not count.
    """
    median = {name: spread(values)["median_ms"] for name, values in seconds.items()}
    ours = median["source"] + steps * median["cached"]
    return {
        "joint_over_ours": round(steps * median["joint"] / ours, 3),
        "current_over_ours": round(steps * median["current"] / ours, 3),
        "ours_over_text": round(ours / (steps * median["text"]), 3),
    }


def pairs(
    model: FluxTransformer2DModel, adapter: PRWAdapter, args: argparse.Namespace
) -> dict[str, Any]:
    """Text to image through both pipelines, at a size where a step is short."""
    given = draw(model, 8 if args.quick else 16, args.device, 32)
    return text_to_image(
        model, adapter, given, rounds=3 if args.quick else 30, device=args.device, clock=args.clock
    )


def train(model: FluxTransformer2DModel, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Training steps: at 512 pixels in full size, shorter otherwise."""
    grid, text, batches = (32, 512, (1, 4, 8)) if args.size == "full" else (8, 32, (1, 2))
    return training(
        model, RANKS[args.size], grid=grid, text=text, batches=batches,
        rounds=2 if args.quick else 5, device=args.device,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
