"""The verb `tiny`: build the embedded base with the project's own recipe."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from prw_flux.cli import show


def add_to(verbs: Any, common: argparse.ArgumentParser) -> None:
    """Add the verb."""
    parser = verbs.add_parser("tiny", help="the embedded base, tiny-flux")
    jobs = parser.add_subparsers(dest="job", metavar="JOB", required=True)
    build = jobs.add_parser("build", parents=[common], help="pretrain it from nothing")
    build.add_argument("--out", required=True, metavar="DIR", help="folder of the new pipeline")
    build.set_defaults(run=run_build)


def run_build(args: argparse.Namespace) -> int:
    """Pretrain autoencoder and base, and write the pipeline."""
    from prw_flux.tiny.build import build

    show.quiet_loading()
    build(Path(args.out))
    show.human().print(args.out)
    return 0
