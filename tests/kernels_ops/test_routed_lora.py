"""Routed LoRA: every implementation is the formula, forward and every gradient, at odd sizes."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from prw_kernels import routed_lora

# Sums of at most a few hundred products in fp64, in two orders: far below 1e-11.
EXACT = {"rtol": 1e-11, "atol": 1e-11}


class Case:
    """Inputs of the operator in fp64, every tensor a leaf that wants a gradient."""

    def __init__(
        self,
        leading: tuple[int, ...],
        *,
        experts: int = 3,
        rank: int = 3,
        per_sample: bool = False,
        only: int | None = None,
        outs: tuple[int, ...] = (7, 4),
    ) -> None:
        width = 5
        self.x = self.leaf(*leading, width)
        self.results = [self.leaf(*leading, out) for out in outs]
        self.A = [[self.leaf(rank, width) for _ in range(experts)] for _ in outs]
        self.B = [[self.leaf(out, rank) for _ in range(experts)] for out in outs]
        self.scaling = [[2.0] * experts for _ in self.A]
        shape = leading[:1] if per_sample else leading
        self.expert = torch.randint(0, experts, shape) if only is None else torch.full(shape, only)
        self.gate = torch.rand(shape, dtype=torch.float64).requires_grad_()

    @staticmethod
    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64).requires_grad_()

    @property
    def leaves(self) -> list[Tensor]:
        factors = itertools.chain(*self.A, *self.B)
        return [self.x, self.gate, *self.results, *factors]

    def run(self, backend: str = "auto") -> tuple[Tensor, ...]:
        return routed_lora(
            self.results,
            self.x,
            self.A,
            self.B,
            self.scaling,
            self.expert,
            self.gate,
            backend=backend,  # type: ignore[arg-type]
        )

    def formula(self) -> tuple[Tensor, ...]:
        """Token by token, as the equation reads."""
        lead = self.x.shape[:-1]
        wide = (1,) * (len(lead) - self.expert.dim())
        expert = self.expert.reshape(*self.expert.shape, *wide).expand(lead).reshape(-1)
        gate = self.gate.reshape(*self.gate.shape, *wide).expand(lead).reshape(-1)
        tokens = self.x.reshape(-1, self.x.shape[-1])
        outputs = []
        for result, A_p, B_p, scaling_p in zip(
            self.results, self.A, self.B, self.scaling, strict=True
        ):
            rows = [
                B_p[e] @ (A_p[e] @ token) * scaling_p[e] * g
                for token, e, g in zip(tokens, expert.tolist(), gate, strict=True)
            ]
            delta = torch.stack(rows).reshape(result.shape) if rows else torch.zeros_like(result)
            outputs.append(result + delta)
        return tuple(outputs)

    def gradients(self, outputs: tuple[Tensor, ...], *, absent: bool = False) -> list[Tensor]:
        """Of a weighted sum, by every leaf; `absent` lets the formula leave some leaves out."""
        generator = torch.Generator().manual_seed(1)
        loss = torch.zeros((), dtype=torch.float64)
        for y in outputs:
            weights = torch.rand(y.shape, generator=generator, dtype=torch.float64)
            loss = loss + (y * weights.to(y.dtype)).sum()
        return list(torch.autograd.grad(loss, self.leaves, materialize_grads=absent))


def assert_same_gradients(
    case: Case, outputs: tuple[Tensor, ...], expected: tuple[Tensor, ...]
) -> None:
    """Fails too when the operator leaves a leaf without any gradient."""
    torch.testing.assert_close(
        case.gradients(outputs), case.gradients(expected, absent=True), **EXACT
    )


LEADING = [(0,), (1,), (63,), (2, 0), (0, 3), (1, 1), (3, 21), (2, 3, 4)]


@pytest.mark.parametrize("leading", LEADING, ids=str)
@pytest.mark.parametrize("per_sample", [False, True], ids=["token", "sample"])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_forward_and_all_gradients_are_the_formula(
    leading: tuple[int, ...], per_sample: bool, backend: str
) -> None:
    case = Case(leading, per_sample=per_sample)
    outputs, expected = case.run(backend), case.formula()
    torch.testing.assert_close(outputs, expected, **EXACT)
    assert_same_gradients(case, outputs, expected)


@pytest.mark.parametrize("rank", [1, 3, 24])
@pytest.mark.parametrize("per_sample", [False, True], ids=["token", "sample"])
def test_any_rank(rank: int, per_sample: bool) -> None:
    case = Case((3, 7), rank=rank, per_sample=per_sample, experts=2)
    outputs, expected = case.run(), case.formula()
    torch.testing.assert_close(outputs, expected, **EXACT)
    assert_same_gradients(case, outputs, expected)


@pytest.mark.parametrize("only", [0, 2])
@pytest.mark.parametrize("per_sample", [False, True], ids=["token", "sample"])
def test_an_expert_without_tokens_gets_gradients_of_zeros(only: int, per_sample: bool) -> None:
    case = Case((3, 5), only=only, per_sample=per_sample)
    gradients = dict(zip(map(id, case.leaves), case.gradients(case.run()), strict=True))
    for A_p, B_p in zip(case.A, case.B, strict=True):
        for e in range(3):
            used = [bool(gradients[id(factor)].any()) for factor in (A_p[e], B_p[e])]
            assert used == [e == only] * 2


@pytest.mark.parametrize("per_sample", [False, True], ids=["token", "sample"])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_gradcheck(per_sample: bool, backend: str) -> None:
    case = Case((3, 2), per_sample=per_sample, rank=2, outs=(3, 2))
    # gradcheck perturbs the leaves in place, so they reach the operator through the case.
    assert torch.autograd.gradcheck(lambda *_: case.run(backend), case.leaves)


@pytest.mark.parametrize("per_sample", [False, True], ids=["token", "sample"])
def test_strides_do_not_matter(per_sample: bool) -> None:
    case = Case((4, 3, 5), per_sample=per_sample)
    plain = case.run()
    case.x = case.x.detach().permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0).requires_grad_()
    assert not case.x.is_contiguous()
    torch.testing.assert_close(case.run(), plain, **EXACT)


@pytest.mark.parametrize("per_sample", [False, True], ids=["token", "sample"])
def test_expanded_inputs_and_incoming_gradients(per_sample: bool) -> None:
    case = Case((4, 6), per_sample=per_sample)
    case.x = torch.randn(1, 1, 5, dtype=torch.float64).expand(4, 6, 5)
    outputs, expected = case.run(), case.formula()
    torch.testing.assert_close(outputs, expected, **EXACT)
    factor = case.A[0][0]
    found, wanted = (torch.autograd.grad(y[0].sum(), factor)[0] for y in (outputs, expected))
    torch.testing.assert_close(found, wanted, **EXACT)


# With a gate, which is fp32, a bf16 residual is promoted and so rounded once less than in PEFT.
@pytest.mark.parametrize(
    ("dtype", "gate"), [(torch.float32, None), (torch.float32, 1.0), (torch.bfloat16, None)]
)
def test_one_expert_has_the_bits_of_a_plain_lora(dtype: torch.dtype, gate: float | None) -> None:
    x, result = torch.randn(3, 7, 16).to(dtype), torch.randn(3, 7, 12).to(dtype)
    A, B = torch.randn(4, 16).to(dtype), torch.randn(12, 4).to(dtype)
    weights = None if gate is None else torch.full((3,), gate)
    (found,) = routed_lora([result], x, [[A]], [[B]], [[1.7]], gate=weights)
    assert torch.equal(found, result + F.linear(F.linear(x, A), B) * 1.7)


def test_experts_may_differ_in_rank_and_scaling() -> None:
    case = Case((3, 5), per_sample=True)
    case.A[0][1], case.B[0][1] = case.leaf(1, 5), case.leaf(7, 1)
    case.A[1][1], case.B[1][1] = case.leaf(1, 5), case.leaf(4, 1)
    case.scaling[0][2] = 0.5
    case.scaling[1][1] = 3.0
    outputs, expected = case.run(), case.formula()
    torch.testing.assert_close(outputs, expected, **EXACT)
    assert_same_gradients(case, outputs, expected)


@pytest.mark.parametrize("per_sample", [False, True], ids=["token", "sample"])
def test_other_experts_change_no_bit_whatever_they_hold(per_sample: bool) -> None:
    case = Case((4, 6), per_sample=per_sample, only=1)
    before = case.run()
    with torch.no_grad():
        for factor in (case.A[0][0], case.B[1][2]):
            factor.fill_(torch.nan)
    for found, wanted in zip(case.run(), before, strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("per_sample", [False, True], ids=["token", "sample"])
def test_frozen_factors_get_no_gradient(per_sample: bool) -> None:
    case = Case((4, 6), per_sample=per_sample)
    for factors in (*case.A, *case.B):
        factors[0].requires_grad_(False)
    sum(y.sum() for y in case.run()).backward()  # type: ignore[union-attr]
    for factors in (*case.A, *case.B):
        assert factors[0].grad is None
        assert all(factor.grad is not None for factor in factors[1:])


@pytest.mark.parametrize("per_sample", [False, True], ids=["token", "sample"])
def test_outputs_keep_their_dtype_and_autocast_is_off_inside(per_sample: bool) -> None:
    case = Case((4, 6), per_sample=per_sample)
    case.results = [result.detach().bfloat16() for result in case.results]
    plain = case.run()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = case.run()
    for found, wanted in zip(cast, plain, strict=True):
        assert found.dtype == torch.bfloat16
        assert torch.equal(found, wanted)


class Sorted(Case):
    """The same in fp32 with widths that the sorted products take; the truth stays in fp64."""

    def __init__(self, leading: tuple[int, ...], **options: object) -> None:
        super().__init__(leading, outs=(8, 12), **options)  # type: ignore[arg-type]
        self.x = self.leaf(*leading, 16)
        self.A = [[self.leaf(A.shape[0], 16) for A in A_p] for A_p in self.A]

    def lowered(self, dtype: torch.dtype) -> Sorted:
        """Itself with every leaf rounded to another dtype."""
        twin = copy.copy(self)
        low = {id(leaf): leaf.detach().to(dtype).requires_grad_() for leaf in self.leaves}
        twin.x, twin.gate = low[id(self.x)], low[id(self.gate)]
        twin.results = [low[id(r)] for r in self.results]
        twin.A, twin.B = ([[low[id(f)] for f in row] for row in side] for side in (self.A, self.B))
        return twin


@pytest.mark.parametrize("only", [None, 0, 2])
@pytest.mark.parametrize("leading", [(1,), (63,), (3, 21), (2, 3, 4)], ids=str)
def test_sorted_rows_are_the_formula(leading: tuple[int, ...], only: int | None) -> None:
    case = Sorted(leading, rank=4, only=only)
    low = case.lowered(torch.float32)

    outputs, expected = low.run("auto"), case.formula()
    # fp32 sums of at most 63 products of normal numbers: 63 * 2**-24 of values below a thousand.
    close = {"rtol": 1e-4, "atol": 1e-4, "check_dtype": False}
    torch.testing.assert_close(outputs, expected, **close)
    torch.testing.assert_close(
        low.gradients(outputs), case.gradients(expected, absent=True), **close
    )


def test_sorted_rows_keep_to_their_expert_and_to_shapes_that_fit() -> None:
    case = Sorted((4, 6), rank=4, only=1).lowered(torch.float32)
    before = case.run()
    with torch.no_grad():
        for factor in (case.A[0][0], case.B[1][2]):
            factor.fill_(torch.nan)
    assert all(map(torch.equal, case.run(), before))
    case.A[0][0].requires_grad_(False)
    sum(y.sum() for y in case.run()).backward()  # type: ignore[union-attr]
    assert case.A[0][0].grad is None
    for leading, rank in (((0,), 4), ((4, 6), 3)):
        other = Sorted(leading, rank=rank).lowered(torch.float32)

        assert [y.shape for y in other.run()] == [r.shape for r in other.results]


def test_mistakes_are_named() -> None:
    case = Case((3, 5))
    with pytest.raises(ValueError, match="at least one expert"):
        routed_lora(case.results, case.x, [[], []], [[], []], [])
    with pytest.raises(ValueError, match="has 3 experts: say which"):
        routed_lora(case.results, case.x, case.A, case.B, case.scaling)
    with pytest.raises(ValueError, match=r"expert has shape \(5,\).*input \(3, 5, 5\)"):
        routed_lora(case.results, case.x, case.A, case.B, case.scaling, torch.zeros(5).long())
    with pytest.raises(ValueError, match="gate has shape"):
        routed_lora(
            case.results, case.x, case.A, case.B, case.scaling, case.expert, torch.ones(3, 5, 1)
        )
