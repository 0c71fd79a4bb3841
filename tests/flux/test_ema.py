"""Averages of what trains: the equation, stages, and where they end up."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from prw import CheckpointError, ConfigError
from prw_flux import PRWAdapter
from prw_flux.config import RunConfig
from prw_flux.ema import Average
from prw_flux.interrupt import Interrupted, Stop
from prw_flux.progress import Quiet
from prw_flux.resume import adapter_to_continue, named_parameters
from prw_flux.rundir import RunFolder
from prw_flux.session import open_session
from prw_flux.trainer import open_training_data, train


@given(st.lists(st.floats(-4, 4), min_size=1, max_size=40), st.floats(0.0, 0.999))
def test_the_equation(values: list[float], decay: float) -> None:
    average, p = Average(decay), nn.Parameter(torch.zeros(1))
    expected = torch.zeros(1)
    for n, value in enumerate(values, start=1):
        with torch.no_grad():
            p.fill_(value)
        average.update([("p", p)])
        keep = min(decay, (n - 1) / (n + 8))
        expected = keep * expected + (1 - keep) * p.detach()
    # each step rounds three times at a magnitude of 4, and earlier errors shrink
    torch.testing.assert_close(average.means["p"], expected, rtol=0, atol=len(values) * 1e-6)


def test_a_new_parameter_starts_fresh_and_a_frozen_one_stays() -> None:
    old, new = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.full((2,), 5.0))
    average = Average(0.9)
    for value in range(30):
        old.data.fill_(float(value))
        average.update([("old", old)])
    kept = average.means["old"].clone()
    assert 15 < float(kept[0]) < 29
    average.begin([("new", new)])
    new.data.fill_(7.0)
    average.update([("new", new)])
    assert torch.equal(average.means["new"], torch.full((2,), 7.0))
    assert torch.equal(average.means["old"], kept)
    with average.applied([("old", old), ("new", new)]):
        assert torch.equal(old, kept)
    assert torch.equal(old, torch.full((2,), 29.0))


def test_an_average_of_another_shape_is_refused() -> None:
    average, p = Average(0.9), nn.Parameter(torch.zeros(2))
    average.update([("p", p)])
    with pytest.raises(CheckpointError, match=r"average of p is \[2\], the parameter \[3\]"):
        Average(0.9).load(average.tensors(), [("p", nn.Parameter(torch.zeros(3)))])


@pytest.mark.parametrize("decay", [1.0, -0.1])
def test_a_decay_outside_is_refused(short_config: RunConfig, decay: float) -> None:
    with pytest.raises(ConfigError, match=r"ema must lie in \[0, 1\)"):
        short_config.with_settings([f"ema={decay}"])


def go(run: RunFolder, progress: Quiet | None = None, stop: Stop | None = None) -> None:
    session = open_session(run.config, adapter_to_continue(run))
    data = open_training_data(run.config, session)
    train(run, session, data, progress=progress, stop=stop)


class Leave(Quiet):
    """Asks to stop at a step of a stage."""

    def __init__(self, stop: Stop, stage: str, step: int) -> None:
        self.stop, self.where, self.stage = stop, (stage, step), ""

    def begin(self, number: int, total: int, stage: Any) -> None:
        self.stage = stage.name

    def stepped(self, done: int) -> None:
        if (self.stage, done) == self.where:
            self.stop.number = 2


def bytes_of(run: RunFolder) -> Mapping[str, bytes]:
    files = [*run.adapter.rglob("*.safetensors"), run.states.paths()[-1] / "ema.safetensors"]
    return {str(f.relative_to(run.path)): f.read_bytes() for f in files}


def test_finished_stages_are_written_averaged(short_config: RunConfig, tmp_path: Path) -> None:
    config = short_config.with_settings(["ema=0.9", "remember=0"])
    run = RunFolder.create(tmp_path / "run", config)
    go(run)
    adapter = PRWAdapter.from_pretrained(run.adapter)
    session = open_session(config, adapter_to_continue(run))
    average = Average(0.9)
    from safetensors.torch import load_file

    tensors = load_file(run.states.paths()[-1] / "ema.safetensors")
    named = list(named_parameters(session.adapter))
    average.load(tensors, named)
    written = dict(named_parameters(adapter))
    experts = [name for name, _ in named if ".columns." not in name]
    assert len(average.means) == len(named) and len(experts) == 3 * 2 * 4  # A and B of K and V
    for name in experts:
        assert torch.equal(average.means[name], written[name]), name
    newest = [name for name in average.raw if ".columns." not in name]
    assert len(newest) == 2 * 4  # of the last stage
    assert all(not torch.equal(average.raw[name], average.means[name]) for name in newest)
    assert {average.counts[name] for name in experts} == {3}


@pytest.mark.parametrize(("stage", "step"), [("inpaint", 2), ("ground", 1), ("control", 3)])
def test_resuming_is_bitwise(
    short_config: RunConfig, tmp_path: Path, stage: str, step: int
) -> None:
    config = short_config.with_settings(["ema=0.9"])
    whole = RunFolder.create(tmp_path / "whole", config)
    go(whole)
    cut = RunFolder.create(tmp_path / "cut", config)
    stop = Stop()
    with pytest.raises(Interrupted):
        go(cut, Leave(stop, stage, step), stop)
    cut = RunFolder.open(cut.path)
    go(cut)
    assert bytes_of(cut) == bytes_of(whole)
    plain = RunFolder.create(tmp_path / "plain", config.with_settings(["ema=0"]))
    go(plain)
    assert not list(plain.states.folder.rglob("ema.safetensors"))
    name = "adapter/experts/0-inpaint/adapter_model.safetensors"
    assert (plain.path / name).read_bytes() != bytes_of(whole)[name]
