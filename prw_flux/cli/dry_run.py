"""`train --dry-run`: what a run will take, told before anything is loaded, fetched or written."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

from rich.console import Console

from prw_flux.cli import show


def add_to(parser: argparse.ArgumentParser) -> None:
    """Add the arguments to `train`."""
    group = parser.add_argument_group("before a run")
    group.add_argument(
        "--dry-run", action="store_true",
        help="print stages, work, memory, disk and hours, and train nothing",
    )  # fmt: skip
    group.add_argument("--ranks", type=int, default=1, help="GPUs that share a batch (default: 1)")
    group.add_argument(
        "--device-tflops", type=float, default=989.0, metavar="T",
        help="dense TFLOP/s of one GPU (default: 989, an H100 or H200 in bf16)",
    )  # fmt: skip
    group.add_argument(
        "--utilisation", type=float, default=0.4, help="share of them that is used (default: 0.4)"
    )
    group.add_argument(
        "--seconds-per-step", type=float, metavar="S",
        help="measured, of the first stage; instead of TFLOP/s and utilisation",
    )  # fmt: skip
    group.add_argument("--price-per-hour", type=float, metavar="P", help="of one GPU")


def tell(args: argparse.Namespace, config: Any) -> int:
    """Print the forecast."""
    from prw_flux.forecast.plan import Machine, forecast

    machine = Machine(
        ranks=args.ranks,
        tflops=args.device_tflops,
        utilisation=args.utilisation,
        seconds_per_step=args.seconds_per_step,
        price=args.price_per_hour,
    )
    found = forecast(config, machine)
    if args.json:
        show.answer(asdict(found) | {"hours": found.hours, "machine": asdict(machine)})
        return 0
    console = show.human()
    tokens = found.tokens
    console.print(
        f"[bold]{config.recipe or 'run'}[/bold]  {config.base.path}, {config.size} px: "
        f"{tokens.source:,} source, {tokens.noisy:,} noisy and {tokens.text:,} text tokens; "
        f"{machine.ranks} GPU(s)"
    )
    _print_stages(console, found)
    _print_times(console, found, machine)
    _print_memory(console, found)
    _print_disk(console, found)
    for line in found.assumptions:
        console.print(f"- {line}")
    return 0


def _print_stages(console: Console, found: Any) -> None:
    columns = dict.fromkeys(
        ["steps", "batch", "samples", "lr", "density", "weight", "trains", "frozen"], "right"
    )
    table = show.table("stages", {"stage": "left", "task": "left"} | columns)
    for plan in found.stages:
        stage = plan.stage
        table.add_row(
            stage.name, stage.task, f"{stage.steps:,}", f"{stage.batch_size:,}",
            _short(plan.samples), f"{stage.lr:g}", f"{stage.density:g}", f"{stage.weight:g}",
            _short(plan.trained), _short(plan.frozen),
        )  # fmt: skip
    console.print(table)


def _print_times(console: Console, found: Any, machine: Any) -> None:
    columns = ["tokens", "per sample", "per step", "s / step", "samples / s", "hours", "GPU hours"]
    columns += [] if machine.price is None else ["cost"]
    table = show.table("work and time", {"stage": "left"} | dict.fromkeys(columns, "right"))
    for plan in found.stages:
        row = [
            plan.stage.name,
            _short(plan.samples * (found.tokens.source + found.tokens.main)),
            f"{_short(plan.work.total)}FLOP",
            f"{_short(plan.flops)}FLOP",
            f"{plan.seconds:,.3g}",
            f"{plan.stage.batch_size / plan.seconds:,.4g}",
            f"{plan.hours:,.1f}",
            f"{plan.hours * machine.ranks:,.1f}",
        ]
        table.add_row(*row, *([] if plan.cost is None else [f"{plan.cost:,.0f}"]))
    total = [f"{found.hours:,.1f}", f"{found.hours * machine.ranks:,.1f}"]
    total += [] if machine.price is None else [f"{sum(p.cost for p in found.stages):,.0f}"]
    flops = sum(plan.flops * plan.stage.steps for plan in found.stages)
    tokens = sum(p.samples for p in found.stages) * (found.tokens.source + found.tokens.main)
    table.add_row("all", _short(tokens), "", f"{flops:.2g} in all", "", "", *total)
    console.print(table)


def _print_memory(console: Console, found: Any) -> None:
    columns = ["base", "encoders", "adapter", "gradients", "optimizer", "samples"]
    columns += ["activations", "checkpointed", "peak"]
    title = "memory of one GPU, GiB"
    table = show.table(title, {"stage": "left"} | dict.fromkeys(columns, "right"))
    for plan in found.stages:
        m = plan.memory
        parts = (m.base, m.encoders, m.adapter, m.gradients, m.optimizer)
        rest = (m.activations, m.checkpointed, m.peak)
        table.add_row(plan.stage.name, *map(_gib, parts), f"{plan.rank_batch:,}", *map(_gib, rest))
    console.print(table)


def _print_disk(console: Console, found: Any) -> None:
    table = show.table("disk, GiB", {"what": "left", "size": "right"})
    table.add_row("adapter", _gib(found.adapter))
    table.add_row("states to resume from", _gib(found.state))
    for plan in found.stages:
        table.add_row(f"cached samples of {plan.stage.name}", _gib(plan.cache))
    console.print(table)


def _gib(count: int) -> str:
    size = count / 2**30
    return f"{size:,.0f}" if size >= 1000 else f"{size:.3g}"


def _short(count: float) -> str:
    """A number with a prefix: 11.9 G."""
    for prefix in ("", "k", "M", "G", "T", "P", "E"):
        if count < 1000:
            return f"{count:.4g} {prefix}".rstrip() if prefix != "" else f"{count:.4g}"
        count /= 1000
    return f"{count:.4g} Z"
