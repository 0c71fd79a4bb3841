"""Several processes that share work without sharing tensors: torchrun's or accelerate's ranks."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final, Self, final

import torch.distributed as dist

from prw import ConfigError

PATIENCE: Final = timedelta(days=7)
"""One rank may finish long before another; a rank that dies is the launcher's to notice."""


@final
@dataclass(frozen=True, kw_only=True)
class Share:
    """This process's share of some work.

    Attributes:
        rank: of this process among `count`.
        local: its number on its machine, which chooses its GPU.
    """

    rank: int = 0
    count: int = 1
    local: int = 0

    @classmethod
    def of_environment(cls) -> Self:
        """As torchrun and `accelerate launch` say it; a process that was started alone does all.

        Raises:
            ConfigError: RANK, WORLD_SIZE and LOCAL_RANK are no numbers, or contradict one another.
        """
        try:
            rank, count, local = (
                int(os.environ.get(name, default))
                for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))
            )
        except ValueError as problem:
            raise ConfigError(f"RANK, WORLD_SIZE and LOCAL_RANK are numbers: {problem}") from None
        if not 0 <= rank < count:
            raise ConfigError(f"RANK={rank} is not one of WORLD_SIZE={count} processes")
        return cls(rank=rank, count=count, local=local)

    def gather(self, mine: Any) -> list[Any]:
        """What every rank says, in order, on rank 0; nothing on the others. Waits for all."""
        if self.count == 1:
            return [mine]
        told: list[Any] | None = [None] * self.count if self.rank == 0 else None
        dist.gather_object(mine, told)
        return told or []


@contextmanager
def gathering() -> Iterator[Share]:
    """The share of `Share.of_environment`, whose ranks can `gather` while this is open."""
    share = Share.of_environment()
    if share.count == 1 or dist.is_initialized():
        yield share
        return
    dist.init_process_group("gloo", timeout=PATIENCE)
    try:
        yield share
    finally:
        dist.destroy_process_group()
