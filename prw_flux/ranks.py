"""Several processes that share work without sharing tensors: torchrun's or accelerate's ranks."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final, final

import torch.distributed as dist

from prw import ConfigError

PATIENCE: Final = timedelta(days=7)
"""One rank may finish long before another; a rank that dies is the launcher's to notice."""


@final
@dataclass(frozen=True, kw_only=True)
class Ranks:
    """This process among `count`; `local` is its number on its machine."""

    rank: int = 0
    count: int = 1
    local: int = 0

    def gather(self, mine: Any) -> list[Any]:
        """What every rank says, in order, on rank 0; nothing on the others. Waits for all."""
        if self.count == 1:
            return [mine]
        told: list[Any] | None = [None] * self.count if self.rank == 0 else None
        dist.gather_object(mine, told)
        return told or []


@contextmanager
def ranks_of_environment() -> Iterator[Ranks]:
    """The ranks that RANK, WORLD_SIZE and LOCAL_RANK tell of; one process where they are not set.

    Raises:
        ConfigError: the three contradict one another.
    """
    try:
        ranks = Ranks(
            rank=int(os.environ.get("RANK", "0")),
            count=int(os.environ.get("WORLD_SIZE", "1")),
            local=int(os.environ.get("LOCAL_RANK", "0")),
        )
    except ValueError as problem:
        raise ConfigError(f"RANK, WORLD_SIZE and LOCAL_RANK are numbers: {problem}") from None
    if not 0 <= ranks.rank < ranks.count:
        raise ConfigError(f"RANK {ranks.rank} is not one of WORLD_SIZE {ranks.count}")
    if ranks.count == 1 or dist.is_initialized():
        yield ranks
        return
    dist.init_process_group("gloo", timeout=PATIENCE)
    try:
        yield ranks
    finally:
        dist.destroy_process_group()
