"""A pool adds what its routing says, at any shape, and nothing before it has learnt something."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import prw
from prw import Config, Pool
from prw.ledger import Ledger

WIDTH, SIZES = 8, {"k": 6, "v": 8}


def build(stages: int, **fields: Any) -> tuple[prw.Pool, prw.Weave]:
    """A pool with trained-looking experts and router columns."""
    config = prw.Config(rank=2, **fields)
    pool = prw.Pool("block", WIDTH, SIZES, config)
    weave = prw.Weave({"block": pool}, config, fingerprint={})
    for stage in range(stages):
        weave.unlock(f"s{stage}")
        for parameter in weave.parameters():
            torch.nn.init.normal_(parameter)
    return pool, weave


def outputs_for(x: Tensor) -> dict[str, Tensor]:
    return {p: torch.randn(*x.shape[:-1], size).to(x.dtype) for p, size in SIZES.items()}


@pytest.mark.parametrize("leading", [(0,), (1,), (63,), (2, 7), (2, 3, 4), (2, 0)], ids=str)
@pytest.mark.parametrize("granularity", ["token", "sample"])
@pytest.mark.parametrize("gate", ["softmax", "one"])
def test_it_adds_the_gated_residual_of_the_chosen_expert(
    leading: tuple[int, ...], granularity: str, gate: str
) -> None:
    pool, _ = build(3, granularity=granularity, gate=gate)
    x = torch.randn(*leading, WIDTH)
    given_outputs = outputs_for(x)
    outputs, routing = pool.add(given_outputs, x)
    assert routing is not None
    shape = leading[:1] if granularity == "sample" else leading
    assert routing.expert.shape == routing.gate.shape == shape
    assert routing.probs.shape == (*shape, 3)
    if gate == "one":
        assert torch.equal(routing.gate, torch.ones(shape))
    lift = (1,) * (len(leading) - len(shape) + 1)
    expert, weight = (t.reshape(*shape, *lift) for t in (routing.expert, routing.gate))
    for p, before in given_outputs.items():
        wanted = before
        for index in range(3):
            A, B = pool.expert(index).pair(p)
            wanted = torch.where(expert == index, before + x @ A.T @ B.T * 2.0 * weight, wanted)
        # fp32 products of 8 and 2 terms, in another order.
        torch.testing.assert_close(outputs[p], wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("granularity", ["token", "sample"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_fresh_expert_changes_nothing(granularity: str, dtype: torch.dtype) -> None:
    pool, weave = build(0, granularity=granularity)
    x = torch.randn(2, 5, WIDTH).to(dtype)
    given_outputs = outputs_for(x)
    outputs, routing = pool.add(given_outputs, x)
    assert routing is None
    assert all(outputs[p] is given_outputs[p] for p in SIZES)
    weave.unlock("first")
    outputs, routing = pool.add(given_outputs, x)
    assert routing is not None
    assert all(torch.equal(outputs[p], given_outputs[p]) for p in SIZES)
    assert all(outputs[p].dtype == dtype for p in SIZES)
    assert torch.equal(routing.gate, torch.ones_like(routing.gate))


@given(st.integers(0, 10_000), st.integers(1, 4))
def test_permuting_tokens_permutes_outputs(seed: int, stages: int) -> None:
    torch.manual_seed(seed)
    pool, _ = build(stages)
    x = torch.randn(11, WIDTH)
    order = torch.randperm(11)
    given_outputs = outputs_for(x)
    plain, routing = pool.add(given_outputs, x)
    moved, _ = pool.add({p: y[order] for p, y in given_outputs.items()}, x[order])
    assert routing is not None
    top = torch.cat([routing.probs, torch.zeros(11, 1)], -1).topk(2, dim=-1).values
    clear = ((top[:, 0] - top[:, 1]) > 1e-5)[order]  # outside the tie margin
    for p in SIZES:
        torch.testing.assert_close(moved[p][clear], plain[p][order][clear], rtol=1e-5, atol=1e-5)


@given(st.integers(0, 10_000))
def test_sample_routing_ignores_token_order_and_other_samples(seed: int) -> None:
    torch.manual_seed(seed)
    pool, _ = build(3, granularity="sample")
    x = torch.randn(4, 6, WIDTH)
    probs = pool.route(x).probs
    shuffled = pool.route(x[:, torch.randperm(6)]).probs
    torch.testing.assert_close(shuffled, probs, rtol=1e-4, atol=1e-5)
    other = x.clone()
    other[1] = 100.0
    rest = torch.tensor([0, 2, 3])
    assert torch.equal(pool.route(other).probs[rest], probs[rest])


@pytest.mark.parametrize("granularity", ["token", "sample"])
def test_noise_needs_training_mode_and_a_noisy_call(granularity: str) -> None:
    pool, _ = build(3, granularity=granularity)
    x = torch.randn(4, 6, WIDTH)
    quiet = pool.route(x).probs
    noisy, other = prw.Call(key=1, noisy=True), prw.Call(key=2, noisy=True)
    assert torch.equal(pool.route(x, prw.Call(key=1)).probs, quiet)
    assert torch.equal(pool.route(x, noisy).probs, pool.route(x, noisy).probs)
    assert not torch.equal(pool.route(x, noisy).probs, quiet)
    assert not torch.equal(pool.route(x, other).probs, pool.route(x, noisy).probs)
    pool.eval()
    assert torch.equal(pool.route(x, noisy).probs, quiet)


def test_noise_can_be_left_out() -> None:
    pool, _ = build(2, noise=False)
    x = torch.randn(4, WIDTH)
    assert not len(pool.columns.noise)
    assert torch.equal(pool.route(x, prw.Call(key=1, noisy=True)).probs, pool.route(x).probs)


def test_siblings_fed_the_same_tensor_get_the_same_routing_and_count_once() -> None:
    pool, weave = build(2)
    x = torch.randn(5, WIDTH)
    outputs = outputs_for(x)
    with weave.record(key=3) as record:
        one = pool.add({"k": outputs["k"]}, x)[1]
        two = pool.add({"v": outputs["v"]}, x)[1]
    assert one is not None and two is not None
    assert torch.equal(one.expert, two.expert) and torch.equal(one.gate, two.gate)
    assert int(record.tally.groups["block"].count) == 5


@pytest.mark.parametrize("granularity", ["token", "sample"])
@pytest.mark.parametrize("stages", [1, 3])
@pytest.mark.parametrize("gate", ["softmax", "one"])
def test_whatever_may_learn_gets_a_gradient_even_when_starving(
    granularity: str, stages: int, gate: str
) -> None:
    pool, weave = build(stages, granularity=granularity, gate=gate)
    with torch.no_grad():
        pool.columns.signal[-1].zero_()
    x = torch.ones(3, 4, WIDTH)
    if stages > 1:
        with torch.no_grad():
            pool.columns.signal[0].fill_(5.0)  # everything goes to the oldest expert
    call = prw.Call(key=0, noisy=True)
    outputs, routing = pool.add(outputs_for(x), x, call)
    assert routing is not None and not routing.expert.any()
    sum(y.sum() for y in outputs.values()).backward()  # type: ignore[union-attr]
    learning = dict(weave.named_parameters())
    assert learning and all(p.grad is not None for p in learning.values())
    frozen = [p for p in pool.parameters() if not p.requires_grad]
    assert all(p.grad is None for p in frozen)


def test_veterans_get_no_gradient_even_if_something_unfreezes_them() -> None:
    pool, _ = build(2)
    for parameter in pool.parameters():
        parameter.requires_grad_(True)
    x = torch.randn(20, WIDTH)
    sum(y.sum() for y in pool.add(outputs_for(x), x)[0].values()).backward()  # type: ignore[union-attr]
    assert all(p.grad is None for p in pool.expert(0).parameters())
    assert all(p.grad is not None for p in pool.expert(1).parameters())


def test_router_train_new_moves_only_the_new_column() -> None:
    pool, weave = build(3, router_train="new")
    names = {name for name, _ in weave.named_parameters()}
    assert {n for n in names if "columns" in n} == {
        "block.columns.signal.2",
        "block.columns.noise.2",
    }


def test_dtype_and_device_follow_the_module_before_anything_is_unlocked() -> None:
    pool, weave = build(0)
    pool.double()
    weave.unlock("a")
    assert all(p.dtype == torch.float64 for p in pool.parameters())


def test_layers_may_have_names_that_containers_use() -> None:
    pool = prw.Pool("b", 4, {"keys": 4, "values": 4, "0": 4}, prw.Config(rank=1))
    weave = prw.Weave({"b": pool}, pool.config, fingerprint={})
    weave.unlock("a")
    x = torch.randn(2, 4)
    assert set(pool.add({"keys": x, "values": x, "0": x}, x)[0]) == {"keys", "values", "0"}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: prw.Pool("b", 4, {}, prw.Config(rank=1)), "needs projections"),
        (lambda: prw.Pool("b", 4, {"a.k": 4}, prw.Config(rank=1)), "without dots"),
        (lambda: prw.Pool("b", 4, {"k": 8}, prw.Config(rank=5)), r"rank 5.*'b.k' \(4 -> 8\)"),
        (lambda: build(1)[0].route(torch.zeros(WIDTH)), "at least two axes"),
        (lambda: build(1)[0].route(torch.zeros(2, 3)), r"inputs \[..., 8\].*\[2, 3\]"),
        (
            lambda: build(1)[0].route(
                torch.zeros(2, 3, WIDTH), prw.Call(mask=torch.ones(2, 4).bool())
            ),
            r"mask of the call is \[2, 4\].*tokens \[2, 3\]",
        ),
    ],
)
def test_mistakes_are_named(make: Any, message: str) -> None:
    with pytest.raises(prw.ConfigError, match=message):
        make()


def test_routing_without_an_expert_or_to_an_unknown_stage() -> None:
    pool, _ = build(0)
    with pytest.raises(prw.StageError, match="no expert yet"):
        pool.route(torch.zeros(2, WIDTH))
    pool, weave = build(2)
    with pytest.raises(prw.StageError, match="no stage 'x'"):
        pool.route(torch.zeros(2, WIDTH), prw.Call(stage="x"))
    with pytest.raises(prw.StageError, match="no stage 's3'"):
        weave.pinned(force="s3")


def test_experts_that_will_be_filled_take_no_memory() -> None:
    """A gigabyte of experts is loaded without two of float32 zeros being written first."""
    pool = Pool("layer", 64, {"to_k": 32, "to_v": 16}, Config(rank=8))
    ledger = Ledger().unlock("one")
    pool.follow(ledger, fresh=False)
    sizes = {p.untyped_storage().nbytes() for p in pool.experts.parameters()}
    assert sizes == {4} and all(not p.any() for p in pool.experts.parameters())
    filling = {p: (torch.ones(8, 64), torch.ones(o, 8)) for p, o in pool.projections.items()}
    for projection, (A_RD, B_OR) in filling.items():
        pool.expert(0).put(projection, A_RD, B_OR, 16.0)
        assert pool.expert(0).pair(projection)[1].is_contiguous()
    pool.follow(ledger.close().unlock("two"))
    assert all(p.is_contiguous() for p in pool.expert(1).parameters())
