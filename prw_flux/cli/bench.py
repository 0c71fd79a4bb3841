"""`prw-flux evaluate --bench`: a folder of generated pictures scored by a published protocol."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from rich.markup import escape

from prw_flux.cli import show

if TYPE_CHECKING:
    from prw_flux.evaluation.benchmarks import Benchmark, Encoders, Scores

CLIP: Final = "openai/clip-vit-base-patch32"
DINO: Final = "facebook/dino-vits16"
"""The encoders of the public scripts of MagicBrush and DreamBench."""
NAMES: Final = ("magicbrush", "emu_edit", "dreambench", "refcoco")


def add_to(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that belong to --bench."""
    group = parser.add_argument_group("scoring a folder of results (no RUN, nothing is generated)")
    group.add_argument("--bench", choices=NAMES, help="the published protocol")
    group.add_argument("--results", metavar="DIR", help="the generated pictures")
    group.add_argument("--data", metavar="DIR", help="the benchmark's own folder")
    group.add_argument("--clip", default=CLIP, help=f"folder, Hub id or none (default: {CLIP})")
    group.add_argument("--dino", default=DINO, help=f"folder, Hub id or none (default: {DINO})")
    group.add_argument("--encoder", metavar="SPEC", help="one more, package.module:object")
    group.add_argument("--device", default="cpu", help="of the encoders (default: cpu)")
    group.add_argument(
        "--samples", type=int, default=1, help="pictures per prompt of dreambench (default: 1)"
    )
    group.add_argument(
        "--captions", choices=("all", "changed"), default="all",
        help="emu_edit: CLIP-T and CLIP-dir of all rows, or where the captions differ",
    )  # fmt: skip
    group.add_argument("--name", default="yours", help="of your row (default: yours)")
    group.add_argument("--out", metavar="FILE", help="default: RESULTS/scores.json")


def run_bench(args: argparse.Namespace) -> int:
    """Score the folder, write the scores, print them under the published rows.

    Exit status 1 if a picture is missing or unusable; the scores of the others are written.
    """
    from prw_flux.evaluation.benchmarks import BenchmarkError, score_folder
    from prw_flux.progress import watching

    if args.directory is not None:
        raise BenchmarkError(
            f"--bench scores pictures that exist: leave out {args.directory!r} and name their "
            "folder with --results."
        )
    for name in ("results", "data"):
        if getattr(args, name) is None:
            raise BenchmarkError(f"--bench {args.bench} needs --{name} DIR.")
    show.quiet_loading()
    results = Path(args.results)
    out = Path(args.out) if args.out else results / "scores.json"
    encoders = _encoders(args)
    benchmark = _open(args, encoders)
    with watching(show.watcher(), quiet=args.quiet or args.json) as progress:
        scores = score_folder(
            benchmark, results, encoders, out,
            lambda done, total: progress.measured(args.bench, done, total),
        )  # fmt: skip
    tables = _comparisons(scores, args.name)
    if args.json:
        show.answer({"out": str(out), **scores.to_json(), "comparisons": tables})
    else:
        _tell(scores, args.name, tables)
        show.human().print(f"scores  {out}")
    if scores.problems:
        raise BenchmarkError(
            f"{len(scores.problems)} problems among {len(benchmark.items)} pictures, the first: "
            f"{scores.problems[0]}. The scores of the other pictures are in {out}."
        )
    return 0


def _encoders(args: argparse.Namespace) -> Encoders:
    from prw_flux.evaluation.benchmarks import Encoders
    from prw_flux.evaluation.encoders import ClipEncoder, DinoEncoder, OwnEncoder

    if args.bench == "refcoco":
        return Encoders()

    def made(kind: Callable[[str, str], Any], where: str) -> Any:
        return None if where == "none" else kind(where, args.device)

    return Encoders(
        clip=made(ClipEncoder, args.clip),
        dino=made(DinoEncoder, args.dino),
        own=OwnEncoder(args.encoder) if args.encoder else None,
    )


def _open(args: argparse.Namespace, encoders: Encoders) -> Benchmark[Any]:
    from prw_flux.evaluation.benchmarks import (
        BenchmarkError,
        DreamBench,
        EmuEdit,
        MagicBrush,
        RefCoco,
    )

    folder = Path(args.data)
    if args.bench == "magicbrush":
        return MagicBrush(folder, captions=encoders.clip is not None)
    if args.bench == "emu_edit":
        return EmuEdit(folder, captions=args.captions)
    if args.bench == "refcoco":
        return RefCoco(folder)
    if not encoders.named():
        raise BenchmarkError("dreambench measures nothing without --clip, --dino or --encoder.")
    return DreamBench(folder, samples=args.samples)


def _comparisons(scores: Scores, name: str) -> list[dict[str, Any]]:
    """Every line under every table of the benchmark that has one of its metrics."""
    from prw_flux.evaluation.published import compare, tables_of

    return [
        {"line": line.label, "table": table.name, "source": table.rows[0].source,
         **asdict(compare(table, name, line.metrics, line.protocol))}
        for line in scores.lines
        for table in tables_of(scores.benchmark)
        if set(table.metrics) & set(line.metrics)
    ]  # fmt: skip


def _tell(scores: Scores, name: str, comparisons: Sequence[Mapping[str, Any]]) -> None:
    console = show.human()
    columns = dict.fromkeys(metric for line in scores.lines for metric in line.metrics)
    made = show.table(
        f"{scores.benchmark}: {name}",
        {"": "left", "n": "right", **dict.fromkeys(map(escape, columns), "right")},
    )
    for line in scores.lines:
        cells = [f"{line.metrics[m]:.4f}" if m in line.metrics else "" for m in columns]
        made.add_row(line.label, str(line.n), *cells)
    console.print(made)
    for note in scores.notes:
        console.print(f"note: {note}", markup=False)
    for one in comparisons:
        first, *metrics = one["columns"]
        title = f"{one['source']}, beside {one['line']}"
        table = show.table(title, {first: "left", **dict.fromkeys(metrics, "right")})
        for row in one["rows"]:
            table.add_row(*row)
        console.print(table)
        for note in one["notes"]:
            console.print(f"  {note}", markup=False)
    if not comparisons:
        console.print("The paper reports nothing on this benchmark.")
