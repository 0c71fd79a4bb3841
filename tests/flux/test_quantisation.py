"""Training with less memory: micro-batches, recomputed blocks, a base in fp8."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from flux.trainer_ranks import FEATURES, gradients_of
from torch.testing import assert_close

from prw import ConfigError
from prw_flux.config import RunConfig
from prw_flux.interrupt import Stop
from prw_flux.progress import Quiet
from prw_flux.quantisation import loading
from prw_flux.ranks import Ranks
from prw_flux.resume import Position, adapter_to_continue
from prw_flux.rundir import RunFolder
from prw_flux.session import Session, open_session
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
