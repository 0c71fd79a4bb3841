"""The router's rules as properties: growth, ties, permutations, independence of rows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from prw.columns import Columns
from prw.router import BLOCK, NoisyTop1, Routing, column_product, router_input

# Hypothesis chooses counts and a seed; the numbers themselves are drawn from that seed.
seeds = st.integers(0, 2**32 - 1)
WIDTH = 6


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def noisy_top1(h: Tensor, signal: list[Tensor], noise: list[Tensor], eps: Tensor | None) -> Routing:
    return NoisyTop1().route(h, signal, noise, eps)


def columns(seed: int, count: int) -> list[Tensor]:
    return list(draw(seed, 2 * BLOCK + 3, WIDTH)[:count])


@given(seeds, st.integers(1, 2 * BLOCK + 2), st.booleans())
def test_probabilities_and_choice(seed: int, count: int, noisy: bool) -> None:
    h = draw(seed + 1, 9, WIDTH)
    signal, noise = columns(seed, count), columns(seed + 2, count)
    eps = draw(seed + 3, 9, count) if noisy else None
    routing = noisy_top1(h, signal, noise, eps)
    logits = h.double() @ torch.stack(signal).double().T
    if eps is not None:
        logits += eps * torch.nn.functional.softplus(h.double() @ torch.stack(noise).double().T)
    assert routing.probs.shape == (9, count)
    # fp32 logits of a few units, rounded a few times: 1e-5 relative.
    torch.testing.assert_close(routing.probs.double(), logits.softmax(-1), rtol=1e-4, atol=1e-6)
    assert torch.equal(routing.gate, routing.probs.amax(-1))
    assert torch.equal(routing.expert, routing.probs.argmax(-1))
    assert bool((routing.gate >= 1 / count - 1e-6).all())


@given(seeds, st.integers(1, 2 * BLOCK + 2), st.integers(1, 2 * BLOCK + 2))
def test_growth_changes_no_bit_of_the_old_logits(seed: int, one: int, other: int) -> None:
    few, many = sorted((one, other))
    h = draw(seed + 1, 7, WIDTH)
    old, new = (column_product(h, columns(seed, count))[:, :few] for count in (few, many))
    assert torch.equal(old, new)


@given(seeds, st.integers(1, 5))
def test_one_expert_has_gate_exactly_one(seed: int, rows: int) -> None:
    routing = noisy_top1(draw(seed, rows, WIDTH) * 50, columns(seed, 1), [], None)
    assert torch.equal(routing.gate, torch.ones(rows))
    assert not routing.expert.any()


@given(seeds, st.lists(st.integers(0, 1), min_size=1, max_size=20))
def test_a_tie_goes_to_the_lowest_index(seed: int, which: list[int]) -> None:
    two = columns(seed, 2)
    routing = noisy_top1(draw(seed + 1, 6, WIDTH), [two[w] for w in which], [], None)
    firsts = {which.index(w) for w in set(which)}
    assert set(routing.expert.tolist()) <= firsts


@given(seeds, st.integers(2, 6))
def test_permuting_experts_permutes_probabilities(seed: int, count: int) -> None:
    h, signal = draw(seed + 1, 8, WIDTH), columns(seed, count)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    plain = noisy_top1(h, signal, [], None)
    moved = noisy_top1(h, [signal[i] for i in order], [], None)
    # The softmax sums in another order: a few units in the last place.
    torch.testing.assert_close(moved.probs, plain.probs[:, order], rtol=1e-6, atol=1e-7)
    top = plain.probs.topk(2, dim=-1).values
    clear = (top[:, 0] - top[:, 1]) > 1e-5
    assert torch.equal(torch.tensor(order)[moved.expert][clear], plain.expert[clear])


@given(seeds)
def test_a_fresh_column_takes_only_rows_whose_logits_were_all_negative(seed: int) -> None:
    h, signal = draw(seed + 1, 32, WIDTH), columns(seed, 3)
    before = noisy_top1(h, signal, [], None).expert
    after = noisy_top1(h, [*signal, torch.zeros(WIDTH)], [], None).expert
    best = column_product(h, signal)[:, :3].amax(-1)
    assert torch.equal(after, torch.where(best >= 0, before, 3))


def test_rows_do_not_see_each_other() -> None:
    h, signal = draw(0, 8, WIDTH), columns(1, 4)
    changed = h.clone()
    changed[3] = 1e3
    one, two = (noisy_top1(rows, signal, [], None) for rows in (h, changed))
    rest = torch.arange(8) != 3
    assert torch.equal(one.probs[rest], two.probs[rest])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_arithmetic_is_at_least_fp32(dtype: torch.dtype) -> None:
    x = draw(0, 2, 5, WIDTH).to(dtype)
    h = router_input(x, "token", None)
    wanted = torch.float64 if dtype == torch.float64 else torch.float32
    assert h.dtype == noisy_top1(h, columns(0, 3), [], None).gate.dtype == wanted


def test_no_tokens_give_no_nan() -> None:
    assert router_input(torch.zeros(0, WIDTH), "token", None).shape == (0, WIDTH)
    pooled = router_input(torch.zeros(2, 0, WIDTH), "sample", None)
    assert torch.equal(pooled, torch.zeros(2, WIDTH))


@given(seeds, st.integers(1, 6))
def test_masked_tokens_are_as_if_removed(seed: int, kept: int) -> None:
    x = draw(seed, 3, 6, WIDTH)
    mask = torch.arange(6).expand(3, 6) < kept
    x[:, kept:] = torch.nan
    whole = router_input(x[:, :kept], "sample", None)
    # A sum over zeros besides: the order of additions may differ.
    torch.testing.assert_close(router_input(x, "sample", mask), whole, rtol=1e-6, atol=1e-6)


def test_mean_over_all_inner_axes() -> None:
    x = draw(0, 2, 3, 4, WIDTH)
    assert router_input(x, "sample", None).shape == (2, WIDTH)
    torch.testing.assert_close(router_input(x, "sample", None), x.mean((1, 2)))


def test_columns_are_parameters_of_their_own_and_survive_growth() -> None:
    router = Columns(WIDTH, noise=True)
    router.grow()
    first = router.signal[0]
    router.take_snapshot(0)
    router.grow()
    assert router.signal[0] is first
    assert not any(column.any() for column in (*router.signal, *router.noise))
    with torch.no_grad():
        first.fill_(3.0)
    assert torch.equal(router.seen(1, True, frozenset())[0][0], torch.zeros(WIDTH))
    router.restore(0)
    assert torch.equal(first, torch.zeros(WIDTH))
