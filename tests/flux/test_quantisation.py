"""Training with less memory: micro-batches, recomputed blocks, a base in fp8."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flux.trainer_ranks import FEATURES, gradients_of
from torch.testing import assert_close

from prw import ConfigError
from prw_flux import CoLoGenPipeline, cli
from prw_flux.cli.evaluate import evaluate_and_tell
from prw_flux.config import RunConfig
from prw_flux.evaluation import (
    Sampling,
    Settings,
    draw_samples,
    evaluate_run,
    generate,
    unusable,
)
from prw_flux.evaluation.runner import load_pipeline
from prw_flux.interrupt import Stop
from prw_flux.progress import Quiet
from prw_flux.quantisation import loading, place, usable
from prw_flux.ranks import Ranks
from prw_flux.resume import Position, adapter_to_continue
from prw_flux.rundir import RunFolder
from prw_flux.session import Session, open_session
from prw_flux.shapeweave.source import ShapeWeave
from prw_flux.tasks import TASKS
from prw_flux.trainer import Trainer, open_training_data, train


def gradients(config: RunConfig, path: Path, session: Session | None = None) -> dict[str, Any]:
    """Of a first step with one veteran, and its losses."""
    session = session or open_session(config)
    run = RunFolder.create(path, config)
    trainer = Trainer(run, session, open_training_data(config, session), Quiet(), Stop())
    for stage in config.stages[:2]:
        trainer._unlock(stage)
    for name, parameter in session.adapter.weave.named_parameters():
        parameter.data.add_(0.1 * len(name) ** -0.5)  # no B and no column stays zero
    loss = trainer._gradients(trainer._samples(1, Position()), config.stages[1], 0)
    usage = trainer.objective.usage(loss.records)
    found = {n: p.grad for n, p in session.adapter.weave.named_parameters()}
    assert all(grad is not None for grad in found.values())
    return found | {"flow": loss.flow, "gate": loss.gate, "usage": torch.tensor(usage)}


@pytest.fixture(scope="module")
def busy(short_config: RunConfig) -> RunConfig:
    """Everything random is on, and a step is large enough to be split."""
    return short_config.with_settings(
        ["stages.*.batch_size=6", "draws=2", "source_dropout=0.3", "caption_dropout=0.3"]
    )


@pytest.fixture(scope="module")
def whole(busy: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return gradients(busy, tmp_path_factory.mktemp("whole") / "run")


@pytest.mark.parametrize("parts", [2, 3, 6])
def test_micro_batches_are_the_step_of_the_whole_batch(
    busy: RunConfig, whole: dict[str, Any], tmp_path: Path, parts: int
) -> None:
    """The veteran gate too: usage is counted over the batch before its absolute value is taken."""
    found = gradients(busy.with_settings([f"accumulate={parts}"]), tmp_path / "run")
    assert found.keys() == whole.keys() and whole["gate"] > 0
    assert_close(found["usage"], whole["usage"], rtol=0, atol=0)  # the same noise for every row
    for name, wanted in whole.items():
        assert_close(found[name], wanted, rtol=1e-5, atol=1e-6, msg=name)


def test_recomputed_blocks_give_the_same_gradients(
    busy: RunConfig, whole: dict[str, Any], tmp_path: Path
) -> None:
    config = busy.with_settings(["checkpointing=true"])
    session = open_session(config)
    ran = []
    session.passes.transformer.transformer_blocks[0].register_forward_pre_hook(
        lambda *_: ran.append(1)
    )
    found = gradients(config, tmp_path / "run", session)
    assert len(ran) == 2 * 2  # both passes, each once more in the backward
    for name, wanted in whole.items():
        assert_close(found[name], wanted, rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("checkpointing", ["false", "true"])
def test_an_fp8_base_trains_as_one_that_was_rounded(
    busy: RunConfig, tmp_path: Path, checkpointing: str
) -> None:
    config = busy.with_settings(["base.quantisation=fp8", f"checkpointing={checkpointing}"])
    stored, plain = open_session(config), open_session(busy)
    layers = (stored.passes.transformer.parameters(), plain.passes.transformer.parameters())
    for narrow, wide in zip(*layers, strict=True):
        wide.data = narrow.data.to(wide.dtype)
    assert stored.passes.transformer.transformer_blocks[0].attn.to_k.weight.itemsize == 1
    assert {p.dtype for p in stored.adapter.parameters()} == set()  # no stage yet
    found = gradients(config, tmp_path / "fp8", stored)
    assert {p.dtype for p in stored.adapter.parameters()} == {torch.float32}
    for name, wanted in gradients(busy, tmp_path / "plain", plain).items():
        assert_close(found[name], wanted, rtol=1e-5, atol=1e-7, msg=name)


def test_an_fp8_run_in_bf16_resumes(short_config: RunConfig, tmp_path: Path) -> None:
    config = replace(short_config, precision="bf16").with_settings(
        ["base.quantisation=fp8", "checkpointing=true", "accumulate=2"]
    )
    run = RunFolder.create(tmp_path / "run", replace(config, stages=config.stages[:1]))
    session = open_session(run.config)
    train(run, session, open_training_data(config, session))
    more = RunFolder.create(tmp_path / "more", config, parent=run)
    session = open_session(config, adapter_to_continue(more))
    train(more, session, open_training_data(config, session))
    assert more.finished and {p.dtype for p in session.adapter.parameters()} == {torch.float32}


def test_a_trained_run_is_evaluated_on_the_base_it_had(
    short_config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In fp8 here: what generates is stored in it, and draws what a rounded base would."""
    config = short_config.with_settings(["base.quantisation=fp8"])
    run = RunFolder.create(tmp_path / "run", replace(config, stages=config.stages[:1]))
    train(run, (session := open_session(run.config)), open_training_data(run.config, session))
    stored = load_pipeline(run)
    layers = [m for m in stored.transformer.modules() if isinstance(m, torch.nn.Linear)]
    fp8 = [m.weight.dtype == torch.float8_e4m3fn for m in layers]
    assert sum(fp8) > len(fp8) / 2 and {p.dtype for p in stored.prw.parameters()} == {torch.float32}
    wide = CoLoGenPipeline.from_pretrained(run.path)
    samples = draw_samples(
        ShapeWeave(size=64, split="heldout"), TASKS["inpaint"], 2, usable=unusable
    ).samples
    sampling = Sampling(steps=2)
    ours, theirs = (np.stack(generate(pipe, samples, sampling)) for pipe in (stored, wide))
    off = np.abs(ours.astype(int) - theirs.astype(int))
    assert off.any() and off.mean() < 8  # of 255 levels
    for narrow, plain in zip(
        stored.transformer.parameters(), wide.transformer.parameters(), strict=True
    ):
        plain.data = narrow.data.to(plain.dtype)
    rounded = np.stack(generate(wide, samples, sampling)).astype(int)
    assert np.abs(rounded - ours).max() <= 1
    told = evaluate_and_tell(run.path, per_task=2, steps=1, quiet=True)
    assert told["settings"]["sampling"]["batch_size"] == 2 and told["tasks"]["inpaint"]["n"] == 2
    stored.enable_model_cpu_offload(device="cpu")  # as on a GPU, whose hooks these are
    sampling = Sampling(steps=1, batch_size=2)
    again = evaluate_run(
        run.path, Settings(n=2, history=0, photos=0, sampling=sampling), pipe=stored
    )
    assert again["tasks"] == told["tasks"]
    capsys.readouterr()
    main = ["generate", "--run", str(run.path), "--prompt", "x", "--steps", "1"]
    assert cli.main([*main, "--out", str(tmp_path / "x.png")]) == 0


@pytest.mark.parametrize("kind, moved", [("none", "to"), ("nf4", "offload"), ("fp8", "offload")])
def test_a_quantised_base_goes_to_a_gpu_one_model_at_a_time(
    make_bare_pipe: Any, monkeypatch: pytest.MonkeyPatch, kind: str, moved: str
) -> None:
    calls: list[tuple[str, str]] = []
    for device in ("cuda:1", "cpu"):
        pipe = make_bare_pipe()
        monkeypatch.setattr(pipe, "to", lambda device: calls.append(("to", device)))
        monkeypatch.setattr(
            pipe, "enable_model_cpu_offload", lambda device: calls.append(("offload", device))
        )
        place(pipe, kind, torch.float32, device)
    assert calls == [(moved, "cuda:1"), ("to", "cpu")]


def test_an_nf4_run_is_used_whole_without_a_gpu(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert [usable(kind) for kind in ("none", "fp8", "int8", "nf4")] == [
        "none", "fp8", "int8", "none"
    ]  # fmt: skip
    assert "nf4 base of this run is loaded whole" in caplog.text
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert usable("nf4") == "nf4"


@pytest.mark.parametrize("kind, package", [("int8", "torchao"), ("nf4", "bitsandbytes")])
def test_what_is_not_installed_is_named(
    kind: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=f"={kind} needs {package}: pip install .*=fp8, which"):
        loading(kind, torch.bfloat16)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    if kind == "nf4":
        with pytest.raises(ConfigError, match="=nf4 needs a GPU"):
            loading(kind, torch.bfloat16)


@pytest.mark.parametrize(
    "settings",
    [
        (),
        ("coredi.stop_gradient=false", "coredi.normalise=none", "coredi.orthogonality=0.3"),
        ("coredi.learn_projection=false", "coredi.tokens=separate", "checkpointing=true"),
    ],
)
def test_features_of_micro_batches_are_those_of_the_whole_batch(
    busy: RunConfig, tmp_path: Path, settings: tuple[str, ...]
) -> None:
    """Batch norm and covariance too: they are taken before the batch is split."""
    config = busy.with_settings([*FEATURES, *settings])
    wanted = gradients_of(config, Ranks(), tmp_path / "whole")
    found = gradients_of(config.with_settings(["accumulate=3"]), Ranks(), tmp_path / "run")
    assert found.keys() == wanted.keys() and "stream.embed.weight" in found
    assert all(grad.abs().max() > 0 for name, grad in wanted.items() if "stream" in name)
    assert ("projection.weight_DK" in wanted) == config.coredi.learn_projection
    for name, value in wanted.items():
        assert_close(found[name], value, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    "version, settings, said",
    [
        ("1", ["checkpointing=true"], "FSDP2 only: launch with --fsdp_version 2"),
        ("2", ["checkpointing=true", "base.quantisation=fp8"], "=fp8 cannot be sharded"),
        ("2", [], "needs --set checkpointing=true"),
    ],
)
def test_what_cannot_be_sharded_is_refused(
    short_config: RunConfig,
    monkeypatch: pytest.MonkeyPatch,
    version: str,
    settings: list[str],
    said: str,
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", version)
    with pytest.raises(ConfigError, match=said):
        open_session(short_config.with_settings(settings))
