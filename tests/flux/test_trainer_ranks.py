"""Training on two gloo ranks is training in one process, and either goes on where the other was."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from flux.trainer_ranks import FEATURES, STOP_AT, gradients_of
from safetensors.torch import save_file
from two_processes import require_quiet, run_two

from prw import ConfigError
from prw_flux.config import RunConfig
from prw_flux.interrupt import Interrupted, Stop
from prw_flux.progress import Quiet
from prw_flux.ranks import Ranks, require_even
from prw_flux.resume import adapter_to_continue, read_position
from prw_flux.rundir import RunFolder
from prw_flux.session import open_session
from prw_flux.trainer import open_training_data, train

WORKER = Path(__file__).with_name("trainer_ranks.py")


def go(run: RunFolder, progress: Quiet | None = None) -> None:
    session = open_session(run.config, adapter_to_continue(run))
    with Stop() as stop:
        train(run, session, open_training_data(run.config, session), progress=progress, stop=stop)


class After(Quiet):
    """Stops after a logged step."""

    def __init__(self, stage: str, step: int) -> None:
        self.where = (stage, step)

    def logged(self, line: Mapping[str, Any]) -> None:
        if (line["stage"], line["step"]) == self.where:
            signal.raise_signal(signal.SIGTERM)


def config_of(short_config: RunConfig) -> RunConfig:
    """With everything that is random in a step."""
    return short_config.with_settings(
        ["stages.*.batch_size=4", "draws=2", "source_dropout=0.3", "caption_dropout=0.3",
         "log_every=1", "remember=6", "data.samples=10", "ema=0.9", "held_out.samples=4",
         "held_out.every=2", "sample_every=2", "evaluation.steps=2"]
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(short_config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where one process, two ranks, and one process again did their part of a run."""
    made = tmp_path_factory.mktemp("ranks")
    config = config_of(short_config)
    (made / "config.json").write_text(config.to_json())
    save_file(gradients_of(config, Ranks(), made / "gradients"), made / "wanted.safetensors")
    with_features = gradients_of(config.with_settings(FEATURES), Ranks(), made / "features")
    save_file(with_features, made / "wanted-features.safetensors")
    run = RunFolder.create(made / "run", config)
    with pytest.raises(Interrupted):
        go(run, After("inpaint", 2))
    run_two(WORKER, made)
    return made


@pytest.mark.slow
@pytest.mark.parametrize(
    "scenario", ["gradients", "features", "preparing", "resumed", "sharded", "ahead"]
)
@pytest.mark.parametrize("rank", [0, 1])
def test_two_ranks_train_as_one_process(folder: Path, scenario: str, rank: int) -> None:
    require_quiet(folder, scenario, rank)


@pytest.mark.slow
def test_a_run_on_a_sharded_base_is_the_run(
    folder: Path, short_config: RunConfig, tmp_path: Path
) -> None:
    run = RunFolder.open(folder / "sharded")
    assert run.finished and list(run.adapter.rglob("adapter_model.safetensors"))
    whole = RunFolder.create(tmp_path / "whole", config_of(short_config))
    go(whole)
    for mine, wanted in zip(run.read_log(), whole.read_log(), strict=True):
        assert mine["loss"] == pytest.approx(wanted["loss"], rel=1e-4), (mine, wanted)


@pytest.mark.slow
def test_one_two_and_one_rank_see_the_data_of_one(
    folder: Path, short_config: RunConfig, tmp_path: Path
) -> None:
    run = RunFolder.open(folder / "run")
    assert (run.config.stages[read_position(run).stage].name, read_position(run).step) == STOP_AT
    go(run)
    whole = RunFolder.create(tmp_path / "whole", config_of(short_config))
    go(whole)
    ours, theirs = run.read_log(), whole.read_log()
    assert [(x["stage"], x["step"]) for x in ours] == [(x["stage"], x["step"]) for x in theirs]
    for mine, wanted in zip(ours, theirs, strict=True):
        # float32, and nine steps of Adam between what two ranks round and what one rounds
        names = ["loss", "gate_loss", "usage_noisy", "usage_deterministic"]
        held = [name for name in wanted if name.startswith("held_out_loss")]
        assert len(held) == 2 * (mine["step"] > 1)
        for name in names + held:
            assert mine[name] == pytest.approx(wanted[name], rel=1e-4, abs=1e-5), (mine, wanted)


def test_a_batch_that_cannot_be_cut_is_refused(short_config: RunConfig) -> None:
    config = short_config.with_settings(["stages.*.batch_size=6", "accumulate=2"])
    require_even(config, 3)
    with pytest.raises(
        ConfigError, match=r"stages.inpaint.batch_size 6 cannot .* 2 ranks .* set it to 8, or any"
    ):
        require_even(config, 2)


def test_alone_everything_is_mine() -> None:
    alone = Ranks()
    assert alone.first and alone.share(3) == range(3)
    assert alone.largest(15) == 15 and alone.gathered("x") == ["x"]
    with pytest.raises(ValueError, match="mine"):
        alone.once(lambda: int("mine"))
