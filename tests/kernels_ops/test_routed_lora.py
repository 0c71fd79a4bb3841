"""Routed LoRA: every implementation is the formula, forward and every gradient, at odd sizes."""

from __future__ import annotations

import copy
import itertools
import logging
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from prw_kernels import routed_linear, routed_lora
from prw_kernels.routed_lora import backends, cpu_concat
from prw_kernels.routed_lora import cpu as cpu_module
from prw_kernels.routed_lora import linear as linear_module
from prw_kernels.routed_lora.cpu import _way

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
@pytest.mark.parametrize("backend", ["cpu", "reference"])
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
@pytest.mark.parametrize("backend", ["cpu", "reference"])
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


class Aligned(Case):
    """Of any dtype, with experts of different ranks and scalings where asked; the truth is fp64."""

    def __init__(self, leading: tuple[int, ...], *, uneven: bool = False, **options: Any) -> None:
        super().__init__(leading, outs=(8, 12), **options)
        self.x = self.leaf(*leading, 16)
        ranks = [A.shape[0] + (e if uneven else 0) for e, A in enumerate(self.A[0])]
        self.A = [[self.leaf(rank, 16) for rank in ranks] for _ in self.A]
        self.B = [[self.leaf(out, rank) for rank in ranks] for out in (8, 12)]
        if uneven:
            self.scaling = [[0.5 * (p + e + 1) for e in range(len(ranks))] for p in range(2)]

    def lowered(self, dtype: torch.dtype) -> Aligned:
        """Itself with every leaf rounded to another dtype, but for the gate: that stays fp32."""
        twin = copy.copy(self)
        low = {id(leaf): leaf.detach().to(dtype).requires_grad_() for leaf in self.leaves}
        twin.gate = self.gate.detach().float().requires_grad_()
        twin.x = low[id(self.x)]
        twin.results = [low[id(r)] for r in self.results]
        twin.A, twin.B = ([[low[id(f)] for f in row] for row in side] for side in (self.A, self.B))
        return twin

    def assert_close_to(self, truth: Aligned, tolerance: float) -> None:
        outputs, expected = self.run("cpu"), truth.formula()
        found = [*outputs, *self.gradients(outputs)]
        wanted = [*expected, *truth.gradients(expected, absent=True)]
        for mine, theirs in zip(found, wanted, strict=True):
            scale = float(theirs.detach().abs().max().clamp(min=1))
            close = {"rtol": 0.0, "atol": tolerance * scale, "check_dtype": False}
            torch.testing.assert_close(mine, theirs, **close)  # type: ignore[arg-type]


SHAPES = [(1,), (63,), (3, 21), (2, 3, 4)]


@pytest.mark.parametrize("uneven", [False, True], ids=["alike", "uneven"])
@pytest.mark.parametrize("per_sample", [False, True], ids=["token", "sample"])
@pytest.mark.parametrize("only", [None, 0, 2])
@pytest.mark.parametrize("leading", SHAPES, ids=str)
def test_the_cpu_is_the_formula_in_fp32(
    leading: tuple[int, ...], only: int | None, per_sample: bool, uneven: bool
) -> None:
    case = Aligned(leading, rank=4, only=only, per_sample=per_sample, uneven=uneven)
    # fp32 sums of at most 63 products: some ten roundings of 2**-24, of values up to the largest.
    case.lowered(torch.float32).assert_close_to(case, 1e-5)


@pytest.mark.parametrize("uneven", [False, True], ids=["alike", "uneven"])
@pytest.mark.parametrize("per_sample", [False, True], ids=["token", "sample"])
@pytest.mark.parametrize("rank", [4, 24], ids=["concatenated", "sorted"])
def test_the_cpu_is_the_formula_in_bf16(rank: int, per_sample: bool, uneven: bool) -> None:
    case = Aligned((3, 21), rank=rank, per_sample=per_sample, uneven=uneven)
    low = case.lowered(torch.bfloat16)
    assert (_way(low.x, low.A) is cpu_concat) == (rank == 4)
    for leaf, rounded in zip(case.leaves, low.leaves, strict=True):
        leaf.data.copy_(rounded)  # the same numbers: only the computation is rounded
    # A few roundings of 2**-9 each, of values up to the largest.
    low.assert_close_to(case, 2e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [4, 24])
def test_the_cpu_keeps_to_the_expert_of_a_row(dtype: torch.dtype, rank: int) -> None:
    case = Aligned((4, 6), rank=rank, only=1).lowered(dtype)
    before = case.run("cpu")
    grads = case.gradients(before)
    with torch.no_grad():
        for factor in (case.A[0][0], case.B[1][2]):
            factor.fill_(torch.nan)
    after = case.run("cpu")
    assert all(map(torch.equal, after, before))
    assert all(map(torch.equal, case.gradients(after), grads))
    case.A[0][0].requires_grad_(False)
    sum(y.sum() for y in case.run("cpu")).backward()  # type: ignore[union-attr]
    assert case.A[0][0].grad is None


def test_units_that_came_sorted_give_the_same_bits() -> None:
    case = Aligned((40,), rank=4).lowered(torch.float32)
    case.expert = torch.arange(3).repeat_interleave(torch.tensor([7, 0, 33]))
    moved = copy.copy(case)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(3))
    stable = torch.cat([order[(order < 7).nonzero()[:, 0]].sort()[0], order[order >= 7].sort()[0]])
    assert torch.equal(stable, torch.arange(40))
    place = torch.empty_like(order).scatter_(0, (order >= 7).sort(stable=True)[1], torch.arange(40))
    moved.x, moved.expert, moved.gate = case.x[place], case.expert[place], case.gate[place]
    moved.results = [r[place] for r in case.results]
    for found, wanted in zip(moved.run("cpu"), case.run("cpu"), strict=True):
        assert torch.equal(found, wanted[place])


def test_auto_says_once_what_it_picked(caplog: pytest.LogCaptureFixture) -> None:
    backends._say.cache_clear()
    case = Case((3, 5))
    with caplog.at_level(logging.INFO, logger="prw_kernels"):
        case.run("auto")
        case.run("auto")
        case.run("reference")
    (message,) = caplog.messages
    assert "on cpu" in message and "picks 'cpu'" in message


def test_a_backend_that_cannot_is_named() -> None:
    case = Case((3, 5))
    with pytest.raises(ValueError, match="backend='rocket' is not available here; use 'auto'"):
        case.run("rocket")
    meta = torch.zeros(3, 5, device="meta")
    with pytest.raises(
        ValueError, match="backend='cpu' computes on a CPU and x is on meta.*'auto'"
    ):
        backends.choose("cpu", backends.Case(meta, [[meta, meta]], [[1.0, 1.0]], None))


def by_samples(case: Case) -> tuple[Tensor, ...]:
    """What "auto" takes for one choice per sample where there is no CPU and no Triton."""
    given = case.x, case.A, case.B, case.scaling, case.expert, case.gate
    deltas = backends.per_sample(*given)
    return tuple(map(torch.add, case.results, deltas))


def test_double_backward_is_refused_before_it_gives_zeros() -> None:
    case = Case((3, 5), per_sample=True)
    for outputs in (case.run("cpu"), by_samples(case)):
        loss = outputs[0].square().sum()
        with pytest.raises(RuntimeError, match="no second derivative; use backend='reference'"):
            torch.autograd.grad(loss, case.x, create_graph=True)
    (dx,) = torch.autograd.grad(case.run("reference")[0].square().sum(), case.x, create_graph=True)
    assert torch.autograd.grad(dx.sum(), case.x)[0].any()


@pytest.mark.parametrize("rank", [4, 24], ids=["concatenated", "sorted"])
def test_a_backward_pass_under_autocast_has_the_same_bits(rank: int) -> None:
    case = Aligned((4, 6), rank=rank, per_sample=True)
    for low in (case.lowered(torch.float32), case.lowered(torch.bfloat16)):
        for outputs in (low.run("cpu"), by_samples(low)):
            loss = sum(y.float().sum() for y in outputs)
            wanted = torch.autograd.grad(loss, low.leaves, retain_graph=True)  # type: ignore[arg-type]
            with torch.autocast("cpu", dtype=torch.bfloat16):
                found = torch.autograd.grad(loss, low.leaves)  # type: ignore[arg-type]
            assert all(map(torch.equal, found, wanted))


@pytest.mark.parametrize("per_sample", [False, True], ids=["token", "sample"])
def test_indices_of_32_bits_are_the_same(per_sample: bool) -> None:
    case = Case((3, 7), per_sample=per_sample)
    wanted = case.run("cpu")
    case.expert = case.expert.int()
    for backend in ("cpu", "reference"):
        torch.testing.assert_close(case.run(backend), wanted, **EXACT)


@pytest.mark.parametrize("wrong", [-1, 3])
def test_a_compiled_graph_looks_at_the_index_when_it_runs(wrong: int) -> None:
    case = Case((3, 5))
    compiled = torch.compile(case.run, backend="aot_eager", fullgraph=True)
    assert all(map(torch.equal, compiled("cpu"), case.run("cpu")))
    case.expert[1, 2] = wrong
    with pytest.raises(ValueError, match=f"index {wrong}; the pool has 0 to 2"):
        compiled("cpu")
    for y in compiled("reference"):  # nothing to look at there
        assert y[1, 2].isnan().all() and y.isnan().sum() == y.shape[-1]


@pytest.mark.parametrize(
    ("dtype", "rank", "per_sample"),
    [(torch.float64, 3, False), (torch.bfloat16, 4, True)],
    ids=["token-sorted", "sample-concatenated"],
)
def test_the_operators_are_registered_as_torch_wants(
    dtype: torch.dtype, rank: int, per_sample: bool
) -> None:
    case = Aligned((4, 5), rank=rank, per_sample=per_sample, uneven=True).lowered(dtype)
    given = [leaf.detach() for leaf in (case.x, case.gate)]
    factors = [f.detach() for side in (case.A, case.B) for row in side for f in row]
    scaling = [s for row in case.scaling for s in row]
    asked = given[0], case.expert, given[1], scaling, 2, factors
    torch.library.opcheck(cpu_module._forward_op, asked)
    outputs = cpu_module._forward_op(*asked)
    dy = [torch.ones_like(y) for y in outputs[:2]]
    needs = [bool(i % 3) for i in range(2 + len(factors))]
    asked = dy, given[0], case.expert, given[1], scaling, factors, outputs[2:], needs
    torch.library.opcheck(cpu_module._backward_op, asked)


def test_mistakes_are_named() -> None:
    def refused(match: str, **changed: Any) -> None:
        case = Case((3, 5))
        for name, value in changed.items():
            setattr(case, name, value)
        for backend in ("cpu", "reference", "auto"):
            with pytest.raises(ValueError, match=match):
                case.run(backend)

    case = Case((3, 5))
    refused("at least one expert", A=[[], []], B=[[], []], scaling=[[], []])
    refused("1 results, 2 projections in A, 2 in B and 2 in scaling", results=case.results[:1])
    refused("2 results, 1 projections in A", A=case.A[:1])
    refused("4 in B", B=case.B + case.B)
    refused("projection 1 has 3 A, 2 B and 3 scalings", B=[case.B[0], case.B[1][:2]])
    refused("has 3 experts: say which", expert=None)
    refused(r"expert has shape \(5,\).*input \(3, 5, 5\)", expert=torch.zeros(5).long())
    refused("gate has shape", gate=torch.ones(3, 5, 1))
    refused(r"gate has shape \(3,\) and expert \(3, 5\)", gate=torch.ones(3))
    refused("gate has dtype torch.complex64", gate=torch.ones(3, 5, dtype=torch.complex64))
    refused("gate is on meta and x on cpu", gate=torch.ones(3, 5, device="meta"))
    refused("expert is on meta and x on cpu", expert=case.expert.to("meta"))
    refused("expert has dtype torch.float64", expert=case.expert.double())
    refused("expert has dtype torch.int16", expert=case.expert.short())
    for wrong in (3, -1, 2**40):
        refused(f"index {wrong}; the pool has 0 to 2", expert=torch.full((3, 5), wrong))
    A = [row[:] for row in case.A]
    A[1][2] = case.leaf(3, 6)
    refused(r"A\[1\]\[2\] \(3, 6\) and B.*no pair from width 5 to 4", A=A)
    A[1][2] = case.leaf(3)
    refused(r"A\[1\]\[2\] \(3,\) and B.*no pair", A=A)
    B = [row[:] for row in case.B]
    B[0][1] = case.leaf(7)
    refused(r"B\[0\]\[1\] \(7,\) are no pair", B=B)
    B[0][1] = case.B[0][1].float()
    refused("one dtype and one device", B=B)
    low = (
        [[row[0], row[1].bfloat16(), row[2]] for row in case.A],
        [[row[0], row[1].bfloat16(), row[2]] for row in case.B],
    )
    refused("factors are of .*bfloat16.*float64.*one dtype", A=low[0], B=low[1])
    refused(r"results\[0\] has shape \(4, 5, 7\)", results=[case.leaf(4, 5, 7), case.results[1]])
    refused("on meta, which does not go", results=[r.to("meta") for r in case.results])


def test_mistakes_about_weights_are_named() -> None:
    case = Case((3, 5))
    rest = case.A, case.B, case.scaling, case.expert, case.gate
    wide, thin = case.leaf(7, 5), case.leaf(4, 5)
    with pytest.raises(ValueError, match="2 weights, 1 biases and 2 projections in A"):
        routed_linear(case.x, [wide, thin], [None], *rest)
    with pytest.raises(ValueError, match="0 weights, 0 biases and 0 projections"):
        routed_linear(case.x, [], [], [], [], [])
    with pytest.raises(ValueError, match=r"weights\[1\] is \(4, 3\).*width 5"):
        routed_linear(case.x, [wide, thin[:, :3]], [None, None], *rest)
    with pytest.raises(ValueError, match=r"biases\[0\] is \(4,\), expected \(7,\)"):
        routed_linear(case.x, [wide, thin], [thin[:, 0], None], *rest)
    with pytest.raises(ValueError, match="no pair from width 5 to 7"):
        routed_linear(case.x, [wide, wide], [None, None], *rest)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_cpu_a_linear_has_the_bits_of_its_base_plus_the_residual(dtype: torch.dtype) -> None:
    """So a hook on a layer, or PEFT's wrapper around it, which take the base apart, move no bit."""
    case = Aligned((3, 21), rank=4).lowered(dtype)
    weights = [torch.randn(size, 16, dtype=dtype) for size in (8, 12)]
    biases = [torch.randn(8, dtype=dtype), None]
    case.results = [F.linear(case.x, W, b) for W, b in zip(weights, biases, strict=True)]
    rest = case.A, case.B, case.scaling, case.expert, case.gate
    found = routed_linear(case.x, weights, biases, *rest)
    assert all(map(torch.equal, found, case.run("auto")))


def test_a_folded_linear_says_once_what_it_picked(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    backends._say.cache_clear()
    case, folded = Case((3, 5)), []
    monkeypatch.setattr(linear_module, "_folds", lambda *_: True)
    monkeypatch.setattr(linear_module, "tiled", lambda *given, **_: folded.append(given))
    weights = [torch.zeros(out, 5, dtype=torch.float64) for out in (7, 4)]
    with caplog.at_level(logging.INFO, logger="prw_kernels"):
        for _ in range(2):
            routed_linear(case.x, weights, [None] * 2, case.A, case.B, case.scaling, case.expert)
    assert len(folded) == 2 and len(caplog.messages) == 1


def test_a_nan_gate_reaches_its_token_only() -> None:
    case = Case((3, 5))
    with torch.no_grad():
        case.gate[1, 2] = torch.nan
    for y in case.run("cpu"):
        assert y[1, 2].isnan().all() and y.isnan().sum() == y.shape[-1]
