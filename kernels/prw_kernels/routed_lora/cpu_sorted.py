"""Units sorted by expert, then one product per expert on rows that lie side by side.

Rows are gathered one expert at a time into the same scratch memory, which stays in cache. Each
factor is used where it is: nothing is stacked, so ranks, scalings and alignment may be any.

In half precision oneDNN builds a kernel for every new number of rows, which takes ten times the
product itself, and routing makes new numbers all the time. So there each expert's rows are rounded
up to whole blocks: the rows of a block beyond its last are zeros, whose products the next expert's
rows overwrite. Sorted tensors have room for one such tail.

Shape suffixes: U units, L rows of a unit, N all rows, S rows of one expert, E experts, D input
width, O output width, R largest rank of a projection.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from prw_kernels.routed_lora.cpu_problem import Grads, Needs, Problem

BLOCK = 32
"""Rows per block in half precision."""


class Segments:
    """Where the units of each expert are once they are sorted.

    Attributes:
        order_U: the unit at each sorted place, stable.
        back_U: the sorted place of each unit.
        ends_E: where the places of each expert end.
        counts: how many units chose each expert.
        chosen: the experts that were chosen.
        given: whether the units came sorted, so that no row has to move.
        block: what the number of rows of an expert is rounded up to.
        tail: rows that sorted tensors have beyond the last.
    """

    def __init__(self, order_U: Tensor, back_U: Tensor, ends_E: Tensor, like_ULD: Tensor) -> None:
        self.order_U, self.back_U, self.ends_E = order_U, back_U, ends_E
        # tolist, not item: on a CPU there is nothing to wait for, and no operator is recorded.
        ends: list[int] = ends_E.tolist()
        self.counts = [stop - start for start, stop in zip([0, *ends[:-1]], ends, strict=True)]
        self.chosen = [e for e, count in enumerate(self.counts) if count]
        self.given = _is_identity(order_U)
        self.units, self.length = like_ULD.shape[:2]
        self.tail = _tail(like_ULD.dtype)
        self.block = 1 if self.given else self.tail + 1

    @classmethod
    def of(cls, expert_U: Tensor, experts: int, like_ULD: Tensor) -> Segments:
        """Sort the units by expert."""
        sorted_U, order_U = torch.sort(expert_U, stable=True)
        back_U = torch.empty_like(order_U).scatter_(0, order_U, torch.arange(order_U.shape[0]))
        ends_E = torch.searchsorted(sorted_U, torch.arange(1, experts + 1))
        return cls(order_U, back_U, ends_E, like_ULD)

    def room(self, like: Tensor, width: int, *, zeros: bool = False) -> Tensor:
        """A sorted tensor ``[N + tail, width]`` to be filled."""
        make = like.new_zeros if zeros else like.new_empty
        return make(self.units * self.length + self.tail, width)

    def padded(self, e: int) -> int:
        """The rows of an expert in whole blocks."""
        return -(-self.counts[e] * self.length // self.block) * self.block

    def parts(self, sorted_NW: Tensor) -> dict[int, Tensor]:
        """The rows of each chosen expert in whole blocks, of a sorted tensor, in this order."""
        start, found = 0, {}
        for e in self.chosen:
            found[e] = sorted_NW[start : start + self.padded(e)]
            start += self.counts[e] * self.length
        return found

    def gathered(self, given_ULD: Tensor, experts: Collection[int]) -> Iterator[tuple[int, Tensor]]:
        """The rows of each chosen one of `experts` in whole blocks, of units in the given order.

        They are overwritten by those of the next expert; what fills up a block is zero.
        """
        width, wanted = given_ULD.shape[-1], [e for e in self.chosen if e in experts]
        if self.given or not wanted:
            parts = self.parts(given_ULD.view(-1, width))
            yield from ((e, parts[e]) for e in wanted)
            return
        given_UV, units = given_ULD.view(self.units, -1), self.order_U.split(self.counts)
        buffer_SD = given_UV.new_empty(max(map(self.padded, wanted)), width)
        for e in wanted:
            rows = self.counts[e] * self.length
            room_SD = buffer_SD[:rows]
            if self.length > 1:
                room_SD = room_SD.view(self.counts[e], -1)
            torch.index_select(given_UV, 0, units[e], out=room_SD)
            if self.block > 1:
                buffer_SD[rows : self.padded(e)].zero_()
            yield e, buffer_SD[: self.padded(e)]

    def give_back(self, sorted_NW: Tensor, given_ULW: Tensor) -> None:
        """Write rows from their sorted places to the given order."""
        sorted_UV = sorted_NW[: self.units * self.length].view(self.units, -1)
        torch.index_select(sorted_UV, 0, self.back_U, out=given_ULW.view(self.units, -1))

    def weighted(self, sorted_NR: Tensor, weight_U: Tensor) -> Tensor:
        """Every row times the weight of its unit, given in sorted places; the tail times zero."""
        weight_N = weight_U if self.length == 1 else weight_U.repeat_interleave(self.length)
        if self.tail:
            weight_N = F.pad(weight_N, (0, self.tail))
        return (sorted_NR * weight_N[:, None]).to(sorted_NR.dtype)

    def summed(self, e: int, rows_SR: Tensor, rows_SW: Tensor) -> Tensor:
        """``rows_SR^T rows_SW`` over the rows of an expert, none of those that follow."""
        rows = self.counts[e] * self.length
        if rows < rows_SR.shape[0]:
            rows_SR = rows_SR.clone()
            rows_SR[rows:].zero_()
        return rows_SR.T @ rows_SW

    def unchosen(self, like: list[Tensor], needs: list[bool]) -> list[Tensor | None]:
        """Gradients of zeros for experts that learn and that nobody chose."""
        return [
            x.new_zeros(x.shape) if need and not count else None
            for x, need, count in zip(like, needs, self.counts, strict=True)
        ]


def forward(problem: Problem, deltas: list[Tensor]) -> list[Tensor]:
    """Fill the residuals ``[U, L, O_p]``; returns what `backward` needs besides the problem."""
    x_ULD, experts = problem.x_ULD, range(len(problem.A[0]))
    segments = Segments.of(problem.expert_U, len(experts), x_ULD)
    h = _rank_sized(problem, segments)
    h_parts = list(map(segments.parts, h))
    for e, x_SD in segments.gathered(x_ULD, experts):
        for h_p, A_p in zip(h_parts, problem.A, strict=True):
            torch.mm(x_SD, A_p[e].T, out=_first(h_p[e], A_p[e].shape[0]))
    for p, (delta_ULO, B_p) in enumerate(zip(deltas, problem.B, strict=True)):
        weight_U = problem.weight(p).index_select(0, segments.order_U)
        wh = segments.parts(segments.weighted(h[p], weight_U))
        out = B_p[0].shape[0]
        sorted_NO = delta_ULO.view(-1, out) if segments.given else segments.room(x_ULD, out)
        for e, delta_SO in segments.parts(sorted_NO).items():
            torch.mm(_first(wh[e], B_p[e].shape[1]), B_p[e].T, out=delta_SO)
        if not segments.given:
            segments.give_back(sorted_NO, delta_ULO)
    return [segments.order_U, segments.back_U, segments.ends_E, *h]


def saved_like(x: Tensor, expert: Tensor, A: list[list[Tensor]]) -> list[Tensor]:
    """Empty tensors shaped like what `forward` returns."""
    sizes = (expert.numel(), expert.numel(), len(A[0]))
    rows = x.shape[:-1].numel() + _tail(x.dtype)
    return [torch.empty(size, dtype=torch.int64, device=x.device) for size in sizes] + [
        x.new_empty(rows, max(A_RD.shape[0] for A_RD in A_p)) for A_p in A
    ]


def backward(problem: Problem, dy: list[Tensor], saved: list[Tensor], needs: Needs) -> Grads:
    """With ``w = scaling * gate`` and ``s = B^T dy``: ``dx = A^T (w s)``, ``dA = (w s) x^T``,
    ``dB = dy (w h)^T`` and ``d_gate = scaling <s, h>``."""
    segments = Segments(saved[0], saved[1], saved[2], problem.x_ULD)
    h, rows = saved[3:], segments.units * segments.length
    weights = [problem.weight(p).index_select(0, segments.order_U) for p in range(len(dy))]
    wh = list(map(segments.weighted, h, weights))
    s, d_B = _through_B(problem, segments, dy, wh, needs)
    d_gate = None
    if needs.gate:
        for p, (s_NR, h_NR) in enumerate(zip(s, h, strict=True)):
            sums_U = (s_NR[:rows] * h_NR[:rows]).view(segments.units, -1).sum(1)
            part_U = sums_U.index_select(0, segments.back_U) * problem.scale(p)
            d_gate = part_U if d_gate is None else d_gate + part_U
    ws = list(map(segments.parts, map(segments.weighted, s, weights)))
    dx = _to_x(problem, segments, ws) if needs.x else None
    return dx, d_gate, _to_A(problem, segments, ws, needs), d_B


def _through_B(
    problem: Problem, segments: Segments, dy: list[Tensor], wh: list[Tensor], needs: Needs
) -> tuple[list[Tensor], list[list[Tensor | None]]]:
    """``s`` in sorted places, and the gradients of B from the same gathered rows."""
    s, grads = _rank_sized(problem, segments), []
    for p, (dy_ULO, B_p) in enumerate(zip(dy, problem.B, strict=True)):
        turned = segments.unchosen([B_OR.T for B_OR in B_p], needs.B[p])
        s_p, wh_p = segments.parts(s[p]), segments.parts(wh[p])
        for e, dy_SO in segments.gathered(dy_ULO, range(len(B_p))):
            rank = B_p[e].shape[1]
            torch.mm(dy_SO, B_p[e], out=_first(s_p[e], rank))
            if needs.B[p][e]:  # dy^T wh is up to five times slower
                turned[e] = segments.summed(e, _first(wh_p[e], rank), dy_SO)
        grads.append([None if grad_RO is None else grad_RO.T for grad_RO in turned])
    return s, grads


def _to_x(problem: Problem, segments: Segments, ws: list[dict[int, Tensor]]) -> Tensor:
    """The gradient of x, in the given order."""
    dx_ULD = torch.empty_like(problem.x_ULD)
    width = dx_ULD.shape[-1]
    sorted_ND = dx_ULD.view(-1, width) if segments.given else segments.room(dx_ULD, width)
    for e, dx_SD in segments.parts(sorted_ND).items():
        for p, A_p in enumerate(problem.A):
            ws_SR = _first(ws[p][e], A_p[e].shape[0])
            if p == 0:
                torch.mm(ws_SR, A_p[e], out=dx_SD)
            else:
                dx_SD.addmm_(ws_SR, A_p[e])
    if not segments.given:
        segments.give_back(sorted_ND, dx_ULD)
    return dx_ULD


def _to_A(
    problem: Problem, segments: Segments, ws: list[dict[int, Tensor]], needs: Needs
) -> list[list[Tensor | None]]:
    """The gradients of A; rows are gathered only for experts that learn."""
    grads = list(map(segments.unchosen, problem.A, needs.A))
    learning = [e for e in range(len(problem.A[0])) if any(needs_p[e] for needs_p in needs.A)]
    for e, x_SD in segments.gathered(problem.x_ULD, learning):
        for p, A_p in enumerate(problem.A):
            if needs.A[p][e]:
                grads[p][e] = segments.summed(e, _first(ws[p][e], A_p[e].shape[0]), x_SD)
    return grads


def _tail(dtype: torch.dtype) -> int:
    return BLOCK - 1 if dtype.itemsize == 2 else 0


def _is_identity(order_U: Tensor) -> bool:
    """Whether ``order[u] = u``; two places are enough to say no to most others."""
    last = order_U.shape[0] - 1
    if [*order_U[:1].tolist(), *order_U[last:].tolist()] != [0, last]:
        return False
    return bool((order_U == torch.arange(last + 1)).all().tolist())


def _first(rows_SR: Tensor, rank: int) -> Tensor:
    """The columns that an expert of this rank has."""
    return rows_SR if rows_SR.shape[1] == rank else rows_SR[:, :rank]


def _rank_sized(problem: Problem, segments: Segments) -> list[Tensor]:
    """Per projection ``[N + tail, R]``; zeros where experts have fewer ranks than R."""
    made = []
    for A_p in problem.A:
        ranks = {A_RD.shape[0] for A_RD in A_p}
        made.append(segments.room(problem.x_ULD, max(ranks), zeros=len(ranks) > 1))
    return made
