"""Between steps: held-out loss, grids, routing per block, trackers; the training stays as it is."""

from __future__ import annotations

import importlib.machinery
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from PIL import Image as PILImage

from prw import ConfigError
from prw_flux.config import RunConfig
from prw_flux.data.annotations import PhotoError
from prw_flux.data.choose import open_held_out
from prw_flux.data.photos import PhotoFolder
from prw_flux.grids import tiled
from prw_flux.held_out import HeldOut
from prw_flux.interrupt import Interrupted, Stop
from prw_flux.monitor import warn_of_few
from prw_flux.objective import Objective
from prw_flux.progress import Quiet
from prw_flux.resume import adapter_to_continue
from prw_flux.rundir import RunFolder
from prw_flux.samples import Samples
from prw_flux.session import open_session
from prw_flux.tasks import Example
from prw_flux.tracking import Trackers, require_trackers, tracked
from prw_flux.trainer import open_training_data, train


def go(run: RunFolder, **told: Any) -> None:
    session = open_session(run.config, adapter_to_continue(run))
    train(run, session, open_training_data(run.config, session), **told)


def adapters(run: RunFolder) -> dict[str, bytes]:
    files = sorted(run.adapter.rglob("*.safetensors"))
    return {str(f.relative_to(run.adapter)): f.read_bytes() for f in files}


class Told:
    """A tracker of one's own, that accelerate's are shaped like."""

    name = "told"
    every: ClassVar[list[Told]] = []

    def __init__(self, folder: Path, step: int) -> None:
        self.folder, self.begun_at = folder, step
        self.lines: list[tuple[int, dict[str, Any]]] = []
        self.pictures: list[tuple[int, str, tuple[int, ...]]] = []
        self.state = "made"
        self.every.append(self)

    def start(self) -> None:
        self.state = "started"

    def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
        assert step is not None
        self.lines.append((step, values))

    def log_images(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
        assert step is not None
        self.pictures += [(step, name, picture.shape) for name, picture in values.items()]

    def finish(self) -> None:
        self.state = "finished"


@pytest.fixture
def watched(short_config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> Iterator[RunConfig]:
    """Everything that is measured, every second step, told to `Told`."""
    module = type(sys)("told_trackers")
    module.Told = Told  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "told_trackers", module)
    Told.every.clear()
    yield replace(short_config, stages=short_config.stages[:2]).with_settings(
        ["held_out.samples=5", "held_out.every=2", "sample_every=2", "evaluation.steps=2",
         'trackers=["told_trackers:Told"]', "ema=0.9"]
    )  # fmt: skip


def test_measuring_changes_no_bit_of_training(watched: RunConfig, tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "watched", watched)
    go(run)
    plain = RunFolder.create(
        tmp_path / "plain",
        watched.with_settings(["held_out.samples=0", "sample_every=0", "trackers=[]"]),
    )
    go(plain)
    assert adapters(run) == adapters(plain)
    for mine, theirs in zip(run.read_log(), plain.read_log(), strict=True):
        assert mine["loss"] == theirs["loss"]

    log = run.read_log()
    held = [line for line in log if "held_out_loss" in line]
    assert [(line["stage"], line["step"]) for line in held] == [
        (name, step) for name in ("inpaint", "ground") for step in (2, 3)
    ]
    for line in held:
        assert math.isfinite(line["held_out_loss"]) and math.isfinite(line["held_out_loss_ema"])
        assert line["held_out_loss"] != line["held_out_loss_ema"]
        assert 0 <= line["held_out_usage"] <= 1 and 0 <= line["held_out_margin"] <= 1
    blocks = log[-1]["blocks"]
    assert blocks.keys() == {"usage_noisy", "usage_deterministic", "margin"}
    assert all(len(found) == 2 for found in blocks.values())  # both blocks of the base
    mean = sum(blocks["usage_deterministic"].values()) / 2
    assert log[-1]["usage_deterministic"] == pytest.approx(mean)

    grids = sorted(path.name for path in run.grids.iterdir())
    assert grids == [f"{s}-000000{n}.png" for s in ("ground", "inpaint") for n in (2, 3)]
    with PILImage.open(run.grids / grids[0]) as picture:
        assert picture.size == (4 * 68 - 4, 3 * 68 - 4)

    (tracker,) = Told.every
    assert (tracker.folder, tracker.begun_at, tracker.state) == (run.path, 0, "finished")
    assert json.loads(tracker.lines[0][1]["config"])["ema"] == 0.9
    assert [step for step, _ in tracker.lines] == [0, 1, 2, 3, 4, 5, 6]
    last = tracker.lines[-1][1]
    assert last["ground/held_out_loss"] == log[-1]["held_out_loss"]
    assert sum(name.startswith("ground/blocks/usage_noisy/") for name in last) == 2
    assert [(s, n) for s, n, _ in tracker.pictures] == [
        (2, "inpaint/samples"), (3, "inpaint/samples"),
        (5, "ground/samples"), (6, "ground/samples"),
    ]  # fmt: skip
    assert tracker.pictures[0][2] == (1, 200, 268, 3)


class Leave(Quiet):
    """Asks to stop after the second step of the second stage."""

    def __init__(self, stop: Stop) -> None:
        self.stop, self.stage = stop, ""

    def begin(self, number: int, total: int, stage: Any) -> None:
        self.stage = stage.name

    def stepped(self, done: int) -> None:
        if (self.stage, done) == ("ground", 2):
            self.stop.number = 2


def test_a_resumed_run_goes_on_where_its_trackers_are(watched: RunConfig, tmp_path: Path) -> None:
    whole = RunFolder.create(tmp_path / "whole", watched)
    go(whole)
    cut = RunFolder.create(tmp_path / "cut", watched)
    stop = Stop()
    with pytest.raises(Interrupted):
        go(cut, progress=Leave(stop), stop=stop)
    go(RunFolder.open(cut.path))
    one, first, second = Told.every
    assert (first.begun_at, second.begun_at, first.state) == (0, 5, "finished")
    joined = [*first.lines, *second.lines]
    assert [step for step, _ in joined] == [step for step, _ in one.lines]
    untimed = [
        [{k: v for k, v in line.items() if not k.endswith(("/seconds", "/memory_mib"))}
         for _, line in lines]
        for lines in (joined, one.lines)
    ]  # fmt: skip
    assert untimed[0] == untimed[1]
    for name in sorted(path.name for path in whole.grids.iterdir()):
        assert (cut.grids / name).read_bytes() == (whole.grids / name).read_bytes()


@pytest.fixture(scope="module")
def held_out(short_config: RunConfig) -> Iterator[Any]:
    session = open_session(short_config)
    session.adapter.weave.unlock("inpaint")
    data = open_held_out(short_config, open_training_data(short_config, session))

    def make(**changes: Any) -> HeldOut:
        told = {"seed": 0, "stage": "inpaint", "size": 2, **changes}
        samples = Samples(data, session.tasks[0], session.pipe, stage="x", seed=0, batch_size=2,
                          count=5)  # fmt: skip
        return HeldOut(samples, Objective(short_config, session), **told)

    yield make


def test_the_held_out_loss_is_a_function_of_the_weights(held_out: Any) -> None:
    found = held_out().measure()
    assert found.loss == held_out().measure().loss
    # batches of another size: the same samples, times and noise, other rounding
    assert held_out(size=5).measure().loss == pytest.approx(found.loss, rel=1e-5)
    assert held_out(seed=1).measure().loss != found.loss
    assert sum(r.expert.numel() for r in found.record.tally.groups.popitem()[1].routings) == 5


@pytest.mark.parametrize("source", ["shapeweave", "photos"])
def test_held_out_samples_are_never_trained_on(short_config: RunConfig, source: str) -> None:
    config = short_config.with_settings([f"data.source={source}"])
    session = open_session(replace(config, stages=config.stages[:1]))
    data = open_training_data(config, session)
    other = open_held_out(config, data)
    count = 60
    keys = [{side.example("inpaint", i).key.split("#")[0] for i in range(count)}
            for side in (data, other)]  # fmt: skip
    assert keys[0] and keys[1] and not keys[0] & keys[1]
    if source == "shapeweave":
        scenes = [
            x.example("inpaint", i).metadata["scene"] for x in (data, other) for i in range(20)
        ]
        assert [scene.held_out() for scene in scenes] == [False] * 20 + [True] * 20


class One:
    """A source without sides."""

    name = "one"

    def __len__(self) -> int:
        return 1

    def tasks(self) -> frozenset[str]:
        return frozenset({"inpaint"})

    def example(self, task: str, index: int) -> Example:
        raise NotImplementedError

    def fingerprint(self) -> str:
        return "one"


def test_a_source_without_sides_is_refused(
    short_config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = type(sys)("one_source")
    module.ONE = One()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "one_source", module)
    config = short_config.with_settings(["data.source=one_source:ONE"])
    with pytest.raises(ConfigError, match="is one object, so nothing of it is held out"):
        open_held_out(config, module.ONE)


def test_fewer_held_out_photos_than_samples_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for i in range(3):
        PILImage.fromarray(np.full((48, 64, 3), 40 * i, np.uint8)).save(tmp_path / f"{i}.png")
    held = PhotoFolder(tmp_path, size=32, split="heldout")
    warn_of_few(held, len(held))
    assert not caplog.records
    warn_of_few(held, 4)
    assert (
        f"4 held-out samples are wanted, and the held-out side of {held.name} has {len(held)}:"
        in (caplog.text)
    )


def test_one_photo_cannot_be_on_both_sides(tmp_path: Path) -> None:
    PILImage.fromarray(np.full((48, 64, 3), 90, np.uint8)).save(tmp_path / "a.png")
    assert len(PhotoFolder(tmp_path, size=32)) == 1
    with pytest.raises(PhotoError, match=r"has one photo.*or hold nothing out \("):
        PhotoFolder(tmp_path, size=32, split="heldout")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("tensorbord", "there is no 'tensorbord'; there are tensorboard, wandb, and"),
        ("nowhere_at_all:Tracker", "No module named 'nowhere_at_all'"),
        ("json:Tracker", "json has no 'Tracker'"),
    ],
)
def test_a_tracker_that_there_is_not(name: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        require_trackers([name])


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_missing_package_is_one_sentence(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=f"needs the package {name}.*: pip install {name}, or"):
        require_trackers([name])


def test_tensorboard_goes_on_at_the_step_of_the_state(watched: RunConfig, tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    config = watched.with_settings(['trackers=["tensorboard"]', "save_every=2"])
    run = RunFolder.create(tmp_path / "run", config)

    class Crash(Leave):
        def stepped(self, done: int) -> None:
            if (self.stage, done) == ("ground", 3):
                raise RuntimeError("power failure")

    with pytest.raises(RuntimeError, match="power"):
        go(run, progress=Crash(Stop()))
    go(RunFolder.open(run.path))
    events = accumulator.EventAccumulator(str(run.path / "tensorboard"))
    events.Reload()
    assert [e.step for e in events.Scalars("ground/loss")] == [4, 5, 6]
    assert [e.step for e in events.Images("ground/samples")] == [5, 6]
    written = [line["loss"] for line in run.read_log() if line["stage"] == "ground"]
    assert [e.value for e in events.Scalars("ground/loss")] == pytest.approx(written)


def test_names_of_what_trackers_are_told() -> None:
    line = {"stage": "a", "task": "edit", "step": 3, "loss": 0.5,
            "blocks": {"margin": {"blocks.0": 0.25}}}  # fmt: skip
    assert tracked(line) == {"edit/loss": 0.5, "edit/blocks/margin/blocks.0": 0.25}


def test_a_grid_takes_pictures_of_any_size() -> None:
    small, large = (np.full((n, 2 * n, 3), n, np.uint8) for n in (8, 16))
    grid = tiled([[small, large], [large]])
    assert grid.shape == (36, 68, 3)
    assert (grid[:8, :16] == 8).all() and (grid[8:16, :16] == 255).all()
    assert (grid[:16, 36:] == 16).all() and (grid[20:, :32] == 16).all()


def test_wandb_goes_on_under_the_id_of_the_run(
    short_config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What wandb is told, by a stand-in for the package; `wandb` itself needs an account."""
    begun: list[dict[str, Any]] = []
    logged: list[tuple[int, list[str]]] = []

    class Run:
        def log(self, values: dict[str, Any], step: int) -> None:
            logged.append((step, sorted(values)))

        def finish(self) -> None:
            logged.append((-1, []))

    def init(**told: Any) -> Run:
        begun.append(told)
        return Run()

    module = type(sys)("wandb")
    module.init, module.Image = init, np.asarray  # type: ignore[attr-defined]
    module.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    monkeypatch.setitem(sys.modules, "wandb", module)
    config = short_config.with_settings(['trackers=["wandb"]'])
    path = RunFolder.create(tmp_path / "run", config).path
    for step in (0, 3):
        trackers = Trackers.open(RunFolder.open(path), step)
        trackers.log({"edit/loss": 0.5}, step + 1)
        trackers.picture("edit/samples", np.zeros((4, 4, 3), np.uint8), step + 1)
        trackers.close()
    first, second = begun
    assert first == second and first["resume"] == "allow" and first["project"] == "prw-flux"
    assert first["id"] == RunFolder.open(path).index["wandb"] and len(first["id"]) == 12
    assert [step for step, _ in logged] == [0, 1, 1, -1, 4, 4, -1]
