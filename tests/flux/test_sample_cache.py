"""Encoded samples on disk: the same bits as without, whole or not at all, by any ranks."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from prw import ConfigError
from prw_flux.cli import main
from prw_flux.config import RunConfig
from prw_flux.rundir import RunFolder
from prw_flux.sample_cache import store, table
from prw_flux.sample_cache.build import Built, build, encoders
from prw_flux.sample_cache.check import check, unfinished
from prw_flux.sample_cache.errors import CacheError
from prw_flux.sample_cache.opened import open_tables
from prw_flux.sample_cache.table import Table, tables
from prw_flux.session import open_session
from prw_flux.shapeweave.source import ShapeWeave
from prw_flux.share import Share
from prw_flux.tasks import DataSource, Example, Task, Triple, load_task
from prw_flux.trainer import open_training_data, train


class Counted(ShapeWeave):
    """Counts what is read, and may die at one of its pictures."""

    def __init__(self, dies_at: int | None = None) -> None:
        super().__init__(size=64, seed=0)
        self.read: Counter[tuple[str, int]] = Counter()
        self.dies_at = dies_at

    def example(self, task: str, index: int) -> Example:
        self.read[task, index] += 1
        if index == self.dies_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().example(task, index)


class Uneven(Task):
    """Targets of two sizes."""

    name, sentence = "uneven", "Be uneven."

    def missing(self, example: Example) -> str | None:
        return None

    def make(self, example: Example, rng: np.random.Generator) -> Triple:
        side = 64 if rng.random() < 0.5 else 32
        return self.triple(example, "x", example.image, "a red", example.image[:side, :side])


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "BLOCK", 2)


def made(
    config: RunConfig, cache: Path, data: DataSource | None = None, share: Share | None = None
) -> Built:
    tasks = [load_task(stage.task) for stage in config.stages]
    share = share or Share()
    data = data or ShapeWeave(size=config.size, seed=config.seed)
    return build(cache, config, data, tasks, lambda: encoders(config, share), share=share)


def with_cache(config: RunConfig, cache: Path, *settings: str) -> RunConfig:
    return config.with_settings([f"data.cache={cache}", *settings])


def trained(config: RunConfig, path: Path) -> RunFolder:
    session = open_session(config)
    data = open_training_data(config, session)
    run = RunFolder.create(path, config)
    train(run, session, data)
    return run


def weights(run: RunFolder) -> dict[str, Any]:
    return {str(f.relative_to(run.path)): load_file(f) for f in run.path.rglob("*.safetensors")}


def losses(run: RunFolder) -> list[Any]:
    told = ("loss", "usage_noisy", "held_out_loss", "held_out_usage")
    return [[line.get(name) for name in told] for line in run.read_log()]


def forbid_encoders(monkeypatch: pytest.MonkeyPatch, *, vae: bool = True) -> None:
    from diffusers import AutoencoderTiny
    from transformers import CLIPTextModel, T5EncoderModel

    def refuse(*given: Any, **named: Any) -> Any:
        raise AssertionError("an encoder was loaded")

    for model in (CLIPTextModel, T5EncoderModel, *([AutoencoderTiny] if vae else [])):
        monkeypatch.setattr(model, "from_pretrained", refuse)


@pytest.mark.parametrize(
    "settings",
    [
        (),
        ("data.samples=none",),
        ("adapter.source_pooled=empty", "precision=bf16"),
        ("precision=bf16",),
    ],
)
def test_training_from_a_cache_is_training_without_and_loads_no_encoder(
    short_config: RunConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    settings: tuple[str, ...],
) -> None:
    looks = ["held_out.samples=5", "held_out.every=2"]
    config = short_config.with_settings(["caption_dropout=0.5", *looks, *settings])
    live = trained(config, tmp_path / "live")
    made(config, tmp_path / "cache")
    forbid_encoders(monkeypatch)
    with pytest.raises(AssertionError, match="an encoder was loaded"):
        open_session(config)
    cached = trained(with_cache(config, tmp_path / "cache"), tmp_path / "cached")
    assert losses(live) == losses(cached)
    looked = [line["step"] for line in cached.read_log() if "held_out_loss" in line]
    assert looked == [2, 3] * 3
    for name, tensors in weights(live).items():
        theirs = weights(cached)[name]
        assert all(torch.equal(tensor, theirs[key]) for key, tensor in tensors.items()), name
    told = [[s["rejected"] for s in run.index["stages"]] for run in (live, cached)]
    if config.data.samples is not None:  # else a batch that is logged is drawn twice
        assert told[0] == told[1]


def test_a_cached_run_draws_the_same_grids_and_loads_the_autoencoder_alone(
    short_config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(short_config, stages=short_config.stages[:1]).with_settings(
        ["sample_every=2", "evaluation.steps=2", "held_out.samples=2", "held_out.every=3"]
    )
    live = trained(config, tmp_path / "live")
    assert made(config, tmp_path / "cache").samples == 6 + 4
    forbid_encoders(monkeypatch, vae=False)
    cached = trained(with_cache(config, tmp_path / "cache"), tmp_path / "cached")
    assert losses(live) == losses(cached) and losses(cached)[-1][-2] is not None
    grids = sorted(path.name for path in live.grids.iterdir())
    assert grids == ["inpaint-0000002.png", "inpaint-0000003.png"]
    pictures = [[(run.grids / name).read_bytes() for name in grids] for run in (live, cached)]
    assert pictures[0] == pictures[1] and pictures[0][0] != pictures[0][1]


def test_an_older_cache_gets_its_held_out_samples_by_the_same_command(
    short_config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made(short_config, tmp_path)
    config = short_config.with_settings(["held_out.samples=5"])
    asked, tasks = with_cache(config, tmp_path), [load_task(s.task) for s in config.stages]
    with pytest.raises(
        CacheError, match="lacks all 5 held-out samples of stage 'inpaint', all 5 held-out"
    ) as refused:
        open_session(asked)
    remedy = f"`prw-flux cache build demo --set data.cache={tmp_path}` and every other --set"
    assert remedy in str(refused.value) and "run, or go without (held_out." in str(refused.value)
    added, again = made(config, tmp_path), made(config, tmp_path)
    assert (added.samples, added.encoded, again.encoded) == (18 + 15, 15, 0)
    assert not check(tmp_path) and not unfinished(tmp_path)
    assert open_tables(asked, tasks, {"inpaint"}).keys() == {
        "ground", "ground held out", "control", "control held out"
    }  # fmt: skip
    (found, *_) = (tmp_path / "samples").glob("inpaint_held_out-*/00001.safetensors")
    found.unlink()
    assert not check(tmp_path)
    (told,) = unfinished(tmp_path)
    assert told.startswith(
        "inpaint held out: unfinished, 3 of 5 samples: run the same `cache build` again, or remove "
    )
    assert main(["cache", "check", str(tmp_path), "--json"]) == 3
    assert json.loads(capsys.readouterr().out)["unfinished"] == [told]
    with pytest.raises(CacheError, match="lacks 2 of 5 held-out samples of stage 'inpaint';"):
        open_session(asked)


def test_samples_of_two_sizes_come_in_the_same_batches(
    short_config: RunConfig, tmp_path: Path
) -> None:
    stage = f"{__name__}:Uneven"
    (first, *_) = short_config.stages
    config = replace(short_config, stages=(replace(first, task=stage, name="uneven"),))
    config = config.with_settings(["held_out.samples=5"])
    made(config, tmp_path / "cache")
    live = trained(config, tmp_path / "live")
    cached = trained(with_cache(config, tmp_path / "cache"), tmp_path / "cached")
    assert losses(live) == losses(cached) and len(losses(live)) == 3


def test_every_picture_is_read_once_and_nothing_is_encoded_twice(
    short_config: RunConfig, tmp_path: Path
) -> None:
    data = Counted()
    done = made(short_config, tmp_path, data)
    assert set(data.read.values()) == {1} and len(data.read) >= 18
    assert (done.samples, done.encoded) == (18, 18)
    shards = [load_file(path) for path in (tmp_path / "shards").glob("*")]
    keys = [bytes(row) for s in shards for n, t in s.items() if n.startswith("keys") for row in t]
    assert len(keys) == len(set(keys)) == done.latents + done.texts
    again = made(short_config, tmp_path, Counted())
    assert again == Built(samples=18, encoded=0, latents=0, texts=0)


def dies_in_a_build(config: RunConfig, cache: Path) -> None:
    """In a process of its own, which knows no fixture."""
    table.BLOCK = 2
    made(config, cache, Counted(dies_at=4))


def test_a_build_that_was_killed_goes_on_where_it_was(
    short_config: RunConfig, tmp_path: Path
) -> None:
    made(short_config, tmp_path / "whole")
    child = multiprocessing.get_context("spawn").Process(
        target=dies_in_a_build, args=(short_config, tmp_path / "cut")
    )
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    (tmp_path / "cut/shards/.x.safetensors.abc.new").write_bytes(b"half")
    data = Counted()
    done = made(short_config, tmp_path / "cut", data)
    assert 0 < done.encoded < 18 == done.samples
    assert data.read["inpaint", 2] == 0 and data.read["inpaint", 4] == 1
    assert not check(tmp_path / "cut") and not unfinished(tmp_path / "cut")
    for one, other in zip(tables(tmp_path / "whole"), tables(tmp_path / "cut"), strict=True):
        assert one.identity == other.identity
        require_equal(one, other)


def require_equal(one: Table, other: Table) -> None:
    for index in range(len(one)):
        a, b = one.read([index]), other.read([index])
        assert torch.equal(a.source_NSC, b.source_NSC) and torch.equal(a.target_NTC, b.target_NTC)
        pairs = zip(one.texts.gather(a.rows), other.texts.gather(b.rows), strict=True)
        assert all(torch.equal(mine, theirs) for mine, theirs in pairs)


def test_ranks_share_the_work_and_write_files_of_their_own(
    short_config: RunConfig, tmp_path: Path
) -> None:
    made(short_config, tmp_path / "one")
    seen: dict[Path, int] = {}
    for rank in range(3):
        share = Share(rank=rank, count=3)
        before = dict(seen)
        made(short_config, tmp_path / "three", share=share)
        seen = {p: p.stat().st_mtime_ns for p in (tmp_path / "three").rglob("*.safetensors")}
        assert before.items() <= seen.items()
        assert len(seen) > len(before)
    assert not check(tmp_path / "three") and not unfinished(tmp_path / "three")
    for one, other in zip(tables(tmp_path / "one"), tables(tmp_path / "three"), strict=True):
        require_equal(one, other)
    monkey = {"RANK": "3", "WORLD_SIZE": "2"}
    os.environ.update(monkey)
    try:
        with pytest.raises(ConfigError, match="RANK=3 is not one of WORLD_SIZE=2"):
            Share.of_environment()
    finally:
        for name in monkey:
            del os.environ[name]


@pytest.mark.slow
def test_two_processes_of_torchrun_build_one_cache(short_config: RunConfig, tmp_path: Path) -> None:
    config = short_config.with_settings(["data.samples=300"])
    config = replace(config, stages=config.stages[:1])
    run = RunFolder.create(tmp_path / "run", config)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
               "--master-port", "0", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0",
               "-m", "prw_flux.cli", "cache", "build", str(run.path),
               "--out", str(tmp_path / "cache")]  # fmt: skip
    ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert ran.returncode == 0, ran.stderr
    assert "rank 0 of 2: 256 samples, 256 of them" in ran.stdout
    assert "rank 1 of 2: 44 samples, 44 of them" in ran.stdout
    ran = subprocess.run(
        [sys.executable, "-m", "prw_flux.cli", "cache", "check", str(tmp_path / "cache")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode == 0 and "300 samples, all as they were" in ran.stdout, ran.stdout


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (["seed=1"], r"all 6 samples of stage 'inpaint' \(it has some with seed 0, not 1\)"),
        (["size=96"], "size 64, not 96"),
        (["data.samples=8"], r"count 6, not 8\)"),
        (["stages.0.task=edit"], "task inpaint, not edit"),
    ],
)
def test_a_cache_of_something_else_is_refused_by_what_differs(
    short_config: RunConfig, tmp_path: Path, settings: list[str], told: str
) -> None:
    made(short_config, tmp_path)
    asked = with_cache(short_config, tmp_path, *settings)
    with pytest.raises(CacheError, match=told) as refused:
        open_session(asked)
    assert f"prw-flux cache build demo --set data.cache={tmp_path}" in str(refused.value)


def test_another_autoencoder_or_other_data_is_told(
    short_config: RunConfig, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made(short_config, tmp_path / "cache")
    other = tmp_path / "other"
    shutil.copytree(tiny_base, other)
    (file,) = (other / "vae").glob("*.safetensors")
    tensors = load_file(file)
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, file, {"format": "pt"})
    asked = with_cache(short_config, tmp_path / "cache", f"base.path={other}")
    with pytest.raises(
        CacheError, match=r"\(it has some with vae [0-9a-f]{12}, not [0-9a-f]{12}\)"
    ):
        open_session(asked)

    def darker(self: ShapeWeave, task: str, index: int) -> Example:
        found = whole(self, task, index)
        found.image[:8] //= 2
        return found

    whole = ShapeWeave.example
    monkeypatch.setattr(ShapeWeave, "example", darker)
    with pytest.raises(CacheError, match="it has some with data"):
        open_session(with_cache(short_config, tmp_path / "cache"))


def test_an_incomplete_cache_says_how_many_and_what_to_do(
    short_config: RunConfig, tmp_path: Path
) -> None:
    with pytest.raises(CacheError, match="lacks all 6 samples of stage 'inpaint', all 6"):
        open_session(with_cache(short_config, tmp_path / "none"))
    made(short_config, tmp_path, share=Share(rank=0, count=2))
    with pytest.raises(CacheError, match=r"lacks 2 of 6 samples of stage 'inpaint', 2 of 6"):
        open_session(with_cache(short_config, tmp_path))
    assert "control: unfinished, 4 of 6 samples" in unfinished(tmp_path)[0]


def test_a_full_disk_leaves_nothing_half_written(
    short_config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written, fails_at = 0, 0

    def full(tensors: Any, path: Path, metadata: Any) -> None:
        nonlocal written
        written += 1
        if written == fails_at:
            Path(path).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        save_file(tensors, path, metadata)

    monkeypatch.setattr(store, "save_file", full)
    for number in (1, 2, 3, 5):
        written, fails_at = 0, number
        with pytest.raises(CacheError, match="No space left on device.*make room"):
            made(short_config, tmp_path)
        assert not [p for p in tmp_path.rglob("*") if p.suffix not in (".safetensors", ".json", "")]
        assert not check(tmp_path)
    written, fails_at = 0, -1
    assert made(short_config, tmp_path).samples == 18
    assert not check(tmp_path) and not unfinished(tmp_path)


@pytest.mark.parametrize("which", ["shards", "samples"])
@pytest.mark.parametrize("how", ["flip", "cut", "gone"])
def test_damage_is_found_and_mended(
    short_config: RunConfig, tmp_path: Path, which: str, how: str
) -> None:
    made(short_config, tmp_path)
    (found, *_) = sorted((tmp_path / which).rglob("*.safetensors"))
    data = bytearray(found.read_bytes())
    data[-3] ^= 1
    if how == "gone":
        found.unlink()
    else:
        found.write_bytes(data if how == "flip" else data[:-40])
    assert any(found.name in told for told in check(tmp_path)) or unfinished(tmp_path)
    expected = 3 if (which, how) == ("samples", "gone") else 1
    assert main(["cache", "check", str(tmp_path), "--repair"]) == expected
    assert made(short_config, tmp_path).encoded > 0
    assert not check(tmp_path) and not unfinished(tmp_path)
    config = with_cache(short_config, tmp_path)
    assert set(open_tables(config, [load_task(s.task) for s in config.stages])) == {
        "inpaint", "ground", "control"
    }  # fmt: skip


def test_the_verb_builds_and_checks(
    short_config: RunConfig, tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunFolder.create(tmp_path / "run", short_config)
    cache = str(tmp_path / "cache")
    assert main(["cache", "build", str(run.path), "--out", cache]) == 0
    assert "18 samples, 18 of them encoded now" in capsys.readouterr().out
    assert main(["cache", "check", cache]) == 0
    assert "18 samples, all as they were encoded" in capsys.readouterr().out
    assert main(["cache", "build", "demo"]) == 1
    assert "needs a place" in capsys.readouterr().err
    assert main(["cache", "check", str(tmp_path / "run")]) == 1
    assert "is no cache" in capsys.readouterr().err
