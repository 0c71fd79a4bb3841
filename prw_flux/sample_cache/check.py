"""Looking at a cache again: are all blocks and shards there, and as they were written?"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from safetensors import SafetensorError, safe_open

from prw_flux.sample_cache.block import Block
from prw_flux.sample_cache.errors import CacheError
from prw_flux.sample_cache.store import SHARDS, Shards, content_hash
from prw_flux.sample_cache.table import TABLES, Table, tables

Problems = dict[Path, str]
"""Damaged files, and what is wrong with each."""


def check(
    cache: Path,
    *,
    workers: int = 4,
    repair: bool = False,
    tick: Callable[[int, int], None] = lambda done, total: None,
) -> list[str]:
    """What is damaged in a cache, one sentence each; what it lacks is told by `unfinished`.

    Args:
        cache: its folder.
        workers: threads that read shards.
        repair: remove what is damaged and what needs it, so that `build` makes it again.
        tick: told how many of how many shards were looked at.

    Raises:
        CacheError: the folder is no cache.
    """
    if not (cache / TABLES).is_dir():
        raise CacheError(f"{cache} is no cache of samples: make one with prw-flux cache build")
    blocks, damaged = _blocks(cache)
    shards = sorted((cache / SHARDS).glob("*.safetensors"))
    with ThreadPoolExecutor(workers) as pool:
        for done, (shard, wrong) in enumerate(zip(shards, pool.map(_wrong, shards), strict=True)):
            if wrong:
                damaged[shard] = wrong
            tick(done + 1, len(shards))
    needing = _unsatisfied(cache, blocks, damaged)
    told = [f"{path.relative_to(cache)} {wrong}" for path, wrong in (damaged | needing).items()]
    if repair:
        for path in damaged | needing:
            path.unlink(missing_ok=True)
    return told


def unfinished(cache: Path) -> list[str]:
    """The stages of which not every sample is encoded, one sentence each.

    Nothing is damaged: a build was stopped, or its configuration was given up since.
    """
    return [_lacks(table) for table in tables(cache) if table.missing()]


def _lacks(table: Table) -> str:
    have = len(table) - table.missing()
    return (
        f"{table.identity.stage}: unfinished, {have:,} of {len(table):,} samples: run the same "
        f"`cache build` again, or remove {table.folder} if it is no longer wanted"
    )


def _blocks(cache: Path) -> tuple[list[Block], Problems]:
    blocks: list[Block] = []
    damaged: Problems = {}
    for table in tables(cache):
        for path in sorted(table.folder.glob("*.safetensors")):
            try:
                blocks.append(Block(path))
            except CacheError:
                damaged[path] = "is damaged"
    return blocks, damaged


def _wrong(shard: Path) -> str:
    """What is wrong with a shard, or nothing."""
    try:
        with safe_open(shard, "pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError) as problem:
        return f"cannot be read ({problem})"
    return "" if header.get("blake2b") == content_hash(tensors) else "has changed"


def _unsatisfied(cache: Path, blocks: list[Block], damaged: Problems) -> Problems:
    """Blocks that need a shard that is damaged or absent, or that has not their content."""
    shards = Shards(cache)
    bad = {path.name for path in damaged}
    found: Problems = {}
    for block in blocks:
        for key, name in block.contents():
            whole = name not in bad and (cache / SHARDS / name).is_file()
            if not whole or key not in shards[name]:
                found[block.path] = f"needs {SHARDS}/{name}"
                break
    return found
