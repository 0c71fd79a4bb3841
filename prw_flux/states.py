"""The saved states of a run: the newest few, each whole or absent, and verified before it is read.

``states/step-N/`` is what the run was after N steps of the whole curriculum. Its ``state.json``
holds plain facts, the sha256 of every other file of the folder, and that of itself.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

from prw import CheckpointError
from prw.atomic import replace_folder, settle

logger = logging.getLogger(__name__)

INDEX: Final = "state.json"
PREFIX: Final = "step-"
DAMAGED: Final = "damaged-"


@final
@dataclass(frozen=True)
class State:
    """A saved state whose files all have the hashes they should.

    Attributes:
        path: its folder.
        facts: what was said about it.
    """

    path: Path
    facts: Mapping[str, Any]


@final
class States:
    """The states in a folder.

    Args:
        folder: `states` of a run; need not exist.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._newest: State | None = None

    def path(self, step: int) -> Path:
        """Where the state after `step` steps of the curriculum lies."""
        return self.folder / f"{PREFIX}{step:09d}"

    def paths(self) -> list[Path]:
        """Those that are there, the oldest first."""
        return sorted(p for p in self.folder.glob(f"{PREFIX}*") if p.is_dir())

    @contextmanager
    def new(self, step: int, facts: Mapping[str, Any], keep: int) -> Iterator[Path]:
        """Yield an empty folder that becomes the state after `step` steps when the block ends well.

        Afterwards the newest `keep` states are left. When the block raises, nothing has changed.
        """
        path = self.path(step)
        with replace_folder(path) as folder:
            yield folder
            files = sorted(file for file in folder.rglob("*") if file.is_file())
            hashes = {file.relative_to(folder).as_posix(): _sha256(file) for file in files}
            sealed = {**facts, "sha256": hashes}
            sealed["seal"] = _seal(sealed)
            (folder / INDEX).write_text(json.dumps(sealed, indent=1), "utf-8")
        self._newest = None
        for old in self.paths()[:-keep]:
            _remove(old)

    def newest(self) -> State | None:
        """The newest state that is whole; one that is damaged is passed over with a warning.

        None where nothing was saved. What was verified once is not read again until a new state is
        written.

        Raises:
            CheckpointError: there are states, and none is whole.
        """
        if self._newest is not None and self._newest.path.is_dir():
            return self._newest
        for halfway in self.folder.glob(f".{PREFIX}*.previous"):
            settle(halfway.with_name(halfway.name.removeprefix(".").removesuffix(".previous")))
        problems: list[str] = []
        for path in reversed(self.paths()):
            try:
                self._newest = verified(path)
            except CheckpointError as problem:
                problems.append(str(problem))
                continue
            for told in problems:
                logger.warning("%s; going on from %s, which is whole", told, path)
            return self._newest
        if problems:
            raise CheckpointError(
                f"no saved state of {self.folder.parent} is whole: {problems[0]}; remove "
                f"{self.folder} to go on from the end of the last finished stage"
            )
        return None

    def settle_on(self, state: State | None) -> None:
        """Set aside what is later than the state a run goes on from, and remove what crashes left.

        Only a damaged state is later; it is renamed ``damaged-step-N``.
        """
        if not self.folder.is_dir():
            return
        for left in self.folder.glob(f".{PREFIX}*"):
            shutil.rmtree(left, ignore_errors=True)
        for path in self.paths():
            if state is not None and path.name > state.path.name:
                aside = path.with_name(DAMAGED + path.name)
                shutil.rmtree(aside, ignore_errors=True)
                path.rename(aside)


def verified(path: Path) -> State:
    """Read a state and check every file of it.

    Raises:
        CheckpointError: naming the file that is missing, changed or too much.
    """
    index = path / INDEX
    try:
        facts = json.loads(index.read_text("utf-8"))
        seal, hashes = facts.pop("seal"), dict(facts["sha256"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as problem:
        raise CheckpointError(f"{index} is damaged: {problem!r}") from None
    if seal != _seal(facts):
        raise CheckpointError(f"{index} is damaged: it was changed after it was written")
    for name, expected in hashes.items():
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"{file} is missing")
        if _sha256(file) != expected:
            raise CheckpointError(
                f"{file} was changed or truncated: its hash is not that of {index}"
            )
    return State(path, facts)


def _remove(path: Path) -> None:
    """Rename first: a crash in the middle must not leave half a state under its name."""
    gone = path.with_name(f".{path.name}.gone")
    shutil.rmtree(gone, ignore_errors=True)
    path.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def _seal(facts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as problem:
        raise CheckpointError(f"{path} cannot be read: {problem}") from None
