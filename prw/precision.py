"""Casts of a whole model, and what they leave alone."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


def at_least_fp32(cast: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """`cast`, except that no tensor changes to a type of less than 32 bits; it still moves.

    For ``_apply`` of a module, behind ``to``, ``half``, ``bfloat16`` and the like. A router in
    bfloat16 ties and flips (0.2 % of all rows), and a frozen expert that is rounded has moved.
    """

    def kept(tensor: Tensor) -> Tensor:
        found = cast(tensor)
        narrowed = found.dtype != tensor.dtype and found.dtype.itemsize < 4
        return tensor.to(found.device) if narrowed and tensor.is_floating_point() else found

    return kept
