"""A cast of the whole model is a cast of its base: routers and experts keep their bits."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import prw

X = torch.linspace(-2, 2, 3 * 5 * 8).sin().reshape(3, 5, 8)
CASTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "bfloat16": lambda model: model.bfloat16(),
    "half": lambda model: model.half(),
    "to": lambda model: model.to("cpu", torch.bfloat16),
    "type": lambda model: model.type(torch.bfloat16),
}


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))


def grown(model: nn.Module, **fields: Any) -> prw.Weave:
    config = prw.Config(target_modules=["0", "2"], rank=2, **fields)
    weave = prw.weave(model, config)
    torch.manual_seed(1)
    for name in ("one", "two"):
        weave.unlock(name)
        for parameter in weave.parameters():
            nn.init.normal_(parameter)
    weave.call(noisy=False)
    return weave


def tensors(weave: prw.Weave) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, pool in weave.pools.items():
        found |= {f"{name}.{n}": t for n, t in pool.named_parameters()}
        found |= {f"{name}.{n}": t for n, t in pool.named_buffers()}
    return found


@pytest.mark.parametrize("share_router", ["module", "parent"])
@pytest.mark.parametrize("cast", CASTS)
def test_weaving_and_casting_commute(tmp_path: Path, cast: str, share_router: str) -> None:
    late, early = net(), CASTS[cast](net())
    weave = grown(late, share_router=share_router)
    wanted = {name: tensor.clone() for name, tensor in tensors(weave).items()}
    learning = list(weave.parameters())
    weave.save(tmp_path / "before")
    CASTS[cast](late)
    assert {p.dtype for p in late.parameters()} > {torch.float32}, "the base was cast"
    torch.testing.assert_close(tensors(weave), wanted, rtol=0, atol=0)
    assert all(a is b for a, b in zip(weave.parameters(), learning, strict=True))
    other = grown(early, share_router=share_router)
    x = X.to(early[0].weight.dtype)
    with weave.record(key=1) as ours, other.record(key=1) as theirs:
        found, expected = late(x), early(x)
    assert found.dtype == x.dtype and torch.equal(found, expected)
    assert ours.usage() == theirs.usage()
    for model, record in ((late, ours), (early, theirs)):
        loss = model(x).float().square().mean()
        (loss + prw.veteran_gate_loss(record, 0.3, 0.5)).backward()
    for mine, reference in zip(weave.parameters(), other.parameters(), strict=True):
        assert mine.grad is not None and mine.grad.dtype == torch.float32
        torch.testing.assert_close(mine.grad, reference.grad, rtol=0, atol=0)
    weave.unlock("three")
    assert all(parameter.dtype == torch.float32 for parameter in weave.parameters())
    weave.save(tmp_path / "after")
    name = "experts/0-one/adapter_model.safetensors"
    assert (tmp_path / "before" / name).read_bytes() == (tmp_path / "after" / name).read_bytes()


def test_wider_types_and_other_devices_are_followed() -> None:
    model = net()
    weave = grown(model)
    before = {name: tensor.clone() for name, tensor in tensors(weave).items()}
    with weave.at_stage("one"):
        single = model(X)
    model.double()
    assert all(tensor.dtype == torch.float64 for tensor in tensors(weave).values())
    with weave.at_stage("one"):
        torch.testing.assert_close(model(X.double()).float(), single, rtol=1e-5, atol=1e-5)
    model.float()
    torch.testing.assert_close(tensors(weave), before, rtol=0, atol=0)
    twin = copy.deepcopy(model)
    twin.to("meta", torch.bfloat16)
    assert all(p.is_meta for p in twin.parameters())
    assert twin[0].pool.columns.signal[0].dtype == torch.float32


def test_experts_alone_can_be_cast_and_routers_cannot() -> None:
    model = net()
    weave = grown(model)
    for pool in weave.pools.values():
        pool.to(torch.bfloat16)
    kinds = {n.partition(".")[2].split(".")[0]: t.dtype for n, t in tensors(weave).items()}
    assert kinds == {"experts": torch.bfloat16, "columns": torch.float32}
    model.half()
    assert weave.pools["0"].expert(0).A[0].dtype == torch.bfloat16, "not rounded once more"
    assert model(X.half()).dtype == torch.float16


def test_the_same_under_peft(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from prw.integrations.peft import PRWPeftConfig, weave_of

    settings = PRWPeftConfig(target_modules=["0", "2"], rank=2, stages=["one", "two"])
    model = peft.get_peft_model(net(), settings)
    weave = weave_of(model)
    for parameter in weave.parameters():
        nn.init.normal_(parameter)
    weave.close()
    wanted = {name: tensor.clone() for name, tensor in tensors(weave).items()}
    model.bfloat16()
    torch.testing.assert_close(tensors(weave), wanted, rtol=0, atol=0)
    assert model.base_model.model[0].base_layer.weight.dtype == torch.bfloat16
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(net().bfloat16(), tmp_path)
    assert torch.equal(again(X.bfloat16()), model(X.bfloat16()))
