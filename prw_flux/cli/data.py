"""The verb `data`: what a data source offers, seen before anything is trained.

Below it, `data build`, `data inspect` and `data check` are about data on disk (data_build.py).
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from prw_flux.cli import data_build, show


def add_to(verbs: Any, common: argparse.ArgumentParser) -> None:
    """Add the verb."""
    parser = verbs.add_parser(
        "data",
        parents=[common],
        help="show what a data source offers to each task; build, inspect, check data on disk",
    )
    parser.add_argument(
        "--source", help="shapeweave (default), photos, disk:DIR or package.module:object"
    )
    parser.add_argument("--photos", metavar="DIR", help="a folder of your photos")
    parser.add_argument("--task", action="append", help="only this task; may be repeated")
    parser.add_argument("--size", type=int, default=96, help="side of the pictures (default: 96)")
    parser.add_argument("--count", type=int, default=8, help="samples per task (default: 8)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", metavar="FILE", help="write the samples as a contact sheet")
    parser.add_argument("--json", action="store_true", help="print it for a script")
    parser.set_defaults(run=run_data)
    data_build.add_to(parser, common)


def run_data(args: argparse.Namespace) -> int:
    """Draw samples of every task, count their kinds and rejects, and show them."""
    from prw_flux.batch_order import stable_hash
    from prw_flux.data.choose import open_data, require_feeds
    from prw_flux.tasks import TASKS, TaskReject, load_task

    source = args.source or ("photos" if args.photos else "shapeweave")
    data = open_data(source, size=args.size, seed=args.seed, photos=args.photos)
    rows, facts = [], []
    for name in args.task or [name for name in TASKS if name in data.tasks()]:
        task = load_task(name)
        require_feeds(data, task, frozenset(TASKS))
        kinds: Counter[str] = Counter()
        rejected: Counter[str] = Counter()
        triples = []
        for index in range(args.count):
            try:
                triple = task(data.example(task.name, index), stable_hash(args.seed, index))
            except TaskReject as refusal:
                rejected[refusal.reason] += 1
                continue
            kinds[str(triple.metadata["kind"])] += 1
            triples.append(triple)
        rows.append(triples)
        facts.append({"task": task.name, "kinds": kinds, "rejected": rejected,
                      "texts": [triple.text for triple in triples]})  # fmt: skip
    if args.out:
        write_sheet(Path(args.out), rows, args.size)
    summary = getattr(data, "summary", lambda: "")()
    _tell(args, {"source": data.name, "summary": summary, "tasks": facts})
    return 0


def _tell(args: argparse.Namespace, facts: dict[str, Any]) -> None:
    if args.json:
        show.answer(facts)
        return
    console = show.human()
    console.print(f"[bold]{facts['source']}[/bold]  {facts['summary']}")
    table = show.table("", {"task": "left", "kinds": "left", "rejected": "left", "text": "left"})
    for fact in facts["tasks"]:
        kinds, rejected = (_counts(fact[key]) for key in ("kinds", "rejected"))
        table.add_row(fact["task"], kinds, rejected, (fact["texts"] or ["-"])[0])
    console.print(table)
    if args.out:
        console.print(args.out)


def _counts(counter: Counter[str]) -> str:
    return ", ".join(f"{key} {count}" for key, count in counter.items()) or "-"


def write_sheet(path: Path, rows: list[list[Any]], size: int) -> None:
    """A contact sheet: one row per task, each sample as source beside target."""
    from PIL import Image

    width = max((len(row) for row in rows), default=1) or 1
    sheet = np.full((len(rows) * (size + 4), width * (2 * size + 8), 3), 255, np.uint8)
    for r, row in enumerate(rows):
        for c, triple in enumerate(row):
            y, x = r * (size + 4), c * (2 * size + 8)
            for picture in (triple.source, triple.target):
                sheet[y : y + size, x : x + size] = picture[:size, :size]
                x += size + 2
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(sheet).save(path)
