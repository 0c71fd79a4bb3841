"""The verb `inspect`: stages, experts, sizes, hashes and usage; no model is loaded."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from prw_flux.cli import show


def add_to(verbs: Any, common: argparse.ArgumentParser) -> None:
    """Add the verb."""
    parser = verbs.add_parser(
        "inspect", parents=[common], help="print stages, experts, sizes, hashes and usage"
    )
    parser.add_argument("directory", metavar="RUN")
    parser.add_argument("--json", action="store_true", help="print it for a script")
    parser.set_defaults(run=run_inspect)


def run_inspect(args: argparse.Namespace) -> int:
    """Print what a run holds; damage in the adapter is an error."""
    facts = inspected(Path(args.directory))
    if args.json:
        show.answer(facts)
        return 0
    console = show.human()
    console.print(
        f"[bold]{facts['run']}[/bold]  recipe {facts['recipe']}  base {facts['base']['path']}  "
        f"seed {facts['seed']}  {facts['size']} px  {facts['done']}/{len(facts['stages'])} stages"
    )
    columns = {"stage": "left", "task": "left", "done": "left", "steps": "right", "s": "right",
               "loss": "right", "usage noisy": "right", "usage quiet": "right", "rank": "right",
               "parameters": "right", "KiB": "right", "sha256": "left"}  # fmt: skip
    table = show.table("", columns)
    for stage in facts["stages"]:
        table.add_row(*(_cell(stage[key]) for key in STAGE_KEYS))
    console.print(table)
    console.print(f"routers  {facts['router']['kib']} KiB  {_short(facts['router']['sha256'])}")
    if (stream := facts["features"]) is not None:
        console.print(
            f"features  {stream['kib']} KiB  {stream['channels']} of {stream['width']} channels of "
            f"{stream['encoder']}, with stages {', '.join(stream['stages'])}"
        )
    return 0


STAGE_KEYS = ("name", "task", "state", "steps", "seconds", "loss", "usage_noisy",
              "usage_deterministic", "rank", "parameters", "kib", "sha256")  # fmt: skip


def inspected(path: Path) -> dict[str, Any]:
    """What `inspect` tells about a run, as plain data; file hashes are verified.

    Raises:
        RunError: not a run.
        CheckpointError: the adapter is damaged.
    """
    from prw.checkpoint import ROUTER, read
    from prw_flux.rundir import RunFolder

    run = RunFolder.open(path)
    facts: dict[str, Any] = {
        "run": str(run.path),
        "recipe": run.config.recipe,
        "base": run.index["base"],
        "parent": run.index.get("parent"),
        "seed": run.config.seed,
        "size": run.config.size,
        "done": run.done,
        "router": {"kib": 0, "sha256": None},
        "features": None,
        "stages": [],
    }
    hashes: dict[str, str] = {}
    if run.done:
        read(run.adapter)
        hashes = json.loads((run.adapter / "prw.json").read_text("utf-8"))["sha256"]
        router = run.adapter / ROUTER
        facts["router"] = {"kib": router.stat().st_size >> 10, "sha256": hashes[ROUTER]}
        facts["features"] = _features(run.coredi)
    last = {line["stage"]: line for line in run.read_log()}
    for number, (stage, noted) in enumerate(
        zip(run.config.stages, run.index["stages"], strict=True)
    ):
        line = last.get(stage.name, {})
        state = "yes" if noted["done"] else "open" if line else "no"
        facts["stages"].append(
            {
                "name": stage.name,
                "task": stage.task,
                "state": state,
                "steps": stage.steps if noted["done"] else line.get("step", 0),
                "seconds": noted.get("seconds"),
                "rejected": noted.get("rejected", {}),
                "kinds": noted.get("kinds", {}),
                **{k: line.get(k) for k in ("loss", "usage_noisy", "usage_deterministic")},
                **_expert(run.adapter, number, stage.name, hashes if noted["done"] else {}),
            }
        )
    return facts


def _features(folder: Path) -> dict[str, Any] | None:
    """The feature stream of a run, None where it has none; a damaged one is an error."""
    from prw_flux.coredi.model import CoReDi

    if not folder.is_dir():
        return None
    stream = CoReDi.load(folder)
    return {
        "encoder": stream.config.encoder,
        "width": stream.width,
        "channels": stream.config.channels,
        "tokens": stream.config.tokens,
        "learn_projection": stream.config.learn_projection,
        "stages": list(stream.snapshots),
        "kib": (folder / "coredi.safetensors").stat().st_size >> 10,
    }


def _expert(adapter: Path, number: int, name: str, hashes: dict[str, str]) -> dict[str, Any]:
    """Rank, size and hash of one expert; nothing for a stage that is not finished."""
    from safetensors import safe_open

    from prw.lora_format import SETTINGS, WEIGHTS

    folder = f"experts/{number}-{name}"
    if f"{folder}/{WEIGHTS}" not in hashes:
        return {"rank": None, "parameters": None, "kib": None, "sha256": None}
    file = adapter / folder / WEIGHTS
    with safe_open(file, framework="pt") as tensors:
        shapes = [tensors.get_slice(key).get_shape() for key in tensors.keys()]
    rank = json.loads((adapter / folder / SETTINGS).read_text("utf-8"))["r"]
    return {
        "rank": rank,
        "parameters": sum(rows * columns for rows, columns in shapes),
        "kib": file.stat().st_size >> 10,
        "sha256": hashes[f"{folder}/{WEIGHTS}"],
    }


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.3f}" if value < 100 else f"{value:.0f}"
    if isinstance(value, int):
        return f"{value:,}"
    return _short(value)


def _short(text: str | None) -> str:
    """A hash by its first twelve digits; other texts as they are."""
    return "-" if text is None else text[:12] if len(text) == 64 else text
