"""The feature stream in a run: trained with the experts, saved with them, resumed bit for bit."""

from __future__ import annotations

import itertools
import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from transformers import Dinov2Config, Dinov2Model

from prw import CheckpointError, ConfigError
from prw_flux import CoLoGenPipeline
from prw_flux.cli import main
from prw_flux.cli.convert import converted
from prw_flux.cli.inspect import inspected
from prw_flux.config import RunConfig
from prw_flux.coredi import CoReDi, carrying
from prw_flux.evaluation.arms import untrained
from prw_flux.interrupt import Interrupted, Stop
from prw_flux.monitor import Monitor
from prw_flux.objective import Objective
from prw_flux.progress import Quiet
from prw_flux.resume import adapter_to_continue
from prw_flux.rundir import RunFolder
from prw_flux.session import open_session
from prw_flux.trainer import open_training_data, train

# float32 products of some hundred terms, in buffers that need not lie as they did
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
ENCODER = """
import torch
from prw_flux.coredi import FunctionEncoder

def maps(pixels, grid):
    pooled = torch.nn.functional.adaptive_avg_pool2d(pixels, grid)
    weight = torch.randn(WIDTH, 3, generator=torch.Generator().manual_seed(0))
    return torch.einsum("dc,bcrk->bdrk", weight, pooled).sin()

def encoder():
    return FunctionEncoder(maps, WIDTH)
"""


@pytest.fixture
def config(short_config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    """Two stages of three steps with a feature stream."""
    for width in (10, 11):
        code = ENCODER.replace("WIDTH", str(width))
        (tmp_path / f"encoder_of_{width}.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    config = replace(short_config, stages=short_config.stages[:2])
    return config.with_settings(
        ["coredi.enabled=true", "coredi.encoder=encoder_of_10:encoder", "coredi.channels=3",
         "coredi.drop=0.3", "log_every=1"]
    )  # fmt: skip


def go(run: RunFolder, progress: Quiet | None = None, stop: Stop | None = None) -> Any:
    session = open_session(run.config, adapter_to_continue(run))
    train(run, session, open_training_data(run.config, session), progress=progress, stop=stop)
    return session


def contents(run: RunFolder) -> dict[str, bytes]:
    files = [*run.adapter.rglob("*.safetensors"), *run.coredi.rglob("*.safetensors")]
    return {str(f.relative_to(run.path)): f.read_bytes() for f in sorted(files)}


class StopAfter(Quiet):
    """Asks to stop after some steps of a stage."""

    def __init__(self, stop: Stop, stage: str, step: int) -> None:
        self.told, self.where, self.stage = stop, (stage, step), ""

    def begin(self, number: int, total: int, stage: Any) -> None:
        self.stage = stage.name

    def stepped(self, done: int) -> None:
        if (self.stage, done) == self.where:
            self.told.number = 2


def test_experts_and_projection_train_together_and_resume_bit_for_bit(
    config: RunConfig, tmp_path: Path
) -> None:
    whole = RunFolder.create(tmp_path / "whole", config)
    session = go(whole)
    saved = CoReDi.load(whole.coredi)
    assert list(saved.snapshots) == ["inpaint", "ground"]
    now, first = saved.state_dict(), saved.snapshots["inpaint"]
    for name in ("projection.weight_DK", "stream.embed.weight", "stream.head.weight"):
        assert now[name].any() and not torch.equal(now[name], first[name])
        assert torch.equal(now[name], session.coredi.state_dict()[name])
    log = whole.read_log()
    keys = {"feature_loss", "feature_penalty", "feature_rank", "feature_scale"}
    assert len(log) == 6 and all(keys <= line.keys() for line in log)
    assert all(0 < line["feature_rank"] <= 3.0 + 1e-9 for line in log)

    for stage, step in (("inpaint", 1), ("ground", 2)):
        run = RunFolder.create(tmp_path / stage, config)
        stop = Stop()
        with pytest.raises(Interrupted):
            go(run, StopAfter(stop, stage, step), stop)
        run = RunFolder.open(run.path)
        go(run)
        assert contents(run) == contents(whole)
        assert [line["feature_loss"] for line in run.read_log()] == [
            line["feature_loss"] for line in log
        ]


def test_it_trains_on_a_narrow_base_and_is_averaged(config: RunConfig, tmp_path: Path) -> None:
    """With fp8 weights, blocks computed again, several draws and tokens of its own."""
    config = config.with_settings(
        ["base.quantisation=fp8", "checkpointing=true", "draws=2", "ema=0.5",
         "coredi.tokens=separate"]
    )  # fmt: skip
    whole = RunFolder.create(tmp_path / "whole", config)
    go(whole)
    means = load_file(whole.states.paths()[-1] / "ema.safetensors")
    saved = CoReDi.load(whole.coredi).state_dict()
    for name in ("projection.weight_DK", "stream.embed.weight", "stream.head.weight"):
        assert torch.equal(means[f"coredi.{name}/mean"], saved[name])
        assert not torch.equal(means[f"coredi.{name}/raw"], saved[name])

    cut, stop = RunFolder.create(tmp_path / "cut", config), Stop()
    with pytest.raises(Interrupted):
        go(cut, StopAfter(stop, "ground", 2), stop)
    cut = RunFolder.open(cut.path)
    go(cut)
    assert contents(cut) == contents(whole)


def test_redi_keeps_its_components(config: RunConfig, tmp_path: Path) -> None:
    redi = config.with_settings(
        ["coredi.learn_projection=false", "coredi.normalise=none", "coredi.covariance=0"]
    )
    run = RunFolder.create(tmp_path / "run", redi)
    go(run)
    saved = CoReDi.load(run.coredi)
    now, first = saved.state_dict(), saved.snapshots["inpaint"]
    assert torch.equal(now["projection.weight_DK"], first["projection.weight_DK"])
    gram = now["projection.weight_DK"].mT @ now["projection.weight_DK"]
    torch.testing.assert_close(gram, torch.eye(3), rtol=0, atol=1e-5)
    assert not torch.equal(now["stream.embed.weight"], first["stream.embed.weight"])
    assert all(line["feature_penalty"] == 0.0 for line in run.read_log())


def test_without_it_nothing_changes(
    config: RunConfig, short_config: RunConfig, tmp_path: Path
) -> None:
    """An image that reads no features trains as ever: the draws of the image come first."""
    off = config.with_settings(["coredi.enabled=false"])
    plain = RunFolder.create(tmp_path / "plain", off)
    go(plain)
    assert not plain.coredi.exists() and "feature_loss" not in plain.read_log()[0]
    dropped = RunFolder.create(tmp_path / "dropped", config.with_settings(["coredi.drop=1"]))
    go(dropped)
    ours, theirs = (
        {k: v for k, v in contents(run).items() if k.startswith("adapter")}
        for run in (plain, dropped)
    )
    assert ours.keys() == theirs.keys()
    assert [line["loss"] for line in plain.read_log()[:1]] == [
        line["loss"] for line in dropped.read_log()[:1]
    ]


def test_a_finished_run_is_extended_with_its_stream(config: RunConfig, tmp_path: Path) -> None:
    whole = RunFolder.create(tmp_path / "whole", config)
    go(whole)
    first = RunFolder.create(tmp_path / "first", replace(config, stages=config.stages[:1]))
    go(first)
    more = RunFolder.create(tmp_path / "more", config, parent=first)
    go(more)
    assert contents(more) == contents(whole)

    wider = config.with_settings(["coredi.encoder=encoder_of_11:encoder"])
    with pytest.raises(CheckpointError, match="features of width 10, this encoder gives 11"):
        open_session(wider, adapter_to_continue(first))
    other = config.with_settings(["coredi.layout=token"])
    with pytest.raises(ConfigError, match="coredi.layout 'latent', this run asks for 'token'"):
        open_session(other, adapter_to_continue(first))


@pytest.fixture
def trained(config: RunConfig, tmp_path: Path) -> RunFolder:
    """Two stages of a run whose batches are encoded one by one."""
    run = RunFolder.create(tmp_path / "run", config.with_settings(["data.samples=none"]))
    go(run)
    return run


def loaded(place: Path) -> CoLoGenPipeline:
    pipe = CoLoGenPipeline.from_pretrained(place)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drawn(pipe: CoLoGenPipeline, seeds: tuple[int, ...] = (0,), **more: Any) -> Tensor:
    """Latents of one picture per seed."""
    image = torch.linspace(0, 1, 3 * 64 * 64).view(3, 64, 64)
    latents: Tensor = pipe(
        prompt=["a red star"] * len(seeds),
        image=[image] * len(seeds),
        task="inpaint",
        num_inference_steps=2,
        output_type="latent",
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        **more,
    ).images
    return latents


def test_the_pipeline_of_a_run_denoises_its_features_beside_the_image(trained: RunFolder) -> None:
    pipe = loaded(trained.path)
    seen, without = drawn(pipe), drawn(pipe, representation_scale=0.0)
    earlier = drawn(pipe, route="stage:inpaint")
    guided = drawn(pipe, representation_scale=1.7)
    for one, other in itertools.combinations((seen, without, earlier, guided), 2):
        assert not torch.equal(one, other)
    # each picture has features of its own noise, whatever stands beside it in a batch
    torch.testing.assert_close(drawn(pipe, (3, 0))[1:], seen, rtol=1e-4, atol=1e-5)

    text = {"prompt": "a red star", "height": 64, "width": 64, "num_inference_steps": 2,
            "output_type": "latent"}  # fmt: skip
    from_text = pipe(**text, generator=torch.Generator().manual_seed(0)).images
    coredi, pipe.coredi = pipe.coredi, None
    assert coredi is not None
    assert torch.equal(drawn(pipe), without)
    assert torch.equal(pipe(**text, generator=torch.Generator().manual_seed(0)).images, from_text)
    with pytest.raises(ValueError, match=r"representation_scale=1.7 acts on a feature stream, and"):
        drawn(pipe, representation_scale=1.7)

    draw = torch.Generator().manual_seed(0)
    with carrying(pipe.transformer, coredi, generator=draw) as carried:
        by_hand = pipe(
            prompt=["a red star"],
            image=torch.linspace(0, 1, 3 * 64 * 64).view(3, 64, 64),
            task="inpaint",
            num_inference_steps=2,
            output_type="latent",
            generator=draw,
        ).images
    assert carried.features_BTF is not None and carried.features_BTF.shape == (1, 16, 12)
    assert torch.equal(by_hand, seen)
    pipe.coredi = coredi
    message = "reads a feature stream already: leave out one of the two"
    with pytest.raises(ConfigError, match=message), carrying(pipe.transformer, coredi):
        drawn(pipe)
    with pytest.raises(ValueError, match=r"=1.5 and image_guidance_scale=2.0 cannot guide"):
        drawn(pipe, representation_scale=1.5, image_guidance_scale=2.0)


def same(one: CoReDi, other: CoReDi) -> bool:
    """Bit for bit, with their stages."""
    states = [{"now": c.state_dict(), **c.snapshots} for c in (one, other)]
    return states[0].keys() == states[1].keys() and all(
        torch.equal(value, states[1][stage][name])
        for stage, state in states[0].items()
        for name, value in state.items()
    )


def test_features_go_where_their_adapter_goes(trained: RunFolder, tmp_path: Path) -> None:
    pipe = loaded(trained.path)
    wanted = drawn(pipe)
    pipe.save_pretrained(tmp_path / "pipe")
    for place in (loaded(tmp_path / "pipe"), CoLoGenPipeline.from_pipe(pipe)):
        assert place.coredi is not None and pipe.coredi is not None
        assert same(place.coredi, pipe.coredi)
        torch.testing.assert_close(drawn(place), wanted, **CLOSE)
    assert CoLoGenPipeline.from_pipe(pipe, prw=untrained(pipe)).coredi is None

    bare = loaded(Path(trained.config.base.path))
    bare.load_prw_weights(trained.path)
    torch.testing.assert_close(drawn(bare), wanted, **CLOSE)
    with pytest.warns(UserWarning, match="without the feature stream .* copy .*run/coredi"):
        converted(trained.path, tmp_path / "one.safetensors")
    bare.load_prw_weights(tmp_path / "one.safetensors")
    assert bare.coredi is None
    without = drawn(pipe, representation_scale=0.0)
    torch.testing.assert_close(drawn(bare), without, **CLOSE)
    assert (without - wanted).abs().max() > 100 * CLOSE["atol"]  # what tells one from the other


def test_a_stage_that_is_older_than_the_stream_has_no_features(
    config: RunConfig, tmp_path: Path
) -> None:
    off = replace(config, stages=config.stages[:1]).with_settings(["coredi.enabled=false"])
    first = RunFolder.create(tmp_path / "first", off)
    go(first)
    more = RunFolder.create(tmp_path / "more", config, parent=first)
    go(more)
    pipe = loaded(more.path)
    alone = drawn(pipe, route="stage:inpaint", representation_scale=0.0)
    assert torch.equal(drawn(pipe, route="stage:inpaint"), alone)
    assert not torch.equal(drawn(pipe), drawn(pipe, representation_scale=0.0))

    with pytest.raises(ConfigError, match="trained with coredi.enabled true, this run asks for f"):
        open_session(config.with_settings(["coredi.enabled=false"]), adapter_to_continue(more))


def test_held_out_samples_are_read_with_their_features(config: RunConfig, tmp_path: Path) -> None:
    """The loss is that of the model with its features, and looking moves nothing."""
    config = replace(config, stages=config.stages[:1])
    plain = RunFolder.create(tmp_path / "plain", config)
    go(plain)
    watched = config.with_settings(
        ["held_out.samples=4", "held_out.every=1", "sample_every=2", "evaluation.steps=1"]
    )
    run = RunFolder.create(tmp_path / "watched", watched)
    session = go(run)
    assert contents(run) == contents(plain)
    logged = run.read_log()[-1]["held_out_loss"]

    monitor = Monitor(run, Objective(watched, session), open_training_data(watched, session))
    monitor.begin(0)
    assert monitor._held_out is not None
    assert monitor._held_out.measure().loss == pytest.approx(logged, rel=1e-6)
    monitor._held_out.objective = Objective(watched, replace(session, coredi=None))
    assert monitor._held_out.measure().loss != pytest.approx(logged, rel=1e-6)


def test_from_a_dinov2_in_a_folder_to_a_report(
    config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command line alone: train, evaluate with and without features, look, generate."""
    torch.manual_seed(0)
    settings = Dinov2Config(
        hidden_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    Dinov2Model(settings).save_pretrained(tmp_path / "dino")
    out = str(tmp_path / "run")
    wanted = [f"base.path={config.base.path}", "size=64", "data.samples=12", "adapter.rank=2",
              "adapter.alpha=none", "precision=fp32", "stages.*.steps=3", "stages.*.batch_size=4",
              "held_out.samples=2", "log_every=1", "evaluation.per_task=2", "evaluation.steps=1",
              "evaluation.history=0", "coredi.enabled=true", "coredi.channels=4",
              f"coredi.encoder={tmp_path / 'dino'}"]  # fmt: skip
    given = [word for one in wanted for word in ("--set", one)]
    assert main(["train", "demo", "--only", "inpaint", "--out", out, "--quiet", *given]) == 0
    assert "effective rank of the projected features" in Path(out, "report.html").read_text()
    with_features = {p.name: p.read_bytes() for p in Path(out, "samples").glob("*.png")}
    assert main(["evaluate", out, "--quiet", "--json", "--representation", "0"]) == 0
    without = {p.name: p.read_bytes() for p in Path(out, "samples").glob("*.png")}
    assert with_features and with_features != without
    facts = inspected(Path(out))["features"]
    assert (facts["width"], facts["channels"], facts["stages"]) == (24, 4, ["inpaint"])

    bench = ["evaluate", out, "--bench", "shapes", "--per-task", "1", "--steps", "1", "--json"]
    assert main(bench) == 0
    (made,) = Path(out, "benchmarks").rglob("generation.json")
    written = json.loads(made.read_text())
    assert written["representation"] == 1.0 and len(written["features"]) == 64
    capsys.readouterr()
    assert main([*bench, "--representation", "0"]) == 1
    assert "made with representation 1.0 and not 0.0" in capsys.readouterr().err

    Image.new("RGB", (64, 64), (200, 30, 30)).save(tmp_path / "source.png")
    command = ["generate", "--run", out, "--prompt", "a red star", "--steps", "2", "--task",
               "inpaint", "--image", str(tmp_path / "source.png"), "--json"]  # fmt: skip
    pictures = []
    for scale in ("1", "0", "2"):
        file = tmp_path / f"{scale}.png"
        assert main([*command, "--representation", scale, "--out", str(file)]) == 0
        pictures.append(np.asarray(Image.open(file)).tobytes())
    assert len(set(pictures)) == 3


def test_collapse_is_told_by_the_trainer(
    config: RunConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = RunFolder.create(tmp_path / "run", config.with_settings(["coredi.warn_rank=1"]))
    with caplog.at_level(logging.WARNING, "prw_flux.coredi.collapse"):
        go(run)
    told = [r.getMessage() for r in caplog.records if "features collapse" in r.getMessage()]
    assert len(told) == 2  # once a stage
    assert "raise coredi.covariance" in told[0]


def test_features_that_really_collapse_are_told(
    config: RunConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Without any safeguard the projection shrinks until there is nothing left to predict."""
    config = replace(config, stages=config.stages[:1]).with_settings(
        ["stages.*.steps=12", "stages.*.batch_size=6", "data.samples=12", "coredi.lr=10",
         "coredi.normalise=none", "coredi.stop_gradient=false", "coredi.covariance=0",
         "coredi.warn_rank=0"]
    )  # fmt: skip
    run = RunFolder.create(tmp_path / "run", config)
    with caplog.at_level(logging.WARNING, "prw_flux.coredi.collapse"):
        go(run)
    scales = [line["feature_scale"] for line in run.read_log()]
    assert scales[0] > 1.0 > 0.5 > min(scales)
    (told,) = [r.getMessage() for r in caplog.records if "features collapse" in r.getMessage()]
    assert "beside noise of scale 1; set coredi.stop_gradient=true" in told


def test_a_channel_that_never_varies_is_refused_with_the_setting_that_drops_it(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = ENCODER.replace("WIDTH", "10").replace(".sin()", ".sin() * (torch.arange(10) != 4).view("
                                                  "10, 1, 1)")  # fmt: skip
    (tmp_path / "flat_encoder.py").write_text(code)
    flat = config.with_settings(["coredi.encoder=flat_encoder:encoder"])
    with pytest.raises(
        ConfigError, match=r"1 of the encoder's 10 channels .* \(4\): .*constant=drop"
    ):
        go(RunFolder.create(tmp_path / "error", flat))
    run = RunFolder.create(tmp_path / "drop", flat.with_settings(["coredi.constant=drop"]))
    go(run)
    assert not CoReDi.load(run.coredi).snapshots["inpaint"]["projection.weight_DK"][4].any()


def test_a_batch_of_one_is_refused_before_anything_begins(config: RunConfig) -> None:
    with pytest.raises(ConfigError, match=r"batch of one: raise stages.ground.batch_size"):
        config.with_settings(["stages.ground.batch_size=1"])
    config.with_settings(["coredi.normalise=none", "stages.ground.batch_size=1"])


def test_a_damaged_stream_is_refused(config: RunConfig, tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run", replace(config, stages=config.stages[:1]))
    go(run)
    file = run.states.paths()[-1] / "coredi" / "coredi.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"schema_version": 9}))
    with pytest.raises(CheckpointError, match="schema version 9, .* install a newer prw"):
        open_session(run.config, run.states.paths()[-1] / "adapter")
    assert load_file(run.coredi / "coredi.safetensors")["now/projection.fitted"]
