"""The ablation: its loop is the trainer's, its arms get what they claim, its files survive."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def from_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT)


def small() -> Any:
    from benchmarks._ablation_plan import QUICK

    return replace(QUICK, steps=(2, 2, 1, 1, 2))


def test_a_curriculum_gets_the_bits_of_the_trainer(tmp_path: Path) -> None:
    from benchmarks._ablation_plan import Arm, progressive
    from benchmarks._ablation_train import Course
    from prw_flux.rundir import RunFolder
    from prw_flux.session import open_session
    from prw_flux.trainer import open_training_data, train

    protocol = small()
    phases = progressive(protocol, ("inpaint", "ground"))
    config = replace(protocol.config(3), stages=tuple(p.stage for p in phases), remember=3)
    session = open_session(config)
    run = RunFolder.create(tmp_path / "run", config)
    train(run, session, open_training_data(config, session))

    arm = Arm(label="", group="main", phases=phases, adapter={}, remember=3)
    course = Course(arm, protocol, 3)
    course.train(lambda phase: None)
    wanted, found = session.adapter.weave, course.adapter.weave
    assert found.stages == wanted.stages
    for group, pool in wanted.pools.items():
        for name, parameter in pool.named_parameters():
            theirs = dict(found.pools[group].named_parameters())[name]
            assert torch.equal(theirs, parameter), f"{group} {name}"
        for stage in (0, 1):
            ours, theirs_ = pool.columns.snapshot(stage), found.pools[group].columns.snapshot(stage)
            assert ours is not None and theirs_ is not None
            assert torch.equal(ours[0], theirs_[0])
