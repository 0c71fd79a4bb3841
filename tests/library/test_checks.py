"""Arguments that cannot work: one sentence with the value and the fix, and nothing has changed."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import prw
from prw.checks import check_number, check_whole
from prw.losses import load_balance_loss, z_loss

X = torch.linspace(-2, 2, 40 * 8).sin().reshape(40, 8)


def trained() -> tuple[nn.Module, prw.Weave]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    weave = prw.weave(model, prw.Config(target_modules=["0"], rank=2))
    for name in ("one", "two"):
        weave.unlock(name)
        for parameter in weave.parameters():
            nn.init.normal_(parameter)
        weave.close()
        with weave.remember(name):
            model(X)
    return model, weave


def state(weave: prw.Weave) -> list[Tensor]:
    pools = weave.pools.values()
    return [t.clone() for pool in pools for t in (*pool.parameters(), *pool.buffers())]


@pytest.mark.parametrize("value", ["x", None, True, math.nan, math.inf, torch.tensor(0.5), [1]])
def test_what_is_no_number(value: Any) -> None:
    for bad in (value, -0.1, 1.1):
        with pytest.raises(prw.ConfigError, match="^rho must be a finite number from 0 to 1, got"):
            check_number("rho", bad, 0, 1)
    with pytest.raises(prw.ConfigError, match="^n must be a whole number of at least 1, got"):
        check_whole("n", value, 1)
    for good in (0, 1, 0.5, 0.5 + 0.0):
        check_number("rho", good, 0, 1)
    check_whole("n", 1, 1)


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda w: w.consolidate(0), "iterations must be a whole number of at least 1, got 0"),
        (lambda w: w.consolidate(1.5), "iterations must be a whole number .*, got 1.5"),
        (lambda w: w.remember("one", rows=True).__enter__(), "rows must be a whole .*, got True"),
        (
            lambda w: w.merge_average(lambda: X, tolerance=None),
            "tolerance, a relative error, must be a finite number of at least 0, got None",
        ),
    ],
)
def test_methods_of_a_weave(use: Callable[[prw.Weave], object], message: str) -> None:
    model, weave = trained()
    before = state(weave)
    with pytest.raises(prw.ConfigError, match=message):
        use(weave)
    assert all(torch.equal(a, b) for a, b in zip(before, state(weave), strict=True))
    model(X)


def test_losses() -> None:
    model, weave = trained()
    weave.unlock("three")
    with weave.record(keep_inputs=True) as record:
        model(X)
    loss: Any = prw.veteran_gate_loss
    cases: list[tuple[Callable[[], object], str]] = [
        (lambda: loss(record, "x", 0.5), "density must be a finite number from 0 to 1, got 'x'"),
        (lambda: loss(record, 0.8, math.inf), "weight must be a finite .* at least 0, got inf"),
        (lambda: loss(record, 0.8, None), "weight must be a finite .* at least 0, got None"),
        (lambda: z_loss(record, "x"), "weight must be a finite number, got 'x'"),  # type: ignore[arg-type]
        (lambda: load_balance_loss(record, math.nan), "weight must be a finite number, got nan"),
        (lambda: loss("abc", 0.8, 0.5), "takes records, which weave.record.* makes, got 'abc'"),
        (lambda: loss([record, 1], 0.8, 0.5), "takes records"),
        (lambda: loss([], 0.8, 0.5), "at least one record"),
    ]
    for use, message in cases:
        with pytest.raises(prw.ConfigError, match=message):
            use()


def test_a_weave_is_unloaded_once() -> None:
    model, weave = trained()
    weave.unload()
    plain = [(name, type(module)) for name, module in model.named_modules()]
    with pytest.raises(prw.StageError, match="unloaded already; weave or load the model again"):
        weave.unload()
    with pytest.raises(prw.StageError, match="unloaded already; weave or load the model again"):
        weave.unlock("three")
    with pytest.raises(prw.StageError, match="unloaded already; weave or load the model again"):
        weave.merge("one")
    assert [stage.name for stage in weave.stages] == ["one", "two"]
    assert [(name, type(module)) for name, module in model.named_modules()] == plain
    prw.weave(model, weave.config).unload()
