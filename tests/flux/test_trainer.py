"""The training loop: what it trains, what it leaves alone, what it writes, and when it stops."""

from __future__ import annotations

import hashlib
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from prw_flux import PRWAdapter
from prw_flux.config import OptimizerConfig, RunConfig
from prw_flux.curriculum import Stage
from prw_flux.interrupt import Stop
from prw_flux.objective import Objective
from prw_flux.optimization import learning_rate, new_optimizer
from prw_flux.progress import Quiet
from prw_flux.resume import Position
from prw_flux.rundir import RunFolder
from prw_flux.session import Session, open_session
from prw_flux.tasks import Example, Task, Triple
from prw_flux.trainer import (
    Trainer,
    TrainingError,
    open_training_data,
    train,
)


def run_of(config: RunConfig, path: Path, **told: Any) -> RunFolder:
    session = open_session(config)
    data = open_training_data(config, session)
    run = RunFolder.create(path, config)
    train(run, session, data, **told)
    return run


def experts(run: RunFolder) -> dict[str, str]:
    return {
        file.parent.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(run.adapter.rglob("adapter_model.safetensors"))
    }


def test_a_run_unlocks_its_stages_and_freezes_veterans(
    short_config: RunConfig, tmp_path: Path
) -> None:
    after: list[dict[str, str]] = []

    class Looks(Quiet):
        def begin(self, number: int, total: int, stage: Any) -> None:
            if number:
                after.append(experts(RunFolder.open(tmp_path / "run")))

    config = short_config.with_settings(["remember=0"])  # else a newcomer may never be chosen
    run = run_of(config, tmp_path / "run", progress=Looks())
    after.append(experts(run))
    assert [list(seen) for seen in after] == [
        ["0-inpaint"],
        ["0-inpaint", "1-ground"],
        ["0-inpaint", "1-ground", "2-control"],
    ]
    for earlier, later in zip(after, after[1:], strict=False):
        assert earlier == {name: later[name] for name in earlier}
    adapter = PRWAdapter.from_pretrained(run.adapter)
    assert [(s.name, s.open) for s in adapter.weave.stages] == [
        ("inpaint", False), ("ground", False), ("control", False)
    ]  # fmt: skip
    assert adapter.config.resolution == 64
    assert sum(p.abs().sum() > 0 for n, p in adapter.named_parameters() if ".B." in n) == 2 * 2 * 3
    assert run.finished and RunFolder.open(run.path).finished


def test_the_log_says_how_the_newest_expert_is_used(
    short_config: RunConfig, tmp_path: Path
) -> None:
    run = run_of(short_config, tmp_path / "run")
    log = run.read_log()
    assert [(line["stage"], line["step"]) for line in log] == [
        (name, step) for name in ("inpaint", "ground", "control") for step in (1, 2, 3)
    ]
    for line in log:
        assert math.isfinite(line["loss"]) and line["memory_mib"] > 0
        assert 0.0 <= line["usage_noisy"] <= 1.0 and 0.0 <= line["usage_deterministic"] <= 1.0
        stage = next(s for s in short_config.stages if s.name == line["stage"])
        gap = abs(line["usage_noisy"] - stage.density)
        assert line["gate_loss"] == pytest.approx(stage.weight * gap, abs=1e-6)
    assert all(line["usage_noisy"] == 1.0 for line in log if line["stage"] == "inpaint")


def test_finished_stages_are_remembered(short_config: RunConfig, tmp_path: Path) -> None:
    run = run_of(short_config, tmp_path / "run")
    pools = PRWAdapter.from_pretrained(run.adapter).weave.pools.values()
    routers = [pool.columns for pool in pools]
    assert [len(router.memory(stage)) for router in routers for stage in range(3)] == [3] * 6
    config = short_config.with_settings(["remember=0"])  # the paper's way
    plain = run_of(config, tmp_path / "plain")
    pool = PRWAdapter.from_pretrained(plain.adapter).weave.pools["transformer_blocks.0.attn"]
    assert len(pool.columns.memory(0)) == 0


def test_the_loss_falls_on_a_few_samples(short_config: RunConfig, tmp_path: Path) -> None:
    config = replace(short_config, stages=short_config.stages[:1]).with_settings(
        ["stages.*.steps=40", "data.samples=2", "stages.*.lr=2e-2", "log_every=1",
         "caption_dropout=0"]
    )  # fmt: skip
    losses = [line["loss"] for line in run_of(config, tmp_path / "run").read_log()]
    assert sum(losses[-10:]) < 0.97 * sum(losses[:10])


@pytest.mark.parametrize("pooled", ["task", "prompt", "empty"])
@pytest.mark.parametrize("time", ["zero", "current"])
def test_every_way_to_modulate_the_source_trains(
    short_config: RunConfig, tmp_path: Path, pooled: str, time: str
) -> None:
    config = replace(short_config, stages=short_config.stages[:1]).with_settings(
        [f"adapter.source_pooled={pooled}", f"adapter.source_timestep={time}",
         "stages.*.steps=1", "data.samples=none"]
    )  # fmt: skip
    run = run_of(config, tmp_path / "run")
    adapter = PRWAdapter.from_pretrained(run.adapter)
    assert (adapter.config.source_pooled, adapter.config.source_timestep) == (pooled, time)


def passes_of(session: Session) -> list[dict[str, torch.Tensor]]:
    """What each pass of the transformer is given from now on; a source pass has no text."""
    seen: list[dict[str, torch.Tensor]] = []
    session.passes.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(dict(kwargs)), with_kwargs=True
    )
    return seen


def one_loss(config: RunConfig, path: Path, session: Session, step: int = 0) -> Any:
    """The trainer's first micro-batch of a step of the first stage."""
    data = open_training_data(config, session)
    trainer = Trainer(RunFolder.create(path, config), session, data, Quiet(), Stop())
    stage = config.stages[0]
    samples = trainer._samples(0, Position())
    trainer._unlock(stage)
    return next(trainer.objective.parts(samples, stage, step))


def test_draws_share_one_source_pass(short_config: RunConfig, tmp_path: Path) -> None:
    config = short_config.with_settings(["draws=3"])
    session = open_session(config)
    seen = passes_of(session)
    loss = one_loss(config, tmp_path / "run", session)
    source, main = seen
    assert source["hidden_states"].shape[0] == 2 and source["encoder_hidden_states"].shape[1] == 0
    assert main["hidden_states"].shape[0] == 6 and len(main["timestep"].unique()) == 6
    texts = main["encoder_hidden_states"].unflatten(0, (2, 3))
    assert torch.equal(texts[:, :1].expand_as(texts), texts)
    assert loss.flow.isfinite() and loss.record.usage() == 1.0


def test_one_draw_is_what_it_was(short_config: RunConfig, tmp_path: Path) -> None:
    """Blank sources are drawn last: a seed gives the noise and the times that it always gave."""
    seen = {}
    for name, settings in (("plain", []), ("blank", ["source_dropout=1"])):
        config = short_config.with_settings(settings)
        session = open_session(config)
        found = passes_of(session)
        one_loss(config, tmp_path / name, session)
        seen[name] = found
    source, main = seen["plain"]
    blank, same = seen["blank"]
    assert torch.equal(main["hidden_states"], same["hidden_states"])
    assert torch.equal(main["timestep"], same["timestep"])
    assert source["hidden_states"].abs().max() > 0.1
    assert torch.equal(blank["hidden_states"], torch.zeros_like(source["hidden_states"]))


def test_a_share_of_the_sources_is_blank(short_config: RunConfig, tmp_path: Path) -> None:
    config = short_config.with_settings(
        ["source_dropout=0.5", "stages.*.batch_size=32", "data.samples=8"]
    )
    session = open_session(config)
    found = passes_of(session)
    one_loss(config, tmp_path / "run", session)
    blank = (found[0]["hidden_states"] == 0).flatten(1).all(dim=1)
    assert 6 <= int(blank.sum()) <= 26  # 32 draws at one half: outside with p = 2e-4


class Uneven(Task):
    """Targets of two sizes for sources of one."""

    name, sentence = "inpaint", "Be uneven."

    def missing(self, example: Example) -> str | None:
        return None

    def make(self, example: Example, rng: np.random.Generator) -> Triple:
        side = 64 if rng.random() < 0.5 else 32
        return self.triple(example, "x", example.image, "", example.image[:side, :side])


def test_samples_of_two_sizes_train(short_config: RunConfig, tmp_path: Path) -> None:
    config = replace(short_config, stages=short_config.stages[:1]).with_settings(
        ["stages.*.steps=8", "data.samples=12"]
    )
    session = replace(open_session(config), tasks=(Uneven(),))
    seen = passes_of(session)
    run = RunFolder.create(tmp_path / "run", config)
    train(run, session, open_training_data(config, session))
    tokens = {x["hidden_states"].shape[1] for x in seen if x["encoder_hidden_states"].shape[1]}
    assert tokens == {4, 16}
    assert all(math.isfinite(line["loss"]) for line in run.read_log())


def test_bf16_keeps_experts_and_routers_in_fp32(short_config: RunConfig, tmp_path: Path) -> None:
    config = replace(short_config, precision="bf16")
    session = open_session(config)
    assert session.passes.transformer.dtype == torch.bfloat16
    run = RunFolder.create(tmp_path / "run", config)
    train(run, session, open_training_data(config, session))
    assert {p.dtype for p in session.adapter.parameters()} == {torch.float32}
    for line in run.read_log():  # an exact value, so nothing of the gate was computed in bf16
        density, weight = (1.0, 0.0) if line["stage"] == "inpaint" else (0.8, 0.5)
        gap = abs(line["usage_noisy"] - density)
        assert line["gate_loss"] == pytest.approx(weight * gap, abs=1e-6)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_loss_that_is_not_finite_stops_and_keeps_the_good_state(
    short_config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    original = Objective.parts

    def broken(self: Objective, samples: Any, stage: Stage, step: int) -> Any:
        (loss,) = original(self, samples, stage, step)
        if (stage.name, step) != ("ground", 1):
            return [loss]
        zero = loss.flow * 0.0  # sqrt'(0) is infinite, its value is not
        return [replace(loss, flow=loss.flow * math.nan if what == "loss" else zero.sqrt())]

    monkeypatch.setattr(Objective, "parts", broken)
    with pytest.raises(TrainingError, match=f"{what} of stage 'ground' is not finite at step 2"):
        run_of(short_config, tmp_path / "run")
    run = RunFolder.open(tmp_path / "run")
    state = PRWAdapter.from_pretrained(run.states.paths()[-1] / "adapter")
    assert all(torch.isfinite(p).all() for p in state.parameters())
    assert run.done == 1


def test_learning_rates(short_config: RunConfig) -> None:
    stage = Stage(task="edit", steps=110, batch_size=1, lr=1.0)
    constant = OptimizerConfig(warmup=10)
    assert learning_rate(constant, stage, 0) == pytest.approx(0.1)
    assert [learning_rate(constant, stage, s) for s in (9, 10, 109)] == [1.0, 1.0, 1.0]
    cosine = OptimizerConfig(warmup=10, decay="cosine")
    rates = [learning_rate(cosine, stage, s) for s in range(10, 110)]
    assert rates[0] == 1.0 and rates == sorted(rates, reverse=True)
    assert rates[-1] == pytest.approx(0.05, abs=1e-3)


def test_routers_have_their_own_rate_and_no_decay(short_config: RunConfig) -> None:
    session = open_session(short_config)
    session.adapter.weave.unlock("inpaint")
    optimizer = new_optimizer(session.adapter, OptimizerConfig(weight_decay=0.3, router_lr=2.0))
    groups = {group["factor"]: group for group in optimizer.param_groups}
    assert groups[1.0]["weight_decay"] == 0.3 and groups[2.0]["weight_decay"] == 0.0
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in session.adapter.weave.parameters()}
    assert all(p.ndim == 1 for p in groups[2.0]["params"])


def test_what_cannot_be_fed_is_known_before_training(
    short_config: RunConfig, tmp_path: Path
) -> None:
    from PIL import Image

    for name in "ab":
        Image.new("RGB", (80, 80), (90, 30, 60)).save(tmp_path / f"{name}.png")
    config = short_config.with_settings(["data.source=photos", f"data.photos={tmp_path}"])
    with pytest.raises(ValueError, match="cannot feed the task 'ground', only control, edit, inp"):
        open_training_data(config, open_session(config))
    with pytest.raises(ValueError, match="no data source 'phots'"):
        open_training_data(config.with_settings(["data.source=phots"]), open_session(config))
