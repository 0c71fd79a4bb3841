"""Router noise as a stateless hash, so that any recomputation sees the same noise.

Shape suffixes: T tokens (or samples), C columns.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

_WORD = (1 << 64) - 1
_MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_SHIFTS = (30, 27, 31)
_WEYL = 0x9E3779B97F4A7C15


def group_id(name: str) -> int:
    """A 64-bit number for a routed group: the same on every machine and in every process."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")


def word(value: int) -> Tensor:
    """The low 64 bits of a number as an int64 scalar on the CPU.

    A tensor, because a compiled graph takes it as an input: a number would become part of the
    graph, which every new key would compile once more. From the CPU no device has to wait for it.
    """
    return torch.tensor(_signed(value & _WORD))


def gaussian_noise(
    key: Tensor | int,
    group: Tensor | int,
    tokens: int,
    columns: int,
    device: torch.device,
    first: Tensor | int = 0,
) -> Tensor:
    """Standard normal noise, a pure function of (key, group, token index, column index).

    The SplitMix64 finaliser (Steele, Lea and Flood, 2014) hashes the four numbers to 64 bits; the
    two halves become a normal number by the Box-Muller transform. No generator is read or moved,
    and a value does not change when tokens or columns are added.

    Args:
        key: the 64-bit noise key of the call, or its `word`.
        group: the `group_id` of the routed group, or its `word`.
        tokens: T, how many rows.
        columns: C, how many columns.
        device: where the result lives.
        first: index of the first row, so that a part of a batch has the noise of the whole one.

    Returns:
        fp32 ``[T, C]``.
    """
    key, group, first = (
        word(value) if isinstance(value, int) else value for value in (key, group, first)
    )
    seed = _mix(_mix(key) ^ group) + first * _signed(_WEYL)
    rows_T = _mix(torch.arange(tokens, device=device) * _signed(_WEYL) + seed)
    columns_C = torch.arange(columns, device=device) * _signed(_WEYL)
    bits_TC = _mix(rows_T[:, None] ^ _mix(columns_C))
    high = ((bits_TC >> 32) & 0xFFFFFFFF).double()
    low = (bits_TC & 0xFFFFFFFF).double()
    radius = torch.sqrt(-2.0 * torch.log((high + 0.5) * 2.0**-32))
    return (radius * torch.cos(low * (2.0 * math.pi * 2.0**-32))).float()


def _signed(bits: int) -> int:
    """The 64-bit word as the int64 with the same bits."""
    return bits - (1 << 64) if bits >> 63 else bits


def _mix(words: Tensor) -> Tensor:
    words = words + _signed(_WEYL)
    for shift, multiplier in zip(_SHIFTS, (*_MULTIPLIERS, 1), strict=True):
        logical = (words >> shift) & ((1 << (64 - shift)) - 1)
        words = (words ^ logical) * _signed(multiplier)
    return words
