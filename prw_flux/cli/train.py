"""The verbs that train: `demo` and `train`."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from prw import ConfigError
from prw_flux.cli import dry_run, show

RUNS = Path("runs")


def add_to(verbs: Any, common: argparse.ArgumentParser) -> None:
    """Add both verbs."""
    demo = verbs.add_parser(
        "demo", parents=[common], help="train the demo, generate, and write a report"
    )
    demo.set_defaults(
        run=run_demo, recipe="demo", resume=None, parent=None, stages=[], only=[], dry_run=False
    )
    train = verbs.add_parser("train", parents=[common], help="train a recipe, resume or extend one")
    train.add_argument(
        "recipe",
        nargs="?",
        help="demo, shapes, photos, photos_24gb, one_h200, paper, or package.module:function",
    )
    train.add_argument(
        "--resume", nargs="?", const="", metavar="RUN",
        help="continue an interrupted run (RUN, or the folder of --out)",
    )  # fmt: skip
    train.add_argument(
        "--from", dest="parent", metavar="RUN", help="add stages to a copy of a finished run"
    )
    train.add_argument(
        "--stage", dest="stages", action="append", default=[], metavar="[NAME=]TASK",
        help="one more stage, on a task or package.module:object; may be repeated",
    )  # fmt: skip
    train.add_argument(
        "--only", action="append", default=[], metavar="NAME",
        help="of the recipe's stages train this one; may be repeated",
    )  # fmt: skip
    train.set_defaults(run=run_train)
    dry_run.add_to(train)
    for parser in (demo, train):
        _add_common(parser)


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", metavar="DIR", help="run folder (default: runs/RECIPE)")
    parser.add_argument(
        "--set", dest="settings", action="append", default=[], metavar="KEY=VALUE",
        help="change any setting: seed=3, adapter.rank=16, stages.edit.lr=1e-3, stages.*.steps=50",
    )  # fmt: skip
    parser.add_argument("--photos", metavar="DIR", help="a folder of your photos")
    parser.add_argument("--overwrite", action="store_true", help="replace the run in the folder")
    parser.add_argument("--no-evaluation", action="store_true", help="train, and no more")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    parser.add_argument("--json", action="store_true", help="print the result for a script")


def run_demo(args: argparse.Namespace) -> int:
    """Train the demo in a folder of its own, then evaluate and report."""
    if args.out is None:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ConfigError("demo on several ranks needs the name of its folder: add --out DIR")
        args.out = str(RUNS / "demo" if args.overwrite else _free(RUNS / "demo"))
    return run_train(args)


def run_train(args: argparse.Namespace) -> int:
    """Train, resume or extend; then, unless told otherwise, evaluate and report."""
    from prw_flux.ranks import join, leave

    if args.dry_run:
        return dry_run.tell(args, _planned(args))
    show.quiet_loading(args.quiet)
    ranks = join()
    path = _begin(args, ranks) if args.resume is None else _resume(args, ranks)
    leave()
    if not ranks.first:
        return 0
    if args.no_evaluation:
        return _tell(args, {"run": str(path)})
    return _evaluate_and_report(args, path)


def _planned(args: argparse.Namespace) -> Any:
    """The configuration of what would be trained, and nothing is."""
    from prw_flux.rundir import RunFolder

    if args.resume is not None:
        return RunFolder.open(args.resume or args.out or str(RUNS / str(args.recipe))).config
    return configured(args, None if args.parent is None else RunFolder.open(args.parent))


def _begin(args: argparse.Namespace, ranks: Any) -> Path:
    """A new run: everything that can be wrong is found before its folder exists."""
    from prw_flux.data.choose import open_held_out
    from prw_flux.data.folder_copy import local_folder
    from prw_flux.data.photos import PhotoFolder
    from prw_flux.ranks import require_even
    from prw_flux.resume import adapter_to_continue
    from prw_flux.rundir import RunFolder
    from prw_flux.session import open_session
    from prw_flux.tracking import require_trackers
    from prw_flux.trainer import open_training_data

    parent = None if args.parent is None else _finished(RunFolder.open(args.parent))
    config = configured(args, parent)
    require_even(config, ranks.count)

    def room() -> Path:
        path = Path(args.out) if args.out else RUNS / (config.recipe.replace(":", ".") or "run")
        RunFolder.check_room(path, overwrite=args.overwrite, parent=parent)
        return path

    path: Path = ranks.once(room)
    start = None if parent is None else ranks.once(lambda: adapter_to_continue(parent))
    # a folder that does not train is shown in the report: it has to be usable as well
    shown = None
    if config.data.photos:
        side = "train" if config.data.source == "photos" else "all"
        shown = PhotoFolder(local_folder(config.data.photos), config.size, side)
    require_trackers(config.trackers)
    session = open_session(config, start)
    data = open_training_data(config, session)
    if config.held_out.samples or config.sample_every:
        open_held_out(config, data)
    photos = data if isinstance(data, PhotoFolder) else shown

    def create() -> None:
        run = RunFolder.create(path, config, parent=parent, overwrite=args.overwrite)
        if photos is not None:
            run.note(photos={"name": photos.name, "summary": photos.summary()})
            show.watcher().print(f"{photos.name}  {photos.summary()}", soft_wrap=True)

    ranks.once(create)
    _train(args, RunFolder.open(path), session, data, ranks)
    return path


def _resume(args: argparse.Namespace, ranks: Any) -> Path:
    from prw_flux.resume import adapter_to_continue, require_same_config
    from prw_flux.rundir import RunError, RunFolder
    from prw_flux.session import open_session
    from prw_flux.trainer import open_training_data

    where = args.resume or args.out or (args.recipe and str(RUNS / args.recipe))
    if not where:
        raise ConfigError("--resume needs the run folder: prw-flux train --resume RUN")
    if any((args.parent, args.stages, args.only, args.overwrite)):
        raise ConfigError(
            "a resumed run keeps its configuration: leave out --from, --stage, --only and "
            "--overwrite, or begin another run"
        )
    run = RunFolder.open(where)
    photos = [] if args.photos is None else [f"data.photos={args.photos}"]
    require_same_config(run.config, run.config.with_settings([*photos, *args.settings]), where)
    if args.recipe and args.recipe != run.config.recipe:
        raise RunError(f"{where} is a run of recipe {run.config.recipe!r}, not {args.recipe!r}")
    if not run.finished:
        session = open_session(run.config, ranks.once(lambda: adapter_to_continue(run)))
        _train(args, run, session, open_training_data(run.config, session), ranks)
    return run.path


def _train(args: argparse.Namespace, run: Any, session: Any, data: Any, ranks: Any) -> None:
    from prw_flux.interrupt import Stop
    from prw_flux.progress import watching
    from prw_flux.trainer import train

    quiet = args.quiet or not ranks.first
    with Stop() as stop, watching(show.watcher(), quiet=quiet) as progress:
        train(run, session, data, progress=progress, stop=stop, ranks=ranks)


def configured(args: argparse.Namespace, parent: Any = None) -> Any:
    """The configuration that the arguments ask for.

    Raises:
        ConfigError: an unknown recipe or setting, a bad value, nothing new to train.
    """
    from prw_flux.curriculum import Stage
    from prw_flux.recipes import RECIPES, load_recipe

    if args.recipe is None and parent is None:
        raise ConfigError(f"train needs a recipe ({', '.join(RECIPES)}), --from or --resume")
    config = parent.config if args.recipe is None else load_recipe(args.recipe)
    if args.only:
        config = _only(config, args.only)
    old = () if parent is None else parent.config.stages
    names = [stage.name for stage in old]
    stages = [*old, *(stage for stage in config.stages if stage.name not in names)]
    for spec in args.stages:  # as long as the last one, unless --set says otherwise
        (name, _, task), last = spec.rpartition("="), stages[-1]
        stages.append(
            Stage(task=task, name=name, steps=last.steps, batch_size=last.batch_size, lr=last.lr)
        )
    config = replace(config, stages=tuple(stages))
    if args.photos is not None:
        config = config.with_settings([f"data.photos={args.photos}"])
    config = config.with_settings(args.settings)
    if config.stages[: len(old)] != old:
        raise ConfigError(f"the stages {', '.join(names)} are finished and cannot be changed")
    if len(config.stages) == len(old):
        raise ConfigError(f"{args.parent} has finished all these stages: add one with --stage TASK")
    return config


def _only(config: Any, names: Sequence[str]) -> Any:
    known = [stage.name for stage in config.stages]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ConfigError(f"--only {unknown[0]}: there is no such stage, but {', '.join(known)}")
    return replace(config, stages=tuple(s for s in config.stages if s.name in names))


def _finished(run: Any) -> Any:
    from prw_flux.rundir import RunError

    if not run.finished:
        stage = run.config.stages[run.done].name
        raise RunError(
            f"{run.path} has not finished stage {stage!r}; first prw-flux train --resume {run.path}"
        )
    return run


def _evaluate_and_report(args: argparse.Namespace, path: Path) -> int:
    from prw_flux.cli.evaluate import evaluate_and_tell
    from prw_flux.evaluation import NothingToMeasure
    from prw_flux.interrupt import Interrupted
    from prw_flux.report import write_report

    measured: dict[str, Any] | None = None
    try:
        try:
            measured = evaluate_and_tell(path, quiet=args.quiet, told=not args.json)
        except NothingToMeasure as told:
            show.watcher().print(str(told), soft_wrap=True)
        page = write_report(path)
    except KeyboardInterrupt:
        raise Interrupted(
            2, f"training is finished and saved; measure it with prw-flux evaluate {path}"
        ) from None
    return _tell(args, {"run": str(path), "report": str(page), "evaluation": measured})


def _tell(args: argparse.Namespace, facts: dict[str, Any]) -> int:
    if args.json:
        show.answer(facts)
        return 0
    console = show.human()
    console.print(f"run     {facts['run']}")
    if "report" in facts:
        console.print(f"report  {facts['report']}")
    return 0


def _free(path: Path) -> Path:
    """`path`, or the first of path-2, path-3, ... that does not exist."""
    number, free = 2, path
    while free.exists():
        free, number = path.with_name(f"{path.name}-{number}"), number + 1
    return free
