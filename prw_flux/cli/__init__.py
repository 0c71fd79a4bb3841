"""prw-flux: one verb per job. Exit status 0 only on success; errors are one sentence on stderr."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from typing import TextIO

import prw
from prw_flux.cli import cache, convert, data, evaluate, generate, inspect, memory, tiny, train
from prw_flux.interrupt import Interrupted

VERBS = (train, generate, evaluate, inspect, convert, memory, data, cache, tiny)


def build_parser() -> argparse.ArgumentParser:
    """The parser of all verbs."""
    parser = argparse.ArgumentParser(
        prog="prw-flux",
        description="Progressive Representation Weaving on FLUX.1: train, generate, look.",
    )
    parser.add_argument("--version", action="version", version=f"prw-flux {prw.__version__}")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show tracebacks and all warnings")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for module in VERBS:
        module.add_to(verbs, common)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a verb; the exit status."""
    args = build_parser().parse_args(arguments)
    if args.debug:
        return int(args.run(args))
    with warnings.catch_warnings():
        _quieten()
        return _run(args)


def _run(args: argparse.Namespace) -> int:
    try:
        return int(args.run(args))
    except Interrupted as stopped:
        return _fail(str(stopped), stopped.status)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except BrokenPipeError:  # the reader of our output has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as problem:
        return _fail(sentence(problem), 1)


def sentence(problem: Exception) -> str:
    """What the user is told of an exception: its own words where they are meant for users."""
    from prw_flux.data.images import ImageError

    meant = (prw.PRWError, ValueError, FileNotFoundError, ImageError)
    text = " ".join(str(problem).split())
    if isinstance(problem, meant) and text:
        return text
    if isinstance(problem, OSError) and problem.strerror:
        return ": ".join(str(part) for part in (problem.filename, problem.strerror) if part)
    return f"{type(problem).__name__}: {text} (--debug shows where)"


def _fail(message: str, status: int) -> int:
    rank = int(os.environ.get("RANK", "0"))
    if not rank or status < 128:  # all ranks are stopped together, one says so
        sys.stderr.write(f"prw-flux: {f'rank {rank}: ' if rank else ''}{message}\n")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        sys.stderr.flush()
        os._exit(status)  # an ordinary end may wait for a device that waits for a lost rank
    return status


def _quieten() -> None:
    """Our own warnings as one line each; the chatter of the libraries below us not at all."""
    for name in ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY"):
        os.environ.setdefault(name, "error")
    warnings.simplefilter("ignore")
    warnings.filterwarnings("default", module=r"prw(_flux|_kernels)?\b")
    warnings.showwarning = _one_line


def _one_line(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    sys.stderr.write(f"prw-flux: warning: {message}\n")


__all__ = ["build_parser", "main", "sentence"]
