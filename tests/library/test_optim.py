"""`weave.sync`: new parameters in, frozen ones out, moments of survivors kept, any optimizer."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import nn

import prw

X = torch.linspace(-2, 2, 3 * 5 * 8).sin().reshape(3, 5, 8)

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.1),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.1),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.05, weight_decay=0.1),
}


def woven(*names: str) -> tuple[nn.Module, prw.Weave]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    weave = prw.weave(net, prw.Config(target_modules=["0", "2"], rank=2))
    for name in names:
        weave.unlock(name)
    return net, weave


def train(net: nn.Module, weave: prw.Weave, *optimizers: torch.optim.Optimizer) -> None:
    for step in range(2):
        with weave.record(key=step) as record:
            loss = (net(X) - 1).square().mean()
        loss = loss + prw.veteran_gate_loss(record, 0.8, 0.5)
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()


def held(optimizer: torch.optim.Optimizer) -> list[int]:
    return [id(p) for group in optimizer.param_groups for p in group["params"]]


def ids(parameters: Iterable[nn.Parameter]) -> set[int]:
    return {id(parameter) for parameter in parameters}


def check(optimizer: torch.optim.Optimizer, wanted: set[int]) -> None:
    """It holds exactly these, once each, and no state of others."""
    assert set(held(optimizer)) == wanted and len(held(optimizer)) == len(wanted)
    assert ids(optimizer.state) <= wanted


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_whole_life(kind: str, tmp_path: Any) -> None:
    net, weave = woven("one")
    optimizer = OPTIMIZERS[kind](weave.parameters())
    train(net, weave, optimizer)

    def step_on(change: Callable[[], None]) -> None:
        """Change the weave, sync, and compare with the state before; then train on."""
        before = {p: copy.deepcopy(s) for p, s in optimizer.state.items()}
        change()
        values = {p: p.detach().clone() for p in before}
        weave.sync(optimizer)
        check(optimizer, ids(weave.parameters()))
        survivors = [p for p in before if id(p) in set(held(optimizer))]
        for parameter in survivors:
            torch.testing.assert_close(
                optimizer.state[parameter], before[parameter], rtol=0, atol=0
            )
        fresh = [p for p in weave.parameters() if p not in before]
        assert not any(p in optimizer.state for p in fresh)
        assert len(survivors) + len(fresh) == len(held(optimizer))
        frozen = [p for p in before if id(p) not in set(held(optimizer))]
        if list(weave.parameters()):
            train(net, weave, optimizer)
            assert all(p in optimizer.state for p in weave.parameters())
        assert all(torch.equal(p, values[p]) for p in frozen)

    step_on(lambda: weave.unlock("two"))
    step_on(lambda: weave.thaw("one"))
    step_on(lambda: weave.freeze("two"))
    step_on(lambda: weave.freeze("one"))
    step_on(lambda: weave.thaw("two"))
    step_on(weave.close)
    weave.export_expert("two", tmp_path / "two")
    step_on(lambda: weave.import_expert(tmp_path / "two", "import"))
    step_on(lambda: weave.unlock("three"))
    step_on(lambda: weave.rename("three", "third"))
    step_on(lambda: weave.rollback("one"))
    step_on(lambda: weave.unlock("two"))
    weave.save(tmp_path / "run")
    step_on(lambda: weave.unlock("three"))
    step_on(lambda: weave.load_state(tmp_path / "run"))


def matrices(weave: prw.Weave) -> list[nn.Parameter]:
    return [p for p in weave.parameters() if p.dim() == 2]


def vectors(weave: prw.Weave) -> list[nn.Parameter]:
    return [p for p in weave.parameters() if p.dim() == 1]


def test_muon_takes_the_matrices_and_another_the_columns() -> None:
    net, weave = woven("one")
    muon = torch.optim.Muon(matrices(weave), lr=0.05, weight_decay=0.1)
    adam = torch.optim.AdamW(vectors(weave), lr=0.05)
    train(net, weave, muon, adam)
    weave.unlock("two")
    kept = {p: copy.deepcopy(adam.state[p]) for p in vectors(weave) if p in adam.state}
    assert kept
    weave.sync(muon, matrices(weave))
    weave.sync(adam, vectors(weave))
    check(muon, ids(matrices(weave)))
    check(adam, ids(vectors(weave)))
    for parameter, state in kept.items():
        torch.testing.assert_close(adam.state[parameter], state, rtol=0, atol=0)
    train(net, weave, muon, adam)
    assert all("momentum_buffer" in muon.state[p] for p in matrices(weave))
    before = {p: copy.deepcopy(s) for p, s in muon.state.items()}
    weave.thaw("one")
    weave.sync(muon, matrices(weave))
    check(muon, ids(matrices(weave)))
    for parameter, state in before.items():
        torch.testing.assert_close(muon.state[parameter], state, rtol=0, atol=0)
    weave.close()
    weave.sync(muon, matrices(weave))
    check(muon, set())


def test_parameters_of_others_are_not_taken_in() -> None:
    net, weave = woven("one", "two")
    veteran = weave.pools["0"].expert(0).A[0]
    optimizer = OPTIMIZERS["sgd"]([nn.Parameter(torch.ones(1))])
    weave.sync(optimizer, [veteran, *weave.parameters()])
    assert id(veteran) not in held(optimizer)
    assert len(held(optimizer)) == 1 + len(list(weave.parameters()))


def test_an_optimizer_with_names_keeps_them_in_step() -> None:
    net, weave = woven("one")
    optimizer = torch.optim.AdamW(weave.named_parameters(), lr=0.05)
    train(net, weave, optimizer)
    weave.unlock("two")
    weave.sync(optimizer)
    group = optimizer.param_groups[0]
    named = dict(weave.named_parameters())
    assert sorted(group["param_names"]) == sorted(named)
    pairs = zip(group["param_names"], group["params"], strict=True)
    assert all(named[name] is parameter for name, parameter in pairs)
    train(net, weave, optimizer)
    state = optimizer.state_dict()
    other = torch.optim.AdamW(weave.named_parameters(), lr=0.05)
    assert len(state["state"]) == len(held(other))


def test_new_parameters_find_the_group_of_their_kind_again() -> None:
    """Also where nothing of that kind was left in between."""
    model = torch.nn.Sequential(torch.nn.Linear(6, 6))
    weave = prw.weave(model, prw.Config(target_modules=["0"], rank=2))
    weave.unlock("a")
    named = list(weave.named_parameters())
    groups = [
        {"params": [p for n, p in named if ".experts." in n], "lr": 1.0},
        {"params": [p for n, p in named if ".columns." in n], "lr": 2.0},
    ]
    optimizer = torch.optim.SGD(groups, lr=1.0)
    weave.close()
    weave.sync(optimizer)
    assert not any(group["params"] for group in optimizer.param_groups)
    weave.unlock("b")
    weave.sync(optimizer)
    held = [{id(p) for p in group["params"]} for group in optimizer.param_groups]
    for name, parameter in weave.named_parameters():
        assert id(parameter) in held[1 if ".columns." in name else 0], name


@pytest.mark.parametrize("end", ["unlock", "close"])
def test_a_forgotten_sync_is_heard_of(end: str) -> None:
    net, weave = woven("first")
    optimizer = torch.optim.AdamW(weave.parameters(), lr=0.05)
    train(net, weave, optimizer)
    weave.unlock("second")
    train(net, weave, optimizer)
    assert all(not B.any() for pool in weave.pools.values() for B in pool.expert(1).B)
    with pytest.warns(UserWarning, match=r"'second' had gradients.*call weave.sync\(optimizer\)"):
        weave.unlock("third") if end == "unlock" else weave.close()


def test_no_warning_where_nothing_was_forgotten() -> None:
    net, weave = woven("untrained", "first")
    optimizer = torch.optim.AdamW(weave.parameters(), lr=0.05)
    train(net, weave, optimizer)
    weave.unlock("second")
    weave.sync(optimizer)
    train(net, weave, optimizer)
    weave.unlock("third")
    renewed = torch.optim.AdamW(weave.parameters(), lr=0.05)
    train(net, weave, renewed)
    weave.close()
