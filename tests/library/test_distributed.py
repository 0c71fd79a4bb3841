"""DDP, FSDP2 and ZeRO on two processes give the gradients of one process with the whole batch."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from two_processes import require_quiet, run_two

import prw
import prw.distributed

WORKER = Path(__file__).with_name("two_ranks.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two ranks wrote what they found."""
    made = tmp_path_factory.mktemp("ranks")
    run_two(WORKER, made)
    return made


@pytest.mark.parametrize("scenario", ["ddp", "fsdp2", "sharded", "splits"])
@pytest.mark.parametrize("rank", [0, 1])
def test_two_ranks_are_one_process(folder: Path, scenario: str, rank: int) -> None:
    require_quiet(folder, scenario, rank)


@pytest.fixture(scope="module")
def zero_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two ranks wrote what they found under DeepSpeed."""
    made = tmp_path_factory.mktemp("zero")
    run_two(WORKER.with_name("zero_ranks.py"), made)
    return made


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed: pip install deepspeed"
)
@pytest.mark.parametrize("scenario", ["zero3", "half", "taken", "zero1", "zero2"])
@pytest.mark.parametrize("rank", [0, 1])
def test_two_ranks_under_deepspeed_are_one_process(
    zero_folder: Path, scenario: str, rank: int
) -> None:
    require_quiet(zero_folder, scenario, rank)


def test_apart_from_its_pools_a_model_has_its_base_only() -> None:
    net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    weave = prw.weave(net, prw.Config(target_modules=["0"], rank=2))
    weave.unlock("one")
    before = [name for name, _ in net.named_parameters()]
    with pytest.raises(RuntimeError, match="inside"), prw.distributed.apart(net, weave):
        assert len(list(net.parameters())) == 4
        raise RuntimeError("inside")
    assert [name for name, _ in net.named_parameters()] == before
    assert len(before) > 4 and net(torch.ones(1, 4)).shape == (1, 4)


def test_alone_there_is_nothing_to_average() -> None:
    net = torch.nn.Sequential(torch.nn.Linear(4, 4))
    weave = prw.weave(net, prw.Config(target_modules=["0"], rank=2))
    weave.unlock("one")
    before = [p.clone() for p in weave.parameters()]
    prw.distributed.broadcast(weave)
    prw.distributed.average_gradients(weave)
    assert all(map(torch.equal, weave.parameters(), before))
    assert all(p.grad is None for p in weave.parameters())
    assert prw.distributed.routed_parameters(weave) == set(weave.pools["0"].parameters())
