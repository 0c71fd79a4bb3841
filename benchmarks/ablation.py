"""Does it work? The ablation of CoLoGen's Table 5 where the truth is exact.

    python -m benchmarks.ablation [--arms main,controls,NAME] [--seeds 3]
                                  [--steps-scale F] [--rank R] [--base-share F]
                                  [--results FILE] [--report] [--quick] [--json FILE]

Every arm trains K/V experts on the frozen base of tiny-flux with ShapeWeave's samples: the same
samples, batch size, optimizer, learning rates and held-out items; what differs is which tasks are
trained, in which order, with which experts. `--arms` takes names, "main", "controls", "sweeps" and
"all"; hypotheses and the meaning of the figures: docs/pages/findings.md.

A finished (arm, seed) is one line of --results; what is there already is not trained again. Several
processes may run the same command: each takes what no other one has. Lines of another protocol
(lengths, rank and base are part of it) are kept and never mixed with this one's. A base with less
pretraining is trained where it is first asked for, and kept among the temporary files. `--report`
trains nothing: it writes the tables into the findings page and the figures beside it.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from PIL import Image

from benchmarks import _ablation_report as report
from benchmarks._ablation_measure import SHOWN, Held, held_out, measure, references
from benchmarks._ablation_plan import FINAL, QUICK, Arm, Protocol, arms
from benchmarks._ablation_statistics import Rows, own
from benchmarks._ablation_train import Store
from benchmarks._common import keep, machine, parser
from prw_flux.evaluation import draw_samples, unusable
from prw_flux.shapeweave import ShapeWeave
from prw_flux.tasks import load_task

HERE: Final = Path(__file__).parent
RESULTS: Final = HERE / "results" / "2026-11-21-ablation.jsonl"
PAGE: Final = HERE.parent / "docs" / "pages" / "findings.md"
GROUPS: Final = ("main", "controls", "sweeps")
IN_QUICK: Final = ("cologen", "cotrain", "references")


def main(arguments: list[str] | None = None) -> int:
    """Run what is missing, tell what is there; 1 where a check fails."""
    args = _parse(arguments)
    protocol = (
        QUICK
        if args.quick
        else Protocol().varied(length=args.steps_scale, rank=args.rank, base=args.base_share)
    )
    known = arms(protocol)
    names = chosen(args.arms, known)
    if isinstance(names, str):
        print(names, file=sys.stderr)
        return 1
    try:
        if not args.report:
            run(names, range(1 if args.quick else args.seeds), protocol, args.results)
    except ArithmeticError as problem:
        print(f"no figures: {problem}", file=sys.stderr)
        return 1
    every = read(args.results)
    rows = own(every, protocol)
    result = {"benchmark": "ablation", **machine(args.device), "protocol": protocol.digest,
              "variants": report.summary(rows, known)}  # fmt: skip
    tables = report.text(every, known, protocol)
    print(tables)
    if args.report:
        publish(args.page, tables, rows, known, protocol, args.results)
    keep(result, args.json)
    return 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    found = parser("ablation", __doc__ or "")
    found.add_argument("--arms", default="main", help="names or groups, separated by commas")
    found.add_argument("--seeds", type=int, default=3, help="trainings of each arm")
    found.add_argument("--steps-scale", type=float, default=1.0, help="of all lengths")
    found.add_argument("--rank", type=int, default=None, help="of an expert")
    found.add_argument("--base-share", type=float, default=1.0, help="of its pretraining")
    found.add_argument("--results", type=Path, default=None, help="finished arms as JSON lines")
    found.add_argument("--report", action="store_true", help="tables and figures, no training")
    found.add_argument("--page", type=Path, default=PAGE, help="where --report writes its tables")
    args = found.parse_args(arguments)
    if args.steps_scale <= 0 or (args.rank is not None and args.rank < 1):
        found.error(f"--steps-scale {args.steps_scale:g} and --rank {args.rank} must be positive")
    if not 0 < args.base_share <= 1:
        found.error(f"--base-share {args.base_share:g} must be above 0 and at most 1")
    if args.quick:
        args.arms = args.arms if args.arms != "main" else ",".join(IN_QUICK)
    if args.results is None:
        quick = Path(tempfile.mkdtemp()) / "ablation.jsonl" if args.quick else None
        args.results = quick or RESULTS
    return args


def chosen(words: str, known: dict[str, Arm]) -> list[str] | str:
    """Names of arms in the order in which they are run; or what is wrong, in a sentence."""
    wanted = words.split(",")
    odd = [word for word in wanted if word not in (*known, *GROUPS, "all")]
    if odd:
        there = ", ".join((*GROUPS, "all", *known))
        return f"there is no arm or group {odd[0]!r}: choose from {there}"
    return [
        name for name, arm in known.items()
        if "all" in wanted or name in wanted or arm.group in wanted
    ]  # fmt: skip


def run(names: list[str], seeds: range, protocol: Protocol, results: Path) -> None:
    """Train and measure what is missing: all arms of the first seed, then of the next."""
    held: Held | None = None
    for seed in seeds:
        stores: dict[int, Store] = {}
        for name in names:
            if name == "references" and seed:
                continue
            with claim(protocol, name, seed) as mine:
                there = {(row["arm"], row["seed"]) for row in own(read(results), protocol)}
                if not mine or (name, seed) in there:
                    continue
                held = held or held_out(protocol)
                row = one(name, seed, protocol, held, stores, results)
                append(results, row)
                print(f"{name}, seed {seed}: {row['seconds']:.0f} s", file=sys.stderr, flush=True)


def one(
    name: str, seed: int, protocol: Protocol, held: Held, stores: dict[int, Store], results: Path
) -> dict[str, Any]:
    """The row of an arm and a seed; the pictures of the first seed go beside the results."""
    arm = arms(protocol)[name]
    row = {"arm": name, "seed": seed, "protocol": protocol.digest, "steps": arm.steps,
           **machine("cpu")}  # fmt: skip
    if not arm.phases:
        return {**row, **references(protocol, held)}
    found, pictures, stores[seed] = measure(arm, protocol, seed, held, stores.get(seed))
    if pictures and seed == 0:
        save_strip(pictures_of(results, protocol) / f"{name}.png", pictures)
    return {**row, **found}


def pictures_of(results: Path, protocol: Protocol) -> Path:
    """Where the pictures of the first seed lie."""
    return results.with_name(f"{results.stem}-{protocol.digest}")


def publish(
    page: Path, tables: str, rows: list[dict[str, Any]], known: dict[str, Arm],
    protocol: Protocol, results: Path,
) -> None:  # fmt: skip
    """Figures into assets/ beside the page, the tables into the page."""
    from benchmarks._ablation_figures import draw

    place = pictures_of(results, protocol)
    if place.is_dir():
        source = ShapeWeave(size=protocol.config(0).size, seed=protocol.held_seed, split="heldout")
        count = min(SHOWN, protocol.items[-1])
        drawn = draw_samples(source, load_task(FINAL), count, protocol.held_seed, unusable)
        save_strip(place / "source.png", [s.triple.source for s in drawn.samples])
        save_strip(place / "truth.png", [s.triple.target for s in drawn.samples])
    assets = page.parent / "assets"
    assets.mkdir(exist_ok=True)
    report.write(page, tables, draw(assets, Rows(rows), known, place))


def save_strip(path: Path, pictures: list[Any]) -> None:
    """Pictures side by side."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.concatenate(pictures, axis=1)).save(path, optimize=True)


# Files ---------------------------------------------------------------------------------------


@contextmanager
def claim(protocol: Protocol, name: str, seed: int) -> Iterator[bool]:
    """Whether this process may run an arm and seed; the system lets go of it when we die."""
    folder = Path(tempfile.gettempdir()) / f"prw-ablation-{os.getuid()}"
    folder.mkdir(exist_ok=True)
    with (folder / f"{protocol.digest}-{name}-{seed}").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def read(path: Path) -> list[dict[str, Any]]:
    """The finished rows; a line that a crash cut off is left out."""
    rows = []
    for line in path.read_text("utf-8").splitlines() if path.is_file() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def append(path: Path, row: dict[str, Any]) -> None:
    """Add a row in one write, on a line of its own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps(row, separators=(",", ":")) + "\n"
    with path.open("ab+", buffering=0) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        size = file.seek(0, os.SEEK_END)
        if size:
            file.seek(size - 1)
            line = line if file.read(1) == b"\n" else "\n" + line
        file.write(line.encode())
        os.fsync(file.fileno())


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    sys.exit(main())
