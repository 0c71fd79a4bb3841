"""Units sorted by expert, then one product per expert on rows that lie side by side.

Rows are gathered one expert at a time into the same scratch memory, which stays in cache. Each
factor is used where it is: nothing is stacked, so ranks, scalings and alignment may be any.

Shape suffixes: U units, L rows of a unit, N all rows, S rows of one expert, E experts, D input
width, O output width, R largest rank of a projection.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch
from torch import Tensor

from prw_kernels.routed_lora.cpu_problem import Grads, Needs, Problem, weighted


class Segments:
    """Where the units of each expert are once they are sorted.

    Attributes:
        order_U: the unit at each sorted place, stable.
        back_U: the sorted place of each unit.
        ends_E: where the places of each expert end.
        counts: how many units chose each expert.
        chosen: the experts that were chosen.
        given: whether the units came sorted, so that no row has to move.
    """

    def __init__(self, order_U: Tensor, back_U: Tensor, ends_E: Tensor) -> None:
        self.order_U, self.back_U, self.ends_E = order_U, back_U, ends_E
        # tolist, not item: on a CPU there is nothing to wait for, and no operator is recorded.
        self.given = _is_identity(order_U)
        ends: list[int] = ends_E.tolist()
        self.counts = [stop - start for start, stop in zip([0, *ends[:-1]], ends, strict=True)]
        self.chosen = [e for e, count in enumerate(self.counts) if count]

    @classmethod
    def of(cls, expert_U: Tensor, experts: int) -> Segments:
        """Sort the units by expert."""
        sorted_U, order_U = torch.sort(expert_U, stable=True)
        back_U = torch.empty_like(order_U).scatter_(0, order_U, torch.arange(order_U.shape[0]))
        return cls(order_U, back_U, torch.searchsorted(sorted_U, torch.arange(1, experts + 1)))

    def parts(self, sorted_NW: Tensor) -> tuple[Tensor, ...]:
        """The rows of each expert, of rows in sorted places."""
        length = sorted_NW.shape[0] // self.order_U.shape[0]
        parts: tuple[Tensor, ...] = sorted_NW.split([count * length for count in self.counts])
        return parts

    def gathered(self, given_ULD: Tensor, experts: Collection[int]) -> Iterator[tuple[int, Tensor]]:
        """The rows ``[S, D]`` of each chosen one of `experts`, of units in the given order.

        They are overwritten by those of the next expert.
        """
        width, wanted = given_ULD.shape[-1], [e for e in self.chosen if e in experts]
        if self.given or not wanted:
            parts = self.parts(given_ULD.view(-1, width))
            yield from ((e, parts[e]) for e in wanted)
            return
        given_UV, units = given_ULD.view(given_ULD.shape[0], -1), self.order_U.split(self.counts)
        buffer_UV = given_UV.new_empty(max(self.counts[e] for e in wanted), given_UV.shape[1])
        for e in wanted:
            rows_UV = buffer_UV[: self.counts[e]]
            torch.index_select(given_UV, 0, units[e], out=rows_UV)
            yield e, rows_UV if given_ULD.shape[1] == 1 else rows_UV.view(-1, width)

    def give_back(self, sorted_ULD: Tensor, given_ULD: Tensor) -> None:
        """Write units from their sorted places to the given order."""
        if sorted_ULD is not given_ULD:
            units = given_ULD.shape[0]
            given_UV, sorted_UV = given_ULD.view(units, -1), sorted_ULD.view(units, -1)
            torch.index_select(sorted_UV, 0, self.back_U, out=given_UV)

    def unchosen(self, like: list[Tensor], needs: list[bool]) -> list[Tensor | None]:
        """Gradients of zeros for experts that learn and that nobody chose."""
        return [
            x.new_zeros(x.shape) if need and not count else None
            for x, need, count in zip(like, needs, self.counts, strict=True)
        ]


def forward(problem: Problem, deltas: list[Tensor]) -> list[Tensor]:
    """Fill the residuals ``[U, L, O_p]``; returns what `backward` needs besides the problem."""
    experts = range(len(problem.A[0]))
    segments, h = Segments.of(problem.expert_U, len(experts)), _rank_sized(problem)
    h_parts = list(map(segments.parts, h))
    for e, x_SD in segments.gathered(problem.x_ULD, experts):
        for h_p, A_p in zip(h_parts, problem.A, strict=True):
            torch.mm(x_SD, A_p[e].T, out=_first(h_p[e], A_p[e].shape[0]))
    for p, (delta_ULO, B_p) in enumerate(zip(deltas, problem.B, strict=True)):
        wh = segments.parts(weighted(h[p], problem.weight(p).index_select(0, segments.order_U)))
        sorted_ULO = delta_ULO if segments.given else torch.empty_like(delta_ULO)
        sorted_NO = segments.parts(sorted_ULO.view(-1, B_p[0].shape[0]))
        for e in segments.chosen:
            torch.mm(_first(wh[e], B_p[e].shape[1]), B_p[e].T, out=sorted_NO[e])
        segments.give_back(sorted_ULO, delta_ULO)
    return [segments.order_U, segments.back_U, segments.ends_E, *h]


def saved_like(x: Tensor, expert: Tensor, A: list[list[Tensor]]) -> list[Tensor]:
    """Empty tensors shaped like what `forward` returns."""
    indices = [
        torch.empty(size, dtype=torch.int64) for size in (expert.numel(), expert.numel(), len(A[0]))
    ]
    rows = x.shape[:-1].numel()
    return indices + [x.new_empty(rows, max(A_RD.shape[0] for A_RD in A_p)) for A_p in A]


def backward(problem: Problem, dy: list[Tensor], saved: list[Tensor], needs: Needs) -> Grads:
    """With ``w = scaling * gate`` and ``s = B^T dy``: ``dx = A^T (w s)``, ``dA = (w s) x^T``,
    ``dB = dy (w h)^T`` and ``d_gate = scaling <s, h>``."""
    segments, h = Segments(*saved[:3]), saved[3:]
    weights = [problem.weight(p).index_select(0, segments.order_U) for p in range(len(dy))]
    s, d_B = _through_B(problem, segments, dy, list(map(weighted, h, weights)), needs)
    d_gate = None
    if needs.gate:
        for p, (s_NR, h_NR) in enumerate(zip(s, h, strict=True)):
            sums_U = (s_NR * h_NR).view(weights[p].shape[0], -1).sum(1)
            part_U = sums_U.index_select(0, segments.back_U) * problem.scale(p)
            d_gate = part_U if d_gate is None else d_gate + part_U
    ws = [segments.parts(weighted(s_NR, weight)) for s_NR, weight in zip(s, weights, strict=True)]
    dx = _to_x(problem, segments, ws) if needs.x else None
    return dx, d_gate, _to_A(problem, segments, ws, needs), d_B


def _through_B(
    problem: Problem, segments: Segments, dy: list[Tensor], wh: list[Tensor], needs: Needs
) -> tuple[list[Tensor], list[list[Tensor | None]]]:
    """``s`` in sorted places, and the gradients of B from the same gathered rows."""
    s, grads = _rank_sized(problem), []
    for p, (dy_ULO, B_p) in enumerate(zip(dy, problem.B, strict=True)):
        turned = segments.unchosen([B_OR.T for B_OR in B_p], needs.B[p])
        s_p, wh_p = segments.parts(s[p]), segments.parts(wh[p])
        for e, dy_SO in segments.gathered(dy_ULO, range(len(B_p))):
            rank = B_p[e].shape[1]
            torch.mm(dy_SO, B_p[e], out=_first(s_p[e], rank))
            if needs.B[p][e]:  # dy^T wh is up to five times slower
                turned[e] = _first(wh_p[e], rank).T @ dy_SO
        grads.append([None if grad_RO is None else grad_RO.T for grad_RO in turned])
    return s, grads


def _to_x(problem: Problem, segments: Segments, ws: list[tuple[Tensor, ...]]) -> Tensor:
    """The gradient of x, in the given order."""
    sorted_ULD = torch.empty_like(problem.x_ULD)
    parts = segments.parts(sorted_ULD.view(-1, sorted_ULD.shape[-1]))
    for e in segments.chosen:
        for p, A_p in enumerate(problem.A):
            ws_SR = _first(ws[p][e], A_p[e].shape[0])
            if p == 0:
                torch.mm(ws_SR, A_p[e], out=parts[e])
            else:
                parts[e].addmm_(ws_SR, A_p[e])
    dx_ULD = sorted_ULD if segments.given else torch.empty_like(sorted_ULD)
    segments.give_back(sorted_ULD, dx_ULD)
    return dx_ULD


def _to_A(
    problem: Problem, segments: Segments, ws: list[tuple[Tensor, ...]], needs: Needs
) -> list[list[Tensor | None]]:
    """The gradients of A; rows are gathered only for experts that learn."""
    grads = list(map(segments.unchosen, problem.A, needs.A))
    learning = [e for e in range(len(problem.A[0])) if any(needs_p[e] for needs_p in needs.A)]
    for e, x_SD in segments.gathered(problem.x_ULD, learning):
        for p, A_p in enumerate(problem.A):
            if needs.A[p][e]:
                grads[p][e] = _first(ws[p][e], A_p[e].shape[0]).T @ x_SD
    return grads


def _is_identity(order_U: Tensor) -> bool:
    """Whether ``order[u] = u``; two places are enough to say no to most others."""
    last = order_U.shape[0] - 1
    if [*order_U[:1].tolist(), *order_U[last:].tolist()] != [0, last]:
        return False
    return bool((order_U == torch.arange(last + 1)).all().tolist())


def _first(rows_SR: Tensor, rank: int) -> Tensor:
    """The columns that an expert of this rank has."""
    return rows_SR if rows_SR.shape[1] == rank else rows_SR[:, :rank]


def _rank_sized(problem: Problem) -> list[Tensor]:
    """Per projection ``[N, R]``; zeros where experts have fewer ranks than R."""
    rows, made = problem.x_ULD.shape[:2].numel(), []
    for A_p in problem.A:
        ranks = {A_RD.shape[0] for A_RD in A_p}
        make = problem.x_ULD.new_empty if len(ranks) == 1 else problem.x_ULD.new_zeros
        made.append(make(rows, max(ranks)))
    return made
