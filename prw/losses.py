"""The veteran gate: how much of the traffic the newest expert should take, as a loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from prw.call import Record, totals
from prw.errors import ConfigError, StageError


def veteran_gate_loss(records: Record | Sequence[Record], density: float, weight: float) -> Tensor:
    """Pull the usage of the newest expert towards a density (CoLoGen, Eq. 8-10).

    ``loss = weight * |U - density|``, ``U = sum(used) / sum(count)`` over the routed groups, the
    forwards of a record, the records, and the ranks when torch.distributed is initialised: all
    sums come before the absolute value. The gradient is that of ``1[e] + (p - p.detach())`` with
    the router's input held constant, so it reaches router columns only; at ``U = density`` it is
    zero. Under data parallelism the local gradient is scaled for the *mean* over ranks that DDP
    and FSDP take, and every rank must call this.

    Args:
        records: what `Weave.record` returned, or one record per micro-batch.
        density: target usage in [0, 1].
        weight: factor of the loss, at least 0.

    Returns:
        A scalar with the dtype of the router's arithmetic. Zero when nothing was counted.

    Raises:
        ConfigError: a density or weight out of range, or no record.
        StageError: no router column may learn, or nothing was routed under a record.
    """
    records = [records] if isinstance(records, Record) else list(records)
    _check(records, density, weight)
    used, count = totals(records)
    ranks = 1
    if dist.is_available() and dist.is_initialized():
        ranks = dist.get_world_size()
        both = torch.stack([used, count])
        dist.all_reduce(both)
        used, count = both.unbind()
    gap = used.double() / count.clamp(min=1) - density
    counted = count > 0
    value = torch.where(counted, weight * gap.abs(), 0.0)
    slope = torch.where(counted, weight * gap.sign() * ranks / count.clamp(min=1), 0.0)
    columns, jacobian = _gathered(records)
    loss: Tensor = _ClosedForm.apply(value.to(jacobian[0].dtype), slope, jacobian, *columns)  # type: ignore[no-untyped-call]
    return loss


def _check(records: Sequence[Record], density: float, weight: float) -> None:
    if not 0 <= density <= 1:
        raise ConfigError(f"density must lie in [0, 1], got {density}")
    if not (math.isfinite(weight) and weight >= 0):
        raise ConfigError(f"weight must be at least 0, got {weight}")
    if not records:
        raise ConfigError("veteran_gate_loss needs at least one record")
    if not any(record.tally.groups for record in records):
        raise StageError("nothing was routed: run the model inside `with weave.record()`")
    if not any(group.columns for record in records for group in record.tally.groups.values()):
        raise StageError("no router may learn now; unlock a stage first")


def _gathered(records: Sequence[Record]) -> tuple[list[Tensor], list[Tensor]]:
    """The distinct learning columns and, for each, its Jacobian summed over the records."""
    columns: dict[int, Tensor] = {}
    sums: dict[int, Tensor] = {}
    for record in records:
        for group in record.tally.groups.values():
            for column, part in zip(group.columns, group.jacobian, strict=True):
                key = id(column)
                columns[key] = column
                sums[key] = sums[key] + part if key in sums else part
    return list(columns.values()), list(sums.values())


class _ClosedForm(torch.autograd.Function):
    """A known value whose gradient with respect to each column is ``slope * jacobian``."""

    @staticmethod
    def forward(
        ctx: Any, value: Tensor, slope: Tensor, jacobian: list[Tensor], *columns: Tensor
    ) -> Tensor:
        ctx.save_for_backward(slope, *jacobian)
        ctx.dtypes = [column.dtype for column in columns]
        return value.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        slope, *jacobian = ctx.saved_tensors
        factor = grad.double() * slope
        parts = (
            (part * factor.to(part)).to(dtype)
            for part, dtype in zip(jacobian, ctx.dtypes, strict=True)
        )
        return None, None, None, *parts
