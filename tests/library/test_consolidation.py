"""Remembered router inputs, and consolidation: their routing is given back to their stages."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import prw
from prw.call import spread
from prw.consolidation import Remembered, fit
from prw.router import Top1

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


@pytest.mark.parametrize("granularity", ["token", "sample"])
def test_what_is_remembered_is_what_the_routers_read(granularity: str) -> None:
    net, weave = build(granularity=granularity)
    x, mask = inputs(4, 3), torch.ones(4, 3, dtype=torch.bool)
    with weave.remember("s0", rows=100):
        net(x)
    read = x.flatten(0, 1) if granularity == "token" else x.mean(1)
    torch.testing.assert_close(weave.pools["0"].columns.memory(0), read)
    with weave.remember("s0", rows=3):  # replaces, evenly spread, over several forwards
        net(x)
        net(x)
    kept = weave.pools["0"].columns.memory(0)
    torch.testing.assert_close(kept[[0, -1]], read[[0, -1]])
    assert len(kept) == 3
    mask[0] = False
    with weave.remember("s0", mask=mask):
        net(x)
    assert len(weave.pools["0"].columns.memory(0)) == len(read) - len(read) // 4


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
            again = loaded.pools[name].columns.memory(stage)
            assert len(again) == rows
            assert torch.equal(again, pool.columns.memory(stage))
    loaded.rollback("s1")
    loaded.unlock("another")
    loaded.close()
    assert len(loaded.pools["0"].columns.memory(0)) == 5
    assert len(loaded.pools["0"].columns.memory(2)) == 0


def test_a_block_that_raises_keeps_what_was_there() -> None:
    net, weave = build()
    with weave.remember("s0"):
        net(inputs(2, 3))
    before = weave.pools["0"].columns.memory(0)
    with pytest.raises(KeyError), weave.remember("s0"):
        net(inputs(7, 3))
        raise KeyError
    assert weave.pools["0"].columns.memory(0) is before


def remember_all(net: nn.Module, weave: prw.Weave, rows: int = 40) -> dict[str, Tensor]:
    """Let every stage remember a cluster of its own, most of which its router sends to its expert.

    Returns the inputs of the first layer.
    """
    seen = {}
    for number, stage in enumerate(weave.stages):
        x = seen[stage.name] = inputs(1, rows) + 4 * torch.eye(WIDTH, dtype=torch.float64)[number]
        for pool, h in zip(weave.pools.values(), (x, torch.tanh(net[0](x))), strict=True):
            columns = torch.zeros(number + 1, WIDTH, dtype=torch.float64)
            columns[number] = 3 * h.detach().mean((0, 1)) / h.detach().mean((0, 1)).square().sum()
            pool.columns.put_snapshot(number, columns, columns)
        with weave.remember(stage.name, rows):
            net(x)
    return seen


@torch.no_grad()
def routed(weave: prw.Weave, x: Tensor, stage: str | None) -> Tensor:
    """Probabilities of the first layer, over all experts."""
    call = prw.Call(stage=stage)
    probs = weave.pools["0"].route(x, call).probs[0]
    return nn.functional.pad(probs, (0, len(weave.stages) - probs.shape[1]))


@pytest.mark.parametrize("stages", [1, 2, 3, 5])
def test_consolidation_gives_inputs_back_to_their_stage(stages: int) -> None:
    torch.manual_seed(stages)
    net, weave = build(stages)
    seen = remember_all(net, weave)
    pinned = {name: routed(weave, x, name) for name, x in seen.items()}
    before = [float((routed(weave, x, None) - pinned[n]).abs().mean()) for n, x in seen.items()]
    snapshots = [
        pool.columns.snapshot(s) for pool in weave.pools.values() for s in range(stages - 1)
    ]
    parameters = [list(pool.columns.signal) for pool in weave.pools.values()]

    share = weave.consolidate()

    assert share > 0.8
    after = [float((routed(weave, x, None) - pinned[n]).abs().mean()) for n, x in seen.items()]
    assert stages == 1 or sum(after) < 0.4 * sum(before)
    # earlier stages are untouched, the last one ends with this router, and an optimizer still holds
    # the live columns
    with weave.at_stage(f"s{stages - 1}"):
        last = net(seen["s0"])
    assert torch.equal(net(seen["s0"]), last)
    assert all(len(pool.columns.memory(stages - 1)) for pool in weave.pools.values())
    again = [pool.columns.snapshot(s) for pool in weave.pools.values() for s in range(stages - 1)]
    assert all(a is not None and b is not None and torch.equal(a[0], b[0])
               for a, b in zip(snapshots, again, strict=True))  # fmt: skip
    for pool, held in zip(weave.pools.values(), parameters, strict=True):
        assert all(a is b for a, b in zip(pool.columns.signal, held, strict=True))


def test_a_fit_that_fails_changes_no_router() -> None:
    net, weave = build(2)
    remember_all(net, weave)
    weave.pools["2"].columns.memory(1)[0, 0] = torch.nan  # the second group, after a good first
    before = weave.pools["0"].columns.state()[0]
    with pytest.raises(prw.StageError, match="the fit for '2' is not finite; nothing was changed"):
        weave.consolidate()
    assert torch.equal(weave.pools["0"].columns.state()[0], before)


def test_the_fit_is_the_minimum() -> None:
    """Convex: at the result, the gradient of the objective is nearly zero."""
    torch.manual_seed(0)
    known = Remembered(inputs(50), torch.rand(50, 3, dtype=torch.float64).softmax(-1))
    start = torch.randn(3, WIDTH, dtype=torch.float64)
    columns = fit(Top1(), known, start, 100).requires_grad_()
    log_q = (known.h_MD @ columns.T).log_softmax(-1)
    loss = nn.functional.kl_div(log_q, known.p_ME, reduction="batchmean")
    loss.backward()
    assert columns.grad is not None
    assert float(columns.grad.abs().max()) < 1e-4


def test_a_new_expert_is_not_locked_out_by_grown_logits() -> None:
    net, weave = build(3)
    seen = remember_all(net, weave)
    weave.consolidate()
    columns = torch.stack([c.detach() for c in weave.pools["0"].columns.signal])
    assert float(columns.norm(dim=1).max()) > 1  # they have grown
    weave.unlock("new")
    probs = torch.cat([routed(weave, x, None) for x in seen.values()])
    assert 0.1 < float(probs[:, -1].mean()) < 0.9


def test_bad_input_is_refused_in_one_sentence() -> None:
    net, weave = build()
    with pytest.raises(prw.StageError, match="'0' remembers nothing yet"):
        weave.consolidate()
    weave.unlock("new")
    with pytest.raises(prw.StageError, match="'new' is open; close it before"):
        weave.consolidate()
    with pytest.raises(prw.StageError, match="'new' is still open"), weave.remember("new"):
        net(inputs(2, 3))
    with pytest.raises(prw.ConfigError, match="rows must be a whole number of at least 1, got 0"):
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


class TwoReaders(nn.Module):
    """Two linears of one parent and one width that read different things."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.third = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.third(torch.tanh(self.first(x) * 3 + self.second(x)))
        return out


@pytest.mark.parametrize("granularity", ["token", "sample"])
def test_every_layer_of_a_shared_router_is_remembered(granularity: str) -> None:
    """Beside what the first layer reads: a fit that never saw the rest would ruin it."""
    torch.manual_seed(0)
    model = TwoReaders().double()
    config = prw.Config(
        target_modules=["first", "second", "third"],
        rank=1,
        granularity=granularity,  # type: ignore[arg-type]
        share_router="parent",
    )
    weave = prw.weave(model, config)
    (pool,) = weave.pools.values()
    given = {}
    for number, name in enumerate(("a", "b")):
        weave.unlock(name)
        for parameter in weave.parameters():
            nn.init.normal_(parameter)
        weave.close()
        given[name] = inputs(40, 3) + 4 * torch.eye(WIDTH, dtype=torch.float64)[number]
    for name, x in given.items():
        with weave.remember(name, rows=20):
            model(x)
    memory = pool.columns.memory(0)
    assert len(memory) == 40  # first and second read the same and keep it once; third keeps its own
    with weave.at_stage("a"):
        read = torch.tanh(model.first(given["a"]) * 3 + model.second(given["a"])).detach()
    read = read.mean(1) if granularity == "sample" else read.flatten(0, 1)
    distance = torch.cdist(memory[20:], read).amin(1)
    torch.testing.assert_close(distance, torch.zeros_like(distance), rtol=0, atol=1e-7)
    share = weave.consolidate(300)
    with weave.at_stage("a"):
        wanted = pool.route(read[None]).expert
    free = pool.route(read[None]).expert
    assert float((free == wanted).double().mean()) > share - 0.2
