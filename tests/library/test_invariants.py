"""What follows from the equations, on drawn pools of any size, rank, dtype and routing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import prw
from prw.testing import PoolPlan, disturb, histories, play, pools

seeds = st.integers(0, 2**16)


def grown(plan: PoolPlan, stages: int) -> prw.Weave:
    """A weave with trained-looking stages, the last one open."""
    weave = plan.build()
    for stage in range(stages):
        weave.unlock(f"s{stage}")
        disturb(weave)
    return weave


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    assert one.keys() == two.keys()
    return all(torch.equal(value, two[name]) for name, value in one.items())


@given(pools(), st.integers(1, 4))
def test_only_noise_tells_training_from_evaluation(plan: PoolPlan, stages: int) -> None:
    weave, x = grown(plan, stages), plan.inputs(3, 2)
    weave.call(key=1, noisy=False)
    quiet = plan.forward(weave, x)
    for pool in weave.pools.values():
        pool.eval()
    weave.call(key=1)
    assert same(plan.forward(weave, x), quiet), "noise in evaluation mode"
    for pool in weave.pools.values():
        pool.train()
    first = plan.forward(weave, x)
    assert same(plan.forward(weave, x), first), "one key gives one noise"
    assert plan.config.noise or same(first, quiet), "noise without noise columns"


@given(pools(), st.integers(1, 18))
def test_the_gate_is_the_largest_probability_or_one(plan: PoolPlan, stages: int) -> None:
    weave, x = grown(plan, stages), plan.inputs(3, 2)
    for pool in weave.pools.values():
        routing = pool.route(x)
        assert routing.probs.shape == (*routing.expert.shape, stages)
        assert torch.equal(routing.expert, routing.probs.argmax(-1))
        largest = routing.probs.amax(-1)
        assert bool((largest >= 1 / stages - 1e-6).all() and (largest <= 1).all())
        one = plan.config.gate == "one" or stages == 1
        assert torch.equal(routing.gate, torch.ones_like(largest) if one else largest)


@given(pools(), st.integers(0, 3))
def test_a_fresh_expert_leaves_the_base_and_a_lone_one_takes_all(plan: PoolPlan, seed: int) -> None:
    weave, x = plan.build(), plan.inputs(3, 2, seed=seed)
    weave.unlock("one")
    with weave.record() as record:
        outputs = plan.forward(weave, x)
    assert not any(y.any() for y in outputs.values())
    assert record.usage() == 1.0


@given(pools(noise=False), st.integers(1, 4))
def test_with_one_expert_the_router_gets_zeros_and_with_more_every_column_gets_a_gradient(
    plan: PoolPlan, stages: int
) -> None:
    plan = replace(plan, dtype=torch.float64)
    weave, x = grown(plan, stages), plan.inputs(3, 2)
    sum(y.square().sum() for y in plan.forward(weave, x).values()).backward()  # type: ignore[union-attr]
    learning = {n: p for n, p in weave.named_parameters() if ".columns." in n}
    for name, column in learning.items():
        assert column.grad is not None, name
        if stages == 1 or plan.config.gate == "one":
            assert not column.grad.any(), name
        else:
            assert bool(column.grad.any()), name


@given(pools(router_train="all"), st.integers(2, 5), seeds)
def test_permuting_experts_with_their_columns_changes_nothing(
    plan: PoolPlan, stages: int, seed: int
) -> None:
    plan = replace(plan, dtype=torch.float64)
    weave, twin, x = grown(plan, stages), grown(plan, stages), plan.inputs(4, 2)
    random = torch.Generator().manual_seed(seed)
    order = torch.randperm(stages, generator=random).tolist()
    for name, pool in weave.pools.items():
        other = twin.pools[name]
        with torch.no_grad():
            for new, old in enumerate(order):
                other.columns.signal[new].copy_(pool.columns.signal[old])
        for new, old in enumerate(order):
            for p in pool.projections:
                A_RD, B_OR = pool.expert(old).pair(p)
                other.expert(new).put(p, A_RD, B_OR, pool.expert(old).alpha(p))
    moved = twin.pools
    for name, pool in weave.pools.items():
        found, wanted = moved[name].route(x), pool.route(x)
        assert torch.equal(torch.tensor(order)[found.expert], wanted.expert)
    outputs, wanted_outputs = plan.forward(twin, x), plan.forward(weave, x)
    # fp64; the softmax adds in another order
    torch.testing.assert_close(outputs, wanted_outputs, rtol=1e-12, atol=1e-12)


@given(pools(granularity="sample"), st.integers(1, 4), seeds)
def test_sample_routing_does_not_depend_on_token_order(
    plan: PoolPlan, stages: int, seed: int
) -> None:
    plan = replace(plan, dtype=torch.float64)
    weave, x = grown(plan, stages), plan.inputs(3, 5)
    order = torch.randperm(5, generator=torch.Generator().manual_seed(seed))
    outputs, moved = plan.forward(weave, x), plan.forward(weave, x[:, order])
    for name, y in outputs.items():
        torch.testing.assert_close(moved[name], y[:, order], rtol=1e-12, atol=1e-12)


@given(pools(), st.integers(2, 4), st.floats(0, 1), st.floats(0, 2), st.integers(1, 3))
def test_usage_is_a_share_of_the_rows_and_the_veteran_loss_is_bounded(
    plan: PoolPlan, stages: int, density: float, weight: float, samples: int
) -> None:
    weave = grown(plan, stages)
    with weave.record() as record:
        plan.forward(weave, plan.inputs(samples, 2))
    tokens = 1 if plan.config.granularity == "sample" else 2
    rows = len(weave.pools) * samples * tokens
    assert record.usage() * rows == pytest.approx(round(record.usage() * rows), abs=1e-9)
    loss = float(prw.veteran_gate_loss(record, density, weight).detach())
    assert 0 <= loss <= weight * max(density, 1 - density) * (1 + 1e-6)
    assert float(prw.veteran_gate_loss(record, record.usage(), weight).detach()) == 0.0
    assert float(prw.veteran_gate_loss(record, density, 0.0).detach()) == 0.0


@given(pools(), histories())
def test_what_learns_is_what_the_schedule_says_in_any_history(
    plan: PoolPlan, history: tuple[str, ...]
) -> None:
    weave = plan.build()
    play(weave, history)
    newest = weave.ledger.newest
    learning = {name for name, _ in weave.named_parameters()}
    for group, pool in weave.pools.items():
        for name, parameter in pool.named_parameters():
            assert parameter.requires_grad == (f"{group}.{name}" in learning)
            kind, *_, index = [part for part in name.split(".") if part not in "AB"][:3]
            if kind == "experts":
                owner = int(name.split(".")[1])
                assert parameter.requires_grad == (newest is not None and owner == newest.index)
            elif plan.config.router_train == "new":
                allowed = newest is not None and int(index) == newest.index
                assert parameter.requires_grad == allowed
            else:
                assert parameter.requires_grad == (newest is not None)
    assert bool(learning) == (newest is not None)
    assert len(weave.pools) > 0 and all(
        len(pool.experts) == len(weave.stages) for pool in weave.pools.values()
    )


@given(pools(), st.integers(1, 3), st.integers(1, 2))
def test_a_forced_route_is_that_expert_with_gate_one(
    plan: PoolPlan, stages: int, dims: int
) -> None:
    plan = replace(
        plan, config=prw.Config.from_dict(plan.config.to_dict() | {"backend": "reference"})
    )
    weave, x = grown(plan, stages), plan.inputs(*(3, 2)[:dims])
    for stage in weave.stages:
        with weave.force_route(stage.name):
            outputs = plan.forward(weave, x)
        for name, pool in weave.pools.items():
            for p in pool.projections:
                A_RD, B_OR = pool.expert(stage.index).pair(p)
                wanted = x @ A_RD.T @ B_OR.T * pool.expert(stage.index).scaling(p)
                torch.testing.assert_close(outputs[f"{name}.{p}"], wanted)
