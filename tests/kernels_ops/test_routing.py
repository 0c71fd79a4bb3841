"""Routing: what segments promise, and the kernels against plain PyTorch.

Unmarked tests run what a CPU takes. The same checks are marked `interpreted` for the kernels in
Triton's interpreter (fp32 and fp16: its bf16 is wrong) and `gpu` for the kernels on a device.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from prw_kernels.backend import check_interpreted, runs_triton
from prw_kernels.routing import (
    Routed,
    Segments,
    route,
    route_reference,
    segments,
    segments_reference,
)

CPU, CUDA = torch.device("cpu"), torch.device("cuda")

places = pytest.mark.parametrize(
    "device",
    [
        pytest.param(CPU, id="torch"),
        pytest.param(CPU, id="interpreter", marks=pytest.mark.interpreted),
        pytest.param(CUDA, id="gpu", marks=pytest.mark.gpu),
    ],
)

kernels = pytest.mark.parametrize(
    "device",
    [
        pytest.param(CPU, id="interpreter", marks=pytest.mark.interpreted),
        pytest.param(CUDA, id="gpu", marks=pytest.mark.gpu),
    ],
)


def fields(found: Segments) -> list[Tensor]:
    return [found.token, found.slot, found.expert, found.offset]


def assert_segments(found: Segments, expert_T: Tensor, experts: int) -> None:
    """Everything the docstring of `Segments` promises, slot by slot."""
    tokens, block = len(expert_T), found.block
    total = (-(-tokens // block) + experts) * block
    assert [t.shape for t in fields(found)] == [
        (total,),
        (tokens,),
        (total // block,),
        (experts + 1,),
    ]
    assert all(t.dtype == torch.int32 for t in fields(found))
    token, slot, tile_expert, offset = (t.tolist() for t in fields(found))
    chosen = expert_T.tolist()

    assert sorted(t for t in token if t < tokens) == list(range(tokens))
    assert max(token) <= tokens and min(token) >= 0
    assert [token[s] for s in slot] == list(range(tokens))

    position = 0
    for e in range(experts):
        mine = [t for t in range(tokens) if chosen[t] == e]
        length = -(-len(mine) // block) * block
        assert offset[e] == position and position % block == 0
        assert token[position : position + len(mine)] == mine
        assert set(token[position + len(mine) : position + length]) <= {tokens}
        assert set(tile_expert[position // block : (position + length) // block]) <= {e}
        position += length
    assert offset[experts] == position
    assert set(token[position:]) <= {tokens} and set(tile_expert[position // block :]) == {-1}


@st.composite
def choices(draw: st.DrawFn) -> tuple[list[int], int, int]:
    """Experts of tokens, how many experts there are, and a block."""
    experts = draw(st.sampled_from([1, 2, 3, 5, 8, 64]))
    used = draw(st.lists(st.integers(0, experts - 1), min_size=1, max_size=3))
    chosen = draw(st.lists(st.sampled_from(used), max_size=300))
    return chosen, experts, draw(st.sampled_from([1, 7, 16, 32, 64]))


@places
@settings(max_examples=20)
@given(choices())
@example(([], 3, 16))
@example(([2], 3, 16))
@example(([0] * 300, 1, 16))
@example(([4] * 257, 5, 32))
@example((list(range(64)) * 3, 64, 16))
def test_segments_are_what_they_promise(
    device: torch.device, choice: tuple[list[int], int, int]
) -> None:
    chosen, experts, block = choice
    expert_T = torch.tensor(chosen, dtype=torch.int64, device=device)
    found = segments(expert_T, experts, block=block)
    assert_segments(found, expert_T, experts)
    assert all(map(torch.equal, fields(found), fields(segments(expert_T, experts, block=block))))
    assert all(
        map(torch.equal, fields(found), fields(segments_reference(expert_T, experts, block=block)))
    )


@places
def test_the_worked_example(device: torch.device) -> None:
    expert_T = torch.tensor([2, 0, 2, 2, 0, 0], dtype=torch.int32, device=device)
    found = segments(expert_T, 3, block=2)
    assert found.token.tolist() == [1, 4, 5, 6, 0, 2, 3, 6, 6, 6, 6, 6]
    assert found.expert.tolist() == [0, 0, 2, 2, -1, -1]
    assert found.offset.tolist() == [0, 4, 4, 8]
    assert found.slot.tolist() == [4, 0, 5, 6, 1, 2]


def test_mistakes_of_segments_are_named() -> None:
    for wrong in (3, -1):
        with pytest.raises(ValueError, match=f"expert index {wrong} is outside the pool of 3"):
            segments(torch.tensor([0, wrong]), 3, block=16)
    with pytest.raises(ValueError, match=r"expert_T is torch.float32 of shape \(2,\)"):
        segments(torch.zeros(2), 3, block=16)
    with pytest.raises(ValueError, match=r"of shape \(2, 2\)"):
        segments(torch.zeros(2, 2).long(), 3, block=16)
    with pytest.raises(ValueError, match="0 experts in tiles of 16 slots"):
        segments(torch.zeros(2).long(), 0, block=16)
    with pytest.raises(ValueError, match="more slots than int32 can count"):
        segments(torch.zeros(1).long().expand(2**30), 3, block=16)


@pytest.mark.gpu
def test_an_index_outside_the_pool_goes_to_the_nearest_inside() -> None:
    expert_T = torch.tensor([5, 0, -3, 2**40, 1], device=CUDA)
    assert_segments(segments(expert_T, 3, block=16), expert_T.clamp(0, 2), 3)


class Case:
    """Inputs of the router; everything is made in fp64 on the CPU and rounded to `dtype`."""

    def __init__(
        self,
        tokens: int,
        width: int,
        experts: int,
        *,
        noisy: bool = True,
        dtype: torch.dtype = torch.float32,
        device: torch.device = CPU,
    ) -> None:
        generator = torch.Generator().manual_seed(tokens + width + experts)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        self.h = normal(tokens, width).to(device, dtype).requires_grad_()
        columns = [(normal(experts, width) / width**0.5).to(device) for _ in range(2)]
        self.signal, self.noise = (column.requires_grad_() for column in columns)
        self.eps = normal(tokens, experts).to(device) if noisy else None
        self.by_gate = normal(tokens).to(device)
        self.by_probs = normal(tokens, experts).to(device)

    @property
    def leaves(self) -> list[Tensor]:
        return [self.h, self.signal, *([] if self.eps is None else [self.noise])]

    def run(self) -> Routed:
        return route(self.h, self.signal, self.noise, self.eps)

    def truth(self) -> Routed:
        """In fp64, differentiable with respect to the same leaves."""
        eps = None if self.eps is None else self.eps.double()
        return route_reference(self.h.double(), self.signal.double(), self.noise.double(), eps)

    def gradients(self, routed: Routed) -> list[Tensor]:
        loss = (routed.gate * self.by_gate).sum() + (routed.probs * self.by_probs).sum()
        return list(torch.autograd.grad(loss, self.leaves))


def assert_routes(case: Case) -> None:
    """The choice, its weight and every gradient are those of fp64."""
    found, truth = case.run(), case.truth()
    # Sums of at most 200 products near 1 / sqrt(200) in fp32: 200 * 2**-24 with room to spare.
    close = {"rtol": 2e-5, "atol": 2e-5, "check_dtype": False}
    torch.testing.assert_close(found.probs, truth.probs, **close)
    torch.testing.assert_close(found.gate, truth.gate, **close)
    assert torch.equal(found.expert, truth.expert)
    assert (found.gate.dtype, found.expert.dtype) == (torch.float32, torch.int64)
    gradients, wanted = case.gradients(found), case.gradients(truth)
    assert [g.dtype for g in gradients] == [leaf.dtype for leaf in case.leaves]
    # Autograd rounds the gradient of h to its dtype in the truth as well.
    rounding = torch.finfo(case.h.dtype).eps
    torch.testing.assert_close(gradients[0], wanted[0], rtol=2 * rounding, atol=2 * rounding + 2e-5)
    torch.testing.assert_close(gradients[1:], wanted[1:], rtol=1e-4, atol=1e-4)


SHAPES = [(0, 24, 3), (1, 24, 1), (37, 70, 5), (50, 33, 20), (40, 16, 64)]


@places
@pytest.mark.parametrize("noisy", [False, True], ids=["plain", "noisy"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_routing_is_the_formula(
    device: torch.device, shape: tuple[int, int, int], noisy: bool
) -> None:
    assert_routes(Case(*shape, noisy=noisy, device=device))


@places
def test_half_precision_inputs_are_read_in_fp32(device: torch.device) -> None:
    assert_routes(Case(37, 70, 5, dtype=torch.float16, device=device))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(1000, 3072, 5), (4096, 3072, 64)], ids=str)
def test_bf16_on_a_device(shape: tuple[int, int, int]) -> None:
    case = Case(*shape, dtype=torch.bfloat16, device=CUDA)
    found, truth = case.run(), case.truth()
    # Three TF32 products: 2**-21 per factor, of a sum of 3072.
    torch.testing.assert_close(found.probs, truth.probs, rtol=1e-4, atol=1e-4, check_dtype=False)
    top = truth.probs.topk(2, dim=-1).values
    clear = (top[:, 0] - top[:, 1] if shape[2] > 1 else top[:, 0]) > 1e-3
    assert torch.equal(found.expert[clear], truth.expert[clear])
    for gradient, wanted in zip(case.gradients(found), case.gradients(truth), strict=True):
        rounding = torch.finfo(gradient.dtype).eps
        scale = wanted.abs().max().item()
        torch.testing.assert_close(gradient, wanted, rtol=2 * rounding, atol=1e-3 * scale)


@places
def test_a_tie_goes_to_the_lowest_index(device: torch.device) -> None:
    case = Case(20, 24, 5, noisy=False, device=device)
    with torch.no_grad():  # sums of small integers are exact in any order
        case.h.copy_(case.h.round())
        case.signal.copy_(case.signal[1].sign())
        case.signal[0].neg_()
    found = case.run()
    assert set(found.expert.tolist()) == {0, 1}
    assert torch.equal(found.expert == 0, found.probs[:, 0] >= found.probs[:, 4])
    with torch.no_grad():
        case.signal.zero_()
    found = case.run()
    assert not found.expert.any()
    torch.testing.assert_close(found.gate, torch.full_like(found.gate, 0.2))


@places
def test_one_expert_has_gate_one(device: torch.device) -> None:
    found = Case(20, 24, 1, device=device).run()
    assert torch.equal(found.gate, torch.ones_like(found.gate))
    assert torch.equal(found.probs[:, 0], found.gate)


@places
@pytest.mark.filterwarnings("ignore:invalid value encountered")  # numpy's, in the interpreter
def test_nan_stays_in_its_row_and_the_expert_in_the_pool(device: torch.device) -> None:
    case = Case(20, 24, 5, device=device)
    clean = case.run()
    with torch.no_grad():
        case.h[7, 3] = torch.nan
    found = case.run()
    others = torch.arange(20, device=device) != 7
    assert found.gate[7].isnan() and 0 <= int(found.expert[7]) < 5
    assert torch.equal(found.probs[others], clean.probs[others])
    assert_segments(segments(found.expert, 5, block=16, count=found.count), found.expert, 5)


@places
def test_large_logits_overflow_nowhere(device: torch.device) -> None:
    case = Case(20, 24, 5, device=device)
    with torch.no_grad():
        case.h *= 1e4
    found = case.run()
    assert found.probs.isfinite().all()
    assert all(gradient.isfinite().all() for gradient in case.gradients(found))


@places
def test_gradients_flow_through_one_output_to_what_learns(device: torch.device) -> None:
    case = Case(37, 70, 5, device=device)
    case.noise.requires_grad_(False)
    found, truth = case.run(), case.truth()
    for output, wanted in ((found.gate, truth.gate), (found.probs, truth.probs)):
        weight = case.by_gate if output.dim() == 1 else case.by_probs
        leaves = [case.signal]
        (gradient,) = torch.autograd.grad((output * weight).sum(), leaves, retain_graph=True)
        (expected,) = torch.autograd.grad((wanted * weight).sum(), leaves, retain_graph=True)
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-4)
    case.signal.requires_grad_(False)
    found.gate.sum().backward()
    assert case.h.grad is not None and case.noise.grad is None


@places
def test_strides_do_not_matter(device: torch.device) -> None:
    case = Case(37, 70, 5, device=device)
    wanted = case.run()
    case.h = case.h.detach().T.contiguous().T
    case.signal = case.signal.detach().repeat_interleave(2, dim=1)[:, ::2]
    found = case.run()
    torch.testing.assert_close(found.probs, wanted.probs)
    assert torch.equal(found.expert, wanted.expert)


@kernels
@pytest.mark.parametrize("tokens", [0, 1, 100, 129])
def test_counts_of_the_choice_spare_a_launch(device: torch.device, tokens: int) -> None:
    found = Case(tokens, 24, 5, device=device).run()
    assert found.count is not None and int(found.count.sum()) == tokens
    one_launch = segments(found.expert, 5, block=16, count=found.count)
    assert all(map(torch.equal, fields(one_launch), fields(segments(found.expert, 5, block=16))))


@kernels
def test_counts_of_another_shape_are_refused(device: torch.device) -> None:
    found = Case(100, 24, 5, device=device).run()
    assert found.count is not None
    for count in (found.count[:3], found.count[:, :5], found.count.repeat(40, 1)):
        with pytest.raises(ValueError, match="is not of a routing of 100 tokens to 5 experts"):
            segments(found.expert, 5, block=16, count=count)


@kernels
def test_operators_keep_their_contract(device: torch.device) -> None:
    case = Case(20, 24, 3, device=device)
    given = (case.h.detach(), case.signal.detach(), case.noise.detach(), case.eps)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.prw_kernels.route.default, given, test_utils=checks)
    found = case.run()
    torch.library.opcheck(
        torch.ops.prw_kernels.segments.default,
        (found.expert, 3, 16, found.count),
        test_utils=checks,
    )
    expert, _, probs, slope, _ = torch.ops.prw_kernels.route(*given)
    back = expert, probs, slope, case.by_gate, None, *given[:3], True, True
    torch.library.opcheck(torch.ops.prw_kernels.route_backward.default, back, test_utils=checks)


@pytest.mark.interpreted
def test_the_interpreter_refuses_what_it_computes_wrongly() -> None:
    assert runs_triton(CPU)
    for dtype in (torch.bfloat16, torch.float64):
        with pytest.raises(ValueError, match="interpreter computes torch"):
            check_interpreted(None, torch.zeros(1, dtype=dtype))
    case = Case(20, 24, 3, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="interpreter computes torch.bfloat16 wrongly"):
        case.run()
    assert Case(20, 24, 3, dtype=torch.float64).run().probs.dtype == torch.float64


def test_the_truth_is_the_router_of_the_library() -> None:
    from prw.router import NoisyTop1

    case = Case(37, 70, 5)
    assert case.eps is not None
    columns = (case.signal.unbind(), case.noise.unbind())
    found = case.run()
    wanted = NoisyTop1().route(case.h, *columns, case.eps)
    torch.testing.assert_close(found.probs, wanted.probs)
    torch.testing.assert_close(found.gate, wanted.gate)
    assert torch.equal(found.expert, wanted.expert)


class Work(TorchDispatchMode):
    """Operators that compute, and the bytes they read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.operators, self.bytes = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if not func.is_view and name not in ("detach", "promote_types", "empty_like"):
            given = [t for t in tree_leaves((args, kwargs, found)) if isinstance(t, Tensor)]
            self.operators += 1
            self.bytes += sum(t.numel() * t.itemsize for t in given)
        return found


def test_what_one_launch_would_save_the_router_of_the_library() -> None:
    """The figures of the README: per token of FLUX's width in bf16, with noise, five experts."""
    from prw.router import NoisyTop1, router_input

    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    tokens, width, experts = 4096, 3072, 5
    with torch.device("meta"):
        x = torch.empty(tokens, width, dtype=torch.bfloat16, requires_grad=True)
        columns = [torch.empty(width, requires_grad=True) for _ in range(2 * experts)]
        eps = torch.empty(tokens, experts)
        with Work() as forward, torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            h_TD = router_input(x, "token", None)
            routing = NoisyTop1().route(h_TD, columns[:experts], columns[experts:], eps)
        with Work() as backward:
            routing.gate.sum().backward()
    assert (forward.operators, backward.operators) == (17, 16)
    per_token = [forward.bytes / tokens, backward.bytes / tokens, sum(kept.values()) / tokens]
    assert per_token == pytest.approx([69e3, 106e3, 12.6e3], rel=0.02)


def test_mistakes_of_routing_are_named() -> None:
    case = Case(20, 24, 3)
    with pytest.raises(ValueError, match=r"h is \(20, 24\) and the signal columns \(3, 23\)"):
        route(case.h, case.signal[:, 1:])
    with pytest.raises(ValueError, match="at least one expert"):
        route(case.h, case.signal[:0])
    with pytest.raises(ValueError, match="eps needs the noise columns"):
        route(case.h, case.signal, None, case.eps)
    with pytest.raises(ValueError, match=r"eps_TE has shape \(20,\), expected \(20, 3\)"):
        route(case.h, case.signal, case.noise, torch.zeros(20))
    with pytest.raises(ValueError, match="signal_ED is torch.int64"):
        route(case.h, case.signal.long())
    with pytest.raises(ValueError, match="signal_ED is on meta and h on cpu"):
        route(case.h, case.signal.to("meta"))


@pytest.mark.gpu
def test_no_synchronisation_and_the_same_bits_under_a_graph() -> None:
    case = Case(1000, 3072, 5, dtype=torch.bfloat16, device=CUDA)

    def step() -> list[Tensor]:
        found = case.run()
        placed = segments(found.expert, 5, block=64, count=found.count)
        return [found.expert, found.gate, *fields(placed), *case.gradients(found)]

    wanted = step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(map(torch.equal, again, wanted))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    torch.cuda.synchronize()
    assert all(map(torch.equal, captured, wanted))
