"""Where verbs write: people get tables and bars, scripts get JSON on stdout and nothing else."""

from __future__ import annotations

import json
import sys
from typing import Any

from rich.console import Console
from rich.table import Table


def human() -> Console:
    """For people: stdout, wrapped only on a terminal."""
    return Console(soft_wrap=not sys.stdout.isatty(), highlight=False)


def watcher() -> Console:
    """For progress: stderr, so that stdout stays the answer."""
    return Console(stderr=True, highlight=False)


def answer(data: Any) -> None:
    """One JSON document on stdout."""
    sys.stdout.write(json.dumps(data, indent=1, default=str) + "\n")


def table(title: str, columns: dict[str, str]) -> Table:
    """A table with left- or right-aligned columns."""
    made = Table(title=title, title_justify="left", title_style="bold")
    for name, side in columns.items():
        made.add_column(name, justify="right" if side == "right" else "left")
    return made
