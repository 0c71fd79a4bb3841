"""The verbs below `data` for data on disk: build it, look at it, check it."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from prw import ConfigError
from prw_flux.cli import show

EPILOG = """inputs (--from KIND PATH):
  photos DIR         photos with captions and annotations.json
  pairs DIR          before/after pictures: edits.json, or source/ target/ (mask/, text/)
  coco FILE          instances.json of COCO or LVIS; --images, for inpaint also --captions
  refcoco FILE       references as JSON; --images, --instances, --split
  webdataset TARS    tars of your own, 'shards/{000..007}.tar'; --map as for parquet
  parquet DIR        parquet files of your own; --map source=before --map text=caption ...
  magicbrush DIR, omniedit DIR, subjects200k DIR, multigen-depth DIR, ade20k DIR
                     parquet files of these data sets
PATH may be a URL: hf://datasets/OWNER/NAME, s3://BUCKET/... Shards are copied one after the other
into a cache of bounded size, folders of pictures whole.
One argument that ends in .tar or .parquet is its own kind; `photos` alone is the default photos."""


def add_to(parser: argparse.ArgumentParser, common: argparse.ArgumentParser) -> None:
    """Add the verbs below `data`."""
    verbs = parser.add_subparsers(metavar="VERB", dest="data_verb")
    _add_build(verbs, common)
    look = verbs.add_parser("inspect", parents=[common], help="counts, sizes, rejects, pictures")
    look.add_argument("folder", help="a data set made by `data build`, or its URL")
    look.add_argument("--out", metavar="FILE", help="write a contact sheet")
    look.add_argument("--count", type=int, default=12, help="samples on it (default: 12)")
    look.add_argument("--json", action="store_true", help="print it for a script")
    look.set_defaults(run=run_inspect)
    check = verbs.add_parser("check", parents=[common], help="verify hashes, decode every picture")
    check.add_argument("folder", help="a data set made by `data build`, or its URL")
    check.add_argument("--workers", type=int, default=4, help="threads (default: 4)")
    check.add_argument("--json", action="store_true", help="print it for a script")
    check.set_defaults(run=run_check)


def _add_build(verbs: Any, common: argparse.ArgumentParser) -> None:
    build = verbs.add_parser(
        "build",
        parents=[common],
        help="make a data set of parquet shards, or go on with one",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    build.add_argument("task", metavar="TASK", help="inpaint, ground, control, customise or edit")
    build.add_argument(
        "--from", dest="origin", nargs="+", metavar=("KIND", "PATH"), required=True,
        help="what to build from, see below",
    )  # fmt: skip
    build.add_argument("--out", metavar="DIR", required=True, help="the data set")
    build.add_argument("--images", metavar="DIR", help="the pictures that a JSON file names")
    build.add_argument("--instances", metavar="FILE", help="instances.json of refcoco")
    build.add_argument("--captions", metavar="FILE", help="captions.json of coco")
    build.add_argument("--split", help="of refcoco")
    build.add_argument("--map", action="append", default=[], metavar="NAME=COLUMN")
    build.add_argument(
        "--conditions", default="", metavar="NAME[:WEIGHTS],...",
        help="of control, made of every picture: canny, softedge_classical, lineart_classical, "
        "softedge:FILE, lineart:FILE, depth:MODEL, segmentation:MODEL",
    )  # fmt: skip
    build.add_argument("--device", default="cpu", help="where conditions are made (default: cpu)")
    build.add_argument("--licence", default="", help="of samples that name none")
    build.add_argument(
        "--max-rejected", type=float, default=0.05, metavar="SHARE",
        help="stop when a larger share of records cannot be used (default: 0.05)",
    )  # fmt: skip
    build.add_argument("--shard-rows", type=int, default=10_000, metavar="N")
    build.add_argument("--workers", type=int, default=4, help="threads (default: 4)")
    build.add_argument("--json", action="store_true", help="print the manifest for a script")
    build.set_defaults(run=run_build)


def run_build(args: argparse.Namespace) -> int:
    """Build, or go on; tells how many records were used and why others were not."""
    from prw_flux.data.build import build
    from prw_flux.data.conditions import open_extractors
    from prw_flux.data.readers import Origin, open_reader
    from prw_flux.data.remote import is_url

    kind, path = _kind_and_path(args.origin)
    if is_url(args.out):
        raise ConfigError(
            f"a data set is built in a local folder, not at {args.out}; copy it there when it is "
            "finished"
        )
    origin = Origin(
        kind=kind,
        path=path,
        images=args.images,
        instances=args.instances,
        captions=args.captions,
        split=args.split,
        columns=tuple(args.map),
        conditions=tuple(filter(None, args.conditions.split(","))),
        licence=args.licence,
    )
    reader = open_reader(origin, args.task)
    extractors = open_extractors(origin.conditions, args.device)
    with bar("building") as tick:
        manifest = build(
            reader,
            args.task,
            Path(args.out),
            made_from=origin.told(),
            extractors=extractors,
            max_rejected=args.max_rejected,
            shard_rows=args.shard_rows,
            workers=args.workers,
            tick=tick,
        )
    if args.json:
        show.answer(vars(manifest))
    else:
        show.human().print(f"{args.out}: {manifest.told()}")
    return 0


def _kind_and_path(words: list[str]) -> tuple[str, str]:
    """KIND PATH, or a path whose suffix says the kind.

    Raises:
        ConfigError: it cannot be told what is meant.
    """
    if len(words) == 2:
        return words[0], words[1]
    for suffix, kind in ((".tar", "webdataset"), (".parquet", "parquet")):
        if len(words) == 1 and words[0].endswith(suffix):
            return kind, words[0]
    if words == ["photos"]:
        return "photos", ""
    raise ConfigError(f"--from needs KIND PATH, got {' '.join(words)!r}; see data build --help")


def run_inspect(args: argparse.Namespace) -> int:
    """Counts, sizes and rejects of a data set, and a contact sheet."""
    from prw_flux.data.check import sample_rows
    from prw_flux.data.manifest import read_manifest
    from prw_flux.data.remote import place_of
    from prw_flux.data.row_sheet import write_row_sheet

    folder = place_of(args.folder)
    manifest = read_manifest(folder)
    if args.out:
        write_row_sheet(Path(args.out), sample_rows(folder, args.count))
    if args.json:
        show.answer(vars(manifest))
        return 0
    console = show.human()
    size = sum(shard["bytes"] for shard in manifest.shards) / 2**20
    state = "" if manifest.done else ", not finished"
    shards = "shard" if len(manifest.shards) == 1 else "shards"
    console.print(
        f"[bold]{folder}[/bold]  {manifest.task}, {manifest.kept:,} rows in "
        f"{len(manifest.shards)} {shards}, {size:,.1f} MiB{state}"
    )
    table = show.table("", {"": "left", "count": "right", "what": "left", "first": "left"})
    for name, counts in (
        ("left out", manifest.rejected),
        ("converted", manifest.converted),
        ("size", manifest.sizes),
    ):
        for what, count in counts.most_common(12):
            first = manifest.examples.get(what, [""])[0] if name == "left out" else ""
            table.add_row(name, f"{count:,}", what, first)
    console.print(table)
    if args.out:
        console.print(args.out)
    return 0


def run_check(args: argparse.Namespace) -> int:
    """Verify a data set; exit status 1 where something is wrong."""
    from prw_flux.data.check import check
    from prw_flux.data.manifest import read_manifest
    from prw_flux.data.remote import place_of

    folder = place_of(args.folder)
    with bar("checking") as tick:
        problems = check(folder, workers=args.workers, tick=tick)
    rows = read_manifest(folder).kept
    if args.json:
        show.answer({"rows": rows, "problems": problems})
    else:
        told = problems or [f"{folder}: {rows:,} rows, all as they were built"]
        for line in told:
            show.human().print(line, markup=False)
    return 1 if problems else 0


@contextmanager
def bar(what: str, *, shown: bool = True) -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal, nothing elsewhere; gives the function that moves it."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    console = show.watcher()
    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not (shown and console.is_terminal)) as bars:
        task = bars.add_task(what, total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total)
