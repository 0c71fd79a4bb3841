"""Gradients and usage are the same, to the bit, whichever activation checkpointing is on."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import prw


class Block(nn.Module):
    """A residual block with two siblings that share a router."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.to_k = nn.Linear(width, width)
        self.to_v = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return x + torch.tanh(self.to_k(h)) * self.to_v(h)


class Model(nn.Module):
    """Blocks in a row, each recomputed in backward if `mode` says so."""

    def __init__(self, mode: str, preserve_rng: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(8) for _ in range(3))
        self.mode, self.preserve_rng = mode, preserve_rng

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            if self.mode == "none":
                x = block(x)
            else:
                reentrant = self.mode == "reentrant"
                keep = self.preserve_rng
                x = checkpoint(block, x, use_reentrant=reentrant, preserve_rng_state=keep)
        return x


def run(mode: str, preserve_rng: bool, **fields: Any) -> tuple[list[Tensor], float, Tensor]:
    """One step of two micro-batches; returns every gradient, the usage and the veteran loss."""
    torch.manual_seed(0)
    model = Model(mode, preserve_rng)
    weave = prw.weave(model, prw.Config(target_modules=["to_k", "to_v"], rank=2, **fields))
    for name in ("one", "two", "three"):
        weave.unlock(name)
        for parameter in weave.parameters():
            nn.init.normal_(parameter, std=0.3)
    x = torch.randn(2, 4, 5, 8, requires_grad=True)
    with weave.record(key=5) as record:
        for batch in x:
            model(batch).square().mean().backward()
    veteran = prw.veteran_gate_loss(record, 0.8, 0.5)
    veteran.backward()
    gradients = [p.grad for p in (x, *weave.parameters())]
    assert all(g is not None for g in gradients)
    return [g for g in gradients if g is not None], record.usage(), veteran.detach()


MODES = list(itertools.product(["reentrant", "non-reentrant"], [True, False]))


@pytest.mark.parametrize("granularity", ["token", "sample"])
@pytest.mark.parametrize("share_router", ["module", "parent"])
@pytest.mark.parametrize(("mode", "preserve_rng"), MODES)
def test_gradients_loss_and_usage_do_not_change(
    granularity: str, share_router: str, mode: str, preserve_rng: bool
) -> None:
    fields = {"granularity": granularity, "share_router": share_router}
    wanted, wanted_usage, wanted_loss = run("none", True, **fields)
    found, usage, loss = run(mode, preserve_rng, **fields)
    assert usage == wanted_usage, "a recomputed forward must not be counted again"
    assert torch.equal(loss, wanted_loss)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize(("mode", "preserve_rng"), MODES)
def test_one_backward_for_task_and_veteran_loss(mode: str, preserve_rng: bool) -> None:
    def gradients(mode: str, preserve_rng: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model = Model(mode, preserve_rng)
        weave = prw.weave(model, prw.Config(target_modules=["to_k", "to_v"], rank=2))
        weave.unlock("one")
        weave.unlock("two")
        with weave.record(key=5) as record:
            loss = model(torch.randn(4, 5, 8, requires_grad=True)).square().mean()
        (loss + prw.veteran_gate_loss(record, 0.8, 0.5)).backward()
        return [p.grad for p in weave.parameters() if p.grad is not None]

    pairs = zip(gradients(mode, preserve_rng), gradients("none", True), strict=True)
    assert all(torch.equal(found, wanted) for found, wanted in pairs)


def test_a_woven_model_can_be_copied_after_a_forward() -> None:
    model = Model("none", True)
    weave = prw.weave(model, prw.Config(target_modules=["to_k"], rank=2))
    weave.unlock("one")
    with weave.record():
        y = model(torch.randn(2, 3, 8))
    y.sum().backward()
    twin = copy.deepcopy(model)
    x = torch.randn(2, 3, 8)
    assert torch.equal(twin(x), model(x))
    twin.blocks[0].to_k.pool.expert(0).B[0].data.fill_(1.0)
    assert not torch.equal(twin(x), model(x))
