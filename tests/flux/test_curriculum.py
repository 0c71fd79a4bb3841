"""The curriculum is the paper's, and scaling changes its length alone."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prw import ConfigError
from prw_flux.curriculum import PAPER, Stage, scaled


def test_the_paper_table() -> None:
    table = [(s.name, s.task, s.steps, s.batch_size, s.lr, s.density, s.weight) for s in PAPER]
    assert table == [
        ("inpaint", "inpaint", 200_000, 256, 1e-4, 1.0, 0.0),
        ("ground", "ground", 200_000, 256, 1e-4, 0.8, 0.5),
        ("control", "control", 400_000, 128, 1e-4, 0.8, 0.5),
        ("customise", "customise", 50_000, 128, 1e-4, 0.8, 0.5),
        ("edit", "edit", 200_000, 128, 1e-4, 0.8, 0.5),
    ]


@given(st.floats(1e-9, 10.0))
def test_scaling_keeps_order_densities_and_weights(factor: float) -> None:
    stages = scaled(PAPER, factor, batch_size=4)
    assert [(s.name, s.density, s.weight, s.lr) for s in stages] == [
        (s.name, s.density, s.weight, s.lr) for s in PAPER
    ]
    assert all(s.steps >= 1 and s.batch_size == 4 for s in stages)


def test_a_stage_is_named_after_its_task() -> None:
    assert Stage(task="edit", steps=1, batch_size=1).name == "edit"
    assert Stage(task="my_tasks:Colourise", steps=1, batch_size=1).name == "colourise"
    assert Stage(task="edit", name="edit-2", steps=1, batch_size=1).name == "edit-2"


@pytest.mark.parametrize(
    ("field", "value"),
    [("steps", 0), ("batch_size", -1), ("lr", 0.0), ("lr", float("nan")), ("density", 1.1),
     ("weight", -1.0), ("weight", float("inf")), ("name", "../x"), ("steps", "3")],
)  # fmt: skip
def test_a_stage_refuses_what_cannot_work(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=field):
        Stage(**{"task": "edit", "steps": 1, "batch_size": 1, field: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("factor", [0.0, -1.0, float("nan")])
def test_scaling_needs_a_positive_factor(factor: float) -> None:
    with pytest.raises(ConfigError, match="positive factor"):
        scaled(PAPER, factor)
