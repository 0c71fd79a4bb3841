"""Rename, freeze, thaw, roll back and begin again: what learns, what stays, what is saved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import prw

X = torch.linspace(-2, 2, 3 * 5 * 8).sin().reshape(3, 5, 8)


def base() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))


def woven(*names: str, **fields: Any) -> tuple[nn.Module, prw.Weave]:
    """A model whose last stage is open and whose parameters are random."""
    net = base()
    weave = prw.weave(net, prw.Config(target_modules=["0", "2"], rank=2, **fields))
    for name in names:
        weave.unlock(name)
        for parameter in weave.parameters():
            nn.init.normal_(parameter)
    return net, weave


def train(net: nn.Module, weave: prw.Weave, optimizer: torch.optim.Optimizer) -> None:
    for step in range(3):
        with weave.record(key=step) as record:
            loss = (net(X) - 1).square().mean()
        loss = loss + prw.veteran_gate_loss(record, 0.8, 0.5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def adam(weave: prw.Weave) -> torch.optim.Optimizer:
    return torch.optim.AdamW(weave.parameters(), lr=0.05, weight_decay=0.1)


def experts(weave: prw.Weave, index: int) -> list[Tensor]:
    pools = weave.pools.values()
    return [p.detach().clone() for pool in pools for p in pool.expert(index).parameters()]


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(map(torch.equal, one, other))


def differ(one: list[Tensor], other: list[Tensor]) -> bool:
    return not any(map(torch.equal, one, other))


def test_with_the_newest_frozen_only_routers_learn() -> None:
    net, weave = woven("one", "two")
    optimizer = adam(weave)
    train(net, weave, optimizer)
    weave.freeze("two")
    weave.sync(optimizer)
    assert all(".columns." in name for name, _ in weave.named_parameters())
    assert {id(p) for p in optimizer.param_groups[0]["params"]} == set(map(id, weave.parameters()))
    assert set(optimizer.state) == set(optimizer.param_groups[0]["params"])
    before, columns = experts(weave, 1), [p.detach().clone() for p in weave.parameters()]
    train(net, weave, optimizer)
    assert equal(experts(weave, 1), before)
    assert differ(columns, [p.detach() for p in weave.parameters()])
    weave.thaw("two")
    weave.sync(optimizer)
    train(net, weave, optimizer)
    assert differ(experts(weave, 1), before)
    weave.freeze("two")
    weave.unlock("three")
    assert not any(".experts.1." in name for name, _ in weave.named_parameters())


def test_a_thawed_veteran_learns_until_the_stage_ends_and_its_past_is_gone() -> None:
    net, weave = woven("one", "two", "three", router_train="new")
    with weave.at_stage("one"):
        then = net(X)
    optimizer = adam(weave)
    weave.thaw("one")
    weave.sync(optimizer)
    learning = [name for name, _ in weave.named_parameters()]
    assert any(".experts.0." in name for name in learning)
    assert not any(".columns.signal.0" in name for name in learning), "its column stays frozen"
    old = [experts(weave, index) for index in range(3)]
    with weave.force_route("one"):  # so that every row teaches the veteran
        for _ in range(3):
            optimizer.zero_grad()
            (net(X) - 1).square().mean().backward()
            optimizer.step()
    assert differ(experts(weave, 0), old[0]) and equal(experts(weave, 1), old[1])
    with weave.at_stage("one"):
        assert not torch.equal(net(X), then), "what thawing costs"
    weave.unlock("four")
    weave.sync(optimizer)
    now = experts(weave, 0)
    train(net, weave, optimizer)
    assert equal(experts(weave, 0), now)
    with pytest.raises(prw.StageError, match="no stage 'on'; did you mean 'one'"):
        weave.thaw("on")
    weave.close()
    with pytest.raises(prw.StageError, match="no stage is open, so 'one' cannot learn"):
        weave.thaw("one")


def test_freezing_drops_gradients_and_thawing_gives_them() -> None:
    net, weave = woven("one", "two")
    weave.thaw("one")
    net(X).sum().backward()
    learning = [p for n, p in weave.named_parameters() if ".experts." in n]
    assert len(learning) == 8 and all(p.grad is not None for p in learning)
    weave.freeze("one")
    pool = weave.pools["0"]
    assert all(p.grad is None and not p.requires_grad for p in pool.expert(0).parameters())
    for parameter in pool.expert(0).parameters():
        parameter.requires_grad_(True)
    net(X).sum().backward()
    assert all(p.grad is None for p in pool.expert(0).parameters())


def test_freeze_thaw_and_rename_are_saved(tmp_path: Path) -> None:
    net, weave = woven("one", "two")
    weave.save(tmp_path / "plain")
    stages = json.loads((tmp_path / "plain/prw.json").read_text())["stages"]
    assert stages == [{"name": "one", "open": False}, {"name": "two", "open": True}]
    weave.freeze("two")
    weave.thaw("one")
    weave.rename("one", "first")
    weave.save(tmp_path / "run")
    twin = base()
    loaded = prw.load(twin, tmp_path / "run")
    assert loaded.stages == weave.stages and (tmp_path / "run/experts/0-first").is_dir()
    names = [name for name, _ in loaded.named_parameters()]
    assert names == [name for name, _ in weave.named_parameters()]
    assert any(".experts.0." in n for n in names) and not any(".experts.1." in n for n in names)
    hashes = json.loads((tmp_path / "run/prw.json").read_text())["sha256"]
    train(twin, loaded, adam(loaded))
    loaded.save(tmp_path / "run")
    after = json.loads((tmp_path / "run/prw.json").read_text())["sha256"]
    file = "experts/{}/adapter_model.safetensors"
    assert after[file.format("0-first")] != hashes[file.format("0-first")]
    assert after[file.format("1-two")] == hashes[file.format("1-two")]
    assert prw.load(base(), tmp_path / "run").stages == weave.stages
    weave.load_state(tmp_path / "plain")
    assert weave.newest == "two" and not any(stage.exempt for stage in weave.stages)


def test_a_checkpoint_that_says_nonsense_about_learning_is_damaged(tmp_path: Path) -> None:
    _, weave = woven("one")
    weave.close()
    weave.save(tmp_path / "run")
    index = json.loads((tmp_path / "run/prw.json").read_text())
    index["stages"][0]["exempt"] = True
    (tmp_path / "run/prw.json").write_text(json.dumps(index))
    with pytest.raises(prw.CheckpointError, match="damaged: the expert 'one' cannot learn while"):
        prw.load(base(), tmp_path / "run")


def test_rename_changes_no_bit_and_no_parameter() -> None:
    net, weave = woven("one", "two")
    before = dict(weave.named_parameters())
    with weave.at_stage("one"):
        wanted = net(X)
        with pytest.raises(prw.StageError, match="'one' is pinned now"):
            weave.rename("one", "first")
        weave.rename("two", "second")
    weave.rename("one", "first")
    after = dict(weave.named_parameters())
    assert before.keys() == after.keys() and all(p is after[n] for n, p in before.items())
    assert weave.newest == "second"
    with weave.at_stage("first"):
        assert torch.equal(net(X), wanted)
    with pytest.raises(prw.StageError, match="no stage 'one'"), weave.at_stage("one"):
        pass


def test_a_stage_that_was_rolled_back_can_be_unlocked_again() -> None:
    net, weave = woven("one", "two", "three")
    with weave.at_stage("one"):
        wanted = net(X)
    optimizer = adam(weave)
    train(net, weave, optimizer)
    weave.thaw("one")
    weave.freeze("one")
    dropped = experts(weave, 1)
    weave.rollback("one")
    weave.unlock("two")
    weave.sync(optimizer)
    assert len(weave.stages) == 2 and weave.newest == "two"
    fresh = experts(weave, 1)
    assert differ(fresh, dropped)
    for pool in weave.pools.values():
        assert not any(B.any() for B in pool.expert(1).B)
    with weave.at_stage("one"):
        assert torch.equal(net(X), wanted)
    train(net, weave, optimizer)
    assert differ(experts(weave, 1), fresh)
    with weave.at_stage("one"):
        assert torch.equal(net(X), wanted)
    weave.close()
    weave.call(noisy=False)
    free = net(X)
    weave.unlock("three")
    with weave.at_stage("two"):
        assert torch.equal(net(X), free)
