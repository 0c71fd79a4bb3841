"""What a source pass leaves behind: the rotated keys and the values of every block.

Plain objects on purpose. They travel inside `joint_attention_kwargs`, and accelerate's
`send_to_device`, which offloading applies to every forward, rebuilds containers and calls `.to` on
whatever has one: a write into such a copy would be lost.

Shapes: B samples, S source tokens, H heads, D channels of a head.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

import prw


class Slot:
    """Keys and values of one block, written once.

    A checkpointed block runs again in the backward pass; its second write is ignored, because the
    tensors of the first are the ones the loss was computed from.
    """

    __slots__ = ("key_BSHD", "value_BSHD")

    def __init__(self) -> None:
        self.key_BSHD: Tensor | None = None
        self.value_BSHD: Tensor | None = None

    def write(self, key_BSHD: Tensor, value_BSHD: Tensor) -> None:
        """Keep the pair unless one is there already."""
        if self.key_BSHD is None:
            self.key_BSHD, self.value_BSHD = key_BSHD, value_BSHD

    def read(self, batch: int) -> tuple[Tensor, Tensor]:
        """The pair for `batch` samples.

        One source serves every sample; b sources serve b n samples, n consecutive ones each (the
        order of `num_images_per_prompt`).
        """
        key, value = self.key_BSHD, self.value_BSHD
        if key is None or value is None:
            raise RuntimeError("The source cache is empty: run source_pass before main_pass.")
        if key.shape[0] == batch:
            return key, value
        if key.shape[0] == 1:
            return key.expand(batch, -1, -1, -1), value.expand(batch, -1, -1, -1)
        if batch % key.shape[0]:
            raise ValueError(f"{key.shape[0]} sources cannot be shared by {batch} samples.")
        repeats = batch // key.shape[0]
        return key.repeat_interleave(repeats, dim=0), value.repeat_interleave(repeats, dim=0)


@dataclass(frozen=True, kw_only=True)
class SourceMeta:
    """Where a cache comes from; a pipeline refuses one that it would not have made itself."""

    adapter: str = ""
    source_timestep: str = ""
    source_pooled: str = ""
    pooled: str = ""
    task: str | None = None
    route: str = "free"
    height: int = 0
    width: int = 0

    def require(self, **wanted: str | int | None) -> None:
        """Raise ValueError at the first field that is not what a call needs; None needs nothing."""
        for name, value in wanted.items():
            own = getattr(self, name)
            if value is not None and value != own:
                hashes = {"adapter": "adapter", "pooled": "prompt"}
                what = hashes.get(name, f"{name} ({own!r}, not {value!r})")
                raise ValueError(
                    f"This source cache was made with another {what}: call encode_source again."
                )


class SourceCache:
    """One write-once slot per transformer block, in the order in which the blocks run."""

    def __init__(self, layers: int, meta: SourceMeta | None = None) -> None:
        self.slots = tuple(Slot() for _ in range(layers))
        self.meta = meta if meta is not None else SourceMeta()

    def __len__(self) -> int:
        return len(self.slots)

    def __iter__(self) -> Iterator[Slot]:
        return iter(self.slots)

    @property
    def recorded(self) -> int:
        """Number of blocks that have written."""
        return sum(slot.key_BSHD is not None for slot in self.slots)

    @property
    def nbytes(self) -> int:
        """Bytes held by the keys and values."""
        tensors = [t for slot in self.slots for t in (slot.key_BSHD, slot.value_BSHD)]
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)

    def require_complete(self) -> None:
        """Raise if a block was skipped, as a step cache of diffusers may do."""
        if self.recorded != len(self.slots):
            raise RuntimeError(
                f"The source pass recorded {self.recorded} of {len(self.slots)} blocks: disable "
                "the transformer's step cache (transformer.disable_cache()) or reset it before."
            )


@dataclass(frozen=True)
class FluxCall:
    """One pass through the transformer, as every attention processor of it sees it.

    Frozen, and one per pass: a block that is recomputed in the backward pass finds the call of its
    own pass, however many passes have happened since.

    Attributes:
        cache: Written in a source pass, read in a main pass.
        mode: Which of the two.
        prw: The call of the routed experts; None takes the one bound to their weave.
        grad: Whether gradients were enabled when the pass began.
    """

    cache: SourceCache
    mode: Literal["source", "main"]
    prw: prw.Call | prw.Record | None = None
    grad: bool = field(default_factory=torch.is_grad_enabled)
