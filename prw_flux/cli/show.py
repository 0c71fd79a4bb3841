"""Where verbs write: people get tables and bars, scripts get JSON on stdout and nothing else."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from rich.console import Console
from rich.table import Table


def human() -> Console:
    """For people: stdout; where it is no terminal, wide enough for every table."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else 200, soft_wrap=True)


def watcher() -> Console:
    """For progress: stderr, so that stdout stays the answer."""
    return Console(stderr=True, highlight=False)


def quiet_loading(quiet: bool = False) -> None:
    """Load models without the bars and remarks of the libraries that load them.

    The bar over the rows of a data set that is opened for the first time stays on a terminal.

    Args:
        quiet: no bar at all.
    """
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for library in (diffusers_logging, transformers_logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
    if quiet or not sys.stderr.isatty():  # read when datasets is imported, which is later
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")


def answer(data: Any) -> None:
    """One JSON document on stdout."""
    sys.stdout.write(json.dumps(data, indent=1, default=str) + "\n")


def table(title: str, columns: dict[str, str]) -> Table:
    """A table with left- or right-aligned columns."""
    made = Table(title=title, title_justify="left", title_style="bold")
    for name, side in columns.items():
        made.add_column(name, justify="right" if side == "right" else "left")
    return made
