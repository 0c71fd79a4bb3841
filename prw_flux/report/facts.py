"""What a report is made from: the files of a run folder, read without loading a model."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from math import prod
from pathlib import Path
from typing import Any, Final, final

from prw_flux.config import RunConfig
from prw_flux.rundir import EVALUATION_VERSION, RunFolder

SCORES: Final = 1
"""Version of a benchmark's scores.json."""


@final
@dataclass(frozen=True, kw_only=True)
class StageFacts:
    """One stage of the run: what it was told, whether it is done, and its log."""

    name: str
    task: str
    steps: int
    batch_size: int
    lr: float
    density: float
    weight: float
    done: bool
    seconds: float | None
    log: tuple[Mapping[str, Any], ...]
    parameters: int | None
    kinds: Mapping[str, int]
    rejected: Mapping[str, int]


@final
@dataclass(frozen=True, kw_only=True)
class Facts:
    """Everything that a report can show; what has not been made yet is None or empty."""

    path: Path
    index: Mapping[str, Any]
    config: RunConfig
    changed: datetime
    stages: tuple[StageFacts, ...]
    router_parameters: int | None
    base_parameters: int | None
    memory_mib: float | None
    evaluation: Mapping[str, Any] | None
    routing: Mapping[str, Any] | None
    samples: Mapping[str, Any] | None
    benchmarks: tuple[Mapping[str, Any], ...] = ()

    @property
    def done(self) -> tuple[StageFacts, ...]:
        """The finished stages."""
        return tuple(stage for stage in self.stages if stage.done)


def read_facts(run: str | Path) -> Facts:
    """Read a run folder, finished or not.

    Raises:
        RunError: it is not a run.
    """
    folder = RunFolder.open(run)
    lines = folder.read_log()
    experts = expert_parameters(folder.adapter)
    states = folder.index["stages"]
    stages = tuple(
        StageFacts(
            name=stage.name,
            task=stage.task,
            steps=stage.steps,
            batch_size=stage.batch_size,
            lr=stage.lr,
            density=stage.density,
            weight=stage.weight,
            done=bool(state["done"]),
            seconds=_number(state.get("seconds")),
            log=tuple(line for line in lines if line.get("stage") == stage.name),
            parameters=experts.get(stage.name),
            kinds=dict(state.get("kinds", {})),
            rejected=dict(state.get("rejected", {})),
        )
        for stage, state in zip(folder.config.stages, states, strict=True)
    )
    memory = [m for m in (_number(line.get("memory_mib")) for line in lines) if m is not None]
    return Facts(
        path=folder.path,
        index=folder.index,
        config=folder.config,
        changed=datetime.fromtimestamp((folder.path / "run.json").stat().st_mtime, UTC),
        stages=stages,
        router_parameters=count_parameters(folder.adapter / "router.safetensors", "live/"),
        base_parameters=base_parameters(str(folder.index["base"]["path"])),
        memory_mib=max(memory, default=None),
        evaluation=_of_version(_read_json(folder.path / "evaluation.json"), EVALUATION_VERSION),
        routing=_read_json(folder.path / "routing.json"),
        samples=_read_json(folder.path / "samples" / "samples.json"),
        benchmarks=_scores(folder.path / "benchmarks"),
    )


def _scores(folder: Path) -> tuple[Mapping[str, Any], ...]:
    """The scores of the benchmarks in a run's folder, by name; other versions are left out."""
    found = [_of_version(_read_json(path), SCORES) for path in sorted(folder.glob("*/scores.json"))]
    return tuple(scores for scores in found if scores is not None and scores.get("lines"))


def expert_parameters(adapter: Path) -> dict[str, int]:
    """Numbers in each expert of an adapter folder, by stage name."""
    found = {}
    for file in sorted((adapter / "experts").glob("*/adapter_model.safetensors")):
        count = count_parameters(file)
        if count is not None:
            found[file.parent.name.partition("-")[2]] = count
    return found


def base_parameters(base: str) -> int | None:
    """Numbers in the transformer of a local base; None where it is not on this machine."""
    if base == "tiny-flux":
        from prw_flux import tiny

        base = str(tiny.path())
    files = sorted((Path(base) / "transformer").glob("*.safetensors"))
    counts = [count for count in map(count_parameters, files) if count is not None]
    return sum(counts) if counts else None


def count_parameters(file: Path, prefix: str = "") -> int | None:
    """How many numbers the tensors of a safetensors file hold; None where it is unreadable.

    Only names that begin with `prefix` count, and only the header is read.

    The header is a JSON object after its own length in eight bytes, little-endian.
    """
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > file.stat().st_size:
                return None
            header = json.loads(stream.read(length))
    except (OSError, ValueError, struct.error):
        return None
    return sum(
        int(prod(entry["shape"]))
        for name, entry in header.items()
        if name != "__metadata__" and name.startswith(prefix)
    )


def _read_json(path: Path) -> Mapping[str, Any] | None:
    """An object from a file; None where it is absent or damaged, which the report then says."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def _of_version(value: Mapping[str, Any] | None, version: int) -> Mapping[str, Any] | None:
    """Nothing instead of what another version of this project wrote."""
    return value if value is not None and value.get("version") == version else None


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
