"""Semantic features in a sample cache: the same bits as without, and no encoder of them loaded."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from flux.test_sample_cache import forbid_encoders, made, trained, weights, with_cache
from safetensors.torch import load_file
from transformers import Dinov2Config, Dinov2Model

from prw_flux.cli import main
from prw_flux.config import RunConfig
from prw_flux.rundir import RunFolder
from prw_flux.sample_cache import build, table
from prw_flux.sample_cache.check import check
from prw_flux.sample_cache.errors import CacheError
from prw_flux.sample_cache.identity import feature_digest
from prw_flux.sample_cache.opened import open_tables
from prw_flux.sample_cache.wanted import sample_count
from prw_flux.session import open_session
from prw_flux.tasks import load_task

FUNCTION = "flux.trainer_ranks:encoder"
OURS = ("format", "block")
TOLD = ("loss", "feature_loss", "feature_penalty", "feature_rank", "usage_noisy", "held_out_loss")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "BLOCK", 4)


@pytest.fixture(scope="module")
def dino(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DINOv2 of random weights."""
    return saved_dino(tmp_path_factory.mktemp("dino") / "model", 0)


def saved_dino(path: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    settings = Dinov2Config(
        hidden_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    Dinov2Model(settings).save_pretrained(path)
    return path


@pytest.fixture
def featured(short_config: RunConfig) -> Callable[..., RunConfig]:
    """One stage of three steps with a feature stream."""

    def make(encoder: str | Path, *settings: str, stages: int = 1) -> RunConfig:
        config = replace(short_config, stages=short_config.stages[:stages])
        return config.with_settings(
            ["coredi.enabled=true", f"coredi.encoder={encoder}", "coredi.channels=3",
             "coredi.drop=0.3", "coredi.fit_images=9", "log_every=1", *settings]
        )  # fmt: skip

    return make


@pytest.mark.parametrize(
    ("encoder", "stages", "settings"),
    [
        ("dino", 2, ("held_out.samples=5", "held_out.every=2")),
        (FUNCTION, 1, ("data.samples=none", "precision=bf16")),
        (FUNCTION, 1, ("stages.0.task=flux.test_sample_cache:Uneven", "data.samples=12")),
    ],
)
def test_training_from_a_cache_is_training_without_and_loads_no_encoder(
    featured: Any,
    dino: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    encoder: str,
    stages: int,
    settings: tuple[str, ...],
) -> None:
    config = featured(dino if encoder == "dino" else encoder, *settings, stages=stages)
    live = trained(config, tmp_path / "live")
    done = made(config, tmp_path / "cache")
    assert done.features >= 6 and not check(tmp_path / "cache")
    forbid_encoders(monkeypatch)
    monkeypatch.delattr("prw_flux.session.load_encoder")
    cached = trained(with_cache(config, tmp_path / "cache"), tmp_path / "cached")
    mine, theirs = ([[x.get(k) for k in TOLD] for x in r.read_log()] for r in (live, cached))
    assert mine == theirs and mine[0][1] > 0
    held_out = bool(config.held_out.samples)
    assert [bool(line[-1]) for line in mine] == [False, held_out, held_out] * stages
    found, wanted = weights(cached), weights(live)
    assert any(name.startswith("coredi") for name in wanted) and found.keys() == wanted.keys()
    for name, tensors in wanted.items():
        assert all(torch.equal(tensor, found[name][key]) for key, tensor in tensors.items()), name


def test_features_are_added_to_a_cache_that_has_none_and_nothing_else_is(
    featured: Any, dino: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = featured(dino)
    plain = config.with_settings(["coredi.enabled=false"])
    made(plain, tmp_path)
    (index,) = (tmp_path / "samples").glob("*/table.json")
    facts = {k: v for k, v in json.loads(index.read_text()).items() if k not in OURS}
    assert not {"encoder", "features"} & facts.keys()
    name = hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=6).hexdigest()
    assert index.parent.name == f"inpaint-{name}", "caches that were made before are not found"
    asked = with_cache(config, tmp_path)
    with pytest.raises(CacheError, match=r"all 6 samples of stage 'inpaint' \(it has some with "
                       f"coredi.encoder none, not {dino}\\); make them"):  # fmt: skip
        open_session(asked)
    forbid_encoders(monkeypatch)
    added = made(config, tmp_path)
    assert (added.samples, added.encoded, added.latents, added.texts) == (6, 6, 0, 0)
    assert added.features == 6 and made(config, tmp_path).features == 0
    tables = {}
    for one in (asked, with_cache(plain, tmp_path)):
        (tables[one.coredi.enabled],) = open_tables(one, [load_task("inpaint")]).values()
    with_features, without = (tables[enabled].read([3, 1]) for enabled in (True, False))
    assert with_features.features_NRCD is not None and without.features_NRCD is None
    assert with_features.features_NRCD.shape == (2, 4, 4, 24)
    assert torch.equal(with_features.target_NTC, without.target_NTC)


def test_a_run_without_a_stream_trains_from_samples_with_features(
    featured: Any, dino: Path, tmp_path: Path
) -> None:
    config = featured(dino)
    made(config, tmp_path)
    asked = with_cache(config.with_settings(["coredi.enabled=false"]), tmp_path)
    (found,) = open_tables(asked, [load_task("inpaint")]).values()
    assert found.identity.encoder == str(dino) and found.read([0]).features_NRCD is None


def test_features_of_another_encoder_are_refused(featured: Any, dino: Path, tmp_path: Path) -> None:
    made(featured(dino), tmp_path / "cache")
    other = saved_dino(tmp_path / "other", 1)
    files = r"\(it has some with a coredi.encoder whose files are [0-9a-f]{12}, not [0-9a-f]{12}\)"
    for encoder in (other, FUNCTION):
        with pytest.raises(CacheError, match=files):
            open_session(with_cache(featured(encoder), tmp_path / "cache"))
    shutil.copytree(dino, tmp_path / "moved")
    (tmp_path / "moved/README.md").write_text("the same weights elsewhere")
    moved = with_cache(featured(tmp_path / "moved"), tmp_path / "cache")
    assert open_session(moved).coredi is not None
    absent = with_cache(featured("nobody/has-this"), tmp_path / "cache")
    with pytest.raises(CacheError, match=f"with coredi.encoder {dino}, not nobody/has-this"):
        open_session(absent)


def test_an_encoder_is_known_by_what_it_is_made_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    module = tmp_path / "an_encoder_of_mine.py"
    module.write_text("raise AssertionError('imported')")
    one, other = (feature_digest(f"an_encoder_of_mine:{name}") for name in ("one", "other"))
    module.write_text("raise AssertionError('imported again')")
    changed = feature_digest("an_encoder_of_mine:one")
    assert len({one, other, changed, ""}) == 4
    assert feature_digest("no_such_module:one") == feature_digest("nobody/has-this") == ""
    assert feature_digest("no_such.module:one") == ""


def test_damaged_features_are_found_and_mended(featured: Any, dino: Path, tmp_path: Path) -> None:
    config = featured(dino)
    made(config, tmp_path)
    shards = sorted((tmp_path / "shards").iterdir())
    (found, *_) = (path for path in shards if "features.4x4" in load_file(path))
    found.write_bytes(found.read_bytes()[:-9] + b"different")
    assert [told for told in check(tmp_path, repair=True) if found.name in told]
    again = made(config, tmp_path)
    assert (again.encoded, again.features) == (4, 4) and not check(tmp_path)


def test_without_a_number_of_samples_those_of_the_components_are_encoded(featured: Any) -> None:
    config = featured(FUNCTION, "data.samples=none")
    (stage,) = config.stages
    assert sample_count(config, stage) == 9 > stage.steps * stage.batch_size
    off = config.with_settings(["coredi.enabled=false"])
    assert sample_count(off, stage) == stage.steps * stage.batch_size


def test_an_encoder_without_files_cannot_fill_a_cache(
    featured: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "load_encoder", lambda *given: None)
    with pytest.raises(CacheError, match="coredi.encoder nobody/has-this has no files to know it"):
        made(featured("nobody/has-this"), tmp_path)


def test_the_verb_says_how_many_features_it_encoded(
    featured: Any, dino: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunFolder.create(tmp_path / "run", featured(dino))
    assert main(["cache", "build", str(run.path), "--out", str(tmp_path / "cache")]) == 0
    assert "texts, features of 6)" in capsys.readouterr().out
    assert main(["cache", "check", str(tmp_path / "cache")]) == 0
