"""What one process of a build knows to be in the cache, and the shards that it adds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final, final

from torch import Tensor

from prw_flux.sample_cache.errors import CacheError
from prw_flux.sample_cache.store import SHARDS, Grid, write_latents, write_texts
from prw_flux.sample_cache.table import Block, tables

TEXTS: Final = 64
"""Texts of a shard: 256 MiB at T5-XXL's 512 tokens of width 4096."""
REMEMBERED: Final = 1_000_000
"""Contents that a rank recognises when it meets them again."""


@final
class Writer:
    """What a process knows to be in the cache, and counts of what it adds."""

    def __init__(self, cache: Path, encoders: dict[str, str]) -> None:
        self.cache, self.encoders, self.shards = cache, encoders, cache / SHARDS
        self.kept = self.encoded = self.latents = self.texts = 0
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
    """The shards of one block: one of latents, and one for every `TEXTS` texts.

    A name that another block refers to is not taken a second time: what it has stays as it is.
    """

    def __init__(self, writer: Writer, stem: str) -> None:
        self.writer, self.stem = writer, stem
        for left in writer.shards.glob(f"{stem}.*"):
            if left.name not in writer.used:
                left.unlink()  # of a block that was not finished
        self.written: dict[bytes, str] = {}
        self._latents: dict[bytes, tuple[Grid, Tensor]] = {}
        self._texts: dict[bytes, tuple[Tensor, Tensor]] = {}
        self._names = self._free_names()
        self._latents_name, self._texts_name = next(self._names), next(self._names)

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

    def add_latents(self, key: bytes, grid: Grid, latents: Tensor) -> None:
        """Packed latents [R C, C']."""
        self._latents[key] = (grid, latents)
        self.written[key] = self._latents_name

    def add_text(self, key: bytes, pair: tuple[Tensor, Tensor]) -> None:
        """Embeddings [L, E] and [P]."""
        self._texts[key] = pair
        self.written[key] = self._texts_name
        if len(self._texts) >= TEXTS:
            self._write_texts()

    def close(self) -> None:
        """Write what has not been written."""
        if self._latents:
            write_latents(self.writer.shards / self._latents_name, self._latents)
            self.writer.latents += len(self._latents)
        if self._texts:
            self._write_texts()

    def _write_texts(self) -> None:
        write_texts(self.writer.shards / self._texts_name, self._texts)
        self.writer.texts += len(self._texts)
        self._texts = {}
        self._texts_name = next(self._names)
