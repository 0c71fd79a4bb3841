"""What a run takes is known before it runs, from the configuration of FLUX.1-dev."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from prw_flux.cli import main
from prw_flux.config import RunConfig
from prw_flux.estimate import estimate, transformer_of
from prw_flux.memory import GIB
from prw_flux.recipes import load_recipe, one_h200, paper, photos_24gb


def test_flops_are_those_that_were_counted() -> None:
    """flux.md, section 3.5: 14.15 and 22.6 TFLOP for the passes at 512 pixels, forward."""
    config = paper()
    step = estimate(config).tflop[0] / config.stages[0].batch_size
    assert step == pytest.approx(2 * (14.15 + 22.6), rel=0.02)
    recomputed = estimate(config.with_settings(["checkpointing=true"])).tflop[0]
    assert recomputed / config.stages[0].batch_size == pytest.approx(110, rel=0.02)
    drawn = config.with_settings(["adapter.source_timestep=zero", "draws=4"])
    step = estimate(drawn).tflop[0] / config.stages[0].batch_size
    assert step == pytest.approx(2 * (14.15 + 4 * 22.6), rel=0.02)


def test_memory_is_what_was_counted() -> None:
    """flux.md, section 4: 24.19 GiB of a bf16 base and five experts that are bf16 but one."""
    found = estimate(paper().with_settings(["stages.*.batch_size=1", "checkpointing=true"]))
    assert found.base / GIB == pytest.approx(22.17, abs=0.02)
    veterans = 4 * found.learning / 3 / 2  # fp32 here
    assert (found.base + found.adapter + found.learning - veterans) / GIB == pytest.approx(
        24.19, abs=0.1
    )
    assert found.activations / GIB == pytest.approx(1.64, abs=0.1)
    assert estimate(photos_24gb()).base / GIB == pytest.approx(6.23, abs=0.15)


@pytest.mark.parametrize("config, card", [(photos_24gb(), 22), (one_h200(), 130)])
def test_recipes_fit_their_cards(config: RunConfig, card: int) -> None:
    found = estimate(config)
    assert found.device / GIB < card - 2  # CUDA's own, and what is fragmented
    assert found.host / GIB < 40


def test_more_ranks_take_less_each(short_config: RunConfig) -> None:
    config = one_h200()
    assert estimate(config, 2).activations == estimate(config).activations // 2
    assert estimate(config, 2).base == estimate(config).base


def test_a_folder_is_read(short_config: RunConfig) -> None:
    assert transformer_of(short_config).inner_dim == 32
    assert transformer_of(load_recipe("demo")).device.type == "meta"


def test_a_dry_run_prints_and_makes_nothing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", "paper", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "200,000" in out and "activations" in out
    assert main(["train", "photos_24gb", "--dry-run", "--json", "--set", "accumulate=4"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["config"]["accumulate"] == 4 and told["GiB"]["device"] < 24
    assert list(told["TFLOP"]) == ["inpaint", "control", "edit"]
    assert not list(tmp_path.iterdir())
