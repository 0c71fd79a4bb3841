"""One routed LoRA as the implementations for a CPU see it: the axes of a routed unit are folded.

Shape suffixes: U units that are routed (tokens, or samples), L rows of a unit (1, or the tokens of
a sample), D input width, O output width, R rank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias, TypeVar

from torch import Tensor

Item = TypeVar("Item")
Grads: TypeAlias = tuple[
    Tensor | None, Tensor | None, list[list[Tensor | None]], list[list[Tensor | None]]
]
"""Of x ``[U, L, D]``, of the gate ``[U]``, and of A and B per projection and expert."""


@dataclass(frozen=True)
class Problem:
    """The arguments.

    Attributes:
        x_ULD: the input.
        expert_U: the expert of each unit.
        gate_U: its weight.
        A: per projection and expert ``[R_e, D]``.
        B: per projection and expert ``[O_p, R_e]``.
        scaling: per projection and expert.
    """

    x_ULD: Tensor
    expert_U: Tensor
    gate_U: Tensor
    A: list[list[Tensor]]
    B: list[list[Tensor]]
    scaling: list[list[float]]

    @classmethod
    def of(
        cls,
        x: Tensor,
        expert: Tensor,
        gate: Tensor,
        scaling: Sequence[float],
        count: int,
        factors: Sequence[Tensor],
    ) -> Problem:
        """From flat lists, see `prw_kernels.routed_lora.cpu.forward`."""
        return cls(
            units(x, expert),
            expert.flatten(),
            gate.flatten(),
            by_projection(factors[: len(scaling)], count),
            by_projection(factors[len(scaling) :], count),
            by_projection(scaling, count),
        )

    def scale(self, p: int) -> float | Tensor:
        """The scaling of a projection: one number, or ``[U]`` where experts differ."""
        row = self.scaling[p]
        if len(set(row)) == 1:
            return row[0]
        return self.gate_U.new_tensor(row).index_select(0, self.expert_U)

    def weight(self, p: int) -> Tensor:
        """``scaling * gate`` of a projection, ``[U]``."""
        return self.gate_U * self.scale(p)


@dataclass(frozen=True)
class Needs:
    """Which gradients are wanted; of the factors per projection and expert."""

    x: bool
    gate: bool
    A: list[list[bool]]
    B: list[list[bool]]


def by_projection(items: Sequence[Item], count: int) -> list[list[Item]]:
    """A flat list cut into one list per projection."""
    size = len(items) // count
    return [list(items[p * size : (p + 1) * size]) for p in range(count)]


def units(rows: Tensor, expert: Tensor) -> Tensor:
    """``[..., D]`` as ``[U, L, D]``, a view."""
    length = math.prod(rows.shape[expert.dim() : -1])
    return rows.view(expert.numel(), length, rows.shape[-1])


def weighted(rows_NR: Tensor, weight_U: Tensor) -> Tensor:
    """Every row times the weight of its unit, in the dtype of the rows."""
    folded = rows_NR.view(weight_U.shape[0], -1) * weight_U[:, None]
    return folded.to(rows_NR.dtype).view(rows_NR.shape)
