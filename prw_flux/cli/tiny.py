"""The verb `tiny`: build the embedded base with the project's own recipe, and measure it."""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path
from typing import Any

from prw import ConfigError
from prw_flux.cli import show


def add_to(verbs: Any, common: argparse.ArgumentParser) -> None:
    """Add the verb."""
    parser = verbs.add_parser("tiny", help="the embedded base, tiny-flux")
    jobs = parser.add_subparsers(dest="job", metavar="JOB", required=True)
    build = jobs.add_parser(
        "build", parents=[common], help="pretrain it from nothing, or from where it was stopped"
    )
    build.add_argument("--out", required=True, metavar="DIR", help="folder of the new pipeline")
    build.set_defaults(run=run_build)
    measure = jobs.add_parser("measure", parents=[common], help="quality on held-out captions")
    measure.add_argument("folder", nargs="?", help="a tiny-flux folder (default: the shipped one)")
    measure.add_argument("--captions", type=int, default=500, help="held-out captions")
    measure.add_argument("--steps", type=int, default=28, help="sampling steps")
    measure.add_argument("--sheet", metavar="PNG", help="contact sheet of the first 40 pictures")
    measure.add_argument("--write", action="store_true", help="keep the result in the folder")
    measure.set_defaults(run=run_measure)


def run_build(args: argparse.Namespace) -> int:
    """Pretrain autoencoder and base, and write the pipeline."""
    from prw_flux.tiny.build import build

    show.quiet_loading()
    told = logging.getLogger("prw_flux.tiny")
    told.setLevel(logging.INFO)
    told.addHandler(logging.StreamHandler())
    build(Path(args.out))
    show.human().print(args.out)
    return 0


def run_measure(args: argparse.Namespace) -> int:
    """Measure a base and print the figures as JSON."""
    from prw_flux import tiny
    from prw_flux.tiny.measure import measure

    show.quiet_loading()
    folder = Path(args.folder) if args.folder else tiny.path()
    if not (folder / "model_index.json").is_file():
        raise ConfigError(f"{folder} is not a pipeline folder: it has no model_index.json")
    sheet = Path(args.sheet) if args.sheet else None
    quality = measure(folder, captions=args.captions, steps=args.steps, sheet=sheet)
    text = json.dumps(quality, indent=2)
    if args.write:
        (folder / "quality.json").write_text(text + "\n", "utf-8")
    print(text)
    return 0
