"""The verb `memory`: what editing with FLUX.1 takes, from its configuration; nothing is loaded."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from prw_flux.cli import show

NAMES = {
    "transformer": "transformer",
    "t5": "T5 text encoder",
    "clip": "CLIP text encoder",
    "vae": "autoencoder",
    "adapter": "adapter",
    "sources": "recorded sources",
    "denoising": "while denoising, the rest offloaded",
    "together": "all on the accelerator",
}


def add_to(verbs: Any, common: argparse.ArgumentParser) -> None:
    """Add the verb."""
    parser = verbs.add_parser(
        "memory", parents=[common], help="print how much memory editing with FLUX.1 takes"
    )
    parser.add_argument("--size", type=int, default=1024, help="side of a source in pixels")
    parser.add_argument("--references", type=int, default=1, help="sources of one result")
    parser.add_argument("--cache", default="bf16", help="recorded sources: bf16 or fp8")
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--experts", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print it for a script, in bytes")
    parser.set_defaults(run=run_memory)


def run_memory(args: argparse.Namespace) -> int:
    """Print one column per precision of the base, in GiB."""
    from prw_flux.memory import GIB, budget

    found: dict[str, dict[str, int]] = {}
    for base in ("bf16", "int8", "nf4"):
        part = budget(
            base=base,
            cache=args.cache,
            size=args.size,
            references=args.references,
            rank=args.rank,
            experts=args.experts,
        )
        sums = {"denoising": part.denoising, "together": part.together}
        found[base] = dataclasses.asdict(part) | sums
    if args.json:
        show.answer(found)
        return 0
    console = show.human()
    console.print(
        f"FLUX.1, {args.experts} experts of rank {args.rank}, {args.references} source(s) of "
        f"{args.size} px in {args.cache}; GiB by precision of transformer and T5"
    )
    table = show.table("", {"": "left"} | dict.fromkeys(found, "right"))
    for key, name in NAMES.items():
        table.add_row(name, *(f"{column[key] / GIB:.2f}" for column in found.values()))
    console.print(table)
    console.print("not counted: activations (an estimated 0.5 GiB at 1024 px) and the CUDA context")
    return 0
