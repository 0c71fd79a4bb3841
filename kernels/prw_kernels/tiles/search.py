"""The tile of a launch: from the table, or the fastest of the candidates where one asks for it."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path

import torch

from prw_kernels.backend import interpreted
from prw_kernels.tiles.table import CANDIDATES, INTERPRETER, SAFE, TABLE, Tile

_LOG = logging.getLogger(__name__)

_UNWRITTEN: dict[tuple[Path, str], Tile] = {}
"""What was found in this process and could not be written."""


def tile(
    kernel: str,
    arch: str,
    rank: int,
    tokens: int,
    *,
    measure: Callable[[Tile], float] | None = None,
) -> Tile:
    """The tile of a kernel.

    Args:
        kernel: one of `KERNELS`.
        arch: from `arch_of`; one that the table lacks has small tiles, which fit everywhere.
        rank: of the experts; for the kernels that choose, how many columns there are.
        tokens: T.
        measure: milliseconds of the launch with a given tile. With it and ``PRW_AUTOTUNE=1``, the
            fastest candidate is searched for, unless it is known or a CUDA graph is captured. A
            search never changes ``m``: what one kernel writes per tile, another reads.
    """
    shipped = _shipped(kernel, arch, rank, tokens)
    if os.environ.get("PRW_AUTOTUNE", "0") != "1" or arch == INTERPRETER:
        return shipped
    key = f"{arch} {kernel} rank<={_bucket(rank)} tokens<={_bucket(tokens)}"
    known = known_tiles().get(key) or _UNWRITTEN.get((cache_file(), key))
    if known is not None and known.m == shipped.m:
        return known
    if measure is None or _capturing():
        return shipped
    found = _search(kernel, shipped, measure)
    _LOG.info("%s: %s", key, found)
    try:
        _remember(key, found)
    except OSError as error:
        _LOG.warning("%s cannot be written, so other processes search again: %s",
                     cache_file(), error)  # fmt: skip
        _UNWRITTEN[cache_file(), key] = found
    return found


@cache
def _arch(device: torch.device) -> str:
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return str(properties.gcnArchName).partition(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def arch_of(device: torch.device) -> str:
    """The architecture of a device as the table names it: ``"sm_90"``, ``"gfx942"``."""
    return INTERPRETER if interpreted() else _arch(device)


def _shipped(kernel: str, arch: str, rank: int, tokens: int) -> Tile:
    for ranks, up_to, found in (*TABLE.get(arch, {}).get(kernel, []), *SAFE[kernel]):
        if rank <= ranks and tokens <= up_to:
            return found
    raise AssertionError("the safe row takes everything")


def _capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _bucket(value: int) -> int:
    """The power of two from `value` on: one search serves all sizes of a bucket."""
    return 1 << max(value - 1, 0).bit_length()


def _search(kernel: str, shipped: Tile, measure: Callable[[Tile], float]) -> Tile:
    """The fastest of the shipped tile and the candidates; those that cannot run are passed over."""
    tried = {shipped: measure(shipped)}
    for candidate in CANDIDATES[kernel]:
        candidate = replace(candidate, m=shipped.m)
        if candidate in tried:
            continue
        try:
            tried[candidate] = measure(candidate)
        except Exception as error:  # whatever a compiler or a launch may raise for a large tile
            _LOG.info("%s %s: %s", kernel, candidate, error)
    return min(tried, key=lambda found: tried[found])


def cache_file() -> Path:
    """Where searched tiles are kept: ``tiles.json`` in ``$PRW_CACHE`` or the user's cache."""
    given = os.environ.get("PRW_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return (Path(given) if given else Path(base) / "prw") / "tiles.json"


def known_tiles() -> dict[str, Tile]:
    """What earlier searches found; nothing where the file is absent or unreadable."""
    file = cache_file()
    try:
        stamp = file.stat().st_mtime_ns
    except OSError:
        return {}
    return _read(file, stamp)


@cache
def _read(file: Path, stamp: int) -> dict[str, Tile]:
    try:
        return {key: Tile(**value) for key, value in json.loads(file.read_text()).items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        _LOG.warning("%s is no list of tiles and is ignored (%s); delete it", file, error)
        return {}


def _remember(key: str, found: Tile) -> None:
    """Add a result to the file in one step: a reader sees the old file or the new one."""
    file = cache_file()
    entries = {name: asdict(value) for name, value in {**known_tiles(), key: found}.items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    new = file.with_name(f".{file.name}.{os.getpid()}.new")
    try:
        new.write_text(json.dumps(entries, indent=1, sort_keys=True))
        new.replace(file)
    finally:
        new.unlink(missing_ok=True)
