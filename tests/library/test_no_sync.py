"""A forward, a record and every loss leave the device running: no value is read on the host."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import prw

READS = {"_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal", "masked_select"}
"""Operators whose result or shape depends on values: a device has to be waited for."""


class NoReads(TorchDispatchMode):
    """Fails where an operator reads values."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        masks = [
            i for i in (args[1] if name.startswith("index") and len(args) > 1 else [])
            if isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8)
        ] if name in ("index", "index_put", "index_put_") else []  # fmt: skip
        if name in READS or masks:
            raise AssertionError(f"{func} reads values")
        return func(*args, **(kwargs or {}))


def build(**fields: Any) -> tuple[nn.Module, prw.Weave]:
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    weave = prw.weave(model, prw.Config(target_modules=["0", "2"], rank=4, **fields))
    for name in ("one", "two", "three"):
        weave.unlock(name)
    return model, weave


@pytest.mark.parametrize("granularity", ["token", "sample"])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_nothing_is_read_in_a_training_step(granularity: str, backend: str) -> None:
    model, weave = build(granularity=granularity, backend=backend, context_features=2)
    x, context = torch.randn(3, 5, 8), torch.randn(3, 2)
    mask = torch.arange(5).expand(3, 5) < 4
    with weave.record(mask, context, keep_inputs=True) as record, NoReads():
        loss = model(x).square().mean()
        loss = loss + prw.veteran_gate_loss(record, 0.8, 0.5)
        loss = loss + prw.veteran_gate_loss(record, 0.8, 0.5, per="sample")
        loss = loss + prw.load_balance_loss(record, 0.1) + prw.z_loss(record, 0.1)
        loss = loss + prw.entropy_loss(record, 0.1)
        loss.backward()
    assert all(p.grad is not None for p in weave.parameters())


def test_reading_waits_only_when_asked() -> None:
    model, weave = build()
    with weave.record() as record:
        model(torch.randn(3, 5, 8))
    with NoReads():
        record.tally.groups["0"].count.add(1)
        with pytest.raises(AssertionError, match="reads values"):
            record.usage()
