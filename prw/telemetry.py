"""What routers did: usage, entropy, margins, by layer, stage and bin; the flip rate at growth.

Shape suffixes: G routed groups (layers), S stages, B bins, E experts, H margin bins, T routed rows.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from prw.call import GroupRecord, Record
from prw.errors import ConfigError
from prw.router import Routing

MARGIN_BINS = 20
"""Bins of the margin histogram, equal parts of 0 to 1."""

By: TypeAlias = Literal["group", "stage", "bin"] | None


@dataclass(frozen=True, kw_only=True, eq=False)
class RoutingSummary:
    """Sums over the counted rows of some records; nothing of it waits for the device.

    The tensors stay where the routings were. Only `to_dict`, `to_json`, or a ``float()`` of one's
    own reads them back.

    Attributes:
        groups: names of the routed groups, in the order they were seen.
        cuts: where one bin ends and the next begins; one bin where there are none.
        rows_GSBE: int64, rows that went to each expert. A row belongs to the stage whose expert was
            the newest one of its call, and to the bin of its sample's value.
        sums_GSB3: sums over rows of the entropy of the probabilities in nats, of the margin (the
            largest probability minus the next; 1 with one expert) and of the confidence (the
            largest probability). In fp64 where the device has it.
        margins_GSH: int64, the histogram of the margins.
    """

    groups: tuple[str, ...]
    cuts: tuple[float, ...]
    rows_GSBE: Tensor
    sums_GSB3: Tensor
    margins_GSH: Tensor

    def count(self, by: By = None) -> Tensor:
        """Counted rows, int64 ``[rows of the table]``; a scalar in all."""
        return _over(self.rows_GSBE, by).sum(-1)

    def usage(self, by: By = None) -> Tensor:
        """Share of the counted rows that went to each expert.

        Args:
            by: a row per ``"group"``, ``"stage"`` or ``"bin"``; None takes all rows together.

        Returns:
            ``[rows of the table, E]``, or ``[E]``; NaN where nothing was counted.
        """
        rows = _over(self.rows_GSBE, by).to(self.sums_GSB3.dtype)
        return rows / rows.sum(-1, keepdim=True)

    def entropy(self, by: By = None) -> Tensor:
        """Mean of ``- sum_e p_e ln p_e``, in nats: 0 is certain, ``ln E`` is a guess."""
        return self._mean(0, by)

    def margin(self, by: By = None) -> Tensor:
        """Mean of the largest probability minus the next one."""
        return self._mean(1, by)

    def confidence(self, by: By = None) -> Tensor:
        """Mean of the largest probability, which is the gate where ``gate="softmax"``."""
        return self._mean(2, by)

    def _mean(self, index: int, by: By) -> Tensor:
        return _over(self.sums_GSB3, by)[..., index] / self.count(by)

    def margin_histogram(self) -> Tensor:
        """Rows per margin bin, int64 ``[MARGIN_BINS]``."""
        return self.margins_GSH.sum((0, 1))

    def merge(self, *others: RoutingSummary) -> RoutingSummary:
        """One summary of all rows, as if one had been made of all records; on this one's device.

        Raises:
            ConfigError: summaries with other bins.
        """
        every = (self, *others)
        for other in others:
            if other.cuts != self.cuts:
                raise ConfigError(
                    f"summaries with other bins cannot be merged: cuts {list(other.cuts)} and "
                    f"{list(self.cuts)}"
                )
        groups = tuple(dict.fromkeys(name for one in every for name in one.groups))
        places = [[groups.index(name) for name in one.groups] for one in every]
        return RoutingSummary(
            groups=groups,
            cuts=self.cuts,
            rows_GSBE=_joined([one.rows_GSBE for one in every], places),
            sums_GSB3=_joined([one.sums_GSB3 for one in every], places),
            margins_GSH=_joined([one.margins_GSH for one in every], places),
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON: of all rows, and by group, stage and bin. Waits for the device.

        Each table holds ``rows``, ``usage`` (a list over experts), ``entropy``, ``margin`` and
        ``confidence``; where nothing was counted they are None. Stages are indices.
        """
        stages = range(self.rows_GSBE.shape[1])
        by_stage = zip(stages, self._tables("stage"), strict=True)
        return {
            "experts": self.rows_GSBE.shape[3],
            "cuts": list(self.cuts),
            "all": self._tables(None)[0],
            "by_group": dict(zip(self.groups, self._tables("group"), strict=True)),
            "by_stage": {str(stage): table for stage, table in by_stage if table["rows"]},
            "by_bin": self._tables("bin"),
            "margin_histogram": self.margin_histogram().tolist(),
        }

    def to_json(self) -> str:
        """`to_dict` as JSON text."""
        return json.dumps(self.to_dict(), indent=1)

    def _tables(self, by: By) -> list[dict[str, Any]]:
        columns = [self.count(by), self.entropy(by), self.margin(by), self.confidence(by)]
        values = [column.reshape(-1).tolist() for column in columns]
        usages = self.usage(by).reshape(-1, self.rows_GSBE.shape[3]).tolist()
        return [
            {
                "rows": rows,
                "usage": usage if rows else None,
                "entropy": entropy if rows else None,
                "margin": margin if rows else None,
                "confidence": confidence if rows else None,
            }
            for usage, rows, entropy, margin, confidence in zip(usages, *values, strict=True)
        ]


def summarise(
    record: Record, values: Tensor | Sequence[Tensor] | None = None, cuts: Sequence[float] = ()
) -> RoutingSummary:
    """Summarise what a record saw, noise and pins included. No device is waited for.

    Args:
        record: with at least one counted forward.
        values: ``[samples]``, a number per sample to bin by, such as its timestep; where the
            record spans several forwards, one such tensor for each.
        cuts: rising numbers; bin ``i`` holds ``cuts[i-1] <= value < cuts[i]``, and the first and
            the last one hold all that lies below or above.

    Raises:
        ConfigError: an empty record, cuts that do not rise, values without cuts or the other way
            round, or as many values as there are samples nowhere.
    """
    if not record.tally.groups:
        raise ConfigError("the record holds no routing; run the model in its with block first")
    cuts = tuple(float(cut) for cut in cuts)
    if any(not a < b for a, b in zip(cuts, cuts[1:], strict=False)):
        raise ConfigError(f"cuts must rise, got {list(cuts)}")
    if bool(cuts) != (values is not None):
        raise ConfigError("bins need both values and cuts; give both or neither")
    parts = [
        _summary(name, group, routing, keep, _bins(values, cuts, name, group, index), cuts)
        for name, group in record.tally.groups.items()
        for index, (routing, keep) in enumerate(zip(group.routings, group.masks, strict=True))
    ]
    return parts[0].merge(*parts[1:])


def merged(summaries: Iterable[RoutingSummary]) -> RoutingSummary:
    """One summary of several, say of all steps; raises ConfigError for none, or as `merge`."""
    every = list(summaries)
    if not every:
        raise ConfigError("there is no summary to merge")
    return every[0].merge(*every[1:])


def flip_rate(before: Record, after: Record) -> float:
    """Share of routing decisions that send the same input to another expert than before.

    ``mean over groups, forwards and counted rows of 1[expert_before != expert_after]``

    Both records must have seen the same inputs in the same order; rows that the mask of `before`
    leaves out do not count. At growth: `before` is recorded before ``unlock``, or at any later time
    inside ``at_stage`` of the last stage, and `after` under the free route, both in evaluation
    mode, since noise flips decisions, too. The inputs are those of the *model*: a decision in an
    early layer changes what a later router reads, and that counts. Waits for the device.

    Raises:
        ConfigError: nothing to compare, or records of other groups, forwards or shapes.
    """
    ours, theirs = before.tally.groups, after.tally.groups
    if not ours or ours.keys() != theirs.keys():
        raise ConfigError(
            f"the records saw other groups, {sorted(ours)} and {sorted(theirs)}; run the same "
            "model on the same inputs in both"
        )
    changed, counted = [], []
    for name, group in ours.items():
        shapes = [[list(r.expert.shape) for r in g.routings] for g in (group, theirs[name])]
        if shapes[0] != shapes[1]:
            raise ConfigError(
                f"{name!r} routed {shapes[0]} before and {shapes[1]} after; give the same inputs"
            )
        for old, new, keep in zip(group.routings, theirs[name].routings, group.masks, strict=True):
            moved = old.expert != new.expert
            kept = torch.ones_like(moved) if keep is None else keep
            changed.append((moved & kept).sum())
            counted.append(kept.sum())
    rows = sum(int(count) for count in counted)
    return sum(int(count) for count in changed) / max(rows, 1)


@torch.no_grad()
def _summary(
    name: str,
    group: GroupRecord,
    routing: Routing,
    keep: Tensor | None,
    bin_T: Tensor | None,
    cuts: tuple[float, ...],
) -> RoutingSummary:
    """The sums of one forward of one group."""
    device = routing.expert.device
    dtype = torch.float32 if device.type == "mps" else torch.float64
    probs_TE = routing.probs.reshape(-1, routing.probs.shape[-1]).to(dtype)
    expert_T = routing.expert.flatten()
    kept_T = torch.ones_like(expert_T) if keep is None else keep.flatten().to(torch.int64)
    # Whatever stands in rows that do not count, NaN included, must not reach a sum.
    probs_TE = torch.where(kept_T[:, None] > 0, probs_TE, 0.0)
    best_T2 = F.pad(probs_TE, (0, 1)).topk(2, dim=-1).values
    margin_T = best_T2[:, 0] - best_T2[:, 1]
    figures_T3 = torch.stack([torch.special.entr(probs_TE).sum(-1), margin_T, best_T2[:, 0]], -1)
    bins, stages, experts = len(cuts) + 1, group.newest + 1, probs_TE.shape[1]
    bin_T = torch.zeros_like(expert_T) if bin_T is None else bin_T
    rows_BE = kept_T.new_zeros(bins * experts).index_add_(0, bin_T * experts + expert_T, kept_T)
    sums_B3 = figures_T3.new_zeros(bins, 3).index_add_(0, bin_T, figures_T3)
    margins_H = kept_T.new_zeros(MARGIN_BINS)
    margins_H.index_add_(0, (margin_T * MARGIN_BINS).long().clamp(0, MARGIN_BINS - 1), kept_T)
    before = [0, 0, group.newest, 0]  # all of it belongs to the stage of the newest expert
    return RoutingSummary(
        groups=(name,),
        cuts=cuts,
        rows_GSBE=F.pad(rows_BE.view(1, bins, experts), [0, 0, *before]).view(
            1, stages, bins, experts
        ),
        sums_GSB3=F.pad(sums_B3[None], [0, 0, *before]).view(1, stages, bins, 3),
        margins_GSH=F.pad(margins_H[None], before).view(1, stages, MARGIN_BINS),
    )


def _bins(
    values: Tensor | Sequence[Tensor] | None,
    cuts: tuple[float, ...],
    name: str,
    group: GroupRecord,
    forward: int,
) -> Tensor | None:
    """The bin of every row of one forward, int64 ``[T]``."""
    if values is None:
        return None
    every = [values] * len(group.routings) if isinstance(values, Tensor) else list(values)
    if len(every) != len(group.routings):
        raise ConfigError(
            f"{name!r} saw {len(group.routings)} forwards, but there are values for {len(every)}"
        )
    shape, value = group.routings[forward].expert.shape, every[forward]
    if value.shape != shape[:1]:
        raise ConfigError(
            f"{name!r} routed {list(shape)}, so it needs {shape[0]} values, a number per sample; "
            f"got {list(value.shape)}"
        )
    bin_B = torch.zeros_like(value, dtype=torch.int64)
    for cut in cuts:  # by Python numbers, since a tensor of cuts would have to travel to the device
        bin_B = bin_B + (value >= cut)
    per_sample = group.routings[forward].expert.numel() // max(shape[0], 1)
    return bin_B.repeat_interleave(per_sample).to(group.routings[forward].expert.device)


def _joined(parts: Sequence[Tensor], places: Sequence[Sequence[int]]) -> Tensor:
    """The sum of tensors ``[G, S, ...]``, each group at its place, other axes filled with zeros."""
    shape = [max(sizes) for sizes in zip(*(part.shape for part in parts), strict=True)]
    shape[0] = 1 + max(place for taken in places for place in taken)
    total = parts[0].new_zeros(shape)
    for part, taken in zip(parts, places, strict=True):
        window = tuple(slice(size) for size in part.shape[1:])
        # by Python numbers, since an index tensor would have to travel to the device first
        for row, place in zip(part.to(total), taken, strict=True):
            total[place][window] += row
    return total


def _over(sums_GSBX: Tensor, by: By) -> Tensor:
    """The sum over all axes but the last and the one that is asked for."""
    axes = {"group": (1, 2), "stage": (0, 2), "bin": (0, 1), None: (0, 1, 2)}
    if by not in axes:
        raise ConfigError(f'by is "group", "stage", "bin" or None; got {by!r}')
    return sums_GSBX.sum(axes[by])
