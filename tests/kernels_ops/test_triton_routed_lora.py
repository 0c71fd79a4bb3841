"""Routed LoRA by Triton kernels: forward and every gradient against the reference in fp64.

The same checks are marked `interpreted`, for Triton's interpreter on a CPU in fp32 and fp16 (its
bf16 is wrong), and `gpu`, for a device, where bf16 is among the dtypes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
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
from prw_kernels.backend import installed
from prw_kernels.routed_lora import blocks, checks, tiled_op
from prw_kernels.routed_lora import tiled as tiled_module
from prw_kernels.routed_lora.tiled import tiled

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
interpreted = pytest.mark.interpreted
on_gpu = pytest.mark.gpu
places = pytest.mark.parametrize(
    ("device", "dtype"),
    [
        pytest.param("cpu", FP32, id="interpreter-fp32", marks=interpreted),
        pytest.param("cpu", FP16, id="interpreter-fp16", marks=interpreted),
        pytest.param("cuda", FP32, id="gpu-fp32", marks=on_gpu),
        pytest.param("cuda", FP16, id="gpu-fp16", marks=on_gpu),
        pytest.param("cuda", BF16, id="gpu-bf16", marks=on_gpu),
    ],
)
devices = pytest.mark.parametrize(
    "device",
    [
        pytest.param("cpu", id="interpreter", marks=interpreted),
        pytest.param("cuda", id="gpu", marks=on_gpu),
    ],
)


@pytest.fixture(params=["grouped", "dense"])
def order(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both orders of rows, whatever the sizes."""
    monkeypatch.setattr(blocks, "DENSE", 0 if request.param == "grouped" else 10**6)


both = pytest.mark.usefixtures("order")
op = partial(routed_lora, backend="triton")
fold = partial(routed_linear, backend="triton")

CASES = {
    "one-token": BackendCase((1,), ranks=(1, 1), width=48, sizes=(64,)),
    "one-expert": BackendCase((7,), ranks=(16,), width=48, sizes=(64,)),
    "two-projections": BackendCase((37,), ranks=(24,) * 3, width=48, sizes=(64, 96)),
    "one-for-all": BackendCase((100,), ranks=(16,) * 5, width=96, choice="last", sizes=(48,)),
    "no-gate": BackendCase((37,), ranks=(8,) * 2, width=64, sizes=(48, 48), gated=False),
    "samples": BackendCase((3, 11), ranks=(8,) * 5, width=64, sizes=(96,), per_sample=True),
    "unlike": BackendCase((2, 3, 4), ranks=(3, 24), width=5, sizes=(7, 4), alike=False),
}


def close(found: Tensor | None, wanted: Tensor | None, dtype: torch.dtype) -> None:
    """Equal up to roundings of the largest value, in the dtype of the factors.

    h, s and the result are rounded once each, and sums of n such terms lose about sqrt(n) roundings
    where terms cancel: below 8 for the sizes here. Sums themselves are fp32, in another order than
    the truth's: below 30 roundings of fp32.
    """
    assert found is not None
    exact = torch.zeros_like(found) if wanted is None else wanted
    largest = float(exact.detach().abs().max()) if exact.numel() else 0.0
    atol = (30 if dtype == FP32 else 8) * torch.finfo(dtype).eps * largest
    torch.testing.assert_close(found.double(), exact.double(), rtol=0, atol=atol)


@both
@places
@pytest.mark.parametrize("name", CASES)
def test_outputs_and_every_gradient_are_the_formula(
    name: str, device: str, dtype: torch.dtype
) -> None:
    given = replace(CASES[name], dtype=dtype).begin(device)
    twin, wanted = given.truth()
    outputs = given.run(op)
    for found, exact in zip(outputs, wanted, strict=True):
        close(found, exact, dtype)
    gradients = twin.gradients(wanted)
    for leaf, gradient in given.gradients(outputs).items():
        close(gradient, gradients[leaf], dtype)


class Linear:
    """The arguments of `routed_linear`, with frozen weights."""

    def __init__(
        self, case: BackendCase, bias: tuple[bool, ...], device: str | torch.device = "cpu"
    ) -> None:
        self.given = case.begin(device)
        random = torch.Generator().manual_seed(2)

        def frozen(*shape: int) -> Tensor:
            return torch.randn(shape, generator=random).to(device, case.dtype)

        self.weights = [frozen(out, case.width) * case.width**-0.5 for out in case.sizes]
        self.biases = [frozen(o) if b else None for o, b in zip(case.sizes, bias, strict=True)]

    def run(self, op: Callable[..., tuple[Tensor, ...]] = fold) -> tuple[Tensor, ...]:
        g = self.given
        return op(g.x, self.weights, self.biases, g.A, g.B, g.scaling, g.expert, g.gate)

    def truth(self) -> tuple[Given, tuple[Tensor, ...]]:
        twin, _ = self.given.truth()
        bases = [
            F.linear(twin.x, W.double(), None if b is None else b.double())
            for W, b in zip(self.weights, self.biases, strict=True)
        ]
        given = twin.x, twin.A, twin.B, twin.scaling, twin.expert, twin.gate
        return twin, routed_lora(bases, *given, backend="reference")


@both
@places
@pytest.mark.parametrize(
    ("name", "bias"),
    [("two-projections", (True, True)), ("no-gate", (False, False)), ("unlike", (True, False))],
)
def test_folded_into_the_base(
    name: str, bias: tuple[bool, ...], device: str, dtype: torch.dtype
) -> None:
    linear = Linear(replace(CASES[name], dtype=dtype), bias, device)
    twin, wanted = linear.truth()
    outputs = linear.run()
    assert all("prw_kernels" in y.grad_fn.next_functions[0][0].name() for y in outputs)
    for found, exact in zip(outputs, wanted, strict=True):
        close(found, exact, dtype)
    gradients = twin.gradients(wanted)
    for leaf, gradient in linear.given.gradients(outputs).items():
        if not leaf.startswith("results"):
            close(gradient, gradients[leaf], dtype)


def nodes(output: Tensor) -> str:
    """The names of all autograd nodes an output comes from."""
    found, open_ = set(), [output.grad_fn]
    while open_:
        node = open_.pop()
        if node is not None and node not in found:
            found.add(node)
            open_ += [parent for parent, _ in node.next_functions]
    return " ".join(node.name() for node in found)


@interpreted
def test_weights_that_are_not_plain_take_their_own_product() -> None:
    folded, own, strided = (Linear(CASES["no-gate"], (False, False)) for _ in range(3))
    own.weights = [W.clone().requires_grad_() for W in folded.weights]
    strided.weights = [W.t().contiguous().t() for W in folded.weights]
    outputs = folded.run()
    assert "MmBackward" not in nodes(outputs[0])
    for other in (own, strided):
        found = other.run()
        assert "MmBackward" in nodes(found[0])
        torch.testing.assert_close(found, outputs, rtol=1e-5, atol=1e-4)
    with torch.no_grad():
        assert all(map(torch.equal, own.run(), folded.run()))
    assert torch.autograd.grad(own.run()[0].sum(), own.weights[0])[0].any()


@interpreted
def test_a_reference_or_automatic_linear_on_a_cpu_takes_the_operators_of_torch() -> None:
    linear = Linear(CASES["no-gate"], (False, False))
    _, wanted = linear.truth()
    for backend in ("reference", "auto"):
        found = linear.run(partial(routed_linear, backend=backend))
        assert "prw_kernels" not in nodes(found[0])
        for y, exact in zip(found, wanted, strict=True):
            close(y, exact, FP32)


@devices
def test_no_tokens(device: str) -> None:
    case = BackendCase((0,), ranks=(8, 8), width=48, sizes=(64,))
    given = case.begin(device)
    assert [y.shape for y in given.run(op)] == [(0, 64)]
    assert all(gradient is not None for gradient in given.gradients(given.run(op)).values())
    assert [y.shape for y in Linear(case, (True,), device).run()] == [(0, 64)]


@interpreted
def test_the_promises_of_a_backend() -> None:
    check_backend(op, dtypes=(FP32,), examples=3)


@pytest.mark.gpu
def test_the_promises_of_a_backend_on_a_gpu() -> None:
    check_backend(op, device="cuda", dtypes=(FP32, FP16, BF16), examples=60)


@both
@devices
def test_two_runs_have_the_same_bits_also_when_sums_are_split(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prw_kernels.routed_lora import launch

    given = CASES["two-projections"].begin(device)
    twin, wanted = given.truth()
    exact = twin.gradients(wanted)
    monkeypatch.setattr(launch, "parts", lambda programs, tokens: 3)
    first, second = given.run(op), given.run(op)
    assert all(map(torch.equal, first, second))
    once, again = given.gradients(first), given.gradients(second)
    for leaf, gradient in once.items():
        assert torch.equal(gradient, again[leaf])  # type: ignore[arg-type]
        close(gradient, exact[leaf], FP32)


@both
@devices
def test_an_expert_nobody_chose_changes_no_bit(device: str) -> None:
    case = BackendCase((20,), ranks=(8,) * 3, width=48, sizes=(64, 48), choice="first")
    clean, dirty = case.begin(device), case.begin(device)
    with torch.no_grad():
        for factors in (*dirty.A, *dirty.B):
            factors[1].fill_(torch.nan)
    wanted, found = clean.run(op), dirty.run(op)
    assert all(map(torch.equal, found, wanted))
    gradients = dirty.gradients(found)
    for leaf, gradient in clean.gradients(wanted).items():
        assert torch.equal(gradients[leaf], gradient)  # type: ignore[arg-type]


@both
@devices
def test_a_token_that_is_not_finite_stays_with_its_expert(device: str) -> None:
    """Token 0 is also what the empty slots of every other expert read."""
    given = BackendCase((20,), ranks=(8,) * 3, width=48, sizes=(64,)).begin(device)
    given.expert[0], given.expert[1:] = 0, torch.arange(19) % 2 + 1
    with torch.no_grad():
        given.x[0].fill_(torch.nan)
    (y,) = given.run(op)
    assert y[0].isnan().all() and y[1:].isfinite().all()
    gradients = given.gradients((y,))
    assert gradients["A[0][0]"].isnan().any()  # type: ignore[union-attr]
    for leaf in ("A[0][1]", "A[0][2]", "B[0][1]", "B[0][2]"):
        assert gradients[leaf].isfinite().all()  # type: ignore[union-attr]


@both
@devices
def test_a_choice_outside_the_pool_is_nan_where_nobody_looks(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prw_kernels.routing.launch import launch_segments

    monkeypatch.setattr(checks, "check_pool", lambda *_: None)
    monkeypatch.setattr(tiled_op, "segments", launch_segments)
    given = BackendCase((20,), ranks=(8,) * 3, width=48, sizes=(64, 48)).begin(device)
    wanted = given.run(op)
    given.expert[3], given.expert[5] = 3, -1
    for backend in (op, partial(routed_lora, backend="reference")):
        for found, exact in zip(given.run(backend), wanted, strict=True):
            wrong = found.isnan().all(1)
            assert wrong.nonzero()[:, 0].tolist() == [3, 5]
            close(found[~wrong], exact[~wrong], FP32)


@interpreted
def test_double_backward_is_refused() -> None:
    given = CASES["two-projections"].begin()
    with pytest.raises(RuntimeError, match="no second derivative; use backend='reference'"):
        torch.autograd.grad(given.run(op)[0].square().sum(), given.x, create_graph=True)


@both
@devices
def test_only_experts_that_learn_get_gradients(device: str) -> None:
    given = BackendCase((20,), ranks=(8,) * 4, width=48, sizes=(64, 48)).begin(device)
    for factors in (*given.A, *given.B):
        factors[1].requires_grad_(False)
    given.A[0][3].requires_grad_(False)
    sum(y.sum() for y in given.run(op)).backward()  # type: ignore[union-attr]
    everyone = (*given.A, *given.B)
    assert all(factors[1].grad is None for factors in everyone)
    assert given.A[0][3].grad is None and given.B[0][3].grad is not None
    assert all(factors[e].grad is not None for factors in everyone for e in (0, 2))


@both
@devices
def test_strides_of_choice_and_gate_do_not_matter(device: str) -> None:
    given = CASES["two-projections"].begin(device)
    assert given.gate is not None
    columns = torch.stack([given.gate.detach(), given.gate.detach() + 1], dim=1)
    experts = torch.stack([given.expert, given.expert * 0], dim=1)
    strided = replace(given, gate=columns[:, 0], expert=experts[:, 0])
    assert all(map(torch.equal, strided.run(op), given.run(op)))


@interpreted
def test_one_output_alone_is_enough() -> None:
    given = CASES["two-projections"].begin()
    twin, wanted = given.truth()
    found = torch.autograd.grad(given.run(op)[1].sum(), given.x)[0]
    close(found, torch.autograd.grad(wanted[1].sum(), twin.x)[0], FP32)


@interpreted
def test_outputs_keep_the_dtype_of_their_results_and_autocast_is_off_inside() -> None:
    given = CASES["no-gate"].begin()
    plain = given.run(op)
    with torch.autocast("cpu", dtype=FP16):
        assert all(map(torch.equal, given.run(op), plain))
    half = replace(given, results=[result.detach().half() for result in given.results])
    for found, wanted in zip(half.run(op), plain, strict=True):
        assert found.dtype == FP16
        close(found, wanted, FP16)


@both
@devices
def test_recomputing_and_compiling_change_no_bit(device: str) -> None:
    given = CASES["samples"].begin(device)
    target = [given.leaves()[leaf] for leaf in ("x", "gate", "A[0][0]", "B[0][4]")]
    wanted = given.run(op)
    gradients = torch.autograd.grad(wanted[0].sum(), target)
    again = checkpoint(partial(given.run, op), use_reentrant=False)
    compiled = torch.compile(op, backend="aot_eager", fullgraph=True)
    for found in (again, given.run(compiled)):
        assert torch.equal(found[0], wanted[0])
        assert all(map(torch.equal, torch.autograd.grad(found[0].sum(), target), gradients))


@both
@interpreted
def test_the_operator_is_registered_as_torch_wants() -> None:
    given = BackendCase((5,), ranks=(8,) * 2, width=48, sizes=(64, 48)).begin()
    factors = [f for row in given.A for f in row], [f for row in given.B for f in row]
    arguments = (given.x, *factors, given.results, [], [], given.expert, given.gate, 2.0)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(tiled_op.routed_lora_op, arguments, test_utils=tests)
    with torch.no_grad():
        outputs = tiled_op.routed_lora_op(*arguments)
    dy = [torch.ones_like(y) for y in outputs[4:]]
    x, gate, h = given.x.detach(), torch.ones(5), outputs[0]
    frozen = [[f.detach() for f in side] for side in factors]
    choice = given.expert, gate, *outputs[1:4], 2.0
    torch.library.opcheck(
        tiled_op.routed_lora_backward_op,
        (dy, x, h, *frozen, [], *choice, True, True, [True, False]),
        test_utils=tests,
    )


@interpreted
@pytest.mark.parametrize("folded", [False, True], ids=["results", "weights"])
def test_what_is_kept_for_the_backward_is_small(
    folded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FLUX's keys and values at rank 128: 6144 B of x, 512 B of h, and the routing, per token."""
    monkeypatch.setattr(tiled_op, "block_for", lambda x, rank: 128)
    tokens, width, rank, experts = 4096, 3072, 128, 5
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    with FakeTensorMode():
        half = partial(torch.empty, dtype=FP16)
        x = half(tokens, width, requires_grad=True)
        A = [[half(rank, width, requires_grad=True) for _ in range(experts)] for _ in range(2)]
        B = [[half(width, rank, requires_grad=True) for _ in range(experts)] for _ in range(2)]
        bases = [half(width, width) if folded else half(tokens, width) for _ in range(2)]
        expert, gate = torch.zeros(tokens, dtype=torch.long), torch.ones(tokens, requires_grad=True)
        mine: dict[str, Any] = {"weights" if folded else "results": bases}
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            outputs = tiled(x, A, B, [[2.0] * experts] * 2, expert, gate, **mine)
        assert [y.shape for y in outputs] == [(tokens, width)] * 2
        for parameter in (*(bases if folded else []), *(f for row in (*A, *B) for f in row)):
            kept.pop(parameter.untyped_storage()._cdata)
    assert 6144 + 512 <= sum(kept.values()) / tokens <= 7000


@interpreted
def test_mistakes_are_named() -> None:
    given = BackendCase((5,), ranks=(4, 4), width=6, sizes=(8,)).begin()
    results, x, A, B, scaling, expert, gate = vars(given).values()

    def refuse(match: str, *arguments: Any) -> None:
        with pytest.raises(ValueError, match=match):
            op(*arguments)

    def cast(rows: list[list[Tensor]], dtype: torch.dtype) -> list[list[Tensor]]:
        return [[factor.to(dtype) for factor in row] for row in rows]

    rest = scaling, expert, gate
    wrong = "interpreter computes torch.bfloat16 wrongly"
    refuse(wrong, results, x, cast(A, BF16), cast(B, BF16), *rest)
    refuse(wrong, [y.bfloat16() for y in results], x, A, B, *rest)
    refuse("torch.float64", results, x, cast(A, torch.float64), cast(B, torch.float64), *rest)
    refuse("gate is on meta", results, x, A, B, scaling, expert, gate.to("meta"))
    refuse("expert has index 2", results, x, A, B, scaling, expert * 0 + 2, gate)
    for weight, bias, match in (
        (torch.zeros(8, 5), None, r"weights\[0\] is \(8, 5\)"),
        (torch.zeros(7, 6), None, "are no pair from width 6 to 7"),
        (torch.zeros(8, 6), torch.zeros(7), r"biases\[0\] is \(7,\), expected \(8,\)"),
    ):
        with pytest.raises(ValueError, match=match):
            fold(x, [weight], [bias], A, B, scaling, expert)


def test_runs_of_experts() -> None:
    assert list(blocks.runs([True, True, False, True])) == [(0, 2), (3, 1)]
    assert list(blocks.runs([False, False])) == []


def test_few_columns_are_not_worth_a_sort() -> None:
    assert blocks.is_dense(1, 128) and blocks.is_dense(5, 16)
    assert not blocks.is_dense(5, 32) and not blocks.is_dense(2, 64)


def test_blocks_cover_and_waste_little() -> None:
    for count in (1, 8, 16, 24, 48, 96, 128, 160, 192, 1000, 3072):
        assert 16 <= blocks.fit(count, 64) <= 64
        padded = -(-count // blocks.fit(count, 64)) * blocks.fit(count, 64)
        assert padded <= 9 / 8 * (-(-count // 16) * 16)
    assert [blocks.columns(count, 256) for count in (24, 48, 96, 256, 512)] == [
        32,
        64,
        128,
        256,
        256,
    ]
    assert blocks.columns(256, 256, rows=69) == 128
    assert blocks.columns(256, 256, rows=10) == 64
    assert [blocks.parts(48, tokens) for tokens in (100, 4096, 65536)] == [1, 4, 6]


def test_without_a_device_or_without_triton_the_backend_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = BackendCase((5,)).begin()
    if installed():
        with pytest.raises(ValueError, match="x is on cpu; move it there"):
            given.run(op)
    monkeypatch.setattr(tiled_module, "installed", lambda: False)
    with pytest.raises(ValueError, match="needs the package triton"):
        given.run(op)


FLUX = BackendCase((4096,), ranks=(128,) * 5, width=3072, sizes=(3072, 3072), dtype=BF16)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("rank", [128, 16])
def test_keys_and_values_of_flux(rank: int, dtype: torch.dtype) -> None:
    """Against fp64, and bit for bit the same twice."""
    linear = Linear(replace(FLUX, ranks=(rank,) * 5, dtype=dtype), (True, True), "cuda")
    twin, wanted = linear.truth()
    outputs, again = linear.run(), linear.run()
    gradients, exact = linear.given.gradients(outputs), twin.gradients(wanted)
    for leaf, gradient in linear.given.gradients(again).items():
        if not leaf.startswith("results"):
            assert torch.equal(gradient, gradients[leaf])  # type: ignore[arg-type]
            close(gradient, exact[leaf], dtype)
    assert all(map(torch.equal, again, outputs))
    for found, truth in zip(outputs, wanted, strict=True):
        close(found, truth, dtype)


@pytest.mark.gpu
def test_nothing_waits_for_the_device() -> None:
    linear = Linear(FLUX, (True, True), "cuda")
    linear.given.gradients(linear.run())  # compiles
    torch.cuda.synchronize()
    seeds = [torch.ones_like(y) for y in linear.run()]
    target = [linear.given.x, *linear.given.A[0], *linear.given.B[1]]
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.autograd.grad(linear.run(), target, seeds)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_a_captured_graph_replays_with_another_routing() -> None:
    linear = Linear(FLUX, (True, True), "cuda")
    given = linear.given
    target = [given.x, *given.A[0], *given.B[1]]
    seeds = [torch.ones_like(y) for y in linear.run()]

    def step() -> list[Tensor]:
        outputs = linear.run()
        return [*outputs, *torch.autograd.grad(outputs, target, seeds)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    given.expert.copy_((given.expert + 1) % 5)
    with torch.no_grad():
        given.x.mul_(-0.5)
    graph.replay()
    torch.cuda.synchronize()
    assert all(map(torch.equal, captured, step()))


@pytest.mark.gpu
def test_more_elements_than_int32_counts() -> None:
    tokens, width = 2**31 // 3072 + 1000, 3072
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of free device memory")
    A = [[torch.randn(16, 16, device="cuda", dtype=BF16) for _ in range(2)]]
    B = [[torch.randn(width, 16, device="cuda", dtype=BF16) for _ in range(2)]]
    x = torch.randn(tokens, 16, device="cuda", dtype=BF16)
    expert = torch.randint(0, 2, (tokens,), device="cuda")
    results = [torch.zeros(tokens, width, device="cuda", dtype=BF16)]
    (y,) = op(results, x, A, B, [[1.0, 1.0]], expert)
    for rows in (slice(0, 100), slice(-100, None)):
        few = [results[0][rows]], x[rows], A, B, [[1.0, 1.0]], expert[rows]
        torch.testing.assert_close(
            y[rows], routed_lora(*few, backend="reference")[0], rtol=2e-2, atol=0.5
        )
