"""What one process of a build knows to be in the cache, and the shards that it adds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Final, final

from prw_flux.sample_cache.block import Block
from prw_flux.sample_cache.errors import CacheError
from prw_flux.sample_cache.store import SHARDS, Content, Kind, write_shard
from prw_flux.sample_cache.table import BLOCK, tables

FULL: Final[dict[Kind, int]] = {"latents": 2 * BLOCK, "texts": 64, "features": 64}
"""Contents of a shard: 256 MiB of texts at T5-XXL's 512 tokens of width 4096."""
REMEMBERED: Final = 1_000_000
"""Contents that a rank recognises when it meets them again."""


@final
class Writer:
    """What a process knows to be in the cache, and counts of what it adds."""

    def __init__(self, cache: Path, encoders: dict[str, str]) -> None:
        self.cache, self.encoders, self.shards = cache, encoders, cache / SHARDS
        self.kept = self.encoded = 0
        self.added: Counter[Kind] = Counter()
        self.done: set[Path] = set()
        self.used: set[str] = set()
        self._where: dict[bytes, str] = {}
        there = {file.name for file in self.shards.glob("*.safetensors")}
        for table in tables(cache):
            for path in sorted(table.folder.glob("*.safetensors")):
                self._look_at(path, there)

    def _look_at(self, path: Path, there: set[str]) -> None:
        try:
            contents = Block(path).contents()
        except CacheError:
            return  # it will be made again
        if there.issuperset(shard for _, shard in contents):
            self.done.add(path)
        for key, shard in contents:
            if shard in there:
                self.know(key, shard)

    def know(self, key: bytes, shard: str) -> None:
        """Remember where a content is."""
        self.used.add(shard)
        if len(self._where) < REMEMBERED:
            self._where.setdefault(key, shard)

    def where(self, key: bytes) -> str | None:
        """The shard that is known to have a content."""
        return self._where.get(key)


@final
class BlockShards:
    """The shards of one block: of each kind one, or a further one where it is `FULL`.

    A name that another block refers to is not taken a second time: what it has stays as it is.
    """

    def __init__(self, writer: Writer, stem: str) -> None:
        self.writer, self.stem = writer, stem
        for left in writer.shards.glob(f"{stem}.*"):
            if left.name not in writer.used:
                left.unlink()  # of a block that was not finished
        self.written: dict[bytes, str] = {}
        self._names = self._free_names()
        self._next = {kind: next(self._names) for kind in FULL}
        self._waiting: dict[Kind, dict[bytes, Content]] = {kind: {} for kind in FULL}

    def _free_names(self) -> Iterator[str]:
        number = 0
        while True:
            name = f"{self.stem}.{number}.safetensors"
            if not (self.writer.shards / name).exists():
                yield name
            number += 1

    def where(self, key: bytes) -> str | None:
        """The shard that has or will have a content."""
        return self.written.get(key) or self.writer.where(key)

    def found(self, key: bytes) -> str:
        """The same, of a content that has been added."""
        shard = self.where(key)
        assert shard is not None
        return shard

    def add(self, kind: Kind, key: bytes, content: Content) -> None:
        """Keep a content, to be written with others of its kind."""
        self._waiting[kind][key] = content
        self.written[key] = self._next[kind]
        if len(self._waiting[kind]) >= FULL[kind]:
            self._write(kind)

    def close(self) -> None:
        """Write what has not been written."""
        for kind, contents in self._waiting.items():
            if contents:
                self._write(kind)

    def _write(self, kind: Kind) -> None:
        write_shard(self.writer.shards / self._next[kind], kind, self._waiting[kind])
        self.writer.added[kind] += len(self._waiting[kind])
        self._waiting[kind], self._next[kind] = {}, next(self._names)
