"""Faults, each done for real: afterwards nothing is lost but the work since the last state."""

from __future__ import annotations

import json
import logging
import math
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from flux.failing import failing

import prw_flux.trainer as trainer_module
from prw import CheckpointError
from prw_flux.config import RunConfig
from prw_flux.draws import SampleError
from prw_flux.interrupt import Interrupted, Stop
from prw_flux.progress import Quiet
from prw_flux.resume import adapter_to_continue, save_state
from prw_flux.rundir import RunFolder
from prw_flux.session import open_session
from prw_flux.shapeweave.source import ShapeWeave
from prw_flux.states import States, verified
from prw_flux.tasks import DataSource, Example
from prw_flux.trainer import TrainingError, open_training_data, train
from prw_flux.waiting import waiting


def go(run: RunFolder, data: DataSource | None = None, **told: Any) -> None:
    session = open_session(run.config, adapter_to_continue(run))
    train(run, session, data or open_training_data(run.config, session), **told)


def contents(run: RunFolder) -> dict[str, bytes]:
    files = [*run.adapter.rglob("*.safetensors"), *run.states.paths()[-1].rglob("*.safetensors")]
    return {str(f.relative_to(run.path)): f.read_bytes() for f in files}


@pytest.fixture(scope="module")
def config(short_config: RunConfig) -> RunConfig:
    return replace(short_config, stages=short_config.stages[:2]).with_settings(["ema=0.9"])


@pytest.fixture(scope="module")
def whole(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run that nothing disturbed."""
    run = RunFolder.create(tmp_path_factory.mktemp("whole") / "run", config)
    go(run)
    return run


@pytest.mark.slow
def test_a_full_disk_at_every_write_of_every_save(
    whole: RunFolder, config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: Counter[str] = Counter()

    def stubborn(run: RunFolder, *args: Any) -> None:
        for at in range(1000):
            before = States(run.states.folder).newest()
            try:
                with failing(at) as writes:
                    save_state(run, *args)
            except CheckpointError as problem:
                tried[writes[-1]] += 1
                assert "No space left on device" in str(problem)
                assert f"prw-flux train --resume {run.path}" in str(problem)
            else:
                return
            after = States(run.states.folder).newest()  # verifies all of it
            if before is not None:
                assert after is not None and after.path.name >= before.path.name

    monkeypatch.setattr("prw_flux.learners.save_state", stubborn)
    run = RunFolder.create(tmp_path / "run", config)
    go(run)
    assert contents(run) == contents(whole)
    assert tried.keys() >= {"fsync", "write_text", "mkdir", "save_file", "rename"}
    assert sum(tried.values()) > 100


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_file_that_may_not_grow(
    whole: RunFolder, config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = 0

    def limited(run: RunFolder, *args: Any) -> None:
        nonlocal refused
        for size in (0, 1000, 4000):
            with pytest.raises(CheckpointError, match="could not be written"), largest_file(size):
                save_state(run, *args)
            refused += 1
        save_state(run, *args)

    monkeypatch.setattr("prw_flux.learners.save_state", limited)
    run = RunFolder.create(tmp_path / "run", config)
    go(run)
    assert refused == 12 and contents(run) == contents(whole)
    assert not list(run.path.rglob(".*.new"))


def test_a_damaged_newest_state_is_passed_over(
    whole: RunFolder, config: RunConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Crash(Quiet):
        left = 6

        def stepped(self, done: int) -> None:
            self.left -= 1
            if not self.left:
                raise RuntimeError("power failure")

    run = RunFolder.create(tmp_path / "run", config)
    with pytest.raises(RuntimeError, match="power failure"):
        go(run, progress=Crash())
    old, new = run.states.paths()
    assert (old.name, new.name) == ("step-000000003", "step-000000005")
    file = new / "optimizer.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    with caplog.at_level(logging.WARNING):
        go(RunFolder.open(run.path))
    assert f"{file} was changed or truncated" in caplog.text
    run = RunFolder.open(run.path)
    assert run.finished and contents(run) == contents(whole)
    assert [path.name for path in run.states.folder.glob("damaged-*")] == ["damaged-" + new.name]
    assert [line["step"] for line in run.read_log()] == [1, 2, 3, 1, 2, 3]


@pytest.mark.parametrize("step", [0, 1, 2])
def test_a_loss_that_is_not_finite_loses_one_step(
    whole: RunFolder, config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    original = trainer_module.Trainer._gradients
    run = RunFolder.create(tmp_path / "run", config)
    with monkeypatch.context() as patch:

        def broken(self: Any, samples: Any, stage: Any, now: int) -> Any:
            loss = original(self, samples, stage, now)
            if (stage.name, now) == ("ground", step):
                loss = replace(loss, total=loss.total * math.nan)
            return loss

        patch.setattr(trainer_module.Trainer, "_gradients", broken)
        with pytest.raises(TrainingError, match=f"stage 'ground' is not finite at step {step + 1}"):
            go(run)
    assert verified(run.states.paths()[-1]).facts["position"]["step"] == step
    go(RunFolder.open(run.path))
    assert contents(RunFolder.open(run.path)) == contents(whole)


class Slow(ShapeWeave):
    """A reader that hangs once, at one index of the second stage, until it is enough."""

    def __init__(self, seconds: float, enough: Callable[[], bool] = lambda: False) -> None:
        super().__init__(size=64)
        self.seconds, self.enough = seconds, enough

    def example(self, task: str, index: int) -> Example:
        if (task, index) == ("ground", 3) and self.seconds:
            until, self.seconds = time.monotonic() + self.seconds, 0.0
            while time.monotonic() < until and not self.enough():
                time.sleep(0.01)
        return super().example(task, index)


class Waits(Quiet):
    """How long it was told that training waited."""

    def __init__(self) -> None:
        self.told: list[float] = []

    def waiting(self, seconds: float) -> None:
        self.told.append(seconds)


def test_a_slow_reader_is_waited_for(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prw_flux.trainer.waiting", lambda tell: waiting(tell, 0.05))
    config = config.with_settings(["data.samples=none"])
    quick = RunFolder.create(tmp_path / "quick", config)
    go(quick, Slow(0.0))
    run, progress = RunFolder.create(tmp_path / "run", config), Waits()
    go(run, Slow(60.0, lambda: max(progress.told, default=0.0) > 0.8), progress=progress)
    assert contents(run) == contents(quick)
    assert 0.8 < max(progress.told) < 30.0
    left = {"waiting for data", "preparing batches"}
    assert not [thread for thread in threading.enumerate() if thread.name in left]


@pytest.mark.parametrize("samples", ["none", "6"])
def test_sigterm_ends_a_reader_that_hangs(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, samples: str
) -> None:
    monkeypatch.setattr("prw_flux.ahead.PATIENCE", 0.5)
    config = config.with_settings([f"data.samples={samples}"])
    quick = RunFolder.create(tmp_path / "quick", config)
    go(quick, Slow(0.0))
    run = RunFolder.create(tmp_path / "run", config)
    began, left = time.monotonic(), threading.Event()

    class Impatient(Quiet):
        def waiting(self, seconds: float) -> None:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted) as stopped, Stop() as stop:
        go(run, Slow(600.0, left.is_set), stop=stop, progress=Impatient())
    left.set()  # the reader that was left behind returns
    assert stopped.value.status == 143 and time.monotonic() - began < 60
    go(RunFolder.open(run.path), Slow(0.0))
    assert contents(RunFolder.open(run.path)) == contents(quick)


def test_a_damaged_picture_in_every_shard(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import numpy as np
    import pyarrow.parquet as parquet

    from prw_flux.data.build import build
    from prw_flux.data.manifest import MANIFEST, sha256
    from prw_flux.data.on_disk import OnDisk
    from prw_flux.data.row_checks import encode
    from prw_flux.data.rows import Picture, Record

    class Reader:
        inputs: tuple[Path, ...] = ()
        listed = ""

        def __len__(self) -> int:
            return 24

        def records(self, start: int = 0) -> Any:
            rng = np.random.default_rng(0)
            for i in range(start, 24):
                data = encode(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8))
                picture = Picture(name=f"photo {i}", data=data)
                yield Record(where=f"record {i}", key=f"k{i}", text="a thing", target=picture)

    folder = tmp_path / "data"
    build(Reader(), "inpaint", folder, made_from={}, shard_rows=4)
    manifest = json.loads((folder / MANIFEST).read_text())
    for shard in manifest["shards"]:  # as if the pictures had been so from the beginning
        file = folder / shard["file"]
        table = parquet.read_table(file)
        rows = table.to_pylist()
        rows[1]["target"]["bytes"] = rows[1]["target"]["bytes"][:200]
        parquet.write_table(table.from_pylist(rows, schema=table.schema), file)
        shard |= {"sha256": sha256(file), "bytes": file.stat().st_size}
    (folder / MANIFEST).write_text(json.dumps(manifest))

    data = OnDisk(str(folder), 64, cache=tmp_path / "cache")
    one = replace(config, stages=config.stages[:1]).with_settings(
        ["data.samples=23", "data.max_rejected=0.3"]
    )
    run = RunFolder.create(tmp_path / "run", one)
    go(run, data)
    rejected = RunFolder.open(run.path).index["stages"][0]["rejected"]
    assert rejected["picture damaged"] >= 5
    strict = RunFolder.create(tmp_path / "strict", one.with_settings(["data.max_rejected=0.1"]))
    with pytest.raises(SampleError, match="cannot be used, above data.max_rejected=0.1 .*damaged"):
        go(strict, data)
    assert not strict.states.paths() and strict.done == 0


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_kill_9_during_saves_and_between_steps(config: RunConfig, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(config.to_json())
    script = Path(__file__).with_name("killed.py")
    paths = [str(Path(__file__).parents[1]), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [*paths, os.getcwd()]))}
    command = [sys.executable, str(script), str(tmp_path), str(tmp_path / "config.json")]
    out = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert out.returncode == 0, out.stderr
    found = json.loads(out.stdout.splitlines()[-1])
    assert len(found) >= 15
    for place, fate in found.items():
        assert fate["status"] == -signal.SIGKILL, place
        assert fate["same"], (place, fate)
        assert not fate["left"], (place, fate)
    assert found["step 4"]["resumed_from"] | {"seconds": 0} == {"stage": 1, "step": 0, "seconds": 0}
    assert found["step 6"]["resumed_from"]["step"] == 2
