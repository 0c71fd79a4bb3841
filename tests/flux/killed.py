"""Runs that are killed for good, each in a process of its own: ``killed.py FOLDER CONFIG_JSON``.

Prints one JSON object: for each place of death, how the process ended and whether the resumed run
has the bytes of one that nobody disturbed.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flux.failing import failing

from prw_flux.config import RunConfig
from prw_flux.progress import Quiet
from prw_flux.resume import adapter_to_continue, read_position
from prw_flux.rundir import RunFolder
from prw_flux.session import open_session
from prw_flux.trainer import open_training_data, train


def go(path: Path, progress: Quiet | None = None) -> None:
    """Begin or resume."""
    run = RunFolder.open(path)
    session = open_session(run.config, adapter_to_continue(run))
    train(run, session, open_training_data(run.config, session), progress=progress)


def die() -> None:
    """As an operating system does it: nothing is flushed, closed or said."""
    os.kill(os.getpid(), signal.SIGKILL)


def apart(work: Callable[[], None]) -> int:
    """The status of `work` in a child."""
    child = os.fork()
    if child == 0:
        work()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


class AfterStep(Quiet):
    """Dies between two steps."""

    def __init__(self, count: int) -> None:
        self.left = count

    def stepped(self, done: int) -> None:
        self.left -= 1
        if not self.left:
            die()


def contents(path: Path) -> dict[str, bytes]:
    """What a run has made."""
    files = [*(path / "adapter").rglob("*.safetensors"),
             *RunFolder.open(path).states.paths()[-1].rglob("*.safetensors")]  # fmt: skip
    return {str(file.relative_to(path)): file.read_bytes() for file in files}


def main(folder: Path, config: RunConfig) -> dict[str, Any]:
    """Every place of death."""
    whole = RunFolder.create(folder / "whole", config).path
    with failing(10**9) as writes:
        go(whole)
    expected, found = contents(whole), {}
    total = len(writes)
    places = [f"write {total * part // 12}" for part in range(1, 12)]
    # the last writes of a stage: its state, the rotation, and the note in run.json
    places += [f"write {total - n}" for n in (1, 3, 6, 9)] + ["step 1", "step 4", "step 6"]
    for number, place in enumerate(places):
        path = RunFolder.create(folder / f"cut-{number}", config).path
        kind, _, count = place.partition(" ")

        def work(path: Path = path, kind: str = kind, count: int = int(count)) -> None:
            if kind == "step":
                go(path, AfterStep(count))
            else:
                with failing(count, die):
                    go(path)

        status = apart(work)
        lost = json.loads(json.dumps(vars(read_position(RunFolder.open(path)))))
        again = apart(lambda path=path: go(path))  # type: ignore[misc]
        same = again == 0 and contents(path) == expected
        left = [str(p) for p in path.rglob(".*.new")]
        finished = RunFolder.open(path).finished
        found[place] = {"status": status, "resumed_from": lost, "same": same and finished,
                        "left": left}  # fmt: skip
    return found


if __name__ == "__main__":
    made = main(Path(sys.argv[1]), RunConfig.from_json(Path(sys.argv[2]).read_text()))
    sys.stdout.write(json.dumps(made))
