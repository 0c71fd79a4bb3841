"""The noisy top-1 router: one pair of columns per expert, growing without changing old bits.

Shape suffixes: T routed rows (tokens, or samples), D in_features, N experts that take part,
C columns after padding to whole blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BLOCK = 16
"""Columns per matrix product. A product of another width gives other bits, so it never varies."""


@dataclass(frozen=True)
class Routing:
    """The result of routing: who was chosen, with what weight.

    Attributes:
        expert: int64, ``[..., tokens]`` or, per sample, ``[samples]``.
        gate: weight of the chosen expert, fp32, shaped like ``expert``.
        probs: probabilities of the experts that took part, fp32, ``[*expert.shape, N]``.
    """

    expert: Tensor
    gate: Tensor
    probs: Tensor


class Router(nn.Module):
    """Router columns, one parameter per expert, and their snapshots at the end of each stage.

    Args:
        in_features: D, the width of the routed input.
        noise: whether each expert also has a column for the width of its noise.
    """

    def __init__(self, in_features: int, *, noise: bool) -> None:
        super().__init__()
        self.in_features = in_features
        self.noisy = noise
        self.signal = nn.ParameterList()
        self.noise = nn.ParameterList()
        self.register_buffer("anchor", torch.empty(0), persistent=False)
        self.snapshots = nn.ModuleDict()

    anchor: Tensor
    """Remembers device and dtype while there is no column yet."""

    def grow(self) -> None:
        """Append a zero column: the new expert starts with logit 0 for every input."""
        zeros = self.anchor.new_zeros(self.in_features)
        self.signal.append(nn.Parameter(zeros))
        if self.noisy:
            self.noise.append(nn.Parameter(zeros.clone()))

    def truncate(self, count: int) -> None:
        """Drop all columns and snapshots from index `count` on."""
        self.signal = nn.ParameterList(list(self.signal)[:count])
        self.noise = nn.ParameterList(list(self.noise)[:count])
        for key in [key for key in self.snapshots if int(key) >= count]:
            del self.snapshots[key]

    def take_snapshot(self, stage: int) -> None:
        """Keep the columns 0..stage as they are now."""
        self.put_snapshot(stage, *self.state(stage + 1))

    def put_snapshot(self, stage: int, signal_ND: Tensor, noise_ND: Tensor) -> None:
        """Keep the given columns as those of the end of `stage`."""
        self.snapshots[str(stage)] = Snapshot(signal_ND, noise_ND)

    def state(self, count: int) -> tuple[Tensor, Tensor]:
        """Copies of the first `count` live columns: signal ``[N, D]``, noise ``[N or 0, D]``."""
        return self._copy(self.signal, count), self._copy(self.noise, count)

    def snapshot(self, stage: int) -> tuple[Tensor, Tensor] | None:
        """The columns as they were at the end of `stage`; None when it was never closed."""
        kept = self.snapshots[str(stage)] if str(stage) in self.snapshots else None
        return (kept.signal, kept.noise) if isinstance(kept, Snapshot) else None

    @torch.no_grad()
    def restore(self, stage: int) -> None:
        """Write the snapshot of `stage` back into the live columns."""
        kept = self.snapshot(stage)
        if kept is not None:
            for columns, values in zip((self.signal, self.noise), kept, strict=True):
                for column, value in zip(columns, values, strict=False):
                    column.copy_(value)

    def _copy(self, columns: nn.ParameterList, count: int) -> Tensor:
        rows = [column.detach() for column in columns][:count]
        return torch.stack(rows) if rows else self.anchor.new_zeros(0, self.in_features)


class Snapshot(nn.Module):
    """Frozen router columns of one stage: buffers, so that they follow device moves."""

    signal: Tensor
    noise: Tensor

    def __init__(self, signal_ND: Tensor, noise_ND: Tensor) -> None:
        super().__init__()
        self.register_buffer("signal", signal_ND.detach().clone(), persistent=False)
        self.register_buffer("noise", noise_ND.detach().clone(), persistent=False)


def router_input(x: Tensor, granularity: str, mask: Tensor | None) -> Tensor:
    """What the router reads, in fp32 (fp64 for fp64 inputs): each token, or each sample's mean.

    Args:
        x: ``[..., D]``.
        granularity: ``"token"`` or ``"sample"``.
        mask: bool ``x.shape[:-1]``; per sample only these tokens enter the mean.

    Returns:
        ``[T, D]`` with T the number of tokens or of samples (``x.shape[0]``).
    """
    h = x.to(torch.promote_types(x.dtype, torch.float32))
    if granularity == "token" or x.dim() == 2:
        return h.reshape(-1, x.shape[-1])
    if mask is None:
        return h.flatten(1, -2).mean(1)
    kept = mask.unsqueeze(-1)
    total = torch.where(kept, h, 0.0).flatten(1, -2).sum(1)
    return total / kept.flatten(1).sum(1, keepdim=True).clamp(min=1)


def column_product(h_TD: Tensor, columns: Sequence[Tensor]) -> Tensor:
    """``h W`` in products of exactly 16 columns, the last block padded with zeros: ``[T, C]``."""
    padding = [h_TD.new_zeros(h_TD.shape[1])] * (-len(columns) % BLOCK)
    weight_CD = torch.stack([*(column.to(h_TD.dtype) for column in columns), *padding])
    return torch.cat([F.linear(h_TD, block) for block in weight_CD.split(BLOCK)], dim=-1)


def noisy_top1(
    h_TD: Tensor, signal: Sequence[Tensor], noise: Sequence[Tensor], eps_TN: Tensor | None
) -> Routing:
    """Noisy top-1 routing (CoLoGen, arXiv 2602.22150, Eq. 2-4).

    ``w = h W_r + eps * softplus(h W_n)``, ``p = softmax(w)`` over the experts that take part,
    ``e = argmax w`` (a tie goes to the lowest index), ``gate = p_e``, not renormalised.

    Args:
        h_TD: router input, fp32 or fp64.
        signal: the N columns of W_r, ``[D]`` each.
        noise: the N columns of W_n; not read without ``eps_TN``.
        eps_TN: standard normal noise, None in deterministic calls.

    Returns:
        Routing with ``expert`` and ``gate`` ``[T]`` and ``probs`` ``[T, N]``.
    """
    count = len(signal)
    logits_TC = column_product(h_TD, signal)
    if eps_TN is not None:
        spread_TC = F.softplus(column_product(h_TD, noise))
        padded_TC = F.pad(eps_TN.to(h_TD.dtype), (0, logits_TC.shape[1] - count))
        logits_TC = logits_TC + padded_TC * spread_TC
    locked_C = torch.arange(logits_TC.shape[1], device=h_TD.device) >= count
    logits_TC = logits_TC.masked_fill(locked_C, -torch.inf)
    probs_TC = torch.softmax(logits_TC, dim=-1)
    expert_T = logits_TC.detach().argmax(dim=-1)
    gate_T = probs_TC.gather(1, expert_T[:, None]).squeeze(1)
    return Routing(expert_T, gate_T, probs_TC[:, :count])
