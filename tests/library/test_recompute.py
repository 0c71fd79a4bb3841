"""Gradients and usage are the same, to the bit, whichever activation checkpointing is on."""

from __future__ import annotations

import copy
import itertools
import sys
import types
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


class Cosine(prw.Router):
    """Logits are cosines, with noise beside them: a router whose Jacobian is not in closed form."""

    def logits(self, h_TD: Tensor, signal: Any, noise: Any, eps_TE: Tensor | None) -> Tensor:
        h_TD = nn.functional.normalize(h_TD, dim=-1)
        logits_TE = h_TD @ nn.functional.normalize(torch.stack(list(signal)), dim=-1).T
        if eps_TE is None:
            return logits_TE
        return logits_TE + eps_TE * nn.functional.softplus(h_TD @ torch.stack(list(noise)).T)


def every_loss(records: prw.Record | list[prw.Record]) -> Tensor:
    """All losses, each with a weight of its own."""
    return (
        prw.veteran_gate_loss(records, 0.8, 0.5)
        + prw.veteran_gate_loss(records, 0.7, 0.3, per="sample")
        + prw.load_balance_loss(records, 0.2)
        + prw.z_loss(records, 0.1)
        + prw.entropy_loss(records, 0.05)
    )


def all_gradients(
    mode: str,
    preserve_rng: bool,
    *,
    parts: int = 1,
    scaler: torch.amp.GradScaler | None = None,
    **fields: Any,
) -> dict[str, Tensor]:
    """Of task and every loss in one step, with context and mask, one record per micro-batch."""
    torch.manual_seed(0)
    model = Model(mode, preserve_rng)
    config = prw.Config(target_modules=["to_k", "to_v"], rank=4, context_features=2, **fields)
    weave = prw.weave(model, config)
    for name in ("one", "two", "three"):
        weave.unlock(name)
        for parameter in weave.parameters():
            nn.init.normal_(parameter, std=0.3)
    x, context = torch.randn(4, 5, 8, requires_grad=True), torch.randn(4, 2)
    mask = torch.arange(5).expand(4, 5) < torch.tensor([5, 3, 4, 1])[:, None]
    scale = (lambda loss: loss) if scaler is None else scaler.scale
    kept = []
    for rows in torch.arange(4).chunk(parts):
        fixed = {"mask": mask[rows], "context": context[rows]}
        kept.append(weave.record(**fixed, key=5, keep_inputs=True))
        loss = model(x[rows]).square().sum() / x.numel()
        if parts > 1:
            scale(loss).backward()
    total = every_loss(kept) + (loss if parts == 1 else 0.0)
    scale(total).backward()
    if scaler is not None:
        optimizer = torch.optim.SGD([*weave.parameters(), x], lr=0.0)
        scaler.unscale_(optimizer)
    gradients = {name: p.grad for name, p in weave.named_parameters()} | {"x": x.grad}
    assert all(gradient is not None for gradient in gradients.values())
    return {"loss": total.detach()} | {n: g for n, g in gradients.items() if g is not None}


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert list(found) == list(wanted)
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("router", ["top1", "cosine"])
@pytest.mark.parametrize("granularity", ["token", "sample"])
def test_every_loss_with_mask_context_and_any_router(
    router: str, granularity: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "top1"
    if router == "cosine":
        home = types.ModuleType("cosine_router")
        home.Cosine = Cosine  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, home.__name__, home)
        name = "cosine_router:Cosine"
    wanted = all_gradients("none", True, router=name, granularity=granularity)
    for mode, preserve_rng in MODES:
        found = all_gradients(mode, preserve_rng, router=name, granularity=granularity)
        assert_same(found, wanted)


@pytest.mark.parametrize(("mode", "preserve_rng"), [("none", True), *MODES])
def test_accumulation_over_records_is_the_whole_batch(mode: str, preserve_rng: bool) -> None:
    # Without noise: it belongs to the position of a row in its forward, which the split moves.
    fields = {"granularity": "sample", "noise": False}
    whole = all_gradients("none", True, **fields)
    found = all_gradients(mode, preserve_rng, parts=2, **fields)
    del whole["loss"], found["loss"]  # one holds the task's loss, too
    # fp32 sums over at most 20 rows in two orders.
    torch.testing.assert_close(found, whole, rtol=2e-5, atol=1e-7)
    assert_same(
        all_gradients(mode, preserve_rng, parts=2),
        all_gradients("none", True, parts=2),
    )


def test_a_gradient_scaler_changes_no_bit() -> None:
    for mode in ("none", "reentrant", "non-reentrant"):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)  # a power of two rounds nothing
        assert_same(all_gradients(mode, True, scaler=scaler), all_gradients(mode, True))


def test_autocast_changes_no_routing() -> None:
    torch.manual_seed(0)
    model = Model("none", True)
    config = prw.Config(target_modules=["to_k", "to_v"], rank=4)
    weave = prw.weave(model, config)
    for name in ("one", "two", "three"):
        weave.unlock(name)
        for parameter in weave.parameters():
            nn.init.normal_(parameter, std=0.3)
    pool, x = weave.pools["blocks.0.to_k"], torch.randn(4, 5, 8)
    weave.call(key=5)
    plain = pool.route(x)
    with torch.autocast("cpu", torch.bfloat16):
        cast = pool.route(x)
        with weave.record(key=5, keep_inputs=True) as record:
            model(x)
        inside = every_loss(record)
    assert all(map(torch.equal, vars(plain).values(), vars(cast).values()))
    outside = every_loss(record)
    ours, theirs = (
        torch.autograd.grad(loss, list(pool.columns.signal)) for loss in (inside, outside)
    )
    assert torch.equal(inside, outside)
    assert all(map(torch.equal, ours, theirs))


def test_averaged_models_follow_a_woven_one_and_leave_veterans_alone() -> None:
    model = Model("none", True)
    weave = prw.weave(model, prw.Config(target_modules=["to_k", "to_v"], rank=4))
    weave.unlock("one")
    weave.unlock("two")
    with weave.record(keep_inputs=True) as record:
        (model(torch.randn(2, 3, 8)).sum() + every_loss_of(weave)).backward()
    assert record.tally.groups
    mean = torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
    averaged = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=mean)
    veterans = {name: p.clone() for name, p in averaged.named_parameters() if ".experts.0." in name}
    optimizer = torch.optim.AdamW(weave.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(5):
        with weave.record(keep_inputs=True):
            loss = model(torch.randn(2, 3, 8)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        averaged.update_parameters(model)
    found = dict(averaged.named_parameters())
    assert veterans and all(torch.equal(found[name], p) for name, p in veterans.items())
    trained = dict(model.named_parameters())
    moved = [n for n in found if not torch.equal(found[n], trained[n.removeprefix("module.")])]
    assert moved and all(".experts.1." in n or ".columns." in n for n in moved)
    assert torch.isfinite(averaged(torch.randn(2, 3, 8))).all()


def every_loss_of(weave: prw.Weave) -> Tensor:
    """The losses of the record that is bound."""
    call = weave._slot.call
    assert isinstance(call, prw.Record)
    return every_loss(call)


@pytest.mark.parametrize("keep_inputs", [False, True])
def test_a_woven_model_can_be_copied_after_a_forward(keep_inputs: bool) -> None:
    model = Model("none", True)
    weave = prw.weave(model, prw.Config(target_modules=["to_k"], rank=2))
    weave.unlock("one")
    with weave.record(keep_inputs=keep_inputs):
        y = model(torch.randn(2, 3, 8))
    y.sum().backward()
    twin = copy.deepcopy(model)
    x = torch.randn(2, 3, 8)
    assert torch.equal(twin(x), model(x))
    twin.blocks[0].to_k.pool.expert(0).B[0].data.fill_(1.0)
    assert not torch.equal(twin(x), model(x))
