"""The feature stream in a run: trained with the experts, saved with them, resumed bit for bit."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from prw import CheckpointError, ConfigError
from prw_flux import CoLoGenPipeline
from prw_flux.cli import main
from prw_flux.config import RunConfig
from prw_flux.coredi import CoReDi, carrying
from prw_flux.interrupt import Interrupted, Stop
from prw_flux.progress import Quiet
from prw_flux.resume import adapter_to_continue
from prw_flux.rundir import RunFolder
from prw_flux.session import open_session
from prw_flux.trainer import open_training_data, train

ENCODER = """
import torch
from prw_flux.coredi import FunctionEncoder

def maps(pixels, grid):
    pooled = torch.nn.functional.adaptive_avg_pool2d(pixels, grid)
    weight = torch.randn(WIDTH, 3, generator=torch.Generator().manual_seed(0))
    return torch.einsum("dc,bcrk->bdrk", weight, pooled).sin()

def encoder():
    return FunctionEncoder(maps, WIDTH)
"""


@pytest.fixture
def config(short_config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    """Two stages of three steps with a feature stream."""
    for width in (10, 11):
        code = ENCODER.replace("WIDTH", str(width))
        (tmp_path / f"encoder_of_{width}.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    config = replace(short_config, stages=short_config.stages[:2])
    return config.with_settings(
        ["coredi.enabled=true", "coredi.encoder=encoder_of_10:encoder", "coredi.channels=3",
         "coredi.drop=0.3", "log_every=1"]
    )  # fmt: skip


def go(run: RunFolder, progress: Quiet | None = None, stop: Stop | None = None) -> Any:
    session = open_session(run.config, adapter_to_continue(run))
    train(run, session, open_training_data(run.config, session), progress=progress, stop=stop)
    return session


def contents(run: RunFolder) -> dict[str, bytes]:
    files = [*run.adapter.rglob("*.safetensors"), *run.coredi.rglob("*.safetensors")]
    return {str(f.relative_to(run.path)): f.read_bytes() for f in sorted(files)}


class StopAfter(Quiet):
    """Asks to stop after some steps of a stage."""

    def __init__(self, stop: Stop, stage: str, step: int) -> None:
        self.told, self.where, self.stage = stop, (stage, step), ""

    def begin(self, number: int, total: int, stage: Any) -> None:
        self.stage = stage.name

    def stepped(self, done: int) -> None:
        if (self.stage, done) == self.where:
            self.told.number = 2


def test_experts_and_projection_train_together_and_resume_bit_for_bit(
    config: RunConfig, tmp_path: Path
) -> None:
    whole = RunFolder.create(tmp_path / "whole", config)
    session = go(whole)
    saved = CoReDi.load(whole.coredi)
    assert list(saved.snapshots) == ["inpaint", "ground"]
    now, first = saved.state_dict(), saved.snapshots["inpaint"]
    for name in ("projection.weight_DK", "stream.embed.weight", "stream.head.weight"):
        assert now[name].any() and not torch.equal(now[name], first[name])
        assert torch.equal(now[name], session.coredi.state_dict()[name])
    log = whole.read_log()
    keys = {"feature_loss", "feature_penalty", "feature_rank", "feature_scale"}
    assert len(log) == 6 and all(keys <= line.keys() for line in log)
    assert all(0 < line["feature_rank"] <= 3.0 + 1e-9 for line in log)

    for stage, step in (("inpaint", 1), ("ground", 2)):
        run = RunFolder.create(tmp_path / stage, config)
        stop = Stop()
        with pytest.raises(Interrupted):
            go(run, StopAfter(stop, stage, step), stop)
        run = RunFolder.open(run.path)
        go(run)
        assert contents(run) == contents(whole)
        assert [line["feature_loss"] for line in run.read_log()] == [
            line["feature_loss"] for line in log
        ]


def test_without_it_nothing_changes(
    config: RunConfig, short_config: RunConfig, tmp_path: Path
) -> None:
    """An image that reads no features trains as ever: the draws of the image come first."""
    off = config.with_settings(["coredi.enabled=false"])
    plain = RunFolder.create(tmp_path / "plain", off)
    go(plain)
    assert not plain.coredi.exists() and "feature_loss" not in plain.read_log()[0]
    dropped = RunFolder.create(tmp_path / "dropped", config.with_settings(["coredi.drop=1"]))
    go(dropped)
    ours, theirs = (
        {k: v for k, v in contents(run).items() if k.startswith("adapter")}
        for run in (plain, dropped)
    )
    assert ours.keys() == theirs.keys()
    assert [line["loss"] for line in plain.read_log()[:1]] == [
        line["loss"] for line in dropped.read_log()[:1]
    ]


def test_a_finished_run_is_extended_with_its_stream(config: RunConfig, tmp_path: Path) -> None:
    whole = RunFolder.create(tmp_path / "whole", config)
    go(whole)
    first = RunFolder.create(tmp_path / "first", replace(config, stages=config.stages[:1]))
    go(first)
    more = RunFolder.create(tmp_path / "more", config, parent=first)
    go(more)
    assert contents(more) == contents(whole)

    wider = config.with_settings(["coredi.encoder=encoder_of_11:encoder"])
    with pytest.raises(CheckpointError, match="features of width 10, this encoder gives 11"):
        open_session(wider, adapter_to_continue(first))
    other = config.with_settings(["coredi.layout=token"])
    with pytest.raises(ConfigError, match="coredi.layout 'latent', this run asks for 'token'"):
        open_session(other, adapter_to_continue(first))


def test_a_trained_stream_is_carried_by_the_pipeline_of_its_run(
    config: RunConfig, tmp_path: Path
) -> None:
    run = RunFolder.create(tmp_path / "run", config.with_settings(["data.samples=none"]))
    go(run)
    pipe = CoLoGenPipeline.from_pretrained(run.path)
    pipe.set_progress_bar_config(disable=True)
    coredi = CoReDi.load(run.coredi).eval()
    with carrying(pipe.transformer, coredi, generator=torch.Generator()) as carried:
        pipe(
            prompt="a red star",
            image=torch.rand(3, 64, 64),
            task="inpaint",
            num_inference_steps=2,
            output_type="latent",
            generator=torch.Generator(),
        )
    assert carried.features_BTF is not None and carried.features_BTF.shape == (1, 16, 12)
    assert coredi.snapshots["inpaint"].keys() == coredi.state_dict().keys()

    pictures = []
    for route in ("free", "stage:inpaint", None):
        if route is None:
            shutil.rmtree(run.coredi)
        out = tmp_path / f"{len(pictures)}.png"
        Image.new("RGB", (64, 64), (200, 30, 30)).save(tmp_path / "source.png")
        command = ["generate", "--run", str(run.path), "--prompt", "a red star", "--steps", "2",
                   "--image", str(tmp_path / "source.png"), "--task", "inpaint", "--json",
                   "--route", route or "free", "--out", str(out)]  # fmt: skip
        assert main(command) == 0
        pictures.append(np.asarray(Image.open(out)))
    assert not np.array_equal(pictures[0], pictures[2])
    assert not np.array_equal(pictures[0], pictures[1])


def test_collapse_is_told_by_the_trainer(
    config: RunConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = RunFolder.create(tmp_path / "run", config.with_settings(["coredi.warn_rank=1"]))
    with caplog.at_level(logging.WARNING, "prw_flux.coredi.collapse"):
        go(run)
    told = [r.getMessage() for r in caplog.records if "features collapse" in r.getMessage()]
    assert len(told) == 2  # once a stage
    assert "raise coredi.covariance" in told[0]


def test_a_batch_of_one_is_refused_before_anything_begins(config: RunConfig) -> None:
    with pytest.raises(ConfigError, match=r"batch of one: raise stages.ground.batch_size"):
        config.with_settings(["stages.ground.batch_size=1"])
    config.with_settings(["coredi.normalise=none", "stages.ground.batch_size=1"])


def test_a_damaged_stream_is_refused(config: RunConfig, tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run", replace(config, stages=config.stages[:1]))
    go(run)
    file = run.states.paths()[-1] / "coredi" / "coredi.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"schema_version": 9}))
    with pytest.raises(CheckpointError, match="schema version 9, .* install a newer prw"):
        open_session(run.config, run.states.paths()[-1] / "adapter")
    assert load_file(run.coredi / "coredi.safetensors")["now/projection.fitted"]
