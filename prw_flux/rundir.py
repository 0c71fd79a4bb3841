"""The run folder: everything a run was told, did and made, in files that are never half written.

``run.json`` configuration, base, stages done · ``adapter/`` the trained adapter after the last
finished stage, ``coredi/`` its feature stream where there is one · ``states/`` what a resumed run
continues from · ``metrics.jsonl`` one line per logged step. Evaluation and report add their own
files.
"""

from __future__ import annotations

import fcntl
import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch

import prw
from prw import PRWError
from prw.atomic import replace_file
from prw_flux.config import RunConfig
from prw_flux.states import State, States

logger = logging.getLogger(__name__)

FORMAT_VERSION: Final = 1
EVALUATION_VERSION: Final = 2
"""Of evaluation.json, which evaluation writes and reports read."""
INDEX: Final = "run.json"


class RunError(PRWError, ValueError):
    """A folder that is not a run, is in the way, or cannot be continued as asked."""


class RunFolder:
    """An existing run. Made by `create` or `open`.

    Attributes:
        path: the folder.
        config: what the run was told, never changed afterwards.
        states: what a resumed run continues from.
    """

    def __init__(self, path: Path, index: dict[str, Any], config: RunConfig) -> None:
        self.path = path
        self.config = config
        self.states = States(path / "states")
        self._index = index

    @classmethod
    def create(
        cls,
        path: str | Path,
        config: RunConfig,
        *,
        parent: RunFolder | None = None,
        overwrite: bool = False,
    ) -> RunFolder:
        """Begin a run in a folder that does not exist yet or is empty.

        Args:
            parent: a finished run whose stages this one's begin with; its adapter is copied.
            overwrite: replace a run that is there; anything else is left alone in any case.

        Raises:
            RunError: something is in the way.
        """
        path = Path(path)
        cls.check_room(path, overwrite=overwrite, parent=parent)
        if path.exists():
            shutil.rmtree(path)
        path.mkdir(parents=True)
        done = 0
        if parent is not None:
            done = parent.done
            for folder in (parent.adapter, parent.coredi):
                if folder.is_dir():
                    shutil.copytree(folder, path / folder.name)
            if (state := parent.state()) is not None:
                shutil.copytree(state.path, path / "states" / state.path.name)
        index = {
            "format_version": FORMAT_VERSION,
            "recipe": config.recipe,
            "base": {"path": _absolute(config.base.path), "revision": config.base.revision},
            "seeds": {"run": config.seed},
            "parent": None if parent is None else str(parent.path.resolve()),
            "versions": {"prw": prw.__version__, "torch": torch.__version__},
            "stages": [
                {"name": stage.name, "task": stage.task, "done": i < done}
                for i, stage in enumerate(config.stages)
            ],
            "config": config.to_dict(),
        }
        run = cls(path, index, config)
        run._write_index()
        return run

    @staticmethod
    def check_room(path: Path, *, overwrite: bool = False, parent: RunFolder | None = None) -> None:
        """Raise RunError where `create` would."""
        if parent is not None and path.resolve() == parent.path.resolve():
            raise RunError(f"{path} cannot extend itself; choose another folder with --out")
        if path.exists() and not path.is_dir():
            raise RunError(f"{path} is a file; choose another folder with --out")
        if not path.exists() or not any(path.iterdir()):
            return
        if not (path / INDEX).is_file():
            raise RunError(f"{path} is not empty and not a run; choose another folder with --out")
        if not overwrite:
            raise RunError(
                f"{path} holds a run already; continue it with --resume {path}, replace it with "
                "--overwrite, or choose another folder with --out"
            )
        with _held(path):
            return

    @classmethod
    def open(cls, path: str | Path) -> RunFolder:
        """An existing run.

        Raises:
            RunError: the folder is absent, is not a run, or is damaged or too new.
        """
        path = Path(path)
        if not path.is_dir():
            raise RunError(f"there is no folder {path}")
        if not (path / INDEX).is_file():
            raise RunError(f"{path} is not a run: it holds no {INDEX}")
        try:
            index = json.loads((path / INDEX).read_text("utf-8"))
            version = index["format_version"]
            if version > FORMAT_VERSION:
                raise RunError(
                    f"{path} has format version {version}, this prw_flux reads up to "
                    f"{FORMAT_VERSION}: install a newer prw"
                )
            config = RunConfig.from_dict(index["config"])
            if [stage["name"] for stage in index["stages"]] != [s.name for s in config.stages]:
                raise RunError(f"{path / INDEX} is damaged: its stages contradict its config")
        except (KeyError, TypeError, AttributeError, UnicodeDecodeError, ValueError) as problem:
            if isinstance(problem, PRWError):
                raise RunError(str(problem)) from None
            raise RunError(f"{path / INDEX} is damaged ({problem!r})") from None
        return cls(path, index, config)

    # What has happened ------------------------------------------------------------------------

    @property
    def done(self) -> int:
        """How many stages are finished."""
        return sum(bool(stage["done"]) for stage in self._index["stages"])

    @property
    def finished(self) -> bool:
        """Whether all stages are."""
        return self.done == len(self.config.stages)

    @property
    def index(self) -> dict[str, Any]:
        """What run.json holds."""
        return self._index

    def note(self, **facts: Any) -> None:
        """Add plain facts to run.json."""
        self._index |= facts
        self._write_index()

    def finish_stage(self, number: int, facts: Mapping[str, Any]) -> None:
        """Note that stage `number` is done, with plain facts about it (seconds, rejects)."""
        self._index["stages"][number] |= {"done": True, **facts}
        self._write_index()

    def agree(self, done: int, facts: Mapping[str, Any]) -> None:
        """Note that exactly `done` stages are done, which a crash or a lost state has put in doubt.

        Args:
            done: as the state says that the run goes on from.
            facts: about the last of them, where it is not noted yet.
        """
        stages = self._index["stages"]
        if [bool(stage["done"]) for stage in stages] == [i < done for i in range(len(stages))]:
            return
        for i, stage in enumerate(stages):
            new = facts if i == done - 1 and not stage["done"] else {}
            stages[i] = stage | new | {"done": i < done}
        self._write_index()

    def _write_index(self) -> None:
        write_atomically(self.path / INDEX, json.dumps(self._index, indent=1) + "\n")

    # Files ------------------------------------------------------------------------------------

    def state(self) -> State | None:
        """The state to go on from, None where there is none; a finished run goes on from its end.

        Raises:
            CheckpointError: as `States.newest`.
        """
        state = self.states.newest()
        if state is None or not self.finished or state.facts["position"]["stage"] == self.done:
            return state
        logger.warning("%s lost the state of its end; a new stage has fresh moments", self.path)
        return None

    @property
    def adapter(self) -> Path:
        """Folder of the adapter after the last finished stage."""
        return self.path / "adapter"

    @property
    def coredi(self) -> Path:
        """Folder of the feature stream that goes with `adapter`, where the run has one."""
        return self.path / "coredi"

    @property
    def grids(self) -> Path:
        """Folder of what was drawn while the run trained; `samples` is evaluation's."""
        return self.path / "grids"

    @property
    def metrics(self) -> Path:
        """The log, one JSON object per line."""
        return self.path / "metrics.jsonl"

    def log(self, line: Mapping[str, Any]) -> None:
        """Append one line to the log."""
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(dict(line)) + "\n")

    def read_log(self) -> list[dict[str, Any]]:
        """All lines of the log; one that was cut off by a crash is left out."""
        if not self.metrics.is_file():
            return []
        lines = []
        for text in self.metrics.read_text("utf-8").splitlines():
            try:
                lines.append(json.loads(text))
            except json.JSONDecodeError:
                continue
        return lines

    def forget_log_after(self, stage: int, step: int) -> None:
        """Drop the lines after `step` of `stage`, which a resumed run will write again."""
        position = {s.name: i for i, s in enumerate(self.config.stages)}
        kept = [
            line
            for line in self.read_log()
            if (position.get(line["stage"], -1), line["step"]) <= (stage, step)
        ]
        if self.metrics.is_file():
            write_atomically(self.metrics, "".join(json.dumps(line) + "\n" for line in kept))

    @contextmanager
    def exclusively(self) -> Iterator[None]:
        """Hold the run while training it.

        Raises:
            RunError: another process trains it.
        """
        with _held(self.path):
            yield


@contextmanager
def _held(path: Path) -> Iterator[None]:
    with (path / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RunError(f"another process is training {path}") from None
        yield


def write_atomically(path: Path, text: str) -> None:
    """Replace a text file in one step: a crash leaves the old one or the new one.

    Raises:
        OSError: the disk does not take it; the error names the file.
    """
    try:
        with replace_file(path) as new:
            new.write_text(text, encoding="utf-8")
    except OSError as problem:
        problem.filename = problem.filename or str(path)  # a write that fails names none
        raise


def _absolute(base: str) -> str:
    """A base as a run stores it: a local folder by its absolute path, names as they are."""
    return str(Path(base).resolve()) if Path(base).is_dir() else base
