"""The state of a run between two steps: saved all or nothing, verified, loaded bit for bit.

In a folder of `States`: ``adapter/`` the weave, its open stage included · ``coredi/`` the feature
stream, where there is one · ``optimizer.safetensors`` the moments of every parameter ·
``ema.safetensors`` the averages, where the run has them · ``state.json`` where the run is,
and its configuration. No generator has a state to be saved: order, times, noise and dropout are
functions of (seed, stage, step), on any number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from prw import CheckpointError
from prw.atomic import settle
from prw_flux.adapter import PRWAdapter
from prw_flux.config import RunConfig
from prw_flux.coredi.model import CoReDi
from prw_flux.ema import Average
from prw_flux.rundir import RunError, RunFolder
from prw_flux.schema import leaves
from prw_flux.states import INDEX
from prw_flux.tasks import DataSource

MOMENTS: Final = "optimizer.safetensors"
AVERAGES: Final = "ema.safetensors"

Moments = Mapping[str, Mapping[str, Tensor]]


@dataclass(frozen=True)
class Position:
    """Between two steps: `step` steps of stage `stage` are done, in `seconds`."""

    stage: int = 0
    step: int = 0
    seconds: float = 0.0


def named_parameters(
    adapter: PRWAdapter, coredi: CoReDi | None = None
) -> Iterator[tuple[str, nn.Parameter]]:
    """Every parameter of every pool and of the feature stream, by a name that survives growth."""
    for group, pool in adapter.weave.pools.items():
        for name, parameter in pool.named_parameters():
            yield f"{group}.{name}", parameter
    if coredi is not None:
        for name, parameter in coredi.named_parameters():
            yield f"coredi.{name}", parameter


def save_state(
    run: RunFolder,
    adapter: PRWAdapter,
    optimizer: torch.optim.Optimizer | None,
    position: Position,
    coredi: CoReDi | None = None,
    average: Average | None = None,
    ended: Mapping[str, Any] | None = None,
) -> None:
    """Add a state to a run, and drop the oldest beyond `RunConfig.keep`.

    Args:
        ended: plain facts about the stage that ends here, which run.json will hold as well.

    Raises:
        CheckpointError: it cannot be written; the states before stay.
    """
    tensors: dict[str, Tensor] = {}
    for name, parameter in named_parameters(adapter, coredi):
        moments = optimizer.state.get(parameter, {}) if optimizer is not None else {}
        for kind, value in moments.items():
            tensors[f"{name}/{kind}"] = value
    facts = {
        "position": asdict(position),
        "config": run.config.to_dict(),
        "ended": dict(ended or {}),
    }
    try:
        with run.states.new(steps_before(run.config, position), facts, run.config.keep) as folder:
            adapter.save_pretrained(folder / "adapter")
            if coredi is not None:
                coredi.save(folder / "coredi")
            save_file(_saveable(tensors), folder / MOMENTS)
            if average is not None:
                save_file(_saveable(average.tensors()), folder / AVERAGES)
    except (OSError, SafetensorError, CheckpointError) as problem:
        raise CheckpointError(
            f"{run.states.folder} could not be written, what was saved before stays: {problem}; "
            f"continue with prw-flux train --resume {run.path}"
        ) from problem


def _saveable(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().cpu().contiguous() for name, value in tensors.items()}


def steps_before(config: RunConfig, position: Position) -> int:
    """Steps of the whole curriculum that are done at a position: also where trackers are."""
    return sum(stage.steps for stage in config.stages[: position.stage]) + position.step


def adapter_to_continue(run: RunFolder) -> Path | None:
    """The adapter that goes with `read_position`; None before the first step of a new run.

    Raises:
        CheckpointError: there are states, and none is whole.
    """
    settle(run.adapter)
    settle(run.coredi)
    state = run.state()
    if state is not None:
        return state.path / "adapter"
    return run.adapter if run.done else None


def read_position(run: RunFolder) -> Position:
    """Where a run is; at its first unfinished stage where no state was saved.

    Raises:
        CheckpointError: no state is whole.
        RunError: the configuration in run.json is not the one that the state was saved with.
    """
    state = run.state()
    if state is None:
        return Position(stage=run.done)
    try:
        position = Position(**state.facts["position"])
        trained = RunConfig.from_dict(state.facts["config"])
        if not 0 <= position.stage <= len(run.config.stages):
            raise ValueError(f"stage {position.stage} of {len(run.config.stages)}")
    except (KeyError, TypeError, ValueError) as problem:
        raise CheckpointError(f"{state.path / INDEX} is damaged: {problem}") from None
    if position != Position(stage=len(trained.stages)):  # else the run extends a finished one
        require_same_config(trained, run.config, str(run.path))
    return position


def require_same_config(trained: RunConfig, asked: RunConfig, run: str) -> None:
    """Raise RunError, naming the first field and both its values, unless the two are equal."""
    if trained == asked:
        return
    old, new = dict(leaves(trained)), dict(leaves(asked))
    for key in {**old, **new}:
        if key not in old or key not in new or old[key] != new[key]:
            was, now = (side.get(key, "not there") for side in (old, new))
            raise RunError(
                f"a resumed run keeps its configuration: {key} of {run} is {was!r}, not {now!r}; "
                "put it back, or begin another run with it"
            )


def require_same_data(run: RunFolder, data: DataSource) -> None:
    """Note the fingerprint of a run's data when it begins; later refuse other data.

    Raises:
        RunError: names both fingerprints.
    """
    facts = {"name": data.name, "fingerprint": data.fingerprint()}
    known = run.index.get("data")
    if known is None:
        run.note(data=facts)
    elif known["fingerprint"] != facts["fingerprint"]:
        raise RunError(
            f"the data of {run.path} have changed: {known['name']} had the fingerprint "
            f"{known['fingerprint']}, {data.name} has {facts['fingerprint']}; put them back, or "
            "begin another run"
        )


def read_moments(run: RunFolder) -> dict[str, dict[str, Tensor]]:
    """The saved moments, by parameter and kind; none where no state was saved.

    Raises:
        CheckpointError: the file is damaged.
    """
    moments: dict[str, dict[str, Tensor]] = {}
    for key, value in _read(run, MOMENTS).items():
        name, _, kind = key.rpartition("/")
        moments.setdefault(name, {})[kind] = value
    return moments


def read_average(run: RunFolder, adapter: PRWAdapter, coredi: CoReDi | None) -> Average | None:
    """The averages that a run goes on with; None where it has none.

    Raises:
        CheckpointError: the file is damaged.
    """
    if not run.config.ema:
        return None
    average = Average(run.config.ema)
    average.load(_read(run, AVERAGES), named_parameters(adapter, coredi))
    return average


def _read(run: RunFolder, name: str) -> dict[str, Tensor]:
    state = run.state()
    if state is None or not (state.path / name).is_file():
        return {}
    try:
        return load_file(state.path / name)
    except (SafetensorError, OSError) as problem:
        raise CheckpointError(f"{state.path / name} cannot be read: {problem}") from None


def restore_moments(
    optimizer: torch.optim.Optimizer,
    adapter: PRWAdapter,
    moments: Moments,
    coredi: CoReDi | None = None,
) -> None:
    """Give the optimizer the saved moments of the parameters that it holds."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in named_parameters(adapter, coredi):
        if name in moments and id(parameter) in held:
            optimizer.state[parameter] = {
                kind: value if kind == "step" else value.to(parameter.device)
                for kind, value in moments[name].items()
            }
