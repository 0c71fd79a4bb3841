"""Retention: remembered router inputs, and the loss that keeps their routing."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import prw
from prw.call import spread

WIDTH = 6


def build(stages: int = 2, **fields: Any) -> tuple[nn.Module, prw.Weave]:
    """Two routed linears in fp64, with random router columns and experts."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH)).double()
    config = prw.Config(target_modules=["0", "2"], rank=2, **fields)
    weave = prw.weave(net, config)
    for stage in range(stages):
        weave.unlock(f"s{stage}")
        for parameter in weave.parameters():
            nn.init.normal_(parameter)
    weave.close()
    return net, weave


def inputs(*leading: int) -> Tensor:
    return torch.randn(*leading, WIDTH, dtype=torch.float64)


def columns(weave: prw.Weave) -> list[Tensor]:
    return [p for name, p in weave.named_parameters() if ".router." in name]


def written_down(weave: prw.Weave) -> Tensor:
    """The definition, input by input."""
    groups = []
    for pool in weave.pools.values():
        rows = []
        for stage in weave.stages:
            for h_D in pool.router.memory(stage.index):
                kept = pool.router.snapshot(stage.index)
                assert kept is not None
                p = torch.stack([h_D @ column for column in kept[0]]).softmax(0)
                q = torch.stack([h_D @ column for column in pool.router.signal]).softmax(0)
                rows.append((p * (p.log() - q[: len(p)].log())).sum())
        groups.append(torch.stack(rows).mean())
    return torch.stack(groups).mean()


@given(st.integers(0, 10_000), st.integers(1, 3), st.sampled_from(["token", "sample"]))
def test_value_and_gradient_are_those_of_the_definition(
    seed: int, stages: int, granularity: str
) -> None:
    torch.manual_seed(seed)
    net, weave = build(stages, granularity=granularity)
    for stage in range(stages):
        with weave.remember(f"s{stage}", rows=4):
            net(inputs(3, 5))
    weave.unlock("new")
    for parameter in weave.parameters():
        nn.init.normal_(parameter)
    loss, expected = prw.retention_loss(weave, 0.7), 0.7 * written_down(weave)
    torch.testing.assert_close(loss, expected)
    ours, theirs = (
        torch.autograd.grad(value, columns(weave), materialize_grads=True)
        for value in (loss, expected)
    )
    torch.testing.assert_close(ours, theirs)


def test_only_router_columns_get_a_gradient() -> None:
    net, weave = build(router_train="new")
    with weave.remember("s1"):
        net(inputs(2, 3))
    weave.unlock("new")
    prw.retention_loss(weave, 1.0).backward()
    got = {name for name, p in weave.named_parameters() if p.grad is not None}
    assert got == {f"{pool}.router.signal.2" for pool in weave.pools}


def test_arithmetic_is_at_least_fp32() -> None:
    net, weave = build()
    with weave.remember("s1"):
        net(inputs(2, 3))
    net.to(torch.bfloat16)
    weave.unlock("new")
    assert prw.retention_loss(weave, 1.0).dtype == torch.float32


def test_many_rows_are_thinned_in_any_default_dtype() -> None:
    rows = torch.arange(1000.0)[:, None]
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        kept = spread(rows, 64)
    finally:
        torch.set_default_dtype(before)
    assert len(kept) == 64 and float(kept[0]) == 0 and float(kept[-1]) == 999
    assert spread(rows, 1).tolist() == [[0.0]]


def test_a_record_takes_a_mask_of_samples() -> None:
    net, weave = build(granularity="sample")
    weave.unlock("new")
    with weave.record(mask=torch.tensor([True, False, True])) as record:
        net(inputs(3))
    assert int(record.tally.groups["0"].count) == 2


def test_nothing_remembered_costs_nothing() -> None:
    _, weave = build()
    weave.unlock("new")
    assert float(prw.retention_loss(weave, 1.0)) == 0.0


@pytest.mark.parametrize("granularity", ["token", "sample"])
def test_what_is_remembered_is_what_the_routers_read(granularity: str) -> None:
    net, weave = build(granularity=granularity)
    x, mask = inputs(4, 3), torch.ones(4, 3, dtype=torch.bool)
    with weave.remember("s0", rows=100):
        net(x)
    read = x.flatten(0, 1) if granularity == "token" else x.mean(1)
    torch.testing.assert_close(weave.pools["0"].router.memory(0), read)
    with weave.remember("s0", rows=3):  # replaces, evenly spread, over several forwards
        net(x)
        net(x)
    kept = weave.pools["0"].router.memory(0)
    torch.testing.assert_close(kept[[0, -1]], read[[0, -1]])
    assert len(kept) == 3
    mask[0] = False
    with weave.remember("s0", mask=mask):
        net(x)
    assert len(weave.pools["0"].router.memory(0)) == len(read) - len(read) // 4


def test_inside_the_model_is_that_of_the_stage() -> None:
    net, weave = build(3)
    x = inputs(2, 3)
    with weave.at_stage("s1"):
        expected = net(x)
    with weave.remember("s1"):
        assert torch.equal(net(x), expected)


def test_memory_lives_and_dies_with_its_stage(tmp_path: Path) -> None:
    net, weave = build(3)
    for name in ("s0", "s2"):
        with weave.remember(name, rows=5):
            net(inputs(2, 4))
    weave.save(tmp_path / "weave")
    _, loaded = build(0)
    loaded.load_state(tmp_path / "weave")
    for name, pool in weave.pools.items():
        for stage, rows in ((0, 5), (1, 0), (2, 5)):
            again = loaded.pools[name].router.memory(stage)
            assert len(again) == rows
            assert torch.equal(again, pool.router.memory(stage))
    loaded.rollback("s1")
    loaded.unlock("another")
    loaded.close()
    assert len(loaded.pools["0"].router.memory(0)) == 5
    assert len(loaded.pools["0"].router.memory(2)) == 0


def test_a_block_that_raises_keeps_what_was_there() -> None:
    net, weave = build()
    with weave.remember("s0"):
        net(inputs(2, 3))
    before = weave.pools["0"].router.memory(0)
    with pytest.raises(KeyError), weave.remember("s0"):
        net(inputs(7, 3))
        raise KeyError
    assert weave.pools["0"].router.memory(0) is before


def learn(retain: float) -> tuple[float, float, float]:
    """Two stages on unlike inputs; the veteran's gate on the first ones, before and after."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(WIDTH, WIDTH)).double()
    weave = prw.weave(net, prw.Config(target_modules=["0"], rank=2))
    old, new = inputs(200) + torch.eye(WIDTH)[0] * 3, inputs(200) - torch.eye(WIDTH)[0] * 3
    for name, x in (("first", old), ("second", new)):
        weave.unlock(name)
        optimizer = torch.optim.AdamW(weave.parameters(), lr=0.05)
        for step in range(150):
            with weave.record(key=step) as record:
                loss = (net(x[None]) - x.flip(-1)).square().mean()
            loss = loss + prw.veteran_gate_loss(record, 0.8, 0.5 * (name == "second"))
            loss = loss + prw.retention_loss(weave, retain)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        weave.close()
        with weave.remember(name):
            net(x[None])
    pool = weave.pools["0"]
    net.eval()
    weave.call(noisy=False)
    first, second = pool.route(old[None]), pool.route(new[None])
    return (
        float((first.expert == 0).double().mean()),
        float(first.probs[..., 0].mean()),
        float((second.expert == 1).double().mean()),
    )


def test_a_free_router_returns_old_inputs_to_the_veteran() -> None:
    veteran, gate, newest = learn(retain=1.0)
    assert veteran > 0.95 and gate > 0.9
    assert newest > 0.7  # the new stage still has what the veteran gate grants it
    without, _, _ = learn(retain=0.0)
    assert without < veteran


def test_bad_input_is_refused_in_one_sentence() -> None:
    net, weave = build()
    with pytest.raises(prw.StageError, match="no router may learn now"):
        prw.retention_loss(weave, 1.0)
    weave.unlock("new")
    with pytest.raises(prw.ConfigError, match="weight must be at least 0, got nan"):
        prw.retention_loss(weave, float("nan"))
    with pytest.raises(prw.StageError, match="'new' is still open"), weave.remember("new"):
        net(inputs(2, 3))
    with pytest.raises(prw.ConfigError, match="rows must be at least 1, got 0"):
        with weave.remember("s0", rows=0):
            net(inputs(2, 3))
    with pytest.raises(prw.StageError, match="nothing was routed by '0'"), weave.remember("s0"):
        pass
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    with pytest.raises(prw.StageError, match="nothing was routed by '0'"):
        with weave.remember("s0", mask=nothing):
            net(inputs(2, 3))
    with pytest.raises(prw.ConfigError, match="an input of '0' is not finite"):
        with weave.remember("s0"):
            net(inputs(2, 3) / 0)
    with pytest.raises(prw.StageError, match="there is no stage 'sX'"), weave.remember("sX"):
        pass


def test_a_damaged_memory_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    net, weave = build()
    with weave.remember("s0"):
        net(inputs(2, 3))
    pools = copy.deepcopy(weave.pools)
    weave.save(tmp_path / "weave")
    stored = prw.checkpoint.read(tmp_path / "weave")
    path = tmp_path / "weave" / "router.safetensors"
    tensors = load_file(path)
    tensors["stage-0/0/memory"] = torch.zeros(3, WIDTH + 1)
    save_file(tensors, path)
    with pytest.raises(prw.CheckpointError, match=r"'stage-0/0/memory' is .* needs floats"):
        stored.tensors(pools)
