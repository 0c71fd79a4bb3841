"""The folder of a weave: written all or nothing, verified before a tensor is read.

``prw.json`` configuration, stage ledger, base fingerprint, sha256 of every tensor file ·
``router.safetensors`` the live router columns, and per closed stage its snapshot and the inputs
that were remembered ·
``experts/<index>-<name>/`` each expert as a LoRA folder that PEFT opens.

Shape suffixes: D input width, E experts.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from prw import lora_format
from prw.atomic import replace_folder, settle
from prw.config import Config
from prw.errors import CheckpointError, ConfigError, StageError
from prw.fingerprint import TOLERANCE, difference, drift
from prw.ledger import Ledger, Stage
from prw.pool import Pool

Alphas: TypeAlias = Mapping[tuple[str, str], float]
Pairs: TypeAlias = Mapping[tuple[str, str], tuple[Tensor, Tensor]]

SCHEMA_VERSION = 1
INDEX = "prw.json"
ROUTER = "router.safetensors"
_OURS = frozenset({INDEX, ROUTER, "experts"})


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
    memories: bool = True,
) -> None:
    """Write the folder beside its final place, sync it to disk, and put it there in one step.

    Without `memories` the remembered router inputs, which can be data, are left out.

    Raises:
        CheckpointError: `path` is something else or holds something else, which is left alone, or
            cannot be written.
    """
    path = Path(path).resolve()  # a link to a folder stays one
    taken = any(path.iterdir()) if path.is_dir() else path.exists()
    if taken and not (path / INDEX).is_file():
        raise CheckpointError(f"{path} exists and is not a weave; choose another folder")
    for name in extra:
        if Path(name).name != name or name in _OURS:
            raise CheckpointError(f"{name!r} cannot name a file beside {INDEX}")
    _check_nothing_is_lost(path, extra)
    try:
        with replace_folder(path) as folder:
            _write(folder, pools, ledger, config, fingerprint, memories, sorted(extra))
            for name, text in extra.items():
                (folder / name).write_text(text, encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} could not be written, nothing changed: {error}") from error


def _check_nothing_is_lost(path: Path, extra: Mapping[str, str]) -> None:
    """Refuse to replace a folder that holds what no save put there."""
    if not path.is_dir():
        return
    try:
        written = set(json.loads((path / INDEX).read_text(encoding="utf-8")).get("extra", ()))
    except (OSError, ValueError, AttributeError, TypeError, RecursionError):
        written = set()
    foreign = {entry.name for entry in path.iterdir()} - _OURS - set(extra) - written
    if foreign:
        raise CheckpointError(
            f"{path} holds {min(foreign)!r} beside the weave, which would be lost; choose another "
            "folder or move it"
        )


def _write(
    folder: Path,
    pools: Mapping[str, Pool],
    ledger: Ledger,
    config: Config,
    fingerprint: Mapping[str, Any],
    memories: bool,
    extra: Sequence[str],
) -> None:
    save_file(_router_tensors(pools, ledger, memories), folder / ROUTER)
    files = [ROUTER]
    for stage in ledger.stages:
        place = folder / expert_folder(stage)
        place.mkdir(parents=True)
        save_file(lora_format.tensors(pools, stage.index), place / lora_format.WEIGHTS)
        settings = lora_format.settings(pools, stage.index)
        (place / lora_format.SETTINGS).write_text(settings, encoding="utf-8")
        files += _expert_files(stage)
    index = {
        "schema_version": SCHEMA_VERSION,
        "config": config.to_dict(),
        "stages": [_entry(stage) for stage in ledger.stages],
        "fingerprint": dict(fingerprint),
        "sha256": {name: _sha256(folder / name) for name in files},
        "extra": list(extra),
    }
    (folder / INDEX).write_text(json.dumps(index, indent=1), encoding="utf-8")


class Files(Protocol):
    """The files of a checkpoint by their names relative to it, wherever they lie."""

    def place(self, name: str) -> str:
        """What messages call a file."""

    def sha256(self, name: str) -> str | None:
        """Of its bytes; None where there is no such file.

        Raises:
            CheckpointError: it leads elsewhere or cannot be read; so do `text` and `tensors`.
        """

    def text(self, name: str) -> str:
        """What a JSON file says."""

    def tensors(self, name: str) -> dict[str, Tensor]:
        """What a safetensors file holds."""


class FolderFiles:
    """`Files` in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def place(self, name: str) -> str:
        """Its path."""
        return str(self.folder / name)

    def sha256(self, name: str) -> str | None:
        """Of a file that must not lead out of the folder."""
        if not (self.folder / name).is_file():
            return None
        check_inside(self.folder, name)
        return _sha256(self.folder / name)

    def text(self, name: str) -> str:
        """Read as UTF-8."""
        return (self.folder / name).read_text(encoding="utf-8")

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Read without copying where safetensors can."""
        return _load(self.folder / name)


@dataclass(frozen=True)
class Stored:
    """A checkpoint whose files are all there and have the hashes they should."""

    folder: Path
    files: Files
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

    def check_config(self, config: Config) -> None:
        """Raise CheckpointError when the folder was made with another kind of routing."""
        for name in ("granularity", "gate", "noise", "router", "context_features"):
            theirs, ours = getattr(self.config, name), getattr(config, name)
            if theirs != ours:
                raise CheckpointError(f"{self.folder} has {name}={theirs!r}, this weave {ours!r}")

    def tensors(self, pools: Mapping[str, Pool]) -> State:
        """Read every tensor and check that it fits; the pools are not touched.

        Raises:
            CheckpointError: a tensor is missing or has another shape.
        """
        source = self.files.place(ROUTER)
        router = self.files.tensors(ROUTER)
        labels = {"live": len(self.ledger)}
        labels |= {_label(stage): stage.index + 1 for stage in self.ledger.stages if not stage.open}
        columns = {
            (label, name): _columns(router, label, pool, count, source)
            for label, count in labels.items()
            for name, pool in pools.items()
        }
        memories = {
            (stage.index, name): memory
            for stage in self.ledger.stages
            for name, pool in pools.items()
            if (memory := _memory(router, stage, pool, source)) is not None
        }
        experts = {}
        for stage in self.ledger.stages:
            weights, settings = _expert_files(stage)
            found, text = self.files.tensors(weights), self.files.text(settings)
            experts[stage.index] = (
                lora_format.alphas_of(text, pools, self.files.place(settings)),
                lora_format.pairs(found, pools, self.files.place(weights)),
            )
        return State(self.ledger, columns, memories, experts)


@dataclass(frozen=True)
class State:
    """The tensors of a checkpoint, known to fit.

    Attributes:
        ledger: the stages.
        columns: signal and noise ``[E, D]`` by label (``live`` or a stage's) and pool.
        memories: remembered router inputs ``[M, D]`` by stage index and pool, where there are any.
        experts: by stage index, the alphas and the factors by pool and projection.
    """

    ledger: Ledger
    columns: Mapping[tuple[str, str], tuple[Tensor, Tensor]]
    memories: Mapping[tuple[int, str], Tensor]
    experts: Mapping[int, tuple[Alphas, Pairs]]

    def fill(self, pools: Mapping[str, Pool]) -> None:
        """Put the tensors, bit for bit, into pools that follow the same ledger."""
        for name, pool in pools.items():
            pool.columns.put_state(*self.columns["live", name])
        for stage in self.ledger.stages:
            alphas, factors = self.experts[stage.index]
            for (name, projection), (A_RD, B_OR) in factors.items():
                alpha = alphas[name, projection]
                pools[name].expert(stage.index).put(projection, A_RD, B_OR, alpha)
            if not stage.open:
                for name, pool in pools.items():
                    pool.columns.put_snapshot(stage.index, *self.columns[_label(stage), name])
        for (index, name), memory_MD in self.memories.items():
            pools[name].columns.remember(index, memory_MD)


def read(path: str | Path) -> Stored:
    """Read and verify a folder: the schema first, then each file's presence, place and hash.

    Raises:
        CheckpointError: one sentence that names the file and what is wrong with it.
    """
    folder = Path(path)
    settle(folder)
    return verified(folder, FolderFiles(folder), _read_index(folder))


def verified(folder: Path, files: Files, index: Mapping[str, Any]) -> Stored:
    """The checkpoint that `index`, the content of prw.json, describes; raises as `read` does.

    Args:
        folder: for messages.
        files: that it consists of.
        index: a JSON object.
    """
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
        stages = enumerate(index["stages"])
        ledger = Ledger(tuple(_stage(i, entry) for i, entry in stages))
        hashes, fingerprint = dict(index["sha256"]), dict(index["fingerprint"])
        fingerprint["samples"] = [float(value) for value in fingerprint.get("samples") or ()]
    except KeyError as error:
        raise CheckpointError(f"{folder / INDEX} is damaged: it lacks {error}") from None
    except (TypeError, ValueError, AttributeError, StageError, ConfigError) as error:
        raise CheckpointError(f"{folder / INDEX} is damaged: {error}") from error
    _verify(files, ROUTER, hashes, "the router")
    for stage in ledger.stages:
        for name in _expert_files(stage):
            _verify(files, name, hashes, f"the expert {stage.name!r}")
    return Stored(folder, files, config, ledger, fingerprint)


def _entry(stage: Stage) -> dict[str, Any]:
    """A stage as `prw.json` has it; ``exempt`` stands there only where it is true."""
    entry = {"name": stage.name, "open": stage.open}
    return entry | {"exempt": True} if stage.exempt else entry


def _stage(index: int, entry: Mapping[str, Any]) -> Stage:
    return Stage(entry["name"], index, bool(entry["open"]), bool(entry.get("exempt", False)))


def _read_index(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise CheckpointError(f"there is no folder {folder}")
    if not (folder / INDEX).is_file():
        raise CheckpointError(f"{folder} holds no {INDEX}; it is not a weave")
    check_inside(folder, INDEX)
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{folder / INDEX} cannot be read: {error}") from error
    except (ValueError, RecursionError) as error:  # no UTF-8, no JSON, or nested without end
        raise CheckpointError(f"{folder / INDEX} is damaged: {error}") from None
    if not isinstance(index, dict):
        raise CheckpointError(f"{folder / INDEX} is damaged: it is not a JSON object")
    return index


def _expert_files(stage: Stage) -> list[str]:
    return [f"{expert_folder(stage)}/{n}" for n in (lora_format.WEIGHTS, lora_format.SETTINGS)]


def _verify(files: Files, name: str, hashes: Mapping[str, Any], owner: str) -> None:
    found = files.sha256(name)
    if found is None:
        raise CheckpointError(f"{owner} is missing: there is no file {files.place(name)}")
    if found != hashes.get(name):
        raise CheckpointError(
            f"{owner} was changed or truncated: {files.place(name)} does not have the hash in "
            f"{INDEX}"
        )


def check_inside(folder: Path, name: str) -> None:
    """Refuse a link that leaves the folder, except into the blobs of a Hugging Face cache."""
    target = (folder / name).resolve()
    allowed = [folder.resolve()]
    allowed += [p.parent / "blobs" for p in folder.absolute().parents if p.name == "snapshots"]
    if not any(target.is_relative_to(place.resolve()) for place in allowed):
        raise CheckpointError(f"{folder / name} leads out of its folder, to {target}")


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def _load(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def _label(stage: Stage) -> str:
    return f"stage-{stage.index}"


def _router_tensors(pools: Mapping[str, Pool], ledger: Ledger, memories: bool) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, pool in pools.items():
        states = {"live": pool.columns.state()}
        for stage in ledger.stages:
            kept = pool.columns.snapshot(stage.index)
            if kept is not None:
                states[_label(stage)] = kept
            if memories and len(memory_MD := pool.columns.memory(stage.index)):
                tensors[f"{_label(stage)}/{name}/memory"] = memory_MD
        for label, (signal_ED, noise_ED) in states.items():
            tensors[f"{label}/{name}/signal"] = signal_ED
            tensors[f"{label}/{name}/noise"] = noise_ED
    return tensors


def _memory(router: Mapping[str, Tensor], stage: Stage, pool: Pool, source: str) -> Tensor | None:
    """The inputs remembered for a closed stage; None where there are none."""
    key = f"{_label(stage)}/{pool.name}/memory"
    if stage.open or key not in router:
        return None
    found = router[key]
    if found.dim() != 2 or found.shape[1] != pool.columns.width or not found.is_floating_point():
        raise CheckpointError(
            f"{source}: tensor {key!r} is {found.dtype} {list(found.shape)}, but the router needs "
            f"floats [M, {pool.columns.width}]"
        )
    return found


def _columns(
    router: Mapping[str, Tensor], label: str, pool: Pool, count: int, source: str
) -> tuple[Tensor, Tensor]:
    found = []
    for kind, rows in (("signal", count), ("noise", count if pool.config.noise else 0)):
        key = f"{label}/{pool.name}/{kind}"
        if key not in router:
            raise CheckpointError(f"{source} holds no tensor {key!r}")
        if router[key].shape != (rows, pool.columns.width) or not router[key].is_floating_point():
            raise CheckpointError(
                f"{source}: tensor {key!r} is {router[key].dtype} {list(router[key].shape)}, but "
                f"the router needs floats {[rows, pool.columns.width]}"
            )
        found.append(router[key])
    return found[0], found[1]
