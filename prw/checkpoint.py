"""The folder of a weave: written all or nothing, verified before a tensor is read.

``prw.json`` configuration, stage ledger, base fingerprint, sha256 of every tensor file ·
``router.safetensors`` live router columns and one snapshot per closed stage ·
``experts/<index>-<name>/`` each expert as a LoRA folder that PEFT opens.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from prw.atomic import replace_folder
from prw.config import Config
from prw.errors import CheckpointError, ConfigError, StageError
from prw.experts import Expert
from prw.fingerprint import TOLERANCE, difference, drift
from prw.ledger import Ledger, Stage
from prw.pool import Pool

SCHEMA_VERSION = 1
INDEX = "prw.json"
ROUTER = "router.safetensors"
WEIGHTS = "adapter_model.safetensors"
LORA = "adapter_config.json"
PREFIX = "base_model.model."


def expert_folder(stage: Stage) -> str:
    """Where the expert of a stage lies, relative to the checkpoint."""
    return f"experts/{stage.index}-{stage.name}"


def save(
    path: str | Path,
    pools: Mapping[str, Pool],
    ledger: Ledger,
    config: Config,
    fingerprint: Mapping[str, Any],
    *,
    extra: Mapping[str, str],
) -> None:
    """Write the folder beside its final place, sync it to disk, and put it there in one step.

    Raises:
        CheckpointError: `path` is something else than a checkpoint, which is left alone.
    """
    path = Path(path)
    if path.exists() and not (path / INDEX).is_file() and (path.is_file() or any(path.iterdir())):
        raise CheckpointError(f"{path} exists and is not a weave; choose another folder")
    with replace_folder(path) as folder:
        save_file(_router_tensors(pools, ledger), folder / ROUTER)
        files = [ROUTER]
        for stage in ledger.stages:
            place = folder / expert_folder(stage)
            place.mkdir(parents=True)
            experts = {name: cast(Expert, p.experts[stage.index]) for name, p in pools.items()}
            save_file(_lora_tensors(pools, experts), place / WEIGHTS)
            (place / LORA).write_text(json.dumps(_lora_config(pools, experts), indent=2))
            files += [f"{expert_folder(stage)}/{name}" for name in (WEIGHTS, LORA)]
        index = {
            "schema_version": SCHEMA_VERSION,
            "config": config.to_dict(),
            "stages": [{"name": stage.name, "open": stage.open} for stage in ledger.stages],
            "fingerprint": dict(fingerprint),
            "sha256": {name: _sha256(folder / name) for name in files},
        }
        for name, text in {**extra, INDEX: json.dumps(index, indent=1)}.items():
            if Path(name).name != name:
                raise CheckpointError(f"{name!r} is not a file name")
            (folder / name).write_text(text)


@dataclass(frozen=True)
class Stored:
    """A checkpoint whose files are all there and have the hashes they should."""

    folder: Path
    config: Config
    ledger: Ledger
    fingerprint: Mapping[str, Any]

    def check_base(self, found: Mapping[str, Any]) -> None:
        """Raise CheckpointError for another base; warn when only its weights seem to differ."""
        problem = difference(self.fingerprint, found)
        if problem is not None:
            raise CheckpointError(f"{self.folder} was made for another base: {problem}")
        distance = drift(self.fingerprint, found)
        if distance > TOLERANCE:
            warnings.warn(
                f"the weights of this base differ by {distance:.1%} from those {self.folder} was "
                "trained on; expected for a quantised base, otherwise check which base it was",
                stacklevel=3,
            )

    def check_fits(
        self, pools: Mapping[str, Pool], config: Config, fingerprint: Mapping[str, Any]
    ) -> None:
        """Raise CheckpointError when base, routing or layers are not those of the folder."""
        self.check_base(fingerprint)
        for name in ("granularity", "gate", "noise"):
            theirs, ours = getattr(self.config, name), getattr(config, name)
            if theirs != ours:
                raise CheckpointError(f"{self.folder} has {name} {theirs!r}, this weave {ours!r}")

    def fill(self, pools: Mapping[str, Pool]) -> None:
        """Write the stored tensors into pools that follow the stored ledger."""
        router = _load(self.folder / ROUTER)
        for name, pool in pools.items():
            _fill_router(pool, name, router, self.ledger)
        for stage in self.ledger.stages:
            tensors = _load(self.folder / expert_folder(stage) / WEIGHTS)
            lora = json.loads((self.folder / expert_folder(stage) / LORA).read_text())
            for pool in pools.values():
                expert = cast(Expert, pool.experts[stage.index])
                expert.rank, expert.alpha = int(lora["r"]), float(lora["lora_alpha"])
                for p, target in pool.targets.items():
                    _set(expert.A[p], tensors, f"{PREFIX}{target}.lora_A.weight")
                    _set(expert.B[p], tensors, f"{PREFIX}{target}.lora_B.weight")


def read(path: str | Path) -> Stored:
    """Read and verify a folder: schema first, then every file's presence, place and hash.

    Raises:
        CheckpointError: one sentence that names the file and what is wrong with it.
    """
    folder = Path(path)
    index = _read_index(folder)
    version = index.get("schema_version")
    if not isinstance(version, int):
        raise CheckpointError(f"{folder / INDEX} has no schema version; it is not a weave")
    if version > SCHEMA_VERSION:
        raise CheckpointError(
            f"{folder} has schema version {version}, this prw reads up to {SCHEMA_VERSION}: "
            "install a newer prw"
        )
    try:
        config = Config.from_dict(index["config"])
        ledger = Ledger(
            tuple(Stage(s["name"], i, bool(s["open"])) for i, s in enumerate(index["stages"]))
        )
        hashes = dict(index["sha256"])
        fingerprint = dict(index["fingerprint"])
    except (KeyError, TypeError, ValueError, StageError, ConfigError) as error:
        raise CheckpointError(f"{folder / INDEX} is damaged: {error}") from error
    _verify(folder, ROUTER, hashes, "the router")
    for stage in ledger.stages:
        for name in (WEIGHTS, LORA):
            _verify(folder, f"{expert_folder(stage)}/{name}", hashes, f"expert {stage.name!r}")
    return Stored(folder, config, ledger, fingerprint)


def _read_index(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise CheckpointError(f"there is no folder {folder}")
    if not (folder / INDEX).is_file():
        raise CheckpointError(f"{folder} holds no {INDEX}; it is not a weave")
    _check_inside(folder, INDEX)
    try:
        index = json.loads((folder / INDEX).read_text())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{folder / INDEX} is damaged: {error}") from None
    if not isinstance(index, dict):
        raise CheckpointError(f"{folder / INDEX} is damaged: not a JSON object")
    return index


def _verify(folder: Path, name: str, hashes: Mapping[str, Any], owner: str) -> None:
    if not (folder / name).is_file():
        raise CheckpointError(f"{owner} is missing: there is no file {folder / name}")
    _check_inside(folder, name)
    if _sha256(folder / name) != hashes.get(name):
        raise CheckpointError(
            f"{owner} was changed or truncated: {folder / name} does not have the hash in {INDEX}"
        )


def _check_inside(folder: Path, name: str) -> None:
    """Refuse a link that leaves the folder, except into the blobs of a Hugging Face cache."""
    target = (folder / name).resolve()
    allowed = [folder.resolve()]
    allowed += [p.parent / "blobs" for p in folder.absolute().parents if p.name == "snapshots"]
    if not any(target.is_relative_to(place) for place in allowed):
        raise CheckpointError(f"{folder / name} leads out of its folder, to {target}")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _load(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def _router_tensors(pools: Mapping[str, Pool], ledger: Ledger) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, pool in pools.items():
        states = {"live": pool.router.state(len(ledger))}
        for stage in ledger.stages:
            kept = pool.router.snapshot(stage.index)
            if kept is not None:
                states[f"stage-{stage.index}"] = kept
        for label, (signal, noise) in states.items():
            tensors[f"{label}/{name}/signal"] = signal.contiguous()
            tensors[f"{label}/{name}/noise"] = noise.contiguous()
    return tensors


def _fill_router(pool: Pool, name: str, tensors: Mapping[str, Tensor], ledger: Ledger) -> None:
    live = (pool.router.signal, pool.router.noise)
    for columns, kind in zip(live, ("signal", "noise"), strict=True):
        stored = _get(tensors, f"live/{name}/{kind}")
        if stored.shape != (len(columns), pool.in_features):
            raise CheckpointError(f"router of {name!r} has shape {list(stored.shape)}")
        for column, value in zip(columns, stored, strict=True):
            column.data = value.to(column.device)
    for stage in ledger.stages:
        label = f"stage-{stage.index}/{name}"
        if not stage.open:
            pair = (_get(tensors, f"{label}/{kind}") for kind in ("signal", "noise"))
            signal, noise = (value.to(pool.router.anchor.device) for value in pair)
            pool.router.put_snapshot(stage.index, signal, noise)


def _lora_tensors(pools: Mapping[str, Pool], experts: Mapping[str, Expert]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, expert in experts.items():
        for p, target in pools[name].targets.items():
            tensors[f"{PREFIX}{target}.lora_A.weight"] = expert.A[p].detach().contiguous()
            tensors[f"{PREFIX}{target}.lora_B.weight"] = expert.B[p].detach().contiguous()
    return tensors


def _lora_config(pools: Mapping[str, Pool], experts: Mapping[str, Expert]) -> dict[str, Any]:
    """What PEFT reads: one rank and one alpha, the same in every pool."""
    expert = next(iter(experts.values()))
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": expert.rank,
        "lora_alpha": expert.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "target_modules": sorted(t for pool in pools.values() for t in pool.targets.values()),
    }


def _get(tensors: Mapping[str, Tensor], key: str) -> Tensor:
    if key not in tensors:
        raise CheckpointError(f"the checkpoint holds no tensor {key!r}")
    return tensors[key]


def _set(parameter: Tensor, tensors: Mapping[str, Tensor], key: str) -> None:
    """Give a parameter its stored value in the stored dtype; the rank may be another."""
    value = _get(tensors, key)
    if value.dim() != 2 or not set(value.shape) & set(parameter.shape):
        raise CheckpointError(f"tensor {key!r} has shape {list(value.shape)}")
    with torch.no_grad():
        parameter.data = value.to(parameter.device)
