"""The noisy top-1 router: one pair of columns per expert, growing without changing old bits.

Shape suffixes: T routed rows (tokens, or samples), D input width, E experts that take part,
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
        gate: weight of the chosen expert, shaped like ``expert``; fp32 (fp64 for fp64 inputs).
        probs: probabilities of the experts that took part, ``[*expert.shape, E]``, typed alike.
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

    anchor: Tensor
    """Carries device and dtype while there is no column yet."""

    def __init__(self, in_features: int, *, noise: bool) -> None:
        super().__init__()
        self.in_features = in_features
        self.noisy = noise
        self.signal = nn.ParameterList()
        self.noise = nn.ParameterList()
        self.snapshots = nn.ModuleDict()
        self.register_buffer("anchor", torch.empty(0), persistent=False)

    def grow(self) -> None:
        """Append a zero column: the new expert starts with logit 0 for every input."""
        self.signal.append(nn.Parameter(self.anchor.new_zeros(self.in_features)))
        if self.noisy:
            self.noise.append(nn.Parameter(self.anchor.new_zeros(self.in_features)))

    def truncate(self, count: int) -> None:
        """Drop all columns and snapshots from index `count` on."""
        if count < len(self.signal):
            self.signal = nn.ParameterList(list(self.signal)[:count])
            self.noise = nn.ParameterList(list(self.noise)[:count])
            for key in [key for key in self.snapshots if int(key) >= count]:
                del self.snapshots[key]

    def columns(
        self, count: int, pinned: bool, learning: frozenset[int]
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """The first `count` signal and noise columns, detached unless they learn.

        Args:
            count: E.
            pinned: read the snapshot of stage `count` - 1 where there is one.
            learning: indices of the live columns that may learn.
        """
        kept = self.snapshot(count - 1) if pinned else None
        if kept is not None:
            return kept[0].unbind(), kept[1].unbind()
        signal, noise = (
            tuple(c if i in learning else c.detach() for i, c in enumerate(list(part)[:count]))
            for part in (self.signal, self.noise)
        )
        return signal, noise

    def pairs(self, indices: frozenset[int]) -> list[tuple[int, Tensor, Tensor | None]]:
        """Index, signal and noise parameter of the given columns."""
        noise = list(self.noise) or [None] * len(self.signal)
        return [(index, self.signal[index], noise[index]) for index in sorted(indices)]

    def state(self) -> tuple[Tensor, Tensor]:
        """Copies of the live columns: signal ``[E, D]`` and noise ``[E, D]``, or ``[0, D]``."""
        signal, noise = (
            torch.stack([c.detach() for c in part])
            if len(part)
            else self.anchor.new_zeros(0, self.in_features)
            for part in (self.signal, self.noise)
        )
        return signal, noise

    @torch.no_grad()
    def set_signal(self, signal_ED: Tensor) -> None:
        """Write values into the live signal columns, which stay the same parameters."""
        for column, value in zip(self.signal, signal_ED, strict=True):
            column.copy_(value)

    def put_state(self, signal_ED: Tensor, noise_ED: Tensor) -> None:
        """Replace the live columns by new parameters with the given values."""
        device = self.anchor.device
        for part, values in ((self.signal, signal_ED), (self.noise, noise_ED)):
            for index, value in enumerate(values):
                part[index] = nn.Parameter(value.to(device, copy=True))

    def snapshot(self, stage: int) -> tuple[Tensor, Tensor] | None:
        """The columns as they were at the end of `stage`; None while it was never closed."""
        kept = self.snapshots[str(stage)] if str(stage) in self.snapshots else None
        return (kept.signal, kept.noise) if isinstance(kept, Snapshot) else None

    def memory(self, stage: int) -> Tensor:
        """Inputs ``[M, D]`` that `stage` routed, from `remember`; M is 0 where nothing was kept."""
        kept = self.snapshots[str(stage)] if str(stage) in self.snapshots else None
        if isinstance(kept, Snapshot):
            return kept.memory
        return self.anchor.new_zeros(0, self.in_features)

    def remember(self, stage: int, memory_MD: Tensor) -> None:
        """Keep router inputs beside the snapshot of a closed stage, instead of earlier ones."""
        kept = self.snapshots[str(stage)]
        assert isinstance(kept, Snapshot)
        kept.memory = memory_MD.detach().to(self.anchor.device, copy=True)

    def take_snapshot(self, stage: int) -> None:
        """Keep the columns 0..stage as they are now."""
        signal_ED, noise_ED = self.state()
        self.put_snapshot(stage, signal_ED[: stage + 1], noise_ED[: stage + 1])

    def renew_snapshot(self, stage: int) -> None:
        """Replace the columns of a snapshot by the live ones; its memory stays."""
        memory_MD = self.memory(stage)
        self.take_snapshot(stage)
        self.remember(stage, memory_MD)

    def put_snapshot(self, stage: int, signal_ED: Tensor, noise_ED: Tensor) -> None:
        """Keep the given columns as those of the end of `stage`."""
        device = self.anchor.device
        self.snapshots[str(stage)] = Snapshot(signal_ED.to(device), noise_ED.to(device))

    @torch.no_grad()
    def restore(self, stage: int) -> None:
        """Write the snapshot of `stage` back into the live columns."""
        kept = self.snapshot(stage)
        if kept is not None:
            for part, values in zip((self.signal, self.noise), kept, strict=True):
                for column, value in zip(list(part)[: stage + 1], values, strict=True):
                    column.copy_(value)


class Snapshot(nn.Module):
    """Router columns of one stage and inputs it routed: buffers, so that they follow the model."""

    signal: Tensor
    noise: Tensor
    memory: Tensor

    def __init__(self, signal_ED: Tensor, noise_ED: Tensor) -> None:
        super().__init__()
        self.register_buffer("signal", signal_ED.detach().clone(), persistent=False)
        self.register_buffer("noise", noise_ED.detach().clone(), persistent=False)
        self.register_buffer("memory", signal_ED.new_empty(0, signal_ED.shape[1]), persistent=False)


def router_input(x: Tensor, granularity: str, mask: Tensor | None) -> Tensor:
    """What the router reads, in fp32 (fp64 for fp64 inputs): each token, or each sample's mean.

    Args:
        x: ``[..., D]``.
        granularity: ``"token"`` or ``"sample"``.
        mask: bool ``x.shape[:-1]``; per sample only these tokens enter the mean.

    Returns:
        ``[T, D]`` with T the number of tokens, or of samples (``x.shape[0]``).
    """
    h = x.to(torch.promote_types(x.dtype, torch.float32))
    if granularity == "token" or x.dim() == 2:
        return h.reshape(-1, x.shape[-1])
    h = h.flatten(1, -2)
    if mask is None:
        return h.sum(1) / max(h.shape[1], 1)
    kept = mask.flatten(1)
    return torch.where(kept[..., None], h, 0.0).sum(1) / kept.sum(1, keepdim=True).clamp(min=1)


def column_product(h_TD: Tensor, columns: Sequence[Tensor]) -> Tensor:
    """``h W`` in products of exactly 16 columns, the last block padded with zeros: ``[T, C]``."""
    padding = [h_TD.new_zeros(h_TD.shape[1])] * (-len(columns) % BLOCK)
    weight_CD = torch.stack([*(column.to(h_TD.dtype) for column in columns), *padding])
    blocks = [F.linear(h_TD, block) for block in torch.split(weight_CD, BLOCK)]
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=-1)


def noisy_top1(
    h_TD: Tensor, signal: Sequence[Tensor], noise: Sequence[Tensor], eps_TE: Tensor | None
) -> Routing:
    """Noisy top-1 routing (CoLoGen, arXiv 2602.22150, Eq. 2 to 4).

    ``w = h W_r + eps * softplus(h W_n)``, ``p = softmax(w)`` over the experts that take part,
    ``e = argmax w`` (a tie goes to the lowest index), ``gate = p_e``, not renormalised.

    Args:
        h_TD: router input, fp32 or fp64.
        signal: the E columns of W_r, ``[D]`` each.
        noise: the E columns of W_n; not read without ``eps_TE``.
        eps_TE: standard normal noise, None in deterministic calls.

    Returns:
        Routing with ``expert`` and ``gate`` ``[T]`` and ``probs`` ``[T, E]``.
    """
    count = len(signal)
    logits_TC = column_product(h_TD, signal)
    if eps_TE is not None:
        eps_TC = F.pad(eps_TE.to(h_TD.dtype), (0, logits_TC.shape[1] - count))
        logits_TC = logits_TC + eps_TC * F.softplus(column_product(h_TD, noise))
    locked_C = torch.arange(logits_TC.shape[1], device=h_TD.device) >= count
    logits_TC = logits_TC.masked_fill(locked_C, -torch.inf)
    probs_TC = torch.softmax(logits_TC, dim=-1)
    expert_T = logits_TC.detach().argmax(dim=-1)
    gate_T = probs_TC.gather(1, expert_T[:, None]).squeeze(1)
    return Routing(expert_T, gate_T, probs_TC[:, :count])
