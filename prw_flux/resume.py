"""The state of a run between two steps: saved all or nothing, loaded bit for bit.

``state/adapter/`` the weave, its open stage included · ``state/coredi/`` the feature stream, where
there is one · ``optimizer.safetensors`` the moments of every parameter · ``state.json`` where the
run is.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from prw import CheckpointError
from prw.atomic import replace_folder, settle
from prw_flux.adapter import PRWAdapter
from prw_flux.coredi.model import CoReDi
from prw_flux.rundir import RunFolder

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
) -> None:
    """Replace the state of a run.

    Raises:
        CheckpointError: it cannot be written; the state before stays.
    """
    tensors: dict[str, Tensor] = {}
    for name, parameter in named_parameters(adapter, coredi):
        moments = optimizer.state.get(parameter, {}) if optimizer is not None else {}
        for kind, value in moments.items():
            tensors[f"{name}/{kind}"] = value.detach().cpu().contiguous()
    try:
        with replace_folder(run.state) as folder:
            adapter.save_pretrained(folder / "adapter")
            if coredi is not None:
                coredi.save(folder / "coredi")
            save_file(tensors, folder / "optimizer.safetensors")
            (folder / "state.json").write_text(json.dumps(asdict(position)))
    except (OSError, SafetensorError, CheckpointError) as problem:
        raise CheckpointError(
            f"{run.state} could not be written, what was saved before stays: {problem}; continue "
            f"with prw-flux train --resume {run.path}"
        ) from problem


def adapter_to_continue(run: RunFolder) -> Path | None:
    """The adapter that goes with `read_position`; None before the first step of a new run."""
    settle(run.state)
    settle(run.adapter)
    settle(run.coredi)
    if (run.state / "state.json").is_file():
        return run.state / "adapter"
    return run.adapter if run.done else None


def read_position(run: RunFolder) -> Position:
    """Where a run is; at its first unfinished stage where no state was saved.

    Raises:
        CheckpointError: the state is damaged.
    """
    file = run.state / "state.json"
    if not file.is_file():
        return Position(stage=run.done)
    try:
        position = Position(**json.loads(file.read_text("utf-8")))
        # a finished stage is noted in run.json only after its state was saved
        if not run.done <= position.stage <= len(run.config.stages):
            raise ValueError(f"stage {position.stage} of {len(run.config.stages)}")
    except (TypeError, ValueError) as problem:
        raise CheckpointError(f"{file} is damaged: {problem}") from None
    return position


def read_moments(run: RunFolder) -> dict[str, dict[str, Tensor]]:
    """The saved moments, by parameter and kind; none where no state was saved.

    Raises:
        CheckpointError: the file is damaged.
    """
    file = run.state / "optimizer.safetensors"
    if not file.is_file():
        return {}
    try:
        tensors = load_file(file)
    except (SafetensorError, OSError) as problem:
        raise CheckpointError(f"{file} cannot be read: {problem}") from None
    moments: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        name, _, kind = key.rpartition("/")
        moments.setdefault(name, {})[kind] = value
    return moments


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
