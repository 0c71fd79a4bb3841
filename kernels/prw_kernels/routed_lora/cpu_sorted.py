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
        given: whether the units came sorted, so that no row has to move.
    """

    def __init__(self, order_U: Tensor, back_U: Tensor, ends_E: Tensor) -> None:
        self.order_U, self.back_U, self.ends_E = order_U, back_U, ends_E
        # tolist, not item: on a CPU there is nothing to wait for, and no operator is recorded.
        self.given = bool((order_U == torch.arange(len(order_U))).all().tolist())
        ends: list[int] = ends_E.tolist()
        spans = enumerate(zip([0, *ends[:-1]], ends, strict=True))
        self.spans = [(e, start, stop) for e, (start, stop) in spans if stop > start]

    @classmethod
    def of(cls, expert_U: Tensor, experts: int) -> Segments:
        """Sort the units by expert."""
        sorted_U, order_U = torch.sort(expert_U, stable=True)
        back_U = torch.empty_like(order_U).scatter_(0, order_U, torch.arange(len(order_U)))
        return cls(order_U, back_U, torch.searchsorted(sorted_U, torch.arange(1, experts + 1)))

    def rows(self, length: int) -> list[tuple[int, slice]]:
        """Per expert that was chosen its sorted rows, `length` of them in a unit."""
        return [(e, slice(start * length, stop * length)) for e, start, stop in self.spans]

    def gathered(
        self, given_ULD: Tensor, experts: Collection[int]
    ) -> Iterator[tuple[int, slice, Tensor]]:
        """The same with these rows ``[S, D]``, which are overwritten by those of the next.

        Only for the given experts.
        """
        units, length, width = given_ULD.shape
        given_UV, buffer_UV = given_ULD.view(units, -1), None
        spans = [span for span in self.spans if span[0] in experts]
        if not self.given and spans:
            longest = max(stop - start for _, start, stop in spans)
            buffer_UV = given_UV.new_empty(longest, length * width)
        for e, start, stop in spans:
            part_UV = given_UV[start:stop]
            if buffer_UV is not None:
                place = buffer_UV[: stop - start]
                part_UV = torch.index_select(given_UV, 0, self.order_U[start:stop], out=place)
            yield e, slice(start * length, stop * length), part_UV.view(-1, width)

    def blank(
        self, factors: list[list[Tensor]], needs: list[list[bool]]
    ) -> list[list[Tensor | None]]:
        """Room for the gradients that are wanted; zeros for an expert nobody chose."""
        chosen = {e for e, _, _ in self.spans}
        return [
            [
                (torch.empty_like if e in chosen else torch.zeros_like)(factor) if need else None
                for e, (factor, need) in enumerate(zip(factors_p, needs_p, strict=True))
            ]
            for factors_p, needs_p in zip(factors, needs, strict=True)
        ]

    def give_back(self, sorted_ULD: Tensor, given_ULD: Tensor) -> None:
        """Write units from their sorted places to the given order."""
        if sorted_ULD is not given_ULD:
            units = len(given_ULD)
            given_UV, sorted_UV = given_ULD.view(units, -1), sorted_ULD.view(units, -1)
            torch.index_select(sorted_UV, 0, self.back_U, out=given_UV)


def forward(problem: Problem, deltas: list[Tensor]) -> list[Tensor]:
    """Fill the residuals ``[U, L, O_p]``; returns what `backward` needs besides the problem."""
    experts = range(len(problem.A[0]))
    segments, h = Segments.of(problem.expert_U, len(experts)), _rank_sized(problem)
    for e, rows, x_SD in segments.gathered(problem.x_ULD, experts):
        for h_NR, A_p in zip(h, problem.A, strict=True):
            torch.mm(x_SD, A_p[e].T, out=h_NR[rows, : len(A_p[e])])
    for p, (delta_ULO, B_p) in enumerate(zip(deltas, problem.B, strict=True)):
        wh_NR = weighted(h[p], problem.weight(p).index_select(0, segments.order_U))
        sorted_ULO = delta_ULO if segments.given else torch.empty_like(delta_ULO)
        sorted_NO = sorted_ULO.flatten(0, 1)
        for e, rows in segments.rows(problem.x_ULD.shape[1]):
            torch.mm(wh_NR[rows, : B_p[e].shape[1]], B_p[e].T, out=sorted_NO[rows])
        segments.give_back(sorted_ULO, delta_ULO)
    return [segments.order_U, segments.back_U, segments.ends_E, *h]


def saved_like(x: Tensor, expert: Tensor, A: list[list[Tensor]]) -> list[Tensor]:
    """Empty tensors shaped like what `forward` returns."""
    indices = [expert.new_empty(size) for size in (expert.numel(), expert.numel(), len(A[0]))]
    rows = x.shape[:-1].numel()
    return indices + [x.new_empty(rows, max(len(A_RD) for A_RD in A_p)) for A_p in A]


def backward(problem: Problem, dy: list[Tensor], saved: list[Tensor], needs: Needs) -> Grads:
    """With ``w = scaling * gate`` and ``s = B^T dy``: ``dx = A^T (w s)``, ``dA = (w s) x^T``,
    ``dB = dy (w h)^T`` and ``d_gate = scaling <s, h>``."""
    segments, h = Segments(*saved[:3]), saved[3:]
    weights = [problem.weight(p).index_select(0, segments.order_U) for p in range(len(dy))]
    s, d_B = _through_B(problem, segments, dy, list(map(weighted, h, weights)), needs)
    d_gate = None
    if needs.gate:
        for p, (s_NR, h_NR) in enumerate(zip(s, h, strict=True)):
            sums_U = (s_NR * h_NR).view(len(weights[p]), -1).sum(1)
            part_U = sums_U.index_select(0, segments.back_U) * problem.scale(p)
            d_gate = part_U if d_gate is None else d_gate + part_U
    ws = list(map(weighted, s, weights))
    dx = _to_x(problem, segments, ws) if needs.x else None
    return dx, d_gate, _to_A(problem, segments, ws, needs), d_B


def _through_B(
    problem: Problem, segments: Segments, dy: list[Tensor], wh: list[Tensor], needs: Needs
) -> tuple[list[Tensor], list[list[Tensor | None]]]:
    """``s`` in sorted places, and the gradients of B from the same gathered rows."""
    s, grads = _rank_sized(problem), segments.blank(problem.B, needs.B)
    for p, (dy_ULO, B_p) in enumerate(zip(dy, problem.B, strict=True)):
        for e, rows, dy_SO in segments.gathered(dy_ULO, range(len(B_p))):
            ranks, grad = slice(B_p[e].shape[1]), grads[p][e]
            torch.mm(dy_SO, B_p[e], out=s[p][rows, ranks])
            if grad is not None:
                torch.mm(dy_SO.T, wh[p][rows, ranks], out=grad)
    return s, grads


def _to_x(problem: Problem, segments: Segments, ws: list[Tensor]) -> Tensor:
    """The gradient of x, in the given order."""
    sorted_ULD = torch.empty_like(problem.x_ULD)
    sorted_ND = sorted_ULD.flatten(0, 1)
    for e, rows in segments.rows(problem.x_ULD.shape[1]):
        for p, A_p in enumerate(problem.A):
            ws_SR, dx_SD = ws[p][rows, : len(A_p[e])], sorted_ND[rows]
            torch.addmm(dx_SD, ws_SR, A_p[e], beta=min(p, 1), out=dx_SD)
    dx_ULD = sorted_ULD if segments.given else torch.empty_like(sorted_ULD)
    segments.give_back(sorted_ULD, dx_ULD)
    return dx_ULD


def _to_A(
    problem: Problem, segments: Segments, ws: list[Tensor], needs: Needs
) -> list[list[Tensor | None]]:
    """The gradients of A; rows are gathered only for experts that learn."""
    grads = segments.blank(problem.A, needs.A)
    experts = [e for e in range(len(problem.A[0])) if any(needs_p[e] for needs_p in needs.A)]
    for e, rows, x_SD in segments.gathered(problem.x_ULD, experts):
        for ws_NR, grads_p in zip(ws, grads, strict=True):
            grad = grads_p[e]
            if grad is not None:
                torch.mm(ws_NR[rows, : len(grad)].T, x_SD, out=grad)
    return grads


def _rank_sized(problem: Problem) -> list[Tensor]:
    """Per projection ``[N, R]``; zeros where experts have fewer ranks than R."""
    rows, made = problem.x_ULD.shape[:2].numel(), []
    for A_p in problem.A:
        ranks = {len(A_RD) for A_RD in A_p}
        make = problem.x_ULD.new_empty if len(ranks) == 1 else problem.x_ULD.new_zeros
        made.append(make(rows, max(ranks)))
    return made
