"""A base sharded by DeepSpeed's ZeRO-3 trains as a whole one; what it cannot mean is refused."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flux.test_trainer_ranks import After, config_of, go
from flux.trainer_ranks import FEATURES, gradients_of
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from two_processes import require_quiet, run_two

from prw import ConfigError
from prw_flux import zero
from prw_flux.config import RunConfig
from prw_flux.interrupt import Interrupted
from prw_flux.ranks import Ranks, join
from prw_flux.rundir import RunFolder

WORKER = Path(__file__).with_name("zero_ranks.py")
installed = importlib.util.find_spec("deepspeed") is not None
needs_deepspeed = pytest.mark.skipif(not installed, reason="needs deepspeed: pip install deepspeed")


@pytest.fixture(scope="module")
def folder(short_config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where one process, and two ranks with a sharded base, did their part."""
    made = tmp_path_factory.mktemp("zero")
    config = config_of(short_config)
    (made / "config.json").write_text(config.to_json())
    save_file(gradients_of(config, Ranks(), made / "gradients"), made / "wanted.safetensors")
    with_features = gradients_of(config.with_settings(FEATURES), Ranks(), made / "features")
    save_file(with_features, made / "wanted-features.safetensors")
    stopped = RunFolder.create(made / "stopped", config.with_settings(["checkpointing=true"]))
    with pytest.raises(Interrupted):
        go(stopped, After("control", 2))
    go(RunFolder.create(made / "whole", config))
    run_two(WORKER, made)
    return made


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize("scenario", ["gradients", "run", "resumed"])
@pytest.mark.parametrize("rank", [0, 1])
def test_two_ranks_with_half_a_base_each(folder: Path, scenario: str, rank: int) -> None:
    require_quiet(folder, scenario, rank)


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize("name", ["zero", "stopped"])
def test_the_run_is_that_of_one_process(folder: Path, name: str) -> None:
    run, whole = RunFolder.open(folder / name), RunFolder.open(folder / "whole")
    assert run.finished
    ours, theirs = run.read_log(), whole.read_log()
    assert [(x["stage"], x["step"]) for x in ours] == [(x["stage"], x["step"]) for x in theirs]
    for mine, wanted in zip(ours, theirs, strict=True):
        names = [n for n in wanted if n in ("loss", "gate_loss") or n.startswith("held_out_loss")]
        for key in names:
            assert mine[key] == pytest.approx(wanted[key], rel=1e-4, abs=1e-5), (key, mine, wanted)
    # Adam divides a gradient by its size, and with it the rounding of one that is nearly zero
    for file in sorted(whole.adapter.rglob("*.safetensors")):
        found = load_file(run.adapter / file.relative_to(whole.adapter))
        for key, value in load_file(file).items():
            assert_close(found[key], value, rtol=1e-3, atol=1e-4, msg=f"{file.name}, {key}")
    pictures = sorted((whole.path / "grids").glob("*.png"))
    assert len(pictures) == 6
    for picture in pictures:
        mine, wanted = (
            np.asarray(Image.open(path)).astype(int)
            for path in (run.path / "grids" / picture.name, picture)
        )
        assert mine.shape == wanted.shape and abs(mine - wanted).max() <= 1, picture.name


# Without DeepSpeed ------------------------------------------------------------------------------


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Says what a launcher says: a configuration, or flags."""
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("WORLD_SIZE", "2")

    def launch(settings: Any = None, **flags: str) -> None:
        if settings is not None:
            path = tmp_path / "ds.json"
            path.write_text(settings if isinstance(settings, str) else json.dumps(settings))
            flags["CONFIG_FILE"] = str(path)
        for name, value in flags.items():
            monkeypatch.setenv(f"ACCELERATE_DEEPSPEED_{name}", value)

    return launch


def of_base(stage: int, **settings: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": stage, **settings}}


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"optimizer": {"type": "AdamW"}}, "DeepSpeed's optimizer would do nothing here"),
        ({"scheduler": {"type": "WarmupLR"}}, "take scheduler out of its configuration"),
        ({"fp16": {"enabled": True}}, "DeepSpeed's fp16 would do nothing here"),
        ({"bf16": {"enabled": True}}, "bf16 is True, but precision=bf16 is False: write \"auto\""),
        ({"train_batch_size": 64}, r"train_batch_size is 64, but stages.\*.batch_size is 4"),
        ({"train_micro_batch_size_per_gpu": 4}, r"_per_gpu is 4, but .* is 2: write"),
        ({"gradient_accumulation_steps": 8}, "gradient_accumulation_steps is 8, but accumulate"),
        ({"gradient_clipping": 7.5}, "gradient_clipping is 7.5, but optimizer.clip is"),
        (of_base(3, offload_optimizer={"device": "cpu"}), "the optimizer is this trainer's"),
        (of_base(2, offload_param={"device": "cpu"}), "needs stage 3, this is stage 2"),
        (of_base(4), "stages 0 to 3, zero_optimization.stage is 4"),
    ],
)  # fmt: skip
def test_a_configuration_that_says_something_else_is_refused(
    short_config: RunConfig, launched: Any, settings: dict[str, Any], said: str
) -> None:
    launched({**of_base(3), **settings})
    config = short_config.with_settings(["stages.*.batch_size=4", "checkpointing=true"])
    with pytest.raises(ConfigError, match=said):
        zero.require_fits(config)


@pytest.mark.parametrize(
    "settings, said",
    [
        (["base.quantisation=fp8", "checkpointing=true"], "=fp8 cannot be sharded: leave out"),
        ([], "by ZeRO-3 needs --set checkpointing=true"),
    ],
)
def test_a_base_that_cannot_be_sharded_is_refused(
    short_config: RunConfig, launched: Any, settings: list[str], said: str
) -> None:
    launched(ZERO_STAGE="3")
    with pytest.raises(ConfigError, match=said):
        zero.require_fits(short_config.with_settings(settings))


def test_a_configuration_that_leaves_the_rest_to_the_run_fits(
    short_config: RunConfig, launched: Any
) -> None:
    launched(
        {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "none"},
                               "stage3_prefetch_bucket_size": "auto"},
         "train_batch_size": 4, "train_micro_batch_size_per_gpu": 1, "gradient_clipping": "auto",
         "gradient_accumulation_steps": 2, "bf16": {"enabled": "auto"}, "fp16": {"enabled": False},
         "steps_per_print": 10}
    )  # fmt: skip
    config = short_config.with_settings(
        ["stages.*.batch_size=4", "checkpointing=true", "accumulate=2"]
    )
    zero.require_fits(config)
    assert zero.is_asked_for()


@pytest.mark.parametrize("text, said", [("{", "cannot be read as JSON"), ("{}", "has no section")])
def test_a_broken_configuration_is_refused(launched: Any, text: str, said: str) -> None:
    launched(text)
    with pytest.raises(ConfigError, match=said):
        zero.is_asked_for()


def test_the_flags_of_the_launcher_count(launched: Any) -> None:
    launched()
    assert zero.asked() == {"zero_optimization": {"stage": 2}} and not zero.is_asked_for()
    launched(ZERO_STAGE="3", OFFLOAD_PARAM_DEVICE="nvme", OFFLOAD_PARAM_NVME_PATH="/fast")
    offload = {"device": "nvme", "nvme_path": "/fast"}
    assert zero.asked() == {"zero_optimization": {"stage": 3, "offload_param": offload}}


@pytest.mark.parametrize("stage", ["1", "2"])
def test_stages_that_shard_no_weights_train_as_ddp_and_say_so(
    short_config: RunConfig, launched: Any, stage: str, caplog: pytest.LogCaptureFixture
) -> None:
    launched(ZERO_STAGE=stage)
    zero.require_fits(short_config)
    assert not zero.is_asked_for()
    assert f"ZeRO stage {stage} would shard the optimizer" in caplog.text


def test_without_deepspeed_the_command_that_installs_it_is_named(
    launched: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs deepspeed: pip install '.\[deepspeed\]', or"):
        join()
