"""A source cache as one safetensors file: encode a source today, edit it tomorrow.

Tensors ``<block>.key``, ``<block>.value`` (with ``.scale`` where they are float8) and ``picture``;
the header's ``meta`` says which adapter, base, task and route made them.
"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from prw import CheckpointError
from prw.atomic import replace_file
from prw_flux.source_cache import Slot, SourceCache, SourceMeta
from prw_flux.stored import Stored

FORMAT: Final = "prw_flux.source_cache"
VERSION: Final = 1


def write_cache(cache: SourceCache, path: str | os.PathLike[str]) -> None:
    """Write `cache` to `path`, all or nothing.

    Raises:
        ValueError: If a block has not been recorded.
        CheckpointError: If the file cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    for index, slot in enumerate(cache):
        if slot.key is None or slot.value is None:
            raise ValueError("An empty source cache cannot be saved: record it first.")
        for name, part in (("key", slot.key), ("value", slot.value)):
            tensors[f"{index}.{name}"] = part.values
            if part.scale is not None:
                tensors[f"{index}.{name}.scale"] = part.scale
    if cache.picture is not None:
        tensors["picture"] = cache.picture
    header = {
        "format": FORMAT,
        "version": str(VERSION),
        "blocks": str(len(cache)),
        "meta": json.dumps(dataclasses.asdict(cache.meta)),
    }
    try:
        with replace_file(Path(path)) as new:
            here = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
            save_file(here, new, metadata=header)
    except (OSError, SafetensorError) as problem:
        raise CheckpointError(f"The source cache cannot be written to {path}: {problem}.") from None


def read_cache(
    path: str | os.PathLike[str], device: torch.device | str | None = None
) -> SourceCache:
    """Read a file of `write_cache`; nothing in it is executed.

    Args:
        path: The file.
        device: Where its tensors go; the CPU where None.

    Raises:
        CheckpointError: If there is no such file, it is damaged, of a newer version, or something
            else.
    """
    if not Path(path).is_file():
        raise CheckpointError(f"There is no source cache {path}: save one with cache.save(path).")
    try:
        with safe_open(path, "pt", device=str(device or "cpu")) as file:
            header = file.metadata() or {}
            _require_format(header, path)
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        meta = SourceMeta(**json.loads(header["meta"]))
        slots = [
            Slot(_part(tensors, f"{i}.key"), _part(tensors, f"{i}.value"))
            for i in range(int(header["blocks"]))
        ]
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as problem:
        if isinstance(problem, CheckpointError):
            raise
        raise CheckpointError(
            f"The source cache {path} is damaged ({problem}): encode the source again."
        ) from None
    return SourceCache(len(slots), meta, tensors.get("picture"), slots)


def _require_format(header: dict[str, Any], path: str | os.PathLike[str]) -> None:
    if header.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} is not a source cache: give a file that SourceCache.save wrote."
        )
    if int(header.get("version", 0)) > VERSION:
        raise CheckpointError(
            f"{path} is a source cache of version {header['version']}, this library reads "
            f"{VERSION}: upgrade prw, or encode the source again."
        )


def _part(tensors: dict[str, Tensor], name: str) -> Stored:
    return Stored(tensors[name], tensors.get(f"{name}.scale"))
