"""Experts that leave as a plain LoRA folder, and LoRAs of elsewhere that join as experts.

Shape suffixes: D input width, O output width, R rank.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from prw import lora_format
from prw.atomic import replace_folder
from prw.checkpoint import check_inside
from prw.errors import CheckpointError
from prw.lora_styles import Pair, alpha_rule, check_settings, read_pairs
from prw.pool import Pool

_LOG = logging.getLogger(__name__)
_PACKED = "lora_adapter_metadata"
"""Under this name diffusers keeps the settings inside the file."""


def export_expert(pools: Mapping[str, Pool], index: int, path: str | Path) -> None:
    """Write the experts with this index as one LoRA folder that PEFT opens, all or nothing.

    Layers whose both factors are zero, as an import leaves those a LoRA lacks, are left out.

    Raises:
        CheckpointError: `path` is something else than such a folder, which is left alone, or
            cannot be written.
    """
    path = Path(path).resolve()  # a link to a folder stays one
    _check_free(path)
    kept = lora_format.live_targets(pools, index)
    try:
        with replace_folder(path) as folder:
            save_file(
                lora_format.tensors(pools, index, kept),
                folder / lora_format.WEIGHTS,
                metadata={"format": "pt"},
            )
            text = lora_format.settings(pools, index, kept)
            (folder / lora_format.SETTINGS).write_text(text, encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} could not be written, nothing changed: {error}") from error


def _check_free(path: Path) -> None:
    """Raise CheckpointError unless nothing that is not an exported expert would be lost."""
    ours = {lora_format.WEIGHTS, lora_format.SETTINGS}
    found = {file.name for file in path.iterdir()} if path.is_dir() else set()
    if (path.exists() and not path.is_dir()) or (found and not ours <= found):
        raise CheckpointError(f"{path} exists and is not an expert's folder; choose another")
    if found - ours:
        raise CheckpointError(
            f"{path} holds {min(found - ours)!r} beside an expert, which would be lost; choose "
            "another folder"
        )


@dataclass(frozen=True)
class Lora:
    """A LoRA that fits some pools.

    Attributes:
        pairs: factors ``A [R, D]``, ``B [O, R]`` and alpha, by pool and projection.
        missing: the targets it does not change.
    """

    pairs: Mapping[tuple[str, str], tuple[Tensor, Tensor, float]]
    missing: tuple[str, ...]

    def fill(self, pools: Mapping[str, Pool], index: int) -> None:
        """Become the experts with this index, which are zero where the LoRA has no pair."""
        for name, pool in pools.items():
            expert = pool.expert(index)
            for projection in pool.projections:
                A_RD, B_OR = expert.pair(projection)
                nothing = A_RD[:1].clone(), B_OR[:, :1].clone(), 1.0
                expert.put(projection, *self.pairs.get((name, projection), nothing))
        if self.missing:
            more = f" and {len(self.missing) - 3} more" if len(self.missing) > 3 else ""
            _LOG.warning(
                "the imported LoRA does not change %s%s; its expert is zero there",
                ", ".join(self.missing[:3]),
                more,
            )


def read_lora(path: str | Path, pools: Mapping[str, Pool]) -> Lora:
    """Read an existing LoRA and check that it fits; the pools are not touched.

    Args:
        path: a ``.safetensors`` file, or a folder with one. Settings come from PEFT's
            ``adapter_config.json`` beside it, else from what diffusers keeps inside the file; a
            tensor ``alpha`` overrules them; without any of these alpha is the rank.
        pools: the routed groups, whose targets the LoRA may change.

    Raises:
        CheckpointError: one sentence that names the file and what is wrong with it: missing,
            damaged, unsafe, no plain LoRA, for layers that are not adapted, or of another shape.
    """
    file = _find(Path(path))
    tensors, packed = _load(file)
    settings = _settings(file, packed)
    if settings is not None:
        check_settings(settings, str(file))
    targets = {
        target: (name, projection)
        for name, pool in pools.items()
        for projection, target in pool.targets.items()
    }
    found = read_pairs(tensors, targets, str(file))
    rule = None if settings is None else alpha_rule(settings, str(file))
    pairs = {}
    for target, pair in found.items():
        name, projection = targets[target]
        _check_shape(pair, pools[name], projection, str(file))
        names = (pair.written.removeprefix("base_model.model."), target)
        alpha = float(pair.rank) if rule is None else rule(names, pair.rank)
        alpha = alpha if pair.alpha is None else pair.alpha
        if not math.isfinite(alpha):
            raise CheckpointError(f"{file}: the alpha of {pair.written!r} is {alpha}")
        pairs[name, projection] = pair.A, pair.B, alpha
    return Lora(pairs, tuple(target for target in targets if target not in found))


def _find(path: Path) -> Path:
    """The file with the weights; a folder's may not be a link that leaves it."""
    if path.is_file():
        if path.suffix != ".safetensors":
            raise CheckpointError(f"{path} is no .safetensors file, and nothing else is read")
        return path
    if not path.is_dir():
        raise CheckpointError(f"there is no file or folder {path}")
    names = sorted(file.name for file in path.glob("*.safetensors"))
    if lora_format.WEIGHTS in names:
        names = [lora_format.WEIGHTS]
    if len(names) != 1:
        what = f"several, {names[0]!r} and {names[1]!r}; name one" if names else "none"
        raise CheckpointError(f"{path} should hold one .safetensors file, it holds {what}")
    check_inside(path, names[0])
    return path / names[0]


def _load(file: Path) -> tuple[dict[str, Tensor], str | None]:
    """All tensors of a file, and the settings that diffusers packs into its header."""
    try:
        with safe_open(file, framework="pt") as opened:
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}
            packed = (opened.metadata() or {}).get(_PACKED)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    return tensors, packed


def _settings(file: Path, packed: str | None) -> Mapping[str, Any] | None:
    """PEFT's settings of a LoRA, if there are any."""
    beside = file.parent / lora_format.SETTINGS
    text, source = packed, str(file)
    if file.name == lora_format.WEIGHTS and beside.is_file():
        check_inside(file.parent, lora_format.SETTINGS)
        source = str(beside)
        try:
            text = beside.read_bytes().decode("utf-8", "replace")
        except OSError as error:
            raise CheckpointError(f"{source} cannot be read: {error}") from error
    if text is None:
        return None
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{source} is damaged: {error}") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{source} is damaged: it is not a JSON object")
    parts = {key.split(".", 1)[0] for key in data if key.endswith(".r")}
    if len(parts) > 1:
        raise CheckpointError(
            f"{file} holds LoRAs of several models, {', '.join(sorted(parts))}; keep one"
        )
    prefix = f"{min(parts)}." if parts else ""
    return {key.removeprefix(prefix): value for key, value in data.items()}


def _check_shape(pair: Pair, pool: Pool, projection: str, source: str) -> None:
    sizes = ([pair.rank, pool.in_features], [pool.projections[projection], pair.rank])
    found = (list(pair.A.shape), list(pair.B.shape))
    if found != sizes or not pair.rank:
        raise CheckpointError(
            f"{source}: the factors of {pair.written!r} are {found[0]} and {found[1]}, but "
            f"{pool.targets[projection]!r} needs {sizes[0]} and {sizes[1]}"
        )
