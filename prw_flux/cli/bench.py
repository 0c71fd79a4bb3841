"""`prw-flux evaluate --bench`: a published protocol, from a trained run to a row beside papers'."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prw_flux.cli import show
from prw_flux.cli.bench_open import (
    NAMES,
    open_benchmark,
    open_encoders,
    open_judge,
    require_bench,
    require_read,
    settled,
)
from prw_flux.cli.bench_presets import B32, DINO, PRESETS
from prw_flux.cli.bench_show import comparisons_of, tell
from prw_flux.cli.bench_time import Stopwatch
from prw_flux.cli.finished import finished_run

if TYPE_CHECKING:
    from prw_flux.evaluation.benchmarks import Benchmark, Scores
    from prw_flux.progress import Quiet
    from prw_flux.rundir import RunFolder
    from prw_flux.share import Share


def add_to(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that belong to --bench."""
    bench = parser.add_argument_group("published benchmarks")
    bench.add_argument("--bench", choices=NAMES, help="the protocol")
    bench.add_argument("--data", "--benchmark-folder", metavar="DIR", dest="data",
                       help="the benchmark's own folder (shapes has none)")  # fmt: skip
    bench.add_argument("--results", metavar="DIR",
                       help="the pictures: made by RUN where they are missing, or, without RUN, "
                       "your own (default: RUN/benchmarks/NAME/pictures)")  # fmt: skip
    bench.add_argument("--out", metavar="FILE",
                       help="the scores (default: RUN/benchmarks/NAME/scores.json, or "
                       "RESULTS/scores.json)")  # fmt: skip
    bench.add_argument("--name", default="yours", help="of your row (default: yours)")
    known = "; ".join(f"{name} {', '.join(those)}" for name, those in PRESETS.items())
    bench.add_argument("--preset", metavar="NAME",
                       help="encoders, size and filter that a paper's numbers were obtained with; "
                       f"what you give counts more ({known})")  # fmt: skip
    bench.add_argument("--samples", type=int,
                       help="pictures per prompt: dreambench (1), multigen (4)")  # fmt: skip
    _making(parser.add_argument_group("generating a benchmark's pictures"))
    _scoring(parser.add_argument_group("scoring them"))
    judge = parser.add_argument_group("the judge of gedit")
    judge.add_argument("--judge", metavar="URL", help="endpoint up to and without "
                       "/chat/completions")  # fmt: skip
    judge.add_argument("--judge-model", metavar="NAME")
    judge.add_argument("--judge-key", metavar="VARIABLE", help="environment variable with the key")
    judge.add_argument("--judge-timeout", type=float, default=120.0, metavar="SECONDS")
    judge.add_argument("--judge-tries", type=int, default=3, help="per question (default: 3)")
    judge.add_argument("--judge-pause", type=float, default=2.0, metavar="SECONDS",
                       help="before the second try, doubled before each further one")  # fmt: skip
    judge.add_argument("--answers", metavar="FILE",
                       help="recorded answers: read without --judge, else kept there "
                       "(default: answers.jsonl beside the scores)")  # fmt: skip
    judge.add_argument("--questions", metavar="FILE", help="JSON with name, SC and PQ")
    judge.add_argument("--language", choices=("en", "cn"), help="default: both")


def refuse_without_bench(args: argparse.Namespace) -> None:
    """Raise BenchmarkError for an argument of `add_to` that nothing would read."""
    alone = argparse.ArgumentParser()
    add_to(alone)
    require_bench(args, vars(alone.parse_args([])))


def _making(group: Any) -> None:
    group.add_argument("--base", help="where the base is now, if the run does not know")
    group.add_argument("--route", default="free", help="free (default), stage:NAME or expert:NAME")
    group.add_argument("--seed", type=int, default=0)
    group.add_argument("--guidance", type=float, default=3.5)
    group.add_argument("--size", type=int, help="side of squares, root of other areas "
                       "(default: what the adapter was trained at)")  # fmt: skip
    group.add_argument("--batch", type=int, help="pictures per call (default: 1; shapes 32)")


def _scoring(group: Any) -> None:
    group.add_argument("--clip", help=f"folder, Hub id or none (default: {B32}; of multigen "
                       "its -patch16)")  # fmt: skip
    group.add_argument("--dino", help=f"folder, Hub id or none (default: {DINO})")
    group.add_argument("--encoder", metavar="SPEC", help="one more, package.module:object")
    group.add_argument("--fid", metavar="WHERE", help='multigen: "torch-fidelity" or a file of its '
                       "Inception weights")  # fmt: skip
    group.add_argument("--maps", metavar="SPEC", help="multigen: what reads a map from a picture: "
                       "folder, Hub id or [kind=]package.module:object")  # fmt: skip
    group.add_argument("--device", default="cpu", help="of the encoders (default: cpu)")
    group.add_argument(
        "--captions", choices=("all", "changed"),
        help="emu_edit: CLIP-T and CLIP-dir of all rows (default), or where the captions differ",
    )  # fmt: skip


def run_bench(args: argparse.Namespace) -> int:
    """Generate what is missing, score, print the row under the published ones.

    Exit status 1 if a picture is missing or unusable; the scores of the others are written.
    """
    from prw_flux.evaluation.benchmarks import BenchmarkError, GEdit, score_folder
    from prw_flux.progress import watching
    from prw_flux.report import write_report
    from prw_flux.share import gathering

    show.quiet_loading()
    require_read(args)
    args, watch = settled(args), Stopwatch()
    run = None if args.directory is None else finished_run(args.directory, "to evaluate")
    if run is None and args.results is None:
        raise BenchmarkError(f"--bench {args.bench} needs a RUN, or --results DIR with pictures.")
    benchmark = open_benchmark(args, run)
    results, out = _places(args, run, benchmark)
    with gathering() as share:
        if share.rank == 0:
            encoders = open_encoders(args)
            if isinstance(benchmark, GEdit):
                benchmark.asking = open_judge(args, out.with_name("answers.jsonl"))
        hidden = args.quiet or args.json or share.rank > 0
        with watching(show.watcher(), quiet=hidden) as progress:
            reasons = {} if run is None else _generate(args, run, benchmark, results, share,
                                                       progress, watch)  # fmt: skip
            if share.rank > 0:
                return 0
            with watch.timing("scores", len(benchmark.items)):
                scores = score_folder(
                    benchmark, results, encoders, out,
                    lambda done, total: progress.measured(f"{args.bench}: scores", done, total),
                    reasons=reasons,
                )  # fmt: skip
    page = None if run is None else str(write_report(run.path))
    _answer(args, scores, out, page, watch)
    if scores.problems:
        problems = counted(len(scores.problems), "problem")
        raise BenchmarkError(
            f"{problems} among {counted(len(benchmark.items), 'picture')}, the first: "
            f"{scores.problems[0]}. The scores of the other pictures are in {out}."
        )
    return 0


def counted(number: int, what: str) -> str:
    """ "1 problem", "2 problems"."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _places(
    args: argparse.Namespace, run: RunFolder | None, benchmark: Benchmark[Any]
) -> tuple[Path, Path]:
    """Where the pictures are, and where the scores go."""
    if run is None:
        results = Path(args.results)
        return results, Path(args.out) if args.out else results / "scores.json"
    home = run.path / "benchmarks" / re.sub(r"[^\w-]+", "-", benchmark.folder_name)
    results = Path(args.results) if args.results else home / "pictures"
    return results, Path(args.out) if args.out else home / "scores.json"


def _generate(
    args: argparse.Namespace,
    run: RunFolder,
    benchmark: Benchmark[Any],
    results: Path,
    share: Share,
    progress: Quiet,
    watch: Stopwatch,
) -> dict[str, str]:
    """Make this rank's share of the pictures and wait for the others'; why some are not there."""
    from prw_flux.digests import adapter_digest, stream_digest
    from prw_flux.evaluation.benchmarks import Making, produce
    from prw_flux.evaluation.benchmarks.making import tidy
    from prw_flux.evaluation.generate import Sampling
    from prw_flux.evaluation.runner import load_pipeline

    making = Making(
        sampling=Sampling(
            steps=run.config.evaluation.steps if args.steps is None else args.steps,
            batch_size=benchmark.batch if args.batch is None else args.batch,
            guidance=args.guidance,
            precision=run.config.precision,
            representation=args.representation,
        ),
        seed=args.seed,
        route=args.route,
        side=args.size or (run.config.size if args.bench == "shapes" else None),
    )
    with watch.timing("loading", 1):
        pipe = load_pipeline(run, base=args.base, local=share.local)
    with watch.timing("pictures", len(benchmark.asks())):
        reasons = produce(
            pipe, benchmark, results, making,
            adapter=adapter_digest(pipe.prw),
            features=None if pipe.coredi is None else stream_digest(pipe.coredi),
            share=share,
            told=lambda done, total: progress.measured(f"{args.bench}: pictures", done, total),
        )  # fmt: skip
        gathered = share.gather(reasons)
    if share.rank == 0 and share.count > 1:  # alone, `produce` has done so
        tidy(results)
    return {name: why for told in gathered for name, why in told.items()}


def _answer(
    args: argparse.Namespace, scores: Scores, out: Path, page: str | None, watch: Stopwatch
) -> None:
    tables = comparisons_of(scores, args.name)
    if args.json:
        more = {"time": watch.to_json()} | ({} if page is None else {"report": page})
        show.answer({"out": str(out), **more, **scores.to_json(), "comparisons": tables})
        return
    tell(scores, args.name, tables)
    show.human().print(f"time    {watch}")
    show.human().print(f"scores  {out}")
    if page is not None:
        show.human().print(f"report  {page}")
