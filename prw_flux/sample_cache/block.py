"""A block of samples on disk: which contents its samples are made of.

Tensors of a block of n samples: ``keys`` uint8 [n, k, 16] and ``shards`` int32 [n, k] of source,
target and text (k = 3), and of the target's semantic features where there are some (k = 4);
``grids`` int32 [n, 4] of source and target. Block 0 has two more rows in ``common_keys`` and
``common_shards``: the empty text and the sentence of the task. Shards are numbers in the list
"shards" of the header, which has the tally and a hash of the tensors as well.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from prw_flux.draws import Tally
from prw_flux.encoded import Grid
from prw_flux.sample_cache.errors import CacheError
from prw_flux.sample_cache.store import content_hash, key_rows, write

SOURCE, TARGET, TEXT, FEATURES = range(4)
"""Columns of a block."""


@final
@dataclass(frozen=True, kw_only=True)
class BlockRow:
    """One sample: keys and shards of its contents, column by column, and both grids."""

    keys: tuple[bytes, ...]
    shards: tuple[str, ...]
    grids: tuple[Grid, Grid]


@final
class Block:
    """A block of samples as it was written.

    Raises:
        CacheError: it is absent or damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with safe_open(path, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}
                header = file.metadata() or {}
            self.shards: list[str] = json.loads(header["shards"])
            self.tally = Tally(*(Counter(json.loads(header[k])) for k in ("rejected", "kinds")))
            whole = header["blake2b"] == content_hash(tensors)
        except (OSError, SafetensorError, KeyError, ValueError) as problem:
            raise CacheError(
                f"{path} cannot be read ({problem}): remove it, then run prw-flux cache build"
            ) from None
        if not whole:
            raise CacheError(f"{path} has changed: remove it, then run prw-flux cache build")
        self.keys_NK, self.shards_NK = tensors["keys"].numpy(), tensors["shards"].numpy()
        self.grids_N4: NDArray[np.int32] = tensors["grids"].numpy()
        none = torch.empty(0, 16, dtype=torch.uint8)
        self.common_keys = tensors.get("common_keys", none).numpy()
        self.common_shards = tensors.get("common_shards", none[:, 0].int()).numpy()

    def __len__(self) -> int:
        return len(self.grids_N4)

    def content(self, row: int, which: int) -> tuple[bytes, str]:
        """Key and shard of one column of a sample."""
        return self.keys_NK[row, which].tobytes(), self.shards[self.shards_NK[row, which]]

    def common(self, which: int) -> tuple[bytes, str]:
        """Key and shard of the empty text (0) or the task's sentence (1)."""
        return self.common_keys[which].tobytes(), self.shards[self.common_shards[which]]

    def contents(self) -> list[tuple[bytes, str]]:
        """Key and shard of everything that the block refers to."""
        columns = range(self.shards_NK.shape[1])
        found = [self.content(row, which) for row in range(len(self)) for which in columns]
        return found + [self.common(which) for which in range(len(self.common_shards))]


def write_block(
    path: Path,
    rows: Sequence[BlockRow],
    common: Sequence[tuple[bytes, str]],
    tally: Tally,
) -> None:
    """Put a block in place, whole or not at all. Raises as `store.write`."""
    shards = list(dict.fromkeys([s for row in rows for s in row.shards] + [s for _, s in common]))
    number = {name: i for i, name in enumerate(shards)}
    tensors: dict[str, Tensor] = {
        "keys": key_rows([key for row in rows for key in row.keys]).view(
            len(rows), len(rows[0].keys), -1
        ),
        "shards": torch.tensor(
            [[number[s] for s in row.shards] for row in rows], dtype=torch.int32
        ),
        "grids": torch.tensor([[*a, *b] for a, b in (r.grids for r in rows)], dtype=torch.int32),
    }
    if common:
        tensors["common_keys"] = key_rows([key for key, _ in common])
        tensors["common_shards"] = torch.tensor([number[s] for _, s in common], dtype=torch.int32)
    header = {
        "shards": json.dumps(shards),
        "rejected": json.dumps(tally.rejected),
        "kinds": json.dumps(tally.kinds),
    }
    write(path, tensors, header)
