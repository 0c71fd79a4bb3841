"""Reading the samples of a stage, which lie on disk block by block.

Shapes: N samples, B of a batch, R x C grid and D width of features, as in `prw_flux.samples`.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Final, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from prw.atomic import replace_file
from prw_flux.draws import Tally
from prw_flux.encoded import Encoded, Grid
from prw_flux.sample_cache.block import FEATURES, SOURCE, TARGET, TEXT, Block
from prw_flux.sample_cache.errors import CacheError
from prw_flux.sample_cache.identity import Identity
from prw_flux.sample_cache.store import Shards

BLOCK: Final = 256
"""Samples of a block; a multiple of the 32 that are encoded together."""
FORMAT: Final = 1
TABLES: Final = "samples"
INDEX: Final = "table.json"


@final
class Bucket:
    """The samples of a table that agree in both grids."""

    def __init__(
        self, table: Table, grids: tuple[Grid, Grid], indices: Sequence[int] | NDArray[np.int64]
    ) -> None:
        self._table, self.grids, self._indices = table, grids, indices

    def __len__(self) -> int:
        return len(self._indices)

    def taken(self, chosen: Sequence[int]) -> Encoded:
        """Some of the samples, read from disk."""
        return self._table.read([int(self._indices[i]) for i in chosen])

    def features(self, count: int) -> Tensor:
        """[at most `count`, R, C, D] semantic features of the first samples, bf16."""
        return self._table.features([int(i) for i in self._indices[:count]])


@final
class StoredTexts:
    """Text embeddings of a table. Row 0 is the empty text, row -1 the sentence of the task, row
    i + 1 the text of sample i."""

    def __init__(self, table: Table, sentence: str) -> None:
        self._table, self._known = table, {"": 0, sentence: -1}

    def rows(self, texts: Sequence[str]) -> list[int]:
        """Rows of the empty text and the task's sentence.

        Raises:
            CacheError: another text.
        """
        for text in texts:
            if text not in self._known:
                raise CacheError(f"the cache {self._table.folder} has no text {text!r} by itself")
        return [self._known[text] for text in texts]

    def gather(self, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """text [B, L, E] and pooled [B, P] of some rows, float32."""
        found = [self._table.text(row) for row in rows]
        text, pooled = (torch.stack([pair[i] for pair in found]) for i in range(2))
        return text.float(), pooled.float()

    def trim(self) -> None:
        """Nothing is kept in memory."""


@final
class Table:
    """The encoded samples of a stage, read from disk as they are asked for.

    Args:
        cache: folder of the cache.
        identity: of the samples.
        sentence: of the task.
        features: whether they are read, where there are some.
    """

    def __init__(
        self, cache: Path, identity: Identity, sentence: str = "", *, features: bool = True
    ) -> None:
        self.folder, self.identity = cache / TABLES / identity.name, identity
        self.pictures = 3 if features and identity.encoder else 2
        self.shards = Shards(cache)
        self.texts = StoredTexts(self, sentence)
        self._blocks: OrderedDict[int, Block] = OrderedDict()

    def __len__(self) -> int:
        return self.identity.count

    @property
    def blocks(self) -> int:
        """How many blocks the samples fill."""
        return -(-self.identity.count // BLOCK)

    def path(self, block: int) -> Path:
        """File of a block."""
        return self.folder / f"{block:05d}.safetensors"

    def samples(self, block: int) -> range:
        """The samples of a block."""
        return range(block * BLOCK, min((block + 1) * BLOCK, len(self)))

    def missing(self) -> int:
        """How many samples have no block."""
        there = {file.name for file in self.folder.glob("*.safetensors")}
        absent = [b for b in range(self.blocks) if self.path(b).name not in there]
        return sum(len(self.samples(block)) for block in absent)

    def write_index(self) -> None:
        """Say whose samples these are."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with replace_file(self.folder / INDEX) as new:
            new.write_text(
                json.dumps({"format": FORMAT, "block": BLOCK, **self.identity.facts()}, indent=1)
            )

    def block(self, number: int) -> Block:
        """A block; the last 64 are kept."""
        if number not in self._blocks:
            self._blocks[number] = Block(self.path(number))
            if len(self._blocks) > 64:
                self._blocks.popitem(last=False)
        return self._blocks[number]

    def tally(self) -> Tally:
        """What was drawn for all samples."""
        found = Tally()
        for number in range(self.blocks):
            found.add(self.block(number).tally)
        return found

    def buckets(self, count: int) -> tuple[Bucket, ...]:
        """The first `count` samples, by their grids, in the order in which the grids come first."""
        found: dict[tuple[int, ...], list[NDArray[np.int64]]] = {}
        for number in range(-(-count // BLOCK)):
            grids = self.block(number).grids_N4[: count - number * BLOCK]
            for row in dict.fromkeys(map(tuple, grids.tolist())):
                here = np.flatnonzero((grids == row).all(axis=1)) + number * BLOCK
                found.setdefault(row, []).append(here)
        if len(found) == 1:
            return (Bucket(self, _pair(next(iter(found))), range(count)),)
        return tuple(Bucket(self, _pair(g), np.concatenate(i)) for g, i in found.items())

    def read(self, indices: Sequence[int]) -> Encoded:
        """Samples of one size."""
        (part,) = self.parts(indices)
        return part

    def parts(self, indices: Sequence[int]) -> list[Encoded]:
        """Samples, those of one size together."""
        groups: dict[tuple[Grid, Grid], list[int]] = {}
        for index in indices:
            groups.setdefault(self._grids(index), []).append(index)
        return [
            Encoded.of(self._pictures(found), grids, [index + 1 for index in found])
            for grids, found in groups.items()
        ]

    def features(self, indices: Sequence[int]) -> Tensor:
        """Semantic features [B, R, C, D] of samples of one target size, bf16."""
        found = (self._content(index, FEATURES) for index in indices)
        return torch.stack([self.shards[shard].features(key) for key, shard in found])

    def first_features(self, count: int) -> Tensor:
        """Of the first `count` samples, the features of those that have the first one's size."""
        size = self._grids(0)[1]
        return self.features([i for i in range(count) if self._grids(i)[1] == size])

    @property
    def width(self) -> int:
        """D."""
        return self.features([0]).shape[-1]

    def text(self, row: int) -> tuple[Tensor, Tensor]:
        """Embeddings [L, E] and [P] in bf16 of a row of `texts`."""
        if row > 0:
            key, shard = self._content(row - 1, TEXT)
        else:
            key, shard = self.block(0).common(-row)
        return self.shards[shard].text(key)

    def _place(self, index: int) -> tuple[Block, int]:
        """The block of a sample, and its row there."""
        if not 0 <= index < len(self):
            raise CacheError(f"{self.folder} has {len(self):,} samples, there is no sample {index}")
        return self.block(index // BLOCK), index % BLOCK

    def _content(self, index: int, which: int) -> tuple[bytes, str]:
        """Key and shard of one column of a sample."""
        block, row = self._place(index)
        return block.content(row, which)

    def _pictures(self, indices: Sequence[int]) -> list[Tensor]:
        """Sources, targets and, where wanted, features of samples of one size."""
        found = []
        for which in (SOURCE, TARGET):
            contents = (self._content(index, which) for index in indices)
            found.append(torch.stack([self.shards[s].latents(key) for key, s in contents]))
        return [*found, self.features(indices)] if self.pictures == 3 else found

    def _grids(self, index: int) -> tuple[Grid, Grid]:
        """Of a sample."""
        block, row = self._place(index)
        return _pair(block.grids_N4[row].tolist())


def _pair(grids: Sequence[int]) -> tuple[Grid, Grid]:
    return (grids[0], grids[1]), (grids[2], grids[3])


def read_index(path: Path) -> Identity:
    """Whose samples a folder has.

    Raises:
        CacheError: the file is damaged, or of another format.
    """
    try:
        raw = json.loads(path.read_text("utf-8"))
        if (raw.pop("format"), raw.pop("block")) != (FORMAT, BLOCK):
            raise CacheError(f"{path} is of another format: build the cache again")
        return Identity(**raw)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as problem:
        if isinstance(problem, CacheError):
            raise
        raise CacheError(f"{path} is damaged ({problem}): build the cache again") from None


def tables(cache: Path) -> list[Table]:
    """All tables of a cache. Raises as `read_index`."""
    found = sorted((cache / TABLES).glob(f"*/{INDEX}"))
    made = [(path, read_index(path)) for path in found]
    return [Table(cache, identity) for path, identity in made if path.parent.name == identity.name]
