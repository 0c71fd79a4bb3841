"""How one recorded tensor is kept: as it is, or in eight bits with a scale per token and head.

Shapes: B samples, S tokens, H heads, D channels of a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

FLOAT8: Final = torch.float8_e4m3fn
LARGEST: Final = 448.0
"""Of float8_e4m3fn: 4 bits of exponent, 3 of mantissa."""
DTYPES: Final = (torch.float32, torch.bfloat16, torch.float16, torch.float64, FLOAT8)


def require_storable(dtype: torch.dtype | None) -> None:
    """Raise ValueError for a dtype in which nothing is stored; None is none."""
    if dtype is not None and dtype not in DTYPES:
        names = ", ".join(str(known).removeprefix("torch.") for known in DTYPES)
        raise ValueError(f"A source cache is stored as one of {names}, not as {dtype}.")


@dataclass(frozen=True)
class Stored:
    """A tensor x, or x = values * scale with values in float8.

    Attributes:
        values: [B, S, H, D].
        scale: float32 [B, S, H, 1], the largest magnitude of each row over 448; None where
            `values` is x itself.
    """

    values: Tensor
    scale: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of both parts."""
        parts = (self.values, self.scale)
        return sum(part.numel() * part.element_size() for part in parts if part is not None)

    def tensor(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """x [B, S, H, D] where it is needed; moved as it is stored, widened there."""
        moved = self._moved(device)
        if moved.scale is None:
            return moved.values.to(dtype)
        return (moved.values.to(torch.float32) * moved.scale).to(dtype)

    def to(self, device: torch.device | None, dtype: torch.dtype | None) -> Stored:
        """The same x elsewhere, or stored as another dtype; None keeps what is.

        From a float type to float8 each value moves by at most |x| / 16, and those below 1 / 28672
        of their row's largest by at most 1 / 458752 of it.
        """
        where = device if device is not None else self.values.device
        if dtype is None or dtype == self.values.dtype:
            return self._moved(where)
        if dtype == FLOAT8:  # where it is, so that half as much is moved
            return quantised(self.values)._moved(where)
        return Stored(self.tensor(where, dtype))

    def _moved(self, device: torch.device) -> Stored:
        # a copy to the CPU that is not waited for may be read before it has arrived
        late = device.type != "cpu"
        scale = None if self.scale is None else self.scale.to(device, non_blocking=late)
        return Stored(self.values.to(device, non_blocking=late), scale)


def quantised(x_BSHD: Tensor) -> Stored:
    """x in float8_e4m3fn, scaled so that the largest of each token and head is 448."""
    wide = x_BSHD.to(torch.float32)
    scale = (wide.abs().amax(dim=-1, keepdim=True) / LARGEST).clamp_min(torch.finfo().tiny)
    return Stored((wide / scale).clamp(-LARGEST, LARGEST).to(FLOAT8), scale)
