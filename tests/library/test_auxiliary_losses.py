"""Load balance, z-loss, entropy and the per-sample gate are their formulas, written down."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import prw
from prw.losses import entropy_loss, load_balance_loss, veteran_gate_loss, z_loss
from prw.noise import gaussian_noise, group_id
from prw.testing import PoolPlan, disturb

WEIGHT = 0.7


def build(stages: int = 3, blocks: int = 2, **fields: Any) -> tuple[PoolPlan, prw.Weave]:
    plan = PoolPlan(prw.Config(rank=1, **fields), 4, (3,), blocks, torch.float64)
    weave = plan.build()
    for stage in range(stages):
        weave.unlock(f"s{stage}")
        disturb(weave)
    return plan, weave


def columns(weave: prw.Weave) -> list[Tensor]:
    return [p for name, p in weave.named_parameters() if ".columns." in name]


def logits(weave: prw.Weave, x: Tensor, key: int | None) -> dict[str, Tensor]:
    """Eq. 2 of every group, ``[samples, tokens, E]``, or with one token per sample."""
    found = {}
    for name, pool in weave.pools.items():
        h = x.detach().mean(1, keepdim=True) if weave.config.granularity == "sample" else x.detach()
        w = h @ torch.stack(list(pool.columns.signal)).T
        if key is not None:
            rows = w.flatten(0, 1)
            eps = gaussian_noise(key, group_id(name), *rows.shape, x.device).view(w.shape)
            spread = torch.nn.functional.softplus(h @ torch.stack(list(pool.columns.noise)).T)
            w = w + eps * spread
        found[name] = w
    return found


def mean(values: list[Tensor]) -> Tensor:
    return torch.stack(values).mean()


def balance_formula(w: dict[str, Tensor]) -> Tensor:
    parts = []
    for logit in w.values():
        p, count = logit.flatten(0, 1).softmax(-1), logit.shape[-1]
        share = torch.bincount(p.argmax(-1), minlength=count).double() / len(p)
        parts.append(count * (share * p.mean(0)).sum())
    return WEIGHT * mean(parts)


def z_formula(w: dict[str, Tensor]) -> Tensor:
    return WEIGHT * mean([logit.exp().sum(-1).log().pow(2).mean() for logit in w.values()])


def entropy_formula(w: dict[str, Tensor]) -> Tensor:
    parts = []
    for logit in w.values():
        p = logit.softmax(-1)
        parts.append(-(p * p.log()).sum(-1).mean())
    return WEIGHT * mean(parts)


def per_sample_formula(w: dict[str, Tensor]) -> Tensor:
    used = []
    for logit in w.values():
        p = logit.softmax(-1)[..., -1]
        chosen = (logit.argmax(-1) == logit.shape[-1] - 1).double()
        used.append(chosen + (p - p.detach()))
    usage_S = torch.cat(used, dim=1).mean(1)
    return WEIGHT * (usage_S - 0.6).abs().mean()


Loss = Callable[[Any], Tensor]
LOSSES: dict[str, tuple[Loss, Callable[[dict[str, Tensor]], Tensor]]] = {
    "balance": (lambda r: load_balance_loss(r, WEIGHT), balance_formula),
    "z": (lambda r: z_loss(r, WEIGHT), z_formula),
    "entropy": (lambda r: entropy_loss(r, WEIGHT), entropy_formula),
    "per sample": (
        lambda r: veteran_gate_loss(r, 0.6, WEIGHT, per="sample"),
        per_sample_formula,
    ),
}
every_loss = pytest.mark.parametrize("name", LOSSES)


@every_loss
@given(st.integers(0, 10_000), st.sampled_from(["token", "sample"]), st.booleans())
def test_value_and_gradient_are_those_of_the_formula(
    name: str, seed: int, granularity: str, noisy: bool
) -> None:
    torch.manual_seed(seed)
    plan, weave = build(stages=2 + seed % 3, granularity=granularity)
    x = plan.inputs(3, 4, seed=seed)
    for pool in weave.pools.values():
        pool.train(noisy)
    with weave.record(key=seed, keep_inputs=True) as record:
        plan.forward(weave, x)
    loss, formula = LOSSES[name]
    found, wanted = loss(record), formula(logits(weave, x, seed if noisy else None))
    # fp64 sums of a few dozen terms
    torch.testing.assert_close(found.detach(), wanted.detach(), rtol=1e-12, atol=1e-13)
    slopes = [
        torch.autograd.grad(value, columns(weave), allow_unused=True, materialize_grads=True)
        for value in (found, wanted)
    ]
    torch.testing.assert_close(slopes[0], slopes[1], rtol=1e-9, atol=1e-11)


@every_loss
@pytest.mark.parametrize("granularity", ["token", "sample"])
def test_masked_nan_tokens_in_any_place_are_as_if_removed(name: str, granularity: str) -> None:
    plan, weave = build(granularity=granularity, noise=False)
    x = plan.inputs(3, 4)
    holes = torch.full((3, 6, 4), torch.nan, dtype=x.dtype)
    places = torch.tensor([0, 2, 3, 5])
    holes[:, places] = x
    mask = torch.zeros(3, 6, dtype=torch.bool)
    mask[:, places] = True
    with weave.record(keep_inputs=True) as short:
        plan.forward(weave, x)
    with weave.record(mask=mask, keep_inputs=True) as masked:
        plan.forward(weave, holes)
    losses = [LOSSES[name][0](record) for record in (short, masked)]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-12, atol=1e-13)
    slopes = [torch.autograd.grad(loss, columns(weave)) for loss in losses]
    torch.testing.assert_close(slopes[1], slopes[0], rtol=1e-9, atol=1e-12)


@every_loss
@pytest.mark.parametrize("leading", [(0, 3), (2, 0), (0,)], ids=str)
@pytest.mark.parametrize("granularity", ["token", "sample"])
def test_nothing_routed_is_no_loss(name: str, leading: tuple[int, ...], granularity: str) -> None:
    plan, weave = build(granularity=granularity)
    with weave.record(keep_inputs=True) as record:
        plan.forward(weave, plan.inputs(*leading))
    loss = LOSSES[name][0](record)
    if granularity == "token" or not leading[0]:
        assert float(loss.detach()) == 0.0
    assert bool(loss.isfinite())
    assert all(bool(g.isfinite().all()) for g in torch.autograd.grad(loss, columns(weave)))


@every_loss
def test_autocast_changes_nothing(name: str) -> None:
    plan, weave = build()
    plan = replace(plan, dtype=torch.float32)
    for pool in weave.pools.values():
        pool.float()
    with weave.record(key=1, keep_inputs=True) as record:
        plan.forward(weave, plan.inputs(3, 4))
    wanted = LOSSES[name][0](record)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = LOSSES[name][0](record)
    assert found.dtype == torch.float32
    assert torch.equal(found, wanted)


def test_closed_forms() -> None:
    plan, weave = build(stages=4, noise=False)
    for column in columns(weave):
        torch.nn.init.zeros_(column)
    with weave.record(keep_inputs=True) as record:
        plan.forward(weave, plan.inputs(5, 2))
    even = torch.tensor(4.0, dtype=torch.float64)
    torch.testing.assert_close(entropy_loss(record, 1.0), even.log())
    torch.testing.assert_close(z_loss(record, 1.0), even.log() ** 2)
    # Probabilities are even: whoever is chosen, E * sum f_e / E = 1.
    torch.testing.assert_close(load_balance_loss(record, 1.0), even / 4)
    for pool in weave.pools.values():
        with torch.no_grad():
            pool.columns.signal[2].fill_(50.0)
    ones = plan.inputs(5, 2).abs() + 1
    with weave.record(keep_inputs=True) as record:
        plan.forward(weave, ones)
    torch.testing.assert_close(load_balance_loss(record, 1.0), even)
    assert float(entropy_loss(record, 1.0).detach()) < 1e-12
    assert float(veteran_gate_loss(record, 0.0, 1.0, per="sample").detach()) == 0.0
    assert float(veteran_gate_loss(record, 1.0, 1.0, per="sample").detach()) == 1.0


def test_descent_does_what_the_loss_is_for() -> None:
    plan, weave = build(stages=3, noise=False, granularity="token")
    x = plan.inputs(20, 1) + 1

    def descend(loss: Callable[[prw.Record], Tensor]) -> tuple[float, float]:
        """The loss at random columns and 20 steps later."""
        for column in columns(weave):
            torch.nn.init.normal_(column)
        optimizer = torch.optim.SGD(columns(weave), lr=0.02)
        values = []
        for _ in range(20):
            with weave.record(keep_inputs=True) as record:
                plan.forward(weave, x)
            optimizer.zero_grad()
            value = loss(record)
            value.backward()
            optimizer.step()
            values.append(float(value.detach()))
        return values[0], values[-1]

    losses = (
        lambda r: z_loss(r, 0.1),
        lambda r: entropy_loss(r, 1.0),
        lambda r: entropy_loss(r, -1.0),
    )
    for loss in losses:
        first, last = descend(loss)
        assert last < first


def test_per_sample_is_not_the_loss_of_the_batch() -> None:
    """Two samples, one always new and one never: the batch is at 0.5, each sample is 0.5 away."""
    plan, weave = build(stages=2, blocks=1, noise=False)
    pool = weave.pools["b0.p0"]
    with torch.no_grad():
        pool.columns.signal[0].zero_()
        pool.columns.signal[1].fill_(1.0)
    x = torch.stack([torch.ones(3, 4), -torch.ones(3, 4)]).double()
    with weave.record(keep_inputs=True) as record:
        plan.forward(weave, x)
    assert float(veteran_gate_loss(record, 0.5, 1.0).detach()) == 0.0
    assert float(veteran_gate_loss(record, 0.5, 1.0, per="sample").detach()) == 0.5


def test_frozen_columns_get_no_gradient() -> None:
    plan, weave = build(router_train="new")
    with weave.record(keep_inputs=True) as record:
        plan.forward(weave, plan.inputs(3, 4))
    for loss, _ in LOSSES.values():
        loss(record).backward()
    for pool in weave.pools.values():
        assert all(column.grad is None for column in list(pool.columns.signal)[:2])
        assert pool.columns.signal[2].grad is not None


@every_loss
def test_what_a_loss_cannot_use_is_named(name: str) -> None:
    loss = LOSSES[name][0]
    plan, weave = build()
    x = plan.inputs(2, 3)
    with pytest.raises(prw.ConfigError, match="at least one record"):
        loss([])
    with weave.record(keep_inputs=True) as empty:
        pass
    with pytest.raises(prw.StageError, match=r"nothing was routed|no router may learn"):
        loss(empty)
    with weave.record() as bare:
        plan.forward(weave, x)
    with weave.record(keep_inputs=True) as kept:
        plan.forward(weave, x)
    for records in (bare, [bare, kept], [kept, bare]):
        with pytest.raises(prw.StageError, match=r"record\(keep_inputs=True\)"):
            loss(records)
    with weave.force_route("s1"), weave.record(keep_inputs=True) as forced:
        plan.forward(weave, x)
    with pytest.raises(prw.StageError, match="outside force_route|no router may learn now"):
        loss(forced)
    weave.unlock("later")
    with weave.record(keep_inputs=True) as later:
        plan.forward(weave, x)
    with pytest.raises(prw.StageError, match="begin a new record after unlock"):
        loss([kept, later])


@pytest.mark.parametrize("weight", [float("nan"), float("inf")])
@pytest.mark.parametrize("loss", [load_balance_loss, z_loss, entropy_loss])
def test_a_weight_that_is_not_finite(loss: Callable[..., Tensor], weight: float) -> None:
    with pytest.raises(prw.ConfigError, match="weight must be a finite number, got"):
        loss(build()[1].record(), weight)


def test_per_is_batch_or_sample() -> None:
    with pytest.raises(prw.ConfigError, match="per must be .*got 'token'"):
        veteran_gate_loss(build()[1].record(), 0.5, 1.0, per="token")  # type: ignore[arg-type]


def test_per_sample_needs_the_same_samples_in_every_group() -> None:
    plan, weave = build()
    one, two = weave.pools.values()
    x = plan.inputs(2, 3)
    with weave.record(keep_inputs=True) as record:
        one.add({"p0": x.new_zeros(2, 3, 3)}, x)
        two.add({"p0": x.new_zeros(1, 3, 3)}, x[:1])
    with pytest.raises(prw.StageError, match="the same samples in every routed group, got 2 and 1"):
        veteran_gate_loss(record, 0.5, 1.0, per="sample")


def test_records_without_kept_inputs_hold_none() -> None:
    plan, weave = build()
    with weave.record() as record:
        plan.forward(weave, plan.inputs(2, 3))
    assert not any(group.passes for group in record.tally.groups.values())
    with weave.record(keep_inputs=True) as record:
        plan.forward(weave, plan.inputs(2, 3).requires_grad_())
    for group in record.tally.groups.values():
        assert not any(seen.h_TD.requires_grad for seen in group.passes)
