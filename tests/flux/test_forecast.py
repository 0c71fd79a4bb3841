"""What a run will take: counted work is torch's own count, and nothing is loaded to tell it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from prw import ConfigError
from prw_flux import CoLoGenPipeline, PRWAdapter
from prw_flux.cli import main
from prw_flux.config import BaseConfig, DataConfig, RunConfig
from prw_flux.encode import position_ids
from prw_flux.forecast.architecture import architecture
from prw_flux.forecast.memory import SAVED, activations, adapter_sizes
from prw_flux.forecast.plan import Machine, forecast
from prw_flux.forecast.work import Tokens, step_work
from prw_flux.memory import GIB
from prw_flux.passes import TwoPass
from prw_flux.recipes import one_h200, paper, photos_24gb
from prw_flux.rundir import RunFolder

DEV = "black-forest-labs/FLUX.1-dev"
BATCH = 2


def small(double: int, single: int, **changes: Any) -> tuple[TwoPass, FluxTransformer2DModel]:
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        in_channels=64, num_layers=double, num_single_layers=single, attention_head_dim=32,
        num_attention_heads=4, joint_attention_dim=96, pooled_projection_dim=48,
        axes_dims_rope=(8, 12, 12), **{"guidance_embeds": True, **changes},
    )  # fmt: skip
    adapter = PRWAdapter.for_transformer(transformer, rank=8)
    adapter.weave.unlock("veteran")
    adapter.weave.close()
    adapter.weave.unlock("newest")
    return TwoPass(transformer, adapter).train(), transformer


def forward(passes: TwoPass, tokens: Tokens, draws: int, dtype: Any = torch.float32) -> Any:
    noisy, side = BATCH * draws, int(tokens.noisy**0.5)
    ids = position_ids(side, side), position_ids(int(tokens.source**0.5), int(tokens.source**0.5))
    with passes.adapter.weave.record(key=1) as record:
        return passes(
            torch.randn(noisy, tokens.noisy, 64, dtype=dtype),
            ids[0],
            torch.randn(noisy, tokens.text, 96, dtype=dtype),
            torch.randn(noisy, 48, dtype=dtype),
            torch.rand(noisy),
            torch.randn(BATCH, tokens.source, 64, dtype=dtype),
            ids[1],
            guidance_B=torch.ones(noisy),
            call=record,
        )


@pytest.mark.parametrize(
    ("double", "single", "checkpointing", "draws", "source", "guidance"),
    [
        (2, 2, False, 1, 64, True),
        (2, 2, True, 1, 64, True),
        (1, 1, False, 1, 64, True),
        (3, 4, False, 2, 64, True),
        (2, 3, True, 3, 16, False),
    ],
)
def test_a_step_is_what_torch_counts(
    double: int, single: int, checkpointing: bool, draws: int, source: int, guidance: bool
) -> None:
    passes, transformer = small(double, single, guidance_embeds=guidance)
    if checkpointing:
        transformer.enable_gradient_checkpointing()
    tokens = Tokens(source=source, noisy=64, text=24)
    with sdpa_kernel(SDPBackend.MATH):  # attention that the counter sees as products
        with FlopCounterMode(display=False) as ahead:
            velocity = forward(passes, tokens, draws)
        with FlopCounterMode(display=False) as back:
            velocity.square().mean().backward()
    work = step_work(
        transformer.config, tokens, rank=8, draws=draws, checkpointing=checkpointing, flash=False
    )
    assert BATCH * (work.source + work.main) == pytest.approx(ahead.get_total_flops(), rel=1e-2)
    assert BATCH * (work.backward + work.again) == pytest.approx(back.get_total_flops(), rel=1e-2)


def test_full_size_work_is_what_the_meta_device_counts() -> None:
    """The recorded counts of `python -m benchmarks.pipeline`, made with FlopCounterMode."""
    records = Path(__file__).parents[2].glob("benchmarks/results/*-pipeline-cpu.json")
    latest = json.loads(max(records).read_text("utf-8"))
    counted = [row for row in rows(latest) if row["size"] == "full"]
    assert counted
    config = architecture(BaseConfig(path=DEV)).transformer.config
    for row in counted:
        work = step_work(config, Tokens(**row["tokens"]), rank=128)
        assert work.source / 1e12 == pytest.approx(row["TFLOP"]["source"], rel=1e-2)
        assert work.main / 1e12 == pytest.approx(row["TFLOP"]["cached"], rel=1e-2)


def rows(value: Any) -> list[Any]:
    """Every table row with operations in a nested record."""
    if isinstance(value, dict):
        own = [value] if "TFLOP" in value else []
        return own + [row for part in value.values() for row in rows(part)]
    return [row for part in value for row in rows(part)] if isinstance(value, list) else []


@pytest.mark.parametrize(("double", "single", "draws"), [(2, 2, 1), (1, 4, 1), (2, 5, 2)])
def test_kept_activations_are_what_the_graph_saves(double: int, single: int, draws: int) -> None:
    passes, transformer = small(double, single)
    transformer.to(torch.bfloat16)
    tokens = Tokens(source=256, noisy=256, text=64)
    own = {parameter.untyped_storage().data_ptr() for parameter in passes.parameters()}
    saved: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in own:
            saved[place] = tensor
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with torch.autocast("cpu", torch.bfloat16), hooks:
        forward(passes, tokens, draws)
    counted = sum(tensor.untyped_storage().nbytes() for tensor in saved.values())
    rows = BATCH * (tokens.source + draws * tokens.main)
    estimate = SAVED * (double + single) * rows * transformer.inner_dim * 2
    assert counted == pytest.approx(estimate, rel=0.15)


def test_parameters_are_those_of_the_adapter() -> None:
    sizes = adapter_sizes(19, 38, 3072, 128, "all", 5)
    expert = 57 * 2 * 2 * 128 * 3072
    assert expert == 89_653_248
    router = 57 * 2 * 3072
    for stage, (every, trained) in enumerate(sizes, start=1):
        assert every == stage * (expert + router)
        assert trained == expert + stage * router


def test_the_paper_is_planned() -> None:
    found = forecast(paper(), Machine(ranks=64, price=2.5))
    assert [plan.samples for plan in found.stages] == [
        51_200_000, 51_200_000, 51_200_000, 6_400_000, 25_600_000
    ]  # fmt: skip
    assert found.tokens == Tokens(source=1024, noisy=1024, text=512)
    base = 11_901_408_320
    last = found.stages[-1]
    assert last.frozen + last.trained == base + 5 * (89_653_248 + 57 * 2 * 3072)
    assert last.memory.base == 2 * base and last.rank_batch == 2
    assert sum(plan.cost or 0 for plan in found.stages) == pytest.approx(found.hours * 64 * 2.5)
    encoders = last.memory.encoders / GIB
    assert 9.2 < encoders < 9.3  # `prw-flux memory`: 8.87 + 0.23 + 0.16
    cached = forecast(paper().with_settings(["data.cache=x"]), Machine(ranks=64))
    assert cached.stages[-1].memory.encoders == 0
    assert cached.stages[0].work.encoding == 0 < found.stages[0].work.encoding


def test_hours_follow_a_measured_step() -> None:
    found = forecast(paper(), Machine(ranks=8, seconds_per_step=4.0))
    assert [plan.seconds for plan in found.stages] == [4.0, 4.0, 2.0, 2.0, 2.0]
    assert found.stages[0].hours == pytest.approx(200_000 * 4 / 3600)
    faster, slower = (forecast(paper(), Machine(ranks=n)).hours for n in (16, 8))
    assert slower == pytest.approx(2 * faster)
    uneven = forecast(paper(), Machine(ranks=100)).stages[0]
    assert uneven.rank_batch == 3  # the busiest rank decides
    assert uneven.seconds == pytest.approx(3 * uneven.work.total / (989e12 * 0.4))


def test_checkpointing_and_micro_batches_decide_the_peak() -> None:
    shape = architecture(BaseConfig(path=DEV))
    kept, checkpointed = activations(shape, Tokens(source=1024, noisy=1024, text=512), 1, 2)
    assert kept / GIB == pytest.approx(14.2, abs=0.1)
    assert checkpointed / GIB == pytest.approx(1.65, abs=0.05)
    sparing = paper().with_settings(["checkpointing=true", "accumulate=4"])
    memory = forecast(sparing, Machine(ranks=32)).stages[0].memory
    parts = (memory.base, memory.encoders, memory.adapter, memory.gradients, memory.optimizer)
    assert memory.peak == sum(parts) + memory.checkpointed == sum(parts) + 2 * checkpointed


@pytest.mark.parametrize(("config", "card"), [(photos_24gb(), 22), (one_h200(), 130)])
def test_recipes_fit_their_cards(config: RunConfig, card: int) -> None:
    for stage in forecast(config, Machine()).stages:
        assert stage.memory.peak / GIB < card - 2  # CUDA's own, and what is fragmented
        assert stage.memory.encoders == 0


@pytest.mark.parametrize(
    ("told", "what"),
    [
        ({"ranks": 0}, "--ranks must be at least 1"),
        ({"utilisation": 1.5}, "--utilisation in"),
        ({"tflops": -1}, "--device-tflops"),
        ({"seconds_per_step": 0.0}, "--seconds-per-step must be positive"),
        ({"price": -1.0}, "--price-per-hour must be at least 0"),
    ],
)
def test_a_machine_that_cannot_be(told: dict[str, Any], what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        Machine(**told)


def test_what_cannot_be_planned_is_said() -> None:
    with pytest.raises(ConfigError, match="256 ranks cannot share the batch of 128 of stage"):
        forecast(paper(), Machine(ranks=256))
    with pytest.raises(ConfigError, match="shapes of someone/else are not known here"):
        forecast(paper().with_settings(["base.path=someone/else"]), Machine())
    with pytest.raises(FileNotFoundError):
        forecast(paper().with_settings(["base.path=/no/such/base"]), Machine())


def test_a_dry_run_loads_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*given: Any, **named: Any) -> Any:
        raise AssertionError("a dry run must not do this")

    for owner, name in ((CoLoGenPipeline, "from_pretrained"), (RunFolder, "create")):
        monkeypatch.setattr(owner, name, refuse)
    monkeypatch.setattr("prw_flux.data.choose.open_data", refuse)
    monkeypatch.setattr("safetensors.torch.load_file", refuse)
    monkeypatch.chdir(tmp_path)
    assert main(["train", "paper", "--dry-run", "--ranks", "8", "--price-per-hour", "3"]) == 0
    told = capsys.readouterr().out
    for word in ("inpaint", "0.8", "200,000", "11.9 G", "peak", "cost", "cached samples of edit"):
        assert word in told, word
    assert len([line for line in told.splitlines() if line.startswith("- ")]) >= 6
    arguments = ["train", "demo", "--dry-run", "--json", "--set", "stages.edit.steps=7"]
    assert main(arguments) == 0
    stages = json.loads(capsys.readouterr().out)["stages"]
    assert stages[-1]["stage"]["steps"] == 7 and stages[-1]["memory"]["peak"] > 0
    assert main(["train", "paper", "--dry-run", "--ranks", "0"]) == 1
    assert not list(tmp_path.iterdir())


def test_a_local_base_is_read_from_its_own_files(short_config: RunConfig, tiny_base: Path) -> None:
    found = forecast(short_config, Machine())
    with torch.no_grad():
        pipe = CoLoGenPipeline.from_pretrained(tiny_base)
    assert found.stages[0].memory.base == 4 * sum(p.numel() for p in pipe.transformer.parameters())
    encoders = (pipe.vae, pipe.text_encoder, pipe.text_encoder_2)
    own = sum(parameter.numel() for model in encoders for parameter in model.parameters())
    assert architecture(short_config.base).encoder_parameters() == own
    streaming = DataConfig(samples=None)
    assert streaming.samples is None and found.stages[0].cache > 0
