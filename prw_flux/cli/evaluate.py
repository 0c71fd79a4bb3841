"""The verbs that look at what was trained: `evaluate` and `report`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prw_flux.cli import bench, show
from prw_flux.cli.finished import finished_run

if TYPE_CHECKING:
    from prw_flux.config import RunConfig


def add_to(verbs: Any, common: argparse.ArgumentParser) -> None:
    """Add both verbs."""
    evaluate = verbs.add_parser(
        "evaluate",
        parents=[common],
        help="measure every task on held-out samples; or a published benchmark (--bench)",
    )
    evaluate.add_argument("directory", metavar="RUN", nargs="?")
    evaluate.add_argument("--per-task", type=int, help="samples per task (default: the run's)")
    evaluate.add_argument("--steps", type=int, help="sampling steps (default: the run's)")
    evaluate.add_argument("--representation", type=float, default=1.0, metavar="W",
                          help="of a run with a feature stream: its guidance, 0 is without "
                          "features (default: 1)")  # fmt: skip
    evaluate.add_argument("--quiet", action="store_true", help="no progress bars")
    evaluate.add_argument("--json", action="store_true", help="print the result for a script")
    bench.add_to(evaluate)
    evaluate.set_defaults(run=run_evaluate)
    report = verbs.add_parser(
        "report", parents=[common], help="write report.html from what the run folder holds"
    )
    report.add_argument("directory", metavar="RUN")
    report.add_argument("--json", action="store_true", help="print the path for a script")
    report.set_defaults(run=run_report)


def run_evaluate(args: argparse.Namespace) -> int:
    """Measure a run and write its report, or run a published benchmark."""
    if args.bench is not None:
        return bench.run_bench(args)
    bench.refuse_without_bench(args)
    if args.directory is None:
        raise ValueError("evaluate needs a RUN, or --bench NAME with --results DIR.")
    from prw_flux.report import write_report

    measured = evaluate_and_tell(
        Path(args.directory),
        per_task=args.per_task,
        steps=args.steps,
        representation=args.representation,
        quiet=args.quiet,
        told=not args.json,
    )
    page = write_report(Path(args.directory))
    if args.json:
        show.answer({"run": args.directory, "report": str(page), "evaluation": measured})
    else:
        show.human().print(f"report  {page}")
    return 0


def run_report(args: argparse.Namespace) -> int:
    """Write the report again; no model is loaded."""
    from prw_flux.report import write_report
    from prw_flux.rundir import RunFolder

    page = write_report(RunFolder.open(args.directory).path)
    if args.json:
        show.answer({"report": str(page)})
    else:
        show.human().print(f"report  {page}")
    return 0


def evaluate_and_tell(
    path: Path,
    *,
    per_task: int | None = None,
    steps: int | None = None,
    representation: float = 1.0,
    quiet: bool = False,
    told: bool = True,
) -> dict[str, Any]:
    """Evaluate a run with its own settings unless others are given."""
    from prw_flux.evaluation import Sampling, Settings, evaluate_run, rich_table
    from prw_flux.progress import watching

    show.quiet_loading()
    run = finished_run(path, "to evaluate")
    asked = run.config.evaluation
    count = asked.per_task if per_task is None else per_task
    settings = Settings(
        n=count,
        history=min(asked.history, count),
        sampling=Sampling(
            steps=asked.steps if steps is None else steps,
            batch_size=_together(run.config),
            precision=run.config.precision,
            representation=representation,
        ),
    )
    with watching(show.watcher(), quiet=quiet) as progress:
        measured: dict[str, Any] = evaluate_run(run.path, settings, progress=progress.measured)
    if told:
        show.human().print(rich_table(measured))
    return measured


def _together(config: RunConfig) -> int:
    """Pictures of a call: on a quantised base, for a small card, as many as training had there."""
    if config.base.quantisation == "none":
        return 32
    return max(1, max(stage.batch_size for stage in config.stages) // config.accumulate)
