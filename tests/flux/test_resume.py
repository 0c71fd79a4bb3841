"""An interrupted run ends with the bits of an uninterrupted one, and so does an extended one."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from prw import CheckpointError, ConfigError
from prw_flux.config import RunConfig
from prw_flux.interrupt import Interrupted, Stop
from prw_flux.progress import Quiet
from prw_flux.resume import Position, adapter_to_continue, read_position
from prw_flux.rundir import RunError, RunFolder
from prw_flux.session import open_session
from prw_flux.trainer import open_training_data, train


def go(run: RunFolder, progress: Quiet | None = None) -> None:
    session = open_session(run.config, adapter_to_continue(run))
    with Stop() as stop:
        train(run, session, open_training_data(run.config, session), progress=progress, stop=stop)


def contents(run: RunFolder) -> dict[str, bytes]:
    files = sorted(run.adapter.rglob("*.safetensors"))
    return {str(f.relative_to(run.adapter)): f.read_bytes() for f in files}


@pytest.fixture(scope="module")
def whole(short_config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run that nothing interrupted."""
    run = RunFolder.create(tmp_path_factory.mktemp("whole") / "run", short_config)
    go(run)
    return run


class Signals(Quiet):
    """Sends a real signal after some steps of a stage, or while its samples are encoded."""

    def __init__(self, stage: str, step: int | None, number: int = signal.SIGINT) -> None:
        self.where, self.number, self.stage = (stage, step), number, ""

    def begin(self, number: int, total: int, stage: Any) -> None:
        self.stage = stage.name

    def encoded(self, done: int, total: int) -> None:
        self._at(None)

    def stepped(self, done: int) -> None:
        self._at(done)

    def _at(self, step: int | None) -> None:
        if (self.stage, step) == self.where:
            os.kill(os.getpid(), self.number)
            self.where = ("", None)


@pytest.mark.parametrize(
    ("stage", "step"),
    [("inpaint", 1), ("ground", None), ("control", 1), ("control", 2), ("control", 3)],
)
def test_resuming_is_bitwise(
    whole: RunFolder, short_config: RunConfig, tmp_path: Path, stage: str, step: int | None
) -> None:
    run = RunFolder.create(tmp_path / "run", short_config)
    with pytest.raises(Interrupted, match=f"of stage '{stage}'; continue with") as stopped:
        go(run, Signals(stage, step))
    assert stopped.value.status == 130
    run = RunFolder.open(run.path)
    assert not run.finished
    go(run)
    assert contents(run) == contents(whole)
    assert lines(run) == lines(whole)


def lines(run: RunFolder) -> list[Mapping[str, Any]]:
    """The log without what depends on the clock and the machine."""
    return [
        {k: v for k, v in line.items() if k not in ("seconds", "memory_mib")}
        for line in run.read_log()
    ]


def test_what_a_killed_process_left_is_removed(
    short_config: RunConfig, tmp_path: Path, whole: RunFolder
) -> None:
    run = RunFolder.create(tmp_path / "run", short_config)
    for name in ("states/.step-000000002.0123.new", ".adapter.4567.new"):
        (run.path / name).mkdir(parents=True)
        (run.path / name / "half").write_text("...")
    for name in (".run.json.89ab.new", ".metrics.jsonl.cdef.new"):
        (run.path / name).write_text("{")
    go(run)
    assert not list(run.path.rglob(".*.new"))
    assert contents(run) == contents(whole)


def test_sigterm_has_its_own_status(short_config: RunConfig, tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run", short_config)
    with pytest.raises(Interrupted) as stopped:
        go(run, Signals("inpaint", 2, signal.SIGTERM))
    assert stopped.value.status == 143


def test_a_crash_goes_back_to_the_last_saved_state(
    whole: RunFolder, short_config: RunConfig, tmp_path: Path
) -> None:
    class Crash(Quiet):
        def logged(self, line: Mapping[str, Any]) -> None:
            if (line["stage"], line["step"]) == ("control", 3):  # saved after step 2
                raise RuntimeError("power failure")

    run = RunFolder.create(tmp_path / "run", short_config)
    with pytest.raises(RuntimeError, match="power failure"):
        go(run, Crash())
    run = RunFolder.open(run.path)
    assert read_position(run).step == 2
    go(run)
    assert contents(run) == contents(whole)
    assert lines(run) == lines(whole)


def test_a_finished_run_can_be_extended_as_if_it_had_never_ended(
    whole: RunFolder, short_config: RunConfig, tmp_path: Path
) -> None:
    first = RunFolder.create(
        tmp_path / "first", replace(short_config, stages=short_config.stages[:2])
    )
    go(first)
    more = RunFolder.create(tmp_path / "more", short_config, parent=first)
    assert more.done == 2
    go(more)
    assert contents(more) == contents(whole)
    assert contents(first).keys() < contents(more).keys()
    shutil.rmtree(
        first.states.folder
    )  # only the adapter was kept: the stage trains, with fresh moments
    again = RunFolder.create(tmp_path / "again", short_config, parent=first)
    assert read_position(again) == Position(stage=2)
    go(again)
    old = "experts/1-ground/adapter_model.safetensors"
    assert contents(again)[old] == contents(whole)[old]


def test_extending_on_another_base_names_what_differs(
    whole: RunFolder, short_config: RunConfig, tiny_base: Path, tmp_path: Path
) -> None:
    import torch
    from safetensors.torch import save_file

    from prw_flux.tiny.autoencoder import new_autoencoder
    from prw_flux.tiny.base import BaseRecipe
    from prw_flux.tiny.build import new_base, write_folder

    wider = tmp_path / "wider"
    parts = new_base(BaseRecipe(width=48, heads=3, double_blocks=1, single_blocks=1))
    write_folder(wider, new_autoencoder(8), *parts)
    config = replace(short_config, base=replace(short_config.base, path=str(wider)))
    with pytest.raises(CheckpointError, match="made for another base: its config is .*heads"):
        open_session(config, whole.adapter)

    other = shutil.copytree(tiny_base, tmp_path / "other")
    file = other / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file({k: torch.roll(v, 1) for k, v in load_file(file).items()}, file, {"format": "pt"})
    config = replace(short_config, base=replace(short_config.base, path=str(other)))
    with pytest.raises(CheckpointError, match="sampled weights of to_k and to_v differ by"):
        open_session(config, whole.adapter)


def test_extending_with_other_settings_names_them(
    whole: RunFolder, short_config: RunConfig
) -> None:
    config = short_config.with_settings(["adapter.source_timestep=current"])
    with pytest.raises(ConfigError, match="--set adapter.source_timestep=zero"):
        open_session(config, whole.adapter)


def test_a_new_expert_may_have_another_rank(
    whole: RunFolder, short_config: RunConfig, tmp_path: Path
) -> None:
    extra = replace(short_config.stages[1], name="again")
    config = replace(short_config, stages=(*short_config.stages, extra))
    more = RunFolder.create(
        tmp_path / "more", config.with_settings(["adapter.rank=3"]), parent=whole
    )
    go(more)
    files = sorted(more.adapter.rglob("adapter_config.json"))
    assert [json.loads(file.read_text())["r"] for file in files] == [2, 2, 2, 3]


def test_a_changed_configuration_is_refused_by_its_field(whole: RunFolder, tmp_path: Path) -> None:
    path = shutil.copytree(whole.path, tmp_path / "run")
    index = json.loads((path / "run.json").read_text())
    index["config"]["stages"][2]["lr"] = 0.5
    index["stages"][2]["done"] = False
    (path / "run.json").write_text(json.dumps(index))
    shutil.rmtree(RunFolder.open(path).states.paths()[-1])  # back to the middle of the last stage
    with pytest.raises(RunError, match=r"stages.control.lr of .* is 0.01, not 0.5; put it back"):
        read_position(RunFolder.open(path))


def test_a_lost_end_is_trained_again(whole: RunFolder, tmp_path: Path) -> None:
    """Three stages are noted as done, but the newest state is one of the middle of the third."""
    path = shutil.copytree(whole.path, tmp_path / "run")
    run = RunFolder.open(path)
    shutil.rmtree(run.states.paths()[-1])
    assert run.done == 3 and read_position(run) == Position(stage=3)  # as far as one can extend it
    run = RunFolder.open(path)
    run.agree(2, {})
    assert read_position(run).step == 2
    go(run)
    assert contents(run) == contents(whole) and run.finished
    assert lines(run) == lines(whole)


def test_a_second_ctrl_c_is_immediate() -> None:
    before = signal.getsignal(signal.SIGINT)  # a test run in the background ignores it
    with pytest.raises(KeyboardInterrupt), Stop() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_other_data_are_refused_by_their_fingerprint(
    whole: RunFolder, short_config: RunConfig, tmp_path: Path
) -> None:
    path = shutil.copytree(whole.path, tmp_path / "run")
    index = json.loads((path / "run.json").read_text())
    old = index["data"]["fingerprint"]
    assert index["data"]["name"] == "shapeweave" and len(old) == 32
    config = short_config.with_settings(["seed=5"])
    session = open_session(whole.config, adapter_to_continue(RunFolder.open(path)))
    other = open_training_data(config, session)
    with pytest.raises(RunError, match=f"had the fingerprint {old}, shapeweave has [0-9a-f]{{32}}"):
        train(RunFolder.open(path), session, other)
    assert json.loads((path / "run.json").read_text()) == index
