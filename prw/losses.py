"""Losses on recorded routings: the veteran gate, load balance, z-loss and entropy.

Every loss is a pure function of records. All sums run over the micro-batches of the records and,
where torch.distributed is initialised, over the ranks, before anything non-linear is done with
them; every rank must then call the loss, and its gradient is scaled for the *mean* over ranks that
DDP and FSDP take.

Shape suffixes: T routed rows, E experts, S samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from prw.call import GroupRecord, Record, totals
from prw.checks import check_number
from prw.distributed import ranks
from prw.errors import ConfigError, StageError
from prw.router import RouterPass, Routing


def veteran_gate_loss(
    records: Record | Sequence[Record],
    density: float,
    weight: float,
    *,
    per: Literal["batch", "sample"] = "batch",
) -> Tensor:
    """Pull the usage of the newest expert towards a density (CoLoGen, Eq. 8-10).

    ``loss = weight * |U - density|``, ``U = sum(used) / sum(count)`` over the routed groups, the
    forwards of a record, the records, and the ranks: all sums come before the absolute value. The
    gradient is that of ``1[e] + (p - p.detach())`` with the router's input held constant, so it
    reaches router columns only; at ``U = density`` it is zero.

    Args:
        records: what `Weave.record` returned, or one record per micro-batch.
        density: target usage in [0, 1].
        weight: factor of the loss, at least 0.
        per: ``"sample"`` takes the mean over samples of ``|U_s - density|``, with U of each sample
            over the groups and its tokens; it needs ``record(keep_inputs=True)``.

    Returns:
        A scalar with the dtype of the router's arithmetic. Zero when nothing was counted.

    Raises:
        ConfigError: a density or weight out of range, or no record.
        StageError: no router column may learn, nothing was routed under a record, or the inputs
            that ``per="sample"`` needs were not kept.
    """
    check_number("density", density, 0, 1)
    check_number("weight", weight, 0)
    if per not in ("batch", "sample"):
        raise ConfigError(f'per must be "batch" or "sample", got {per!r}')
    records = _listed(records)
    if not any(group.columns for record in records for group in record.tally.groups.values()):
        raise StageError("no router may learn now; unlock a stage first")
    if per == "sample":
        return _per_sample(records, density, weight)
    used, count = (_over_ranks(total) for total in totals(records))
    gap = used.double() / count.clamp(min=1) - density
    counted = count > 0
    value = torch.where(counted, weight * gap.abs(), 0.0)
    slope = torch.where(counted, weight * gap.sign() * ranks() / count.clamp(min=1), 0.0)
    columns, jacobian = _gathered(records)
    loss: Tensor = _ClosedForm.apply(value.to(jacobian[0].dtype), slope, jacobian, *columns)  # type: ignore[no-untyped-call]
    return loss


def load_balance_loss(records: Record | Sequence[Record], weight: float) -> Tensor:
    """Spread the rows over the experts (Switch Transformer, arXiv 2101.03961, Eq. 4-6).

    ``loss = weight * mean_groups E * sum_e f_e P_e``, f the share of rows that were routed to an
    expert, P its mean probability. It is 1 where both are uniform, E where one expert takes all.

    Args:
        records: made by ``record(keep_inputs=True)``, one or several.
        weight: factor of the loss.

    Raises:
        ConfigError: the weight is not finite, or no record.
        StageError: nothing was routed under a record, or its inputs were not kept.
    """
    parts = []
    for group in _groups(records, weight):
        chosen_E: Tensor | None = None
        probs_E: Tensor | None = None
        for seen, routing, keep_T in _forwards(group):
            p_TE = seen.logits().softmax(-1)
            index_E = torch.arange(p_TE.shape[1], device=p_TE.device)
            e_TE = routing.expert.flatten()[:, None] == index_E  # one_hot reads values on a CPU
            e_E, p_E = _sum(e_TE.to(p_TE.dtype), keep_T), _sum(p_TE, keep_T)
            chosen_E = e_E if chosen_E is None else chosen_E + e_E
            probs_E = p_E if probs_E is None else probs_E + p_E
        assert chosen_E is not None and probs_E is not None
        chosen_E, probs_E = _over_ranks(chosen_E), _over_ranks(probs_E)
        rows = chosen_E.sum().clamp(min=1)
        parts.append(len(chosen_E) * (chosen_E / rows * (probs_E / rows)).sum())
    return weight * torch.stack(parts).mean()


def z_loss(records: Record | Sequence[Record], weight: float) -> Tensor:
    """Keep logits small: ``weight * mean logsumexp(w)^2`` (ST-MoE, arXiv 2202.08906, Eq. 5).

    The mean is over the rows of each group, then over groups. Arguments and errors as in
    `load_balance_loss`.
    """
    return _mean_of_rows(records, weight, lambda logits_TE: logits_TE.logsumexp(-1).square())


def entropy_loss(records: Record | Sequence[Record], weight: float) -> Tensor:
    """Make choices clear: ``weight * mean -sum_e p_e log p_e``, in nats.

    A negative weight makes them even. The mean is over the rows of each group, then over groups.
    Arguments and errors as in `load_balance_loss`.
    """

    def entropy(logits_TE: Tensor) -> Tensor:
        log_p_TE = logits_TE.log_softmax(-1)
        return -(log_p_TE.exp() * log_p_TE).sum(-1)

    return _mean_of_rows(records, weight, entropy)


def _mean_of_rows(
    records: Record | Sequence[Record], weight: float, value: Callable[[Tensor], Tensor]
) -> Tensor:
    means = []
    for group in _groups(records, weight):
        forwards = [(value(seen.logits()), keep_T) for seen, _, keep_T in _forwards(group)]
        total = _over_ranks(torch.stack([_sum(v_T, keep_T) for v_T, keep_T in forwards]).sum())
        means.append(total / _over_ranks(group.count).clamp(min=1))
    return weight * torch.stack(means).mean()


def _per_sample(records: Sequence[Record], density: float, weight: float) -> Tensor:
    """``weight * mean_s |U_s - density|``."""
    used_S: Tensor | None = None
    count_S: Tensor | None = None
    for group in _groups(records, weight):
        used, count = [], []
        for seen, routing, keep_T in _forwards(group):
            newest = group.newest
            p_T = seen.logits().softmax(-1)[:, newest]
            u_T = (routing.expert.flatten() == newest).to(p_T.dtype) + (p_T - p_T.detach())
            kept_T = torch.ones_like(p_T) if keep_T is None else keep_T.to(p_T.dtype)
            u_T = u_T if keep_T is None else torch.where(keep_T, u_T, 0.0)
            rows = (*routing.expert.shape, 1)
            used.append(u_T.reshape(rows).flatten(1).sum(1))
            count.append(kept_T.reshape(rows).flatten(1).sum(1))
        u_S, n_S = torch.cat(used), torch.cat(count)
        if used_S is not None and used_S.shape != u_S.shape:
            raise StageError(
                f'per="sample" needs the same samples in every routed group, got {len(used_S)} '
                f"and {len(u_S)}"
            )
        used_S = u_S if used_S is None else used_S + u_S
        count_S = n_S if count_S is None else count_S + n_S
    assert used_S is not None and count_S is not None
    gap_S = (used_S / count_S.clamp(min=1) - density).abs()
    counted_S = count_S > 0
    total = _over_ranks(torch.where(counted_S, gap_S, 0.0).sum())
    return weight * total / _over_ranks(counted_S.sum()).clamp(min=1)


def _listed(records: Record | Sequence[Record]) -> Sequence[Record]:
    listed = [records] if isinstance(records, Record) else records
    if not isinstance(listed, (list, tuple)) or not all(isinstance(r, Record) for r in listed):
        raise ConfigError(f"a loss takes records, which weave.record() makes, got {records!r}")
    if not listed:
        raise ConfigError("a loss needs at least one record")
    if not any(record.tally.groups for record in listed):
        raise StageError("nothing was routed: run the model inside `with weave.record()`")
    groups = [group for record in listed for group in record.tally.groups.values()]
    if len({group.newest for group in groups if group.columns}) > 1:
        raise StageError("a stage began between these records; begin a new record after unlock()")
    return listed


def _groups(records: Record | Sequence[Record], weight: float) -> list[GroupRecord]:
    """Each group with its forwards in all records, known to have kept what its routers read."""
    check_number("weight", weight)
    merged: dict[str, GroupRecord] = {}
    for record in _listed(records):
        for name, group in record.tally.groups.items():
            merged[name] = merged[name].joined(group) if name in merged else group
    if any(len(group.passes) != len(group.routings) for group in merged.values()):
        raise StageError(
            "this loss needs what the routers read: make the record with "
            "record(keep_inputs=True), outside force_route"
        )
    return list(merged.values())


def _forwards(group: GroupRecord) -> Iterator[tuple[RouterPass, Routing, Tensor | None]]:
    """Every forward of a group, and which of its rows count."""
    for seen, routing, mask in zip(group.passes, group.routings, group.masks, strict=True):
        yield seen, routing, None if mask is None else mask.flatten()


def _sum(values_T: Tensor, keep_T: Tensor | None) -> Tensor:
    """Sum over the rows that count."""
    if keep_T is None:
        return values_T.sum(0)
    keep = keep_T.reshape(-1, *(1,) * (values_T.dim() - 1))
    return torch.where(keep, values_T, 0.0).sum(0)


def _over_ranks(local: Tensor) -> Tensor:
    """The sum over ranks; its derivative is that of the local part, times the number of ranks."""
    if ranks() == 1:
        return local
    total = local.detach().clone()
    dist.all_reduce(total)
    return total + (local - local.detach()) * ranks() if local.requires_grad else total


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
