"""Every row meets every expert in one product, and what is not its own is masked.

For small ranks in bf16: there the products cost less than sorting and moving rows.

Shape suffixes: U units, L rows of a unit, N all rows, D input width, O output width, Q the ranks of
all experts of a projection side by side.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from prw_kernels.routed_lora.cpu_problem import Grads, Needs, Problem, weighted


def forward(problem: Problem, deltas: list[Tensor]) -> list[Tensor]:
    """Fill the residuals ``[U, L, O_p]``; returns what `backward` needs besides the problem."""
    saved = []
    for p, (A_p, B_p) in enumerate(zip(problem.A, problem.B, strict=True)):
        h_NQ = _own(problem, p, problem.x_ULD.flatten(0, 1) @ torch.cat(A_p).T)
        wh_NQ = weighted(h_NQ, problem.weight(p))
        _product(problem, p, wh_NQ, torch.cat(B_p, dim=1).T, deltas[p].flatten(0, 1))
        saved.append(h_NQ)
    return saved


def saved_like(x: Tensor, expert: Tensor, A: list[list[Tensor]]) -> list[Tensor]:
    """Empty tensors shaped like what `forward` returns."""
    rows = x.shape[:-1].numel()
    return [x.new_empty(rows, sum(A_RD.shape[0] for A_RD in A_p)) for A_p in A]


def backward(problem: Problem, dy: list[Tensor], saved: list[Tensor], needs: Needs) -> Grads:
    """The derivatives as in `prw_kernels.routed_lora.cpu_sorted.backward`."""
    x_ND = problem.x_ULD.flatten(0, 1)
    dx_ND, d_gate = None, None
    d_A: list[list[Tensor | None]] = []
    d_B: list[list[Tensor | None]] = []
    for p, (dy_ULO, h_NQ) in enumerate(zip(dy, saved, strict=True)):
        dy_NO, weight_U = dy_ULO.flatten(0, 1), problem.weight(p)
        s_NQ = _own(problem, p, dy_NO @ torch.cat(problem.B[p], dim=1))
        ws_NQ = weighted(s_NQ, weight_U)
        if needs.x:
            part_ND = _product(problem, p, ws_NQ, torch.cat(problem.A[p]), torch.empty_like(x_ND))
            dx_ND = part_ND if dx_ND is None else dx_ND.add_(part_ND)
        if needs.gate:
            part_U = (s_NQ * h_NQ).view(weight_U.shape[0], -1).sum(1) * problem.scale(p)
            d_gate = part_U if d_gate is None else d_gate + part_U
        d_A.append(_pieces(problem, p, ws_NQ, x_ND, needs.A[p]))
        turned = _pieces(problem, p, weighted(h_NQ, weight_U), dy_NO, needs.B[p])
        d_B.append([None if piece is None else piece.T for piece in turned])
    return dx_ND, d_gate, d_A, d_B


def _ranks(problem: Problem, p: int) -> list[int]:
    return [A_RD.shape[0] for A_RD in problem.A[p]]


def _own(problem: Problem, p: int, rows_NQ: Tensor) -> Tensor:
    """Zeros in the columns of experts that a row did not choose, whatever was there."""
    owner_Q = torch.tensor([e for e, rank in enumerate(_ranks(problem, p)) for _ in range(rank)])
    mine_U1Q = (problem.expert_U[:, None] == owner_Q)[:, None]
    rows_ULQ = rows_NQ.view(problem.expert_U.shape[0], -1, owner_Q.shape[0])
    return torch.where(mine_U1Q, rows_ULQ, 0.0).view(rows_NQ.shape)


def _product(problem: Problem, p: int, own_NQ: Tensor, factor_QW: Tensor, out_NW: Tensor) -> Tensor:
    """``own @ factor``; a factor with NaN or infinity reaches only the rows that chose it."""
    total: float = factor_QW.sum().tolist()  # type: ignore[assignment]
    if math.isfinite(total):
        return torch.mm(own_NQ, factor_QW, out=out_NW)
    ranks = _ranks(problem, p)
    length = own_NQ.shape[0] // problem.expert_U.shape[0]
    expert_N1 = problem.expert_U.repeat_interleave(length)[:, None]
    parts = zip(own_NQ.split(ranks, dim=1), factor_QW.split(ranks), strict=True)
    for e, (own_NR, factor_RW) in enumerate(parts):
        torch.where(expert_N1 == e, own_NR @ factor_RW, out_NW, out=out_NW)
    return out_NW


def _pieces(
    problem: Problem, p: int, own_NQ: Tensor, rows_NW: Tensor, needs: list[bool]
) -> list[Tensor | None]:
    """``own^T rows`` of the experts that learn, ``[R_e, W]`` each, in one product."""
    found: list[Tensor | None] = [None for _ in needs]
    learning = [e for e, need in enumerate(needs) if need]
    if not learning:
        return found
    ranks = _ranks(problem, p)
    first, last = learning[0], learning[-1] + 1
    columns = slice(sum(ranks[:first]), sum(ranks[:last]))
    blocks = (own_NQ[:, columns].T @ rows_NW).split(ranks[first:last])
    for e, block_RW in enumerate(blocks, first):
        if needs[e]:
            found[e] = block_RW.clone()
    return found
