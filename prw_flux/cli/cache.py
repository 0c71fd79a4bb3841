"""The verb `cache`: encode the samples of a run onto disk, and check what is there."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, Final

from prw import ConfigError
from prw_flux.cli import show
from prw_flux.cli.data_build import bar

DAMAGED: Final = 1
UNFINISHED: Final = 3
"""Exit statuses of `cache check`; 2 is that of a mistake in the command line."""

EPILOG = """Several processes share the work, each writes files of its own:
  accelerate launch --num_processes 8 -m prw_flux.cli cache build RECIPE --out CACHE
Then train with --set data.cache=CACHE."""


def add_to(verbs: Any, common: argparse.ArgumentParser) -> None:
    """Add the verb and those below it."""
    parser = verbs.add_parser(
        "cache", parents=[common], help="encode the samples of a run onto disk; check them"
    )
    below = parser.add_subparsers(metavar="VERB", dest="cache_verb", required=True)
    build = below.add_parser(
        "build",
        parents=[common],
        help="encode the samples of a recipe or run, or what is missing of them",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    build.add_argument("recipe", help="a recipe, package.module:function, or the folder of a run")
    build.add_argument("--out", metavar="DIR", help="the cache (default: data.cache)")
    build.add_argument(
        "--set", dest="settings", action="append", default=[], metavar="KEY=VALUE",
        help="change any setting of the recipe, as for train",
    )  # fmt: skip
    build.add_argument("--only", action="append", default=[], metavar="NAME", help="this stage")
    build.add_argument("--photos", metavar="DIR", help="a folder of your photos")
    build.add_argument("--json", action="store_true", help="print the result for a script")
    build.set_defaults(run=run_build, parent=None, stages=[])
    check = below.add_parser(
        "check",
        parents=[common],
        help="verify the hash of every file; exit status 1: damaged, 3: unfinished",
    )
    check.add_argument("folder", help="a cache made by `cache build`")
    check.add_argument("--workers", type=int, default=4, help="threads (default: 4)")
    check.add_argument(
        "--repair", action="store_true", help="remove what is damaged; `cache build` makes it again"
    )
    check.add_argument("--json", action="store_true", help="print it for a script")
    check.set_defaults(run=run_check)


def run_build(args: argparse.Namespace) -> int:
    """Encode this process's share; tells what it did."""
    from prw_flux.data.choose import open_run_data, require_feeds
    from prw_flux.sample_cache.build import build, encoders
    from prw_flux.share import Share
    from prw_flux.tasks import TASKS, load_task

    show.quiet_loading()
    config = _config(args)
    if config.data.cache is None:
        raise ConfigError("cache build needs a place: --out DIR, or --set data.cache=DIR")
    cache, share = Path(config.data.cache), Share.of_environment()
    tasks = [load_task(stage.task) for stage in config.stages]
    data = open_run_data(config)
    for task in tasks:
        require_feeds(data, task, frozenset(TASKS))
    with bar("encoding", shown=share.rank == 0) as tick:
        done = build(
            cache, config, data, tasks, lambda: encoders(config, share), share=share,
            tick=lambda stage, done, total: tick(done, total),
        )  # fmt: skip
    if args.json:
        show.answer(vars(done) | {"rank": share.rank, "cache": str(cache)})
        return 0
    whose = f"rank {share.rank} of {share.count}: " if share.count > 1 else ""
    features = f", features of {done.features:,}" if config.coredi.enabled else ""
    show.human().print(
        f"{cache}  {whose}{done.samples:,} samples, {done.encoded:,} of them encoded now "
        f"({done.latents:,} pictures, {done.texts:,} texts{features})"
    )
    return 0


def _config(args: argparse.Namespace) -> Any:
    """Of a recipe or of a run, with the settings of the command line."""
    from prw_flux.cli.train import configured
    from prw_flux.locate import is_run
    from prw_flux.rundir import RunFolder

    if is_run(Path(args.recipe)):
        if args.settings or args.only or args.photos:
            raise ConfigError("a run keeps its configuration: leave out --set, --only and --photos")
        config = RunFolder.open(args.recipe).config
    else:
        config = configured(args)
    return config.with_settings([f"data.cache={args.out}"]) if args.out else config


def run_check(args: argparse.Namespace) -> int:
    """Verify a cache; exit status 1 where something is damaged, 3 where samples are lacking."""
    from prw_flux.sample_cache.check import check, unfinished
    from prw_flux.sample_cache.table import tables

    folder = Path(args.folder)
    with bar("checking") as tick:
        problems = check(folder, workers=args.workers, repair=args.repair, tick=tick)
    lacking = unfinished(folder)
    counts = {table.identity.name: len(table) - table.missing() for table in tables(folder)}
    if args.json:
        show.answer({"samples": counts, "problems": problems, "unfinished": lacking})
    else:
        whole = [f"{folder}: {sum(counts.values()):,} samples, all as they were encoded"]
        for line in [*(problems or whole), *lacking]:
            show.human().print(line, markup=False, soft_wrap=True)
    return DAMAGED if problems else UNFINISHED if lacking else 0
