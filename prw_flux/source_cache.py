"""What a source pass leaves behind: the rotated keys and the values of every block.

A cache travels inside a `FluxCall`, which has no `.to` on purpose: accelerate's `send_to_device`,
which offloading applies to every forward, rebuilds containers and moves whatever has one, and a
write into such a copy would be lost.

Shapes: B samples, S source tokens, H heads, D channels of a head.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import torch
from torch import Tensor

import prw
from prw_flux.stored import Stored, require_storable


class Slot:
    """Keys and values of one block, written once.

    A checkpointed block runs again in the backward pass; its second write is ignored, because the
    tensors of the first are the ones the loss was computed from.
    """

    __slots__ = ("key", "value")

    def __init__(self, key: Stored | None = None, value: Stored | None = None) -> None:
        self.key = key
        self.value = value

    @property
    def key_BSHD(self) -> Tensor | None:
        """Keys as they are stored; None before they are written."""
        return self.key.values if self.key is not None else None

    @property
    def value_BSHD(self) -> Tensor | None:
        """Values as they are stored; None before they are written."""
        return self.value.values if self.value is not None else None

    def write(self, key_BSHD: Tensor, value_BSHD: Tensor) -> None:
        """Keep the pair unless one is there already."""
        if self.key is None:
            self.key, self.value = Stored(key_BSHD), Stored(value_BSHD)

    def read(self, like_MSHD: Tensor) -> tuple[Tensor, Tensor]:
        """The pair for the M samples of a main pass, on their device and in their dtype.

        One source serves every sample; b sources serve b n samples, n consecutive ones each (the
        order of `num_images_per_prompt`).
        """
        if self.key is None or self.value is None:
            raise RuntimeError("The source cache is empty: run source_pass before main_pass.")
        batch, device, dtype = like_MSHD.shape[0], like_MSHD.device, like_MSHD.dtype
        key, value = self.key.tensor(device, dtype), self.value.tensor(device, dtype)
        if key.shape[0] == batch:
            return key, value
        if key.shape[0] == 1:
            return key.expand(batch, -1, -1, -1), value.expand(batch, -1, -1, -1)
        if batch % key.shape[0]:
            raise ValueError(f"{key.shape[0]} sources cannot be shared by {batch} samples.")
        repeats = batch // key.shape[0]
        return key.repeat_interleave(repeats, dim=0), value.repeat_interleave(repeats, dim=0)


class JoinedSlot(Slot):
    """One block of several references, read as one source; each was recorded without the others."""

    __slots__ = ("parts",)

    def __init__(self, parts: tuple[Slot, ...]) -> None:
        super().__init__()
        self.parts = parts

    def read(self, like_MSHD: Tensor) -> tuple[Tensor, Tensor]:
        """The pairs of all references, one after the other along the tokens."""
        keys, values = zip(*(part.read(like_MSHD) for part in self.parts), strict=True)
        return torch.cat(keys, dim=1), torch.cat(values, dim=1)


@dataclass(frozen=True, kw_only=True)
class SourceMeta:
    """Where a cache comes from; a pipeline never uses one that it would not have made itself.

    Attributes:
        adapter: digest of the experts, routers, stages and settings.
        base: digest of the transformer (with its LoRAs) and the autoencoder.
        source_timestep, source_pooled: what modulated the source.
        pooled: digest of the pooled text that did.
        task, route, scale: as the call said.
        image: digest of the pixels, or of the latents, that were encoded.
        height, width: of the result the source was placed for.
        place: columns by which it lies left of the result.
    """

    adapter: str = ""
    base: str = ""
    source_timestep: str = ""
    source_pooled: str = ""
    pooled: str = ""
    task: str | None = None
    route: str = "free"
    scale: float = 1.0
    image: str = ""
    height: int = 0
    width: int = 0
    place: int = 0

    def difference(self, **wanted: str | float | None) -> str | None:
        """The first field that is not what a call needs, in words; None needs nothing."""
        hashes = {"adapter": "adapter", "pooled": "prompt", "image": "image",
                  "base": "base (or base LoRA)"}  # fmt: skip
        for name, value in wanted.items():
            own = getattr(self, name)
            if value is not None and value != own:
                return hashes.get(name, f"{name} ({own!r}, not {value!r})")
        return None


class SourceCache:
    """One write-once slot per transformer block, in the order in which the blocks run.

    Attributes:
        slots: of the blocks.
        meta: where it comes from.
        picture: uint8 [B, 3, h, w], the source as it was encoded, if it was an image.
    """

    def __init__(
        self,
        layers: int,
        meta: SourceMeta | None = None,
        picture: Tensor | None = None,
        slots: Sequence[Slot] | None = None,
    ) -> None:
        self.slots = tuple(slots) if slots is not None else tuple(Slot() for _ in range(layers))
        self.meta = meta if meta is not None else SourceMeta()
        self.picture = picture

    def __len__(self) -> int:
        return len(self.slots)

    def __iter__(self) -> Iterator[Slot]:
        return iter(self.slots)

    def __repr__(self) -> str:
        key = self.slots[0].key_BSHD if self.slots else None
        if key is None:
            return f"SourceCache({len(self)} blocks, empty)"
        return (
            f"SourceCache(task={self.meta.task!r}, {key.shape[0]} x {key.shape[1]} tokens, "
            f"{len(self)} blocks, {key.dtype}, {key.device}, {self.nbytes / 2**20:.1f} MiB)"
        )

    @property
    def recorded(self) -> int:
        """Number of blocks that have written."""
        return sum(slot.key is not None for slot in self.slots)

    @property
    def nbytes(self) -> int:
        """Bytes held by the keys and values, with their scales."""
        pairs = [part for slot in self.slots for part in (slot.key, slot.value)]
        return sum(part.nbytes for part in pairs if part is not None)

    @property
    def batch(self) -> int:
        """B, the number of source images."""
        key = self.slots[0].key_BSHD if self.slots else None
        return int(key.shape[0]) if key is not None else 0

    def require_complete(self) -> None:
        """Raise if a block was skipped, as a step cache of diffusers may do."""
        if self.recorded != len(self.slots):
            raise RuntimeError(
                f"The source pass recorded {self.recorded} of {len(self.slots)} blocks: disable "
                "the transformer's step cache (transformer.disable_cache()) or reset it before."
            )

    def to(
        self,
        device: torch.device | str | torch.dtype | None = None,
        dtype: torch.dtype | None = None,
    ) -> SourceCache:
        """The same cache elsewhere, or in another precision; this one stays as it is.

        A main pass fetches one block at a time, so that a cache on the CPU costs the accelerator
        no more than one block, and time for the transfer in every step.

        Args:
            device: "cpu" takes it off the accelerator.
            dtype: a float type; torch.float8_e4m3fn stores half as much as bfloat16, with a scale
                per token and head. May stand first, as in torch.

        Raises:
            ValueError: For another dtype, or an empty cache.
        """
        if isinstance(device, torch.dtype):
            device, dtype = None, device
        require_storable(dtype)
        where = torch.device(device) if device is not None else None
        slots = []
        for slot in self.slots:
            if slot.key is None or slot.value is None:
                raise ValueError("An empty source cache cannot be moved: record it first.")
            slots.append(Slot(slot.key.to(where, dtype), slot.value.to(where, dtype)))
        return SourceCache(len(slots), self.meta, self.picture, slots)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file, all or nothing; see `prw_flux.cache_file`."""
        from prw_flux.cache_file import write_cache

        write_cache(self, path)

    @staticmethod
    def load(path: str | os.PathLike[str], device: torch.device | str | None = None) -> SourceCache:
        """Read a file of `save`; a pipeline then checks that it fits. See `prw_flux.cache_file`."""
        from prw_flux.cache_file import read_cache

        return read_cache(path, device)


class JoinedCache:
    """Several references that a main pass sees at once."""

    def __init__(self, caches: Sequence[SourceCache]) -> None:
        if len({len(cache) for cache in caches}) != 1:
            raise ValueError(
                f"Source caches of {', '.join(str(len(c)) for c in caches)} blocks cannot be "
                "joined: encode them with one transformer."
            )
        self.slots = tuple(
            JoinedSlot(parts) for parts in zip(*(cache.slots for cache in caches), strict=True)
        )

    def __len__(self) -> int:
        return len(self.slots)


Recorded: TypeAlias = SourceCache | JoinedCache


def joined(caches: Sequence[SourceCache]) -> Recorded:
    """What a main pass reads: the only cache, or all side by side."""
    return caches[0] if len(caches) == 1 else JoinedCache(caches)


@dataclass(frozen=True)
class FluxCall:
    """One pass through the transformer, as every attention processor of it sees it.

    Frozen, and one per pass: a block that is recomputed in the backward pass finds the call of its
    own pass, however many passes have happened since.

    Attributes:
        cache: Written in a source pass, read in a main pass.
        mode: Which of the two.
        prw: The call of the routed experts; None takes the one bound to their weave.
        scale: Of the experts' residual in a source pass; 0 is the keys and values of the base.
        grad: Whether gradients were enabled when the pass began.
    """

    cache: Recorded
    mode: Literal["source", "main"]
    prw: prw.Call | prw.Record | None = None
    scale: float = 1.0
    grad: bool = field(default_factory=torch.is_grad_enabled)
