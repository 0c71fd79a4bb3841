"""Runs that a verb can do something with."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prw_flux.rundir import RunFolder


def finished_run(path: str | Path, purpose: str) -> RunFolder:
    """A run with a finished stage.

    Raises:
        RunError: it is not a run, or has none yet; says how to go on, and what it was wanted for.
    """
    from prw_flux.rundir import RunError, RunFolder

    run = RunFolder.open(path)
    if not run.done:
        raise RunError(
            f"{run.path} has no finished stage {purpose}; prw-flux train --resume {run.path}"
        )
    return run
