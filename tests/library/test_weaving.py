"""A weave over a whole history: pinned stages keep their bits, veterans their bytes."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import prw


class Net(nn.Module):
    """Two projections of one input, and one elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.to_k = nn.Linear(8, 8)
        self.to_v = nn.Linear(8, 6)
        self.out = nn.Linear(6, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.to_v(x + torch.tanh(self.to_k(x)))))


def build(**fields: Any) -> tuple[Net, prw.Weave]:
    torch.manual_seed(0)
    net = Net()
    config = prw.Config(target_modules=["to_k", "to_v"], rank=2, **fields)
    return net, prw.weave(net, config)


X = torch.linspace(-2, 2, 3 * 5 * 8).sin().reshape(3, 5, 8)


def train(
    net: nn.Module, weave: prw.Weave, optimizer: torch.optim.Optimizer, steps: int = 2
) -> None:
    for step in range(steps):
        with weave.record(key=step) as record:
            loss = (net(X) - 1).square().mean()
        loss = loss + prw.veteran_gate_loss(record, 0.8, 0.5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def adam(weave: prw.Weave) -> torch.optim.Optimizer:
    return torch.optim.AdamW(weave.parameters(), lr=0.05, weight_decay=0.1)


def digest(weave: prw.Weave, stage: int) -> str:
    """sha256 over all bytes of the experts of one stage."""
    found = hashlib.sha256()
    for pool in weave.pools.values():
        for parameter in pool.expert(stage).parameters():
            found.update(parameter.detach().numpy().tobytes())
    return found.hexdigest()


@settings(max_examples=12)  # each example trains up to five stages
@given(
    st.integers(1, 5),
    st.sampled_from(["token", "sample"]),
    st.sampled_from(["module", "parent"]),
    st.sampled_from(["all", "new"]),
)
def test_at_stage_is_the_model_of_that_time_bit_for_bit(
    stages: int, granularity: str, share_router: str, router_train: str
) -> None:
    net, weave = build(
        granularity=granularity, share_router=share_router, router_train=router_train
    )
    then: dict[str, Tensor] = {}
    for stage in range(stages):
        weave.unlock(f"s{stage}")
        train(net, weave, adam(weave))
        weave.close()
        weave.call(noisy=False)
        then[f"s{stage}"] = net(X)
    for name, wanted in then.items():
        with weave.at_stage(name):
            assert torch.equal(net(X), wanted)
    weave.unlock("open")
    for name, wanted in then.items():
        with weave.at_stage(name):
            assert torch.equal(net(X), wanted)


def test_at_stage_across_a_block_of_columns() -> None:
    net, weave = build(granularity="sample")
    then = []
    for stage in range(18):
        weave.unlock(f"s{stage}")
        train(net, weave, adam(weave), steps=1)
        weave.close()
        weave.call(noisy=False)
        then.append(net(X))
    for stage, wanted in enumerate(then):
        with weave.at_stage(f"s{stage}"):
            assert torch.equal(net(X), wanted)


def test_rollback_is_at_stage_and_training_goes_on_from_there() -> None:
    net, weave = build()
    for name in ("one", "two", "three"):
        weave.unlock(name)
        train(net, weave, adam(weave))
    with weave.at_stage("two"):
        wanted = net(X)
    optimizer = adam(weave)
    weave.rollback("two")
    weave.sync(optimizer)
    weave.call(noisy=False)
    assert torch.equal(net(X), wanted)
    assert [stage.name for stage in weave.stages] == ["one", "two"]
    assert weave.newest is None and not list(weave.parameters())
    assert not optimizer.param_groups[0]["params"] and not optimizer.state
    weave.unlock("other")
    assert weave.newest == "other"
    with weave.at_stage("two"):
        assert torch.equal(net(X), wanted)


def test_rollback_of_the_open_stage_closes_it() -> None:
    net, weave = build()
    weave.unlock("one")
    train(net, weave, adam(weave))
    weave.rollback("one")
    assert weave.newest is None
    weave.call(noisy=False)
    now = net(X)
    with weave.at_stage("one"):
        assert torch.equal(net(X), now)


def test_a_fresh_expert_and_unload_leave_the_base() -> None:
    net, weave = build()
    base = copy.deepcopy(Net.__call__(net, X))
    with torch.no_grad():
        torch.manual_seed(0)
        assert torch.equal(base, Net()(X))
    weave.unlock("one")
    assert torch.equal(net(X), base)
    train(net, weave, adam(weave))
    weave.call(noisy=False)
    assert not torch.equal(net(X), base)
    weave.unload()
    assert torch.equal(net(X), base)
    assert type(net.to_k) is nn.Linear
    assert all(parameter.requires_grad for parameter in net.parameters())
    with pytest.raises(prw.StageError, match="unload"):
        weave.unload()


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.1),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.1),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05, weight_decay=0.1),
}


@pytest.mark.parametrize("optimizer_name", OPTIMIZERS)
@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("synced", [True, False])
def test_veterans_do_not_move(optimizer_name: str, set_to_none: bool, synced: bool) -> None:
    net, weave = build()
    weave.unlock("one")
    optimizer = OPTIMIZERS[optimizer_name](weave.parameters())
    train(net, weave, optimizer)
    weave.unlock("two")
    if synced:
        weave.sync(optimizer)
    else:
        optimizer.add_param_group({"params": [p for n, p in weave.named_parameters() if ".1" in n]})
    before = digest(weave, 0)
    base = [parameter.clone() for parameter in net.out.parameters()]
    trained = digest(weave, 1)
    for parameter in weave.pools["to_k"].parameters():
        parameter.requires_grad_(True)  # what PEFT's disable_adapter() and set_adapter() do
    for step in range(50):
        with weave.record(key=step):
            loss = (net(X) - 1).square().mean()
        optimizer.zero_grad(set_to_none=set_to_none)
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
    assert digest(weave, 0) == before
    assert digest(weave, 1) != trained
    assert all(p.grad is None for p in weave.pools["to_k"].expert(0).parameters())
    assert all(map(torch.equal, net.out.parameters(), base))


def test_freezing_drops_gradients_that_clipping_would_count() -> None:
    net, weave = build()
    weave.unlock("one")
    net(X).sum().backward()
    assert weave.pools["to_k"].expert(0).A[0].grad is not None
    with pytest.warns(UserWarning, match="no optimizer has stepped it"):
        weave.close()
    assert all(parameter.grad is None for parameter in net.parameters())
    assert not any(parameter.requires_grad for parameter in net.parameters())


@pytest.mark.parametrize("optimizer_name", OPTIMIZERS)
def test_sync_keeps_the_moments_of_survivors(optimizer_name: str) -> None:
    net, weave = build()
    weave.unlock("one")
    other = nn.Parameter(torch.ones(2))
    groups = [
        {"params": [other]},
        {"params": [p for n, p in weave.named_parameters() if ".columns." in n], "lr": 0.1},
        {"params": [p for n, p in weave.named_parameters() if ".experts." in n], "lr": 0.2},
    ]
    optimizer = OPTIMIZERS[optimizer_name](groups)
    other.grad = torch.ones(2)
    train(net, weave, optimizer)
    old = dict(weave.named_parameters())
    kept = {n: copy.deepcopy(optimizer.state[p]) for n, p in old.items() if ".columns." in n}
    weave.unlock("two")
    weave.sync(optimizer)
    new = dict(weave.named_parameters())
    assert [p is other for p in optimizer.param_groups[0]["params"]] == [True]
    for kind, index, rate in ((".columns.", 1, 0.1), (".experts.", 2, 0.2)):
        group = optimizer.param_groups[index]
        wanted = {id(p) for n, p in new.items() if kind in n}
        assert {id(p) for p in group["params"]} == wanted
        assert len(group["params"]) == len(wanted) and group["lr"] == rate
    for name, state in kept.items():
        torch.testing.assert_close(optimizer.state[new[name]], state, rtol=0, atol=0)
    gone = [p for n, p in old.items() if ".experts." in n]
    assert not any(p in optimizer.state for p in gone)
    train(net, weave, optimizer)
    weave.sync(optimizer)
    assert sum(len(g["params"]) for g in optimizer.param_groups) == 1 + len(new)


def test_sync_fills_an_optimizer_that_was_emptied() -> None:
    net, weave = build()
    weave.unlock("one")
    optimizer = adam(weave)
    weave.close()
    weave.sync(optimizer)
    assert not optimizer.param_groups[0]["params"]
    train(net, weave, optimizer, steps=0)
    weave.unlock("two")
    weave.sync(optimizer)
    assert len(optimizer.param_groups[0]["params"]) == len(list(weave.parameters()))


def test_force_route_is_the_expert_alone_with_gate_one() -> None:
    net, weave = build()
    for name in ("one", "two"):
        weave.unlock(name)
        train(net, weave, adam(weave))
    weave.close()
    wanted = Net()
    weave.call()
    with weave.force_route("one"), weave.record() as record:
        found = net(X)
    assert record.usage() == 1.0
    assert all((group["gate"] == 1).all() for group in record.by_group().values())
    for name, layer in (("to_k", wanted.to_k), ("to_v", wanted.to_v), ("out", wanted.out)):
        source = getattr(net, name)
        layer.load_state_dict((source if name == "out" else source.base).state_dict())
    expert = {name: weave.pools[name].expert(0) for name in ("to_k", "to_v")}

    def lora(layer: nn.Module, name: str, x: Tensor) -> Tensor:
        A, B = expert[name].pair(name)
        return layer(x) + nn.functional.linear(nn.functional.linear(x, A), B) * 2.0

    h = X + torch.tanh(lora(wanted.to_k, "to_k", X))
    assert torch.equal(found, wanted.out(torch.tanh(lora(wanted.to_v, "to_v", h))))


def test_calls_bind_until_the_next_one_and_pins_are_undone() -> None:
    net, weave = build()
    for name in ("one", "two"):
        weave.unlock(name)
        train(net, weave, adam(weave))
    weave.call(key=1)
    noisy = net(X)
    assert torch.equal(net(X), noisy)
    weave.call(noisy=False)
    quiet = net(X)
    assert not torch.equal(quiet, noisy)
    with weave.record(key=1) as record:
        assert torch.equal(net(X), noisy)
    counted = int(record.tally.groups["to_k"].count)
    with weave.at_stage("one"):
        net(X)
    assert torch.equal(net(X), noisy), "the record is bound again"
    assert int(record.tally.groups["to_k"].count) == counted, "but it has ended"
    net.eval()
    assert torch.equal(net(X), quiet)
    with pytest.raises(prw.StageError, match="no stage 'three'"), weave.at_stage("three"):
        pass


def test_keys_come_from_torch_seeds() -> None:
    _, weave = build()
    torch.manual_seed(1)
    first = [weave.call().key, weave.record().key]
    torch.manual_seed(1)
    assert [weave.call().key, weave.record().key] == first
    assert first[0] != first[1]


def test_record_reports_groups_and_modes() -> None:
    net, weave = build(granularity="sample")
    weave.unlock("one")
    weave.unlock("two")
    with weave.record() as record:
        net(X)
        net(X)
    groups = record.by_group()
    assert list(groups) == ["to_k", "to_v"]
    assert groups["to_k"]["expert"].shape == groups["to_k"]["gate"].shape == (6,)
    shares = [group["usage"] for group in groups.values()]
    assert record.usage() == pytest.approx(sum(shares) / 2)


def test_a_stage_that_begins_inside_a_record_is_refused() -> None:
    net, weave = build()
    weave.unlock("one")
    with weave.record():
        net(X)
        weave.unlock("two")
        with pytest.raises(prw.StageError, match="began inside a record"):
            net(X)


def test_a_weave_over_no_pools_is_refused() -> None:
    with pytest.raises(prw.ConfigError, match="at least one pool"):
        prw.Weave({}, prw.Config(), fingerprint={})


def test_masks_and_names_of_the_wrong_kind_are_refused() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(6, 6))
    weave = prw.weave(model, prw.Config(target_modules=["0"], rank=2))
    weave.unlock("a")
    weave.close()
    mask = torch.ones(2, 3, dtype=torch.int64)
    for use in (weave.record, weave.call):
        with pytest.raises(prw.ConfigError, match=r"got torch.int64; give mask.bool"):
            use(mask=mask)
        with pytest.raises(prw.ConfigError, match=r"\[batch, context_features\], got a list"):
            use(context=[[1.0]])
        with pytest.raises(prw.ConfigError, match="a key is a whole number of 64 bits, got 1.5"):
            use(key=1.5)
    with (
        pytest.raises(prw.ConfigError, match="a bool tensor"),
        weave.remember("a", mask=mask),
    ):
        raise AssertionError("not reached")
    for pin in (weave.at_stage, weave.force_route):
        with pytest.raises(prw.StageError, match="there is no stage None"), pin(weave.newest):
            raise AssertionError("not reached")


def test_a_record_that_would_count_nothing_says_so() -> None:
    net, weave = build()
    weave.unlock("one")
    with weave.record() as record:
        net(X)
        with weave.at_stage("one"):
            net(X)
        net(X)
    count = int(prw.call.totals([record])[1])
    with pytest.raises(prw.StageError, match="has ended and would count nothing; make a new one"):
        with record:
            raise AssertionError("not reached")
    net(X)
    assert int(prw.call.totals([record])[1]) == count == 2 * 2 * X.shape[0] * X.shape[1]
    first = weave.record()
    weave.call()
    with pytest.raises(prw.StageError, match="would count nothing"), first:
        raise AssertionError("not reached")
    with weave.record() as outer:
        net(X)
        with pytest.raises(prw.StageError, match="would count nothing"), outer:
            raise AssertionError("not reached")
        net(X)
    assert int(prw.call.totals([outer])[1]) == count
    alone = weave.record()  # no block at all
    net(X)
    assert alone.usage() == 1
