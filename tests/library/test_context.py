"""Context beside the router's input, and routers of one's own, through their whole life."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import prw
from prw.router import column_product, find_router, router_input

X = torch.linspace(-2, 2, 3 * 5 * 6).sin().reshape(3, 5, 6)
CONTEXT = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 2.0]])


class Scaled(prw.Router):
    """Rows of length one, so that logits cannot grow with the input."""

    def logits(
        self,
        h_TD: Tensor,
        signal: Sequence[Tensor],
        noise: Sequence[Tensor],
        eps_TE: Tensor | None,
    ) -> Tensor:
        return column_product(nn.functional.normalize(h_TD, dim=-1), signal)


class NeedsArguments(Scaled):
    """Cannot be made without arguments."""

    def __init__(self, size: int) -> None:
        self.size = size


class Dangerous:
    """What a configuration must not be able to run."""

    def __init__(self) -> None:
        raise AssertionError("this was called")


@pytest.fixture(autouse=True)
def user_module() -> Iterator[None]:
    """A module like a user's own file."""
    module = ModuleType("users_routers")
    found = {"Scaled": Scaled, "ready": Scaled(), "NeedsArguments": NeedsArguments}
    module.__dict__.update(found, Dangerous=Dangerous, number=3)
    sys.modules["users_routers"] = module
    yield
    del sys.modules["users_routers"]


def build(stages: int = 2, **fields: Any) -> tuple[nn.Module, prw.Weave]:
    model = base()
    weave = prw.weave(model, prw.Config(target_modules=["0", "2"], rank=2, **fields))
    for stage in range(stages):
        weave.unlock(f"s{stage}")
        for parameter in weave.parameters():
            nn.init.normal_(parameter)
    return model, weave


def base() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))


@pytest.mark.parametrize("granularity", ["token", "sample"])
def test_context_is_appended_to_every_row_of_its_sample(granularity: str) -> None:
    rows = router_input(X, granularity, None, CONTEXT)
    plain = router_input(X, granularity, None)
    assert torch.equal(rows[:, :6], plain)
    each = CONTEXT.repeat_interleave(len(plain) // 3, 0)
    assert torch.equal(rows[:, 6:], each)
    empty = router_input(X[:0], granularity, None, CONTEXT[:0])
    assert empty.shape == (0, 8)
    none = router_input(X[:, :0], granularity, None, CONTEXT)
    assert none.shape == ((3, 8) if granularity == "sample" else (0, 8))


@pytest.mark.parametrize("granularity", ["token", "sample"])
def test_routing_follows_the_context(granularity: str) -> None:
    model, weave = build(stages=2, granularity=granularity, context_features=2)
    pools = list(weave.pools.values())
    assert all(p.columns.signal[0].shape == (8,) for p in pools)
    with torch.no_grad():
        for pool in pools:
            pool.columns.signal[0].zero_()
            pool.columns.signal[1].zero_()
            pool.columns.signal[1][6] = 1.0  # the first context feature decides
    weave.call(context=CONTEXT, noisy=False)
    for sample, expert in enumerate((1, 0, 0)):
        routing = pools[0].route(X)
        assert bool((routing.expert[sample] == expert).all())
    model(X)
    before = model(X)[1].clone()
    other = CONTEXT.clone()
    other[0] = -5.0
    weave.call(context=other, noisy=False)
    assert torch.equal(model(X)[1], before), "a sample's context reached another sample"


@pytest.mark.parametrize("granularity", ["token", "sample"])
def test_training_pinning_saving_and_loading_with_context(granularity: str, tmp_path: Path) -> None:
    model, weave = build(stages=2, granularity=granularity, context_features=2)
    optimizer = torch.optim.SGD(weave.parameters(), lr=0.1)
    with weave.record(context=CONTEXT, key=1) as record:
        loss = model(X).square().mean()
    (loss + prw.veteran_gate_loss(record, 0.5, 1.0)).backward()
    for pool in weave.pools.values():
        gradient = pool.columns.signal[1].grad
        assert gradient is not None and bool(gradient[6:].any()), "context columns do not learn"
    optimizer.step()
    weave.close()
    weave.call(context=CONTEXT, noisy=False)
    wanted = model(X)
    with weave.at_stage("s0"):
        weave.call(context=CONTEXT)
        pinned = model(X)
    with weave.remember("s0", rows=3, context=CONTEXT):
        model(X)
    weave.save(tmp_path / "run")
    twin = base()
    loaded = prw.load(twin, tmp_path / "run")
    assert loaded.config.context_features == 2
    loaded.call(context=CONTEXT, noisy=False)
    assert torch.equal(twin(X), wanted)
    with loaded.at_stage("s0"):
        loaded.call(context=CONTEXT)
        assert torch.equal(twin(X), pinned)
    memory = loaded.pools["0"].columns.memory(0)
    assert memory.shape[1] == 8
    other = prw.weave(base(), prw.Config(target_modules=["0", "2"], rank=2))
    with pytest.raises(prw.CheckpointError, match=rf"{granularity}|context_features=2"):
        other.load_state(tmp_path / "run")


def test_context_carries_no_gradient() -> None:
    model, weave = build(context_features=2)
    context = CONTEXT.clone().requires_grad_()
    weave.call(context=context, noisy=False)
    model(X).sum().backward()
    assert context.grad is None


def test_context_is_cast_to_the_arithmetic_of_the_router() -> None:
    model, weave = build(context_features=2)
    for dtype in (torch.bfloat16, torch.float64, torch.int64):
        weave.call(context=CONTEXT.to(dtype), noisy=False)
        assert model(X).dtype == torch.float32


@pytest.mark.parametrize(
    ("width", "context", "message"),
    [
        (2, None, r"context_features=2: give the call context=\[3, 2\], got none"),
        (2, torch.zeros(3, 1), r"context=\[3, 2\], got \[3, 1\]"),
        (2, torch.zeros(2, 2), r"context=\[3, 2\], got \[2, 2\]"),
        (2, torch.zeros(3, 5, 2), r"context=\[3, 2\], got \[3, 5, 2\]"),
        (0, torch.zeros(3, 4), r"context \[3, 4\], but context_features is 0; .*features=4"),
    ],
)
def test_a_context_that_does_not_fit(width: int, context: Tensor | None, message: str) -> None:
    model, weave = build(context_features=width)
    weave.call(context=context)
    with pytest.raises(prw.ConfigError, match=message):
        model(X)


@pytest.mark.parametrize("value", [-1, 1.5, True, "2"])
def test_context_features_is_a_whole_number(value: Any) -> None:
    with pytest.raises(prw.ConfigError, match="context_features must be a whole number"):
        prw.Config(context_features=value)


@pytest.mark.parametrize("router", ["users_routers:Scaled", "users_routers:ready"])
@pytest.mark.parametrize("granularity", ["token", "sample"])
@pytest.mark.parametrize("noise", [True, False])
def test_a_router_of_ones_own_through_its_life(
    router: str, granularity: str, noise: bool, tmp_path: Path
) -> None:
    model, weave = build(stages=3, router=router, granularity=granularity, noise=noise)
    with weave.record(key=1, keep_inputs=True) as record:
        loss = model(X).square().mean()
    loss = loss + prw.veteran_gate_loss(record, 0.8, 0.5) + prw.z_loss(record, 0.1)
    loss.backward()
    assert all(p.columns.signal[0].grad is not None for p in weave.pools.values())
    weave.close()
    weave.call(noisy=False)
    wanted = model(X)
    weave.save(tmp_path / "run")
    twin = base()
    loaded = prw.load(twin, tmp_path / "run")
    assert loaded.config.router == router
    assert torch.equal(twin(X), wanted)
    with loaded.at_stage("s0"), weave.at_stage("s0"):
        assert torch.equal(twin(X), model(X))
    for stage in loaded.stages:
        with loaded.remember(stage.name, rows=4):
            twin(X)
    assert 0 <= loaded.consolidate(iterations=3) <= 1
    other = prw.weave(
        base(), prw.Config(target_modules=["0", "2"], rank=2, granularity=granularity)
    )
    with pytest.raises(prw.CheckpointError, match="has (noise|router)="):
        other.load_state(tmp_path / "run")


def test_plain_top1_may_have_noise_columns_beside_it() -> None:
    model, weave = build(stages=2, router="prw:Top1", noise=True)
    with weave.record(key=1) as record:
        model(X)
    prw.veteran_gate_loss(record, 0.99, 0.5).backward()
    for pool in weave.pools.values():
        assert bool(pool.columns.signal[1].grad.any())  # type: ignore[union-attr]
        assert not pool.columns.noise[1].grad.any()  # type: ignore[union-attr]


def test_a_checkpoint_whose_router_is_not_there(tmp_path: Path) -> None:
    _, weave = build(router="users_routers:Scaled")
    weave.save(tmp_path / "run")
    del sys.modules["users_routers"].__dict__["Scaled"]
    model = base()
    with pytest.raises(
        prw.CheckpointError, match="router 'users_routers:Scaled': users_routers has no 'Scaled'"
    ):
        prw.load(model, tmp_path / "run")
    assert type(model[0]) is nn.Linear  # type: ignore[index]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_module:Router", "'no_such_module:Router': cannot import 'no_such_module'"),
        ("users_routers:Absent", "users_routers has no 'Absent'"),
        (":Router", "'' is not a module's name"),
        (".relative:Router", "'.relative' is not a module's name"),
        ("users_routers:number", "is a int, not a prw.Router"),
        ("users_routers:Dangerous", "is Dangerous, not a prw.Router"),
        ("users_routers:NeedsArguments", "cannot be made: .*missing 1 required"),
        ("prw:Router", "cannot be made: Can't instantiate abstract class Router"),
    ],
)
def test_routers_that_are_none(name: str, message: str) -> None:
    with pytest.raises(prw.ConfigError, match=message):
        find_router(name, noise=True)


@pytest.mark.parametrize("value", ["noisy", "", 3, None])
def test_a_router_is_named_by_module_and_object(value: Any) -> None:
    with pytest.raises(prw.ConfigError, match='router is "top1" or package.module:object'):
        prw.Config(router=value)


def test_the_name_top1_means_noisy_or_plain() -> None:
    assert type(find_router("top1", noise=True)) is prw.NoisyTop1
    assert type(find_router("top1", noise=False)) is prw.Top1


def test_pinned_calls_take_the_context_they_need() -> None:
    model, weave = build(stages=2, context_features=2)
    weave.call(context=CONTEXT, noisy=False)
    free = model(X)
    weave.close()
    with weave.at_stage("s1", context=CONTEXT):
        assert torch.equal(model(X), free)
    with weave.at_stage("s1"), pytest.raises(prw.ConfigError, match="context_features=2"):
        model(X)
    with weave.force_route("s0"):
        model(X)  # a forced route reads no context
