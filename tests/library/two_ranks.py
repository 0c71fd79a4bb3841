"""What two gloo processes check; `test_distributed` starts them, each with its rank and a folder.

Every scenario compares itself with one process that has the whole batch, in fp64. It writes what
went wrong, or nothing, to ``<scenario>-<rank>.txt``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from two_processes import report

import prw
import prw.distributed

# Sums of at most 80 products in fp64, in two orders.
CLOSE = {"rtol": 1e-10, "atol": 1e-13}


class Net(nn.Module):
    """A projection in, two routed ones that read the same, a projection out."""

    def __init__(self) -> None:
        super().__init__()
        self.to_k = nn.Linear(8, 8)
        self.to_v = nn.Linear(8, 8)
        self.out = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.out(torch.tanh(self.to_k(x)) * self.to_v(x))
        return y


def build(dtype: torch.dtype = torch.float64) -> tuple[Net, prw.Weave]:
    """The same on every rank. The sign of feature 0 decides: below 0 never reaches the newest."""
    torch.manual_seed(0)
    net = Net().to(dtype)
    weave = prw.weave(net, prw.Config(target_modules=["to_k", "to_v"], rank=2, noise=False))
    for name in ("one", "two"):
        weave.unlock(name)
        for parameter in weave.parameters():
            nn.init.normal_(parameter, std=0.1)
    for pool in weave.pools.values():
        pool.columns.signal[1].data[0] = 9.0
    return net, weave


def batch() -> Tensor:
    """Eight samples; the first half, rank 0's, starves the newest expert."""
    torch.manual_seed(1)
    x = torch.randn(8, 5, 8, dtype=torch.float64)
    x[..., 0] = torch.tensor([-1.0] * 4 + [1.0] * 4, dtype=torch.float64)[:, None]
    return x


def losses(records: Any) -> Tensor:
    """Every loss, each with a weight of its own."""
    return (
        prw.veteran_gate_loss(records, 0.8, 0.5)
        + prw.veteran_gate_loss(records, 0.7, 0.3, per="sample")
        + prw.load_balance_loss(records, 0.2)
        + prw.z_loss(records, 0.1)
        + prw.entropy_loss(records, 0.05)
    )


def backward(model: nn.Module, weave: prw.Weave, x: Tensor, *, parts: int = 1) -> prw.Record:
    """Task and losses of one step in one backward."""
    for parameter in weave.parameters():
        parameter.grad = None
    with weave.record(key=1, keep_inputs=True) as record:
        task = torch.stack([model(part).square().mean() for part in x.chunk(parts)]).mean()
    (task + losses(record)).backward()
    return record


def alone(step: Any) -> Any:
    """`step` as if there were no other rank."""
    ranks, prw.losses.ranks = prw.losses.ranks, lambda: 1
    averaging, prw.distributed.ranks = prw.distributed.ranks, lambda: 1
    try:
        return step()
    finally:
        prw.losses.ranks, prw.distributed.ranks = ranks, averaging


def assert_gradients(ours: prw.Weave, theirs: prw.Weave, close: Any = CLOSE) -> None:
    """The same gradient for every parameter that may learn, and none that is absent."""
    wanted = dict(theirs.named_parameters())
    found = dict(ours.named_parameters())
    assert list(found) == list(wanted)
    for name, parameter in wanted.items():
        assert parameter.grad is not None and found[name].grad is not None, name
        torch.testing.assert_close(found[name].grad, parameter.grad, **close, msg=name)


def ddp(rank: int, folder: Path) -> None:
    """DDP without find_unused_parameters; rank 0 never reaches the newest expert."""
    net, weave = build()
    whole_net, whole = build()
    model = DistributedDataParallel(net)
    for _ in range(2):  # the second forward fails where a parameter of the first was not reduced
        record = backward(model, weave, batch().chunk(2)[rank], parts=1)
        alone(lambda: backward(whole_net, whole, batch()))
        assert_gradients(weave, whole)
    group = record.tally.groups["to_k"]
    assert int(group.used) == (0 if rank == 0 else 20)


def fsdp2(rank: int, folder: Path) -> None:
    """FSDP2 shards the base; routed parameters stay whole through growth, saving and loading."""
    net, weave = build()
    whole_net, whole = build()
    kept = prw.distributed.routed_parameters(weave)
    fully_shard(net.to_k, ignored_params=kept)
    fully_shard(net, ignored_params=kept)
    optimizers = [torch.optim.AdamW(w.parameters(), lr=0.01) for w in (weave, whole)]
    for stage in ("two", "three"):
        if stage == "three":
            for found, optimizer in zip((weave, whole), optimizers, strict=True):
                torch.manual_seed(rank if found is weave else 0)
                found.unlock(stage)
                prw.distributed.broadcast(found)
                found.sync(optimizer)
        for _ in range(2):
            backward(net, weave, batch().chunk(2)[rank])
            prw.distributed.average_gradients(weave)
            alone(lambda: backward(whole_net, whole, batch()))
            assert_gradients(weave, whole)
            for optimizer in optimizers:
                optimizer.step()
    weave.close()
    with weave.remember("three"):
        net(batch())
    assert 0 <= weave.consolidate(iterations=5) <= 1
    weave.save(folder / f"saved-{rank}")
    torch.manual_seed(0)
    again = Net().double()
    prw.load(again, folder / f"saved-{rank}")
    torch.testing.assert_close(again(batch()), net(batch()), **CLOSE)


def sharded(rank: int, folder: Path) -> None:
    """Routed parameters that FSDP2 took are refused by name, before anything is written."""
    net, weave = build()
    fully_shard(net)
    for attempt in (lambda: list(weave.parameters()), lambda: weave.save(folder / "never")):
        try:
            attempt()
        except prw.StageError as error:
            assert "ignored_params=prw.distributed.routed_parameters(weave)" in str(error)
        else:
            raise AssertionError("sharded parameters were accepted")
    assert not (folder / "never").exists()


def splits(rank: int, folder: Path) -> None:
    """Losses and gradients for 3 and 5 samples, the latter in two records, with padding."""
    _, weave = build()
    lengths = torch.tensor([5, 3, 1, 4, 5, 2, 2, 5])
    x, mask = batch(), torch.arange(5).expand(8, 5) < lengths[:, None]

    def run(rows: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        records = []
        for part in rows:
            with weave.record(mask[part], key=1, keep_inputs=True) as record:
                for pool in weave.pools.values():
                    outputs = {p: x.new_zeros(*x[part].shape[:-1], 8) for p in pool.projections}
                    pool.add(outputs, x[part])
            records.append(record)
        columns = [p for n, p in weave.named_parameters() if ".columns." in n]
        loss = losses(records)
        return loss.detach(), list(torch.autograd.grad(loss, columns))

    wanted, wanted_gradients = alone(lambda: run([torch.arange(8)]))
    mine = [torch.arange(3)] if rank == 0 else [torch.arange(3, 4), torch.arange(4, 8)]
    loss, gradients = run(mine)
    torch.testing.assert_close(loss, wanted, **CLOSE)
    for found, gradient in zip(gradients, wanted_gradients, strict=True):
        dist.all_reduce(found)
        torch.testing.assert_close(found / 2, gradient, **CLOSE)


SCENARIOS = {"ddp": ddp, "fsdp2": fsdp2, "sharded": sharded, "splits": splits}


if __name__ == "__main__":
    report(SCENARIOS, seconds=60)
