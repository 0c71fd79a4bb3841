"""Routed LoRA's Triton kernels in Triton's interpreter, against the reference in fp64.

`test_triton_routed_lora.py` runs this file in a process of its own: ``TRITON_INTERPRET`` must be
set before triton is imported, and is for a whole process. fp32 and fp16 only: the interpreter
computes bf16 wrongly.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from prw.testing import check_backend
from prw.testing.backends import BackendCase, Given
from prw_kernels import routed_linear, routed_lora
from prw_kernels.routed_lora import launch, tiled_op
from prw_kernels.routed_lora.tiled import tiled

op = partial(routed_lora, backend="triton")
fold = partial(routed_linear, backend="triton")

CASES = {
    "one-token": BackendCase((1,), ranks=(1,), width=48, sizes=(64,)),
    "two-projections": BackendCase((37,), ranks=(24,) * 5, width=48, sizes=(64, 96)),
    "one-expert-for-all": BackendCase(
        (100,), ranks=(16,) * 5, width=96, choice="last", sizes=(48,)
    ),
    "no-gate": BackendCase((100,), ranks=(8,) * 2, width=64, sizes=(48, 48), gated=False),
    "samples": BackendCase((3, 21), ranks=(8,) * 5, width=64, sizes=(96,), per_sample=True),
    "unlike": BackendCase((2, 3, 4), ranks=(3, 24), width=5, sizes=(7, 4), alike=False),
}


def tolerance(dtype: torch.dtype) -> dict[str, float]:
    """Of sums of up to 100 products of normal numbers, each result up to a few hundred.

    fp32: 100 roundings of 2**-24. fp16: h, the weighted h and s are rounded to 2**-11 each, in sums
    whose terms are up to ten times the sum.
    """
    return {"rtol": 2e-5, "atol": 2e-4} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 0.3}


def close(found: Tensor | None, wanted: Tensor | None, dtype: torch.dtype) -> None:
    assert found is not None
    exact = torch.zeros_like(found) if wanted is None else wanted.to(found.dtype)
    torch.testing.assert_close(found, exact, **tolerance(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("name", CASES)
def test_outputs_and_every_gradient_are_the_formula(name: str, dtype: torch.dtype) -> None:
    given = BackendCase(**{**vars(CASES[name]), "dtype": dtype}).begin()
    twin, wanted = given.truth()
    outputs = given.run(op)
    for found, exact in zip(outputs, wanted, strict=True):
        close(found, exact, dtype)
    gradients = twin.gradients(wanted)
    for leaf, found in given.gradients(outputs).items():
        close(found, gradients[leaf], dtype)


class Linear:
    """The arguments of `routed_linear`, with frozen weights."""

    def __init__(self, case: BackendCase, *, bias: tuple[bool, ...]) -> None:
        self.given = case.begin()
        size = case.width**-0.5
        self.weights = [(torch.randn(out, case.width) * size).to(case.dtype) for out in case.sizes]
        self.biases = [
            torch.randn(out).to(case.dtype) if b else None
            for out, b in zip(case.sizes, bias, strict=True)
        ]

    def run(self, op: Callable[..., tuple[Tensor, ...]] = fold) -> tuple[Tensor, ...]:
        g = self.given
        return op(g.x, self.weights, self.biases, g.A, g.B, g.scaling, g.expert, g.gate)

    def truth(self) -> tuple[Given, tuple[Tensor, ...]]:
        twin, _ = self.given.truth()
        exact = [
            F.linear(twin.x, W.double(), None if b is None else b.double())
            for W, b in zip(self.weights, self.biases, strict=True)
        ]
        deltas = routed_lora(
            exact, twin.x, twin.A, twin.B, twin.scaling, twin.expert, twin.gate, backend="reference"
        )
        return twin, deltas


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize(
    ("name", "bias"),
    [("two-projections", (True, True)), ("no-gate", (False, False)), ("unlike", (True, False))],
)
def test_folded_into_the_base(name: str, bias: tuple[bool, ...], dtype: torch.dtype) -> None:
    linear = Linear(BackendCase(**{**vars(CASES[name]), "dtype": dtype}), bias=bias)
    twin, wanted = linear.truth()
    outputs = linear.run()
    for found, exact in zip(outputs, wanted, strict=True):
        close(found, exact, dtype)
    gradients = twin.gradients(wanted)
    for leaf, found in linear.given.gradients(outputs).items():
        if not leaf.startswith("results"):
            close(found, gradients[leaf], dtype)


def nodes(output: Tensor) -> set[str]:
    """The names of all autograd nodes an output comes from."""
    found, open_ = set(), [output.grad_fn]
    while open_:
        node = open_.pop()
        if node is not None and node not in found:
            found.add(node)
            open_ += [parent for parent, _ in node.next_functions]
    return {node.name() for node in found}


def test_weights_that_are_not_plain_take_their_own_product() -> None:
    case = CASES["no-gate"]
    folded = Linear(case, bias=(False, False))
    own = Linear(case, bias=(False, False))
    own.weights = [W.clone().requires_grad_() for W in folded.weights]
    strided = Linear(case, bias=(False, False))
    strided.weights = [W.t().contiguous().t() for W in folded.weights]
    outputs = folded.run()
    assert not any("Mm" in name or "Addmm" in name for name in nodes(outputs[0]))
    for other in (own, strided):
        found = other.run()
        assert any("Mm" in name or "Addmm" in name for name in nodes(found[0]))
        torch.testing.assert_close(found, outputs, **tolerance(torch.float32))
    with torch.no_grad():
        assert all(map(torch.equal, own.run(), folded.run()))
    assert torch.autograd.grad(own.run()[0].sum(), own.weights[0])[0].any()


def test_no_tokens() -> None:
    case = BackendCase((0,), ranks=(8, 8), width=48, sizes=(64,))
    given = case.begin()
    assert [y.shape for y in given.run(op)] == [(0, 64)]
    assert all(gradient is not None for gradient in given.gradients(given.run(op)).values())
    assert [y.shape for y in Linear(case, bias=(True,)).run()] == [(0, 64)]


def test_the_promises_of_a_backend() -> None:
    check_backend(op, dtypes=(torch.float32,), examples=4)


def test_two_runs_have_the_same_bits_also_when_sums_are_split(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = CASES["two-projections"].begin()
    twin, wanted = given.truth()
    exact = twin.gradients(wanted)
    monkeypatch.setattr(launch, "parts", lambda programs, tokens: 3)
    first, second = given.run(op), given.run(op)
    assert all(map(torch.equal, first, second))
    once, again = given.gradients(first), given.gradients(second)
    for leaf, gradient in once.items():
        assert gradient is not None and torch.equal(gradient, again[leaf])  # type: ignore[arg-type]
        close(gradient, exact[leaf], torch.float32)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_an_expert_nobody_chose_changes_no_bit(value: float) -> None:
    case = BackendCase((37,), ranks=(8,) * 3, width=48, sizes=(64, 48), choice="first")
    clean, dirty = case.begin(), case.begin()
    with torch.no_grad():
        for factors in (*dirty.A, *dirty.B):
            factors[1].fill_(value)
    wanted, found = clean.run(op), dirty.run(op)
    assert all(map(torch.equal, found, wanted))
    gradients = dirty.gradients(found)
    for leaf, gradient in clean.gradients(wanted).items():
        assert torch.equal(gradients[leaf], gradient)  # type: ignore[arg-type]


def test_a_token_that_is_not_finite_stays_with_its_expert() -> None:
    given = BackendCase((37,), ranks=(8,) * 3, width=48, sizes=(64,)).begin()
    given.expert[0], given.expert[1:] = 0, torch.arange(36) % 2 + 1
    with torch.no_grad():
        given.x[0].fill_(torch.nan)
    (y,) = given.run(op)
    assert y[0].isnan().all() and y[1:].isfinite().all()
    gradients = given.gradients((y,))
    assert all(gradients[f"A[0][{e}]"].isfinite().all() for e in (1, 2))  # type: ignore[union-attr]


def test_only_experts_that_learn_get_gradients() -> None:
    given = BackendCase((37,), ranks=(8,) * 4, width=48, sizes=(64, 48)).begin()
    for factors in (*given.A, *given.B):
        factors[1].requires_grad_(False)
    given.A[0][3].requires_grad_(False)
    sum(y.sum() for y in given.run(op)).backward()  # type: ignore[union-attr]
    everyone = (*given.A, *given.B)
    assert all(factors[1].grad is None for factors in everyone)
    assert given.A[0][3].grad is None and given.B[0][3].grad is not None
    assert all(factors[e].grad is not None for factors in everyone for e in (0, 2))


def test_runs_of_experts() -> None:
    assert list(launch.runs([True, True, False, True])) == [(0, 2), (3, 1)]
    assert list(launch.runs([False, False])) == []


def test_one_output_alone_is_enough() -> None:
    given = CASES["two-projections"].begin()
    twin, wanted = given.truth()
    found = torch.autograd.grad(given.run(op)[1].sum(), given.x)[0]
    close(found, torch.autograd.grad(wanted[1].sum(), twin.x)[0], torch.float32)


def test_outputs_keep_the_dtype_of_their_results_and_autocast_is_off_inside() -> None:
    given = CASES["no-gate"].begin()
    plain = given.run(op)
    with torch.autocast("cpu", dtype=torch.float16):
        assert all(map(torch.equal, given.run(op), plain))
    half = [result.detach().half() for result in given.results]
    (y, _) = op(half, given.x, given.A, given.B, given.scaling, given.expert, given.gate)
    assert y.dtype == torch.float16


def test_recomputing_and_compiling_change_no_bit() -> None:
    given = CASES["samples"].begin()
    target = [given.leaves()[leaf] for leaf in ("x", "gate", "A[0][0]", "B[0][4]")]
    wanted = given.run(op)
    gradients = torch.autograd.grad(wanted[0].sum(), target)
    again = checkpoint(partial(given.run, op), use_reentrant=False)
    compiled = torch.compile(op, backend="aot_eager", fullgraph=True)
    for found in (again, given.run(compiled)):
        assert torch.equal(found[0], wanted[0])
        assert all(map(torch.equal, torch.autograd.grad(found[0].sum(), target), gradients))


def test_the_operator_is_registered_as_torch_wants() -> None:
    given = BackendCase((21,), ranks=(8,) * 2, width=48, sizes=(64, 48)).begin()
    factors = [f for row in given.A for f in row], [f for row in given.B for f in row]
    arguments = (given.x, *factors, given.results, [], [], given.expert, given.gate, 2.0)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(tiled_op.routed_lora_op, arguments, test_utils=checks)


@pytest.mark.parametrize("folded", [False, True], ids=["results", "weights"])
def test_what_is_kept_for_the_backward_is_small(
    folded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FLUX's keys and values at rank 128: 6144 B of x, 512 B of h, and the routing per token."""
    monkeypatch.setattr(tiled_op, "block_for", lambda x, rank: 128)
    tokens, width, rank, experts = 4096, 3072, 128, 5
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    with FakeTensorMode():
        half = partial(torch.empty, dtype=torch.float16)
        x = half(tokens, width, requires_grad=True)
        A = [[half(rank, width, requires_grad=True) for _ in range(experts)] for _ in range(2)]
        B = [[half(width, rank, requires_grad=True) for _ in range(experts)] for _ in range(2)]
        bases = [half(width, width) if folded else half(tokens, width) for _ in range(2)]
        expert, gate = torch.zeros(tokens, dtype=torch.long), torch.ones(tokens, requires_grad=True)
        mine: dict[str, Any] = {"weights" if folded else "results": bases}
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            outputs = tiled(x, A, B, [[2.0] * experts] * 2, expert, gate, **mine)
        frozen = [*(bases if folded else []), *(f for row in (*A, *B) for f in row)]
        for parameter in frozen:
            kept.pop(parameter.untyped_storage()._cdata)
        assert [y.shape for y in outputs] == [(tokens, width)] * 2
    assert width * 2 + 2 * rank * 2 <= sum(kept.values()) / tokens <= 7000


def test_mistakes_are_named() -> None:
    given = BackendCase((5,), ranks=(4, 4), width=6, sizes=(8,)).begin()
    results, x, A, B, scaling, expert, gate = vars(given).values()

    def refuse(match: str, *arguments: Any) -> None:
        with pytest.raises(ValueError, match=match):
            op(*arguments)

    half = [[f.bfloat16() for f in row] for row in A], [[f.bfloat16() for f in row] for row in B]
    refuse("interpreter computes torch.bfloat16 wrongly", results, x, *half, scaling, expert, gate)
    refuse(
        "interpreter computes torch.bfloat16 wrongly",
        *([y.bfloat16() for y in results], x, A, B, scaling, expert, gate),
    )
    double = [[f.double() for f in row] for row in A], [[f.double() for f in row] for row in B]
    refuse("the factors are torch.float64", results, x, *double, scaling, expert, gate)
    refuse("give all in one dtype", results, x, A, half[1], scaling, expert, gate)
    refuse(r"A\[0\]\[1\] is \(4, 5\)", results, x, [[A[0][0], A[0][1][:, :5]]], B, scaling, expert)
    refuse(r"B\[0\]\[1\] \(7, 4\)", results, x, A, [[B[0][0], B[0][1][:7]]], scaling, expert)
    refuse(r"results\[0\] is \(4, 8\), expected", [results[0][:4]], x, A, B, scaling, expert)
    refuse("index 2 is outside the pool", results, x, A, B, scaling, expert * 0 + 2, gate)
    refuse("give int64 indices", results, x, A, B, scaling, expert.float(), gate)
    refuse("another argument on meta", results, x, A, B, scaling, expert.to("meta"), gate)
    with pytest.raises(ValueError, match=r"weights\[0\] is \(8, 5\)"):
        fold(x, [torch.zeros(8, 5)], [None], A, B, scaling, expert)
