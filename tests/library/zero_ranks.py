"""What two gloo processes check under DeepSpeed; `test_distributed` starts them like `two_ranks`.

In fp32, since DeepSpeed takes nothing wider.
"""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import deepspeed.ops
import torch
from two_processes import report
from two_ranks import Net, alone, assert_gradients, backward, batch, build, losses

import prw
import prw.distributed

# Sums of at most 80 products in fp32, in two orders.
CLOSE = {"rtol": 1e-5, "atol": 1e-6}
TIGHT = {"stage3_param_persistence_threshold": 0, "stage3_max_live_parameters": 1,
         "stage3_max_reuse_distance": 1, "stage3_prefetch_bucket_size": 0}  # fmt: skip


def settings(stage: int, **zero: Any) -> dict[str, Any]:
    return {"train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": stage, **zero}}


def zero3(rank: int, folder: Path) -> None:
    """ZeRO-3 shards the base; routed parameters stay whole through growth, saving and loading."""
    net, weave = build(torch.float32)
    whole_net, whole = build(torch.float32)
    before = list(net.state_dict())
    with prw.distributed.apart(net, weave):
        assert len(list(net.parameters())) == 6
        engine = deepspeed.initialize(model=net, config=settings(3, **TIGHT))[0]
    assert list(net.state_dict()) == before
    base = [net.to_k.base.weight, net.to_v.base.weight, net.out.weight]
    x = batch().float()
    optimizers = [torch.optim.AdamW(w.parameters(), lr=0.01) for w in (weave, whole)]
    for stage in ("two", "three"):
        if stage == "three":
            for found, optimizer in zip((weave, whole), optimizers, strict=True):
                torch.manual_seed(rank if found is weave else 0)
                found.unlock(stage)
                prw.distributed.broadcast(found)
                found.sync(optimizer)
        for _ in range(2):
            backward(net, weave, x.chunk(2)[rank])
            assert all(w.numel() == 0 and w.ds_tensor.numel() == 32 for w in base)
            prw.distributed.average_gradients(weave)
            alone(lambda: backward(whole_net, whole, x))
            assert_gradients(weave, whole, CLOSE)
            for optimizer in optimizers:
                optimizer.step()
    weave.close()
    with weave.remember("three"):
        net(x)
    assert 0 <= weave.consolidate(iterations=5) <= 1
    weave.save(folder / f"zero3-{rank}")
    torch.manual_seed(0)
    again = Net()
    prw.load(again, folder / f"zero3-{rank}")
    torch.testing.assert_close(again(x), net(x), **CLOSE)
    engine.destroy()


def half(rank: int, folder: Path) -> None:
    """DeepSpeed casts the base under the routed parameters, which keep their bits."""
    net, weave = build(torch.float32)
    before = [parameter.clone() for parameter in weave.parameters()]
    with prw.distributed.apart(net, weave):
        plan = settings(3, **TIGHT) | {"bf16": {"enabled": True}}
        engine = deepspeed.initialize(model=net, config=plan)[0]
    assert net.out.weight.dtype == torch.bfloat16
    backward(net, weave, batch().bfloat16())
    assert all(map(torch.equal, weave.parameters(), before))
    assert all(parameter.grad.dtype == torch.float32 for parameter in weave.parameters())
    engine.destroy()


def taken(rank: int, folder: Path) -> None:
    """Routed parameters that ZeRO-3 took are refused by name, before anything is written."""
    net, weave = build(torch.float32)
    engine = deepspeed.initialize(model=net, config=settings(3, **TIGHT))[0]
    for attempt in (lambda: list(weave.parameters()), lambda: weave.save(folder / "never")):
        try:
            attempt()
        except prw.StageError as error:
            assert "with prw.distributed.apart(model, weave):" in str(error)
        else:
            raise AssertionError("sharded parameters were accepted")
    assert not (folder / "never").exists()
    engine.destroy()


def steps(stage: int, rank: int, folder: Path) -> None:
    """ZeRO-1 and ZeRO-2 step what learns as one process does; a new stage needs a new engine."""
    x = batch().float()
    net, weave = build(torch.float32)
    whole_net, whole = build(torch.float32)
    before = {name: parameter.clone() for name, parameter in whole.named_parameters()}
    for name in ("two", "three"):
        if name == "three":
            for found in (weave, whole):
                torch.manual_seed(0)
                found.unlock(name)
        # momentum and no Adam, which would divide rounding by rounding
        ours, theirs = (
            torch.optim.SGD(w.parameters(), lr=0.1, momentum=0.9) for w in (weave, whole)
        )
        plan = settings(stage) | {"zero_allow_untested_optimizer": True}
        engine = deepspeed.initialize(model=net, optimizer=ours, config=plan)[0]
        for _ in range(3):
            with weave.record(key=1, keep_inputs=True) as record:
                loss = engine(x.chunk(2)[rank]).square().mean()
            engine.backward(loss + losses(record))
            engine.step()
            alone(lambda: backward(whole_net, whole, x))
            theirs.step()
        engine.destroy()
    wanted = dict(whole.named_parameters())
    for name, parameter in weave.named_parameters():
        torch.testing.assert_close(parameter, wanted[name], **CLOSE)
    lasting = [name for name in wanted if name in before]
    assert lasting and not any(torch.equal(wanted[name], before[name]) for name in lasting)
    weave.save(folder / f"zero{stage}-{rank}")
    torch.manual_seed(0)
    again = Net()
    prw.load(again, folder / f"zero{stage}-{rank}")
    assert torch.equal(again(x), net(x))


if __name__ == "__main__":
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled here
    os.environ["LOCAL_RANK"] = sys.argv[1]
    report({"zero3": zero3, "half": half, "taken": taken,
            "zero1": partial(steps, 1), "zero2": partial(steps, 2)})  # fmt: skip
