"""load_prw_weights: folders, runs, files and repositories; adapters and LoRAs told apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.testing import assert_close

from prw import CheckpointError
from prw_flux import CoLoGenPipeline, attached
from prw_flux.flat_file import load_flat, save_flat

EXACT = {"rtol": 0.0, "atol": 0.0}


@pytest.fixture
def saved(make_base: Any, make_adapter: Any, tmp_path: Path) -> Any:
    """A pipeline without adapter, and an adapter of it in a folder, a run and a file."""
    base = make_base()
    adapter = make_adapter(base.transformer)
    adapter.save_pretrained(tmp_path / "adapter")
    adapter.save_pretrained(tmp_path / "run/adapter")
    (tmp_path / "run/run.json").write_text("{}")
    save_flat(adapter, tmp_path / "file/adapter.safetensors")
    return CoLoGenPipeline.from_pipe(base), adapter


PLACES: dict[str, dict[str, Any]] = {
    "adapter": {},
    "run": {},
    "run/": {"subfolder": "adapter"},
    "file/adapter.safetensors": {},
    "file": {"weight_name": "adapter.safetensors"},
}


@pytest.mark.parametrize("place", PLACES)
def test_an_adapter_comes_and_goes(
    saved: Any, photo: Any, run: Any, tmp_path: Path, place: str
) -> None:
    pipe, adapter = saved
    text = run(pipe, "a", height=32, width=32)
    pipe.load_prw_weights(tmp_path / place, **PLACES[place])
    assert attached(pipe.transformer) is pipe.prw is pipe.components["prw"]
    found = run(pipe, "a", image=photo(), task="edit")
    wanted = CoLoGenPipeline.from_pipe(pipe, prw=adapter)
    assert_close(run(wanted, "a", image=photo(), task="edit"), found, **EXACT)
    pipe.unload_prw_weights()
    assert pipe.prw is None and attached(pipe.transformer) is None
    assert_close(run(pipe, "a", height=32, width=32), text, **EXACT)
    with pytest.raises(ValueError, match=r"no PRW adapter.*pipe\.load_prw_weights"):
        run(pipe, "a", image=photo(), task="edit")
    pipe.unload_prw_weights()


def test_experts_take_the_dtype_of_the_transformer(saved: Any, tmp_path: Path) -> None:
    pipe, _ = saved
    pipe.transformer.to(torch.bfloat16)
    pipe.load_prw_weights(tmp_path / "adapter")
    assert {p.dtype for p in pipe.prw.pools[0].experts.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in pipe.prw.pools[0].columns.parameters()} == {torch.float32}
    pipe.load_prw_weights(tmp_path / "adapter", dtype=torch.float32)
    assert {p.dtype for p in pipe.prw.parameters()} == {torch.float32}


def test_repositories(saved: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, _ = saved
    asked: list[Any] = []

    def snapshot(repo: str, **options: Any) -> str:
        asked.append((repo, options))
        return str(tmp_path)

    def one_file(repo: str, name: str, **options: Any) -> str:
        asked.append((repo, name, options))
        return str(tmp_path / "file" / name)

    monkeypatch.setattr("prw_flux.locate.snapshot_download", snapshot)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", one_file)
    pipe.load_prw_weights("someone/some-adapter", subfolder="adapter", revision="v1")
    pipe.load_prw_weights("someone/some-adapter", weight_name="adapter.safetensors")
    pipe.load_prw_weights("someone/FLUX.1-adapter", subfolder="adapter")  # no file's ending
    with pytest.raises(FileNotFoundError, match="is not a PRW adapter"):
        pipe.load_prw_weights("~/adapter")
    assert asked == [
        ("someone/some-adapter", {"allow_patterns": ["adapter/**"], "revision": "v1"}),
        ("someone/some-adapter", "adapter.safetensors", {}),
        ("someone/FLUX.1-adapter", {"allow_patterns": ["adapter/**"]}),
    ]


def test_a_repository_that_cannot_be_reached(saved: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.errors import LocalEntryNotFoundError

    def offline(*_: Any, **__: Any) -> None:
        raise LocalEntryNotFoundError("offline")

    monkeypatch.setattr("prw_flux.locate.snapshot_download", offline)
    with pytest.raises(CheckpointError, match="Hub cannot be reached for 'someone/nothing'"):
        saved[0].load_prw_weights("someone/nothing")


def test_what_is_no_adapter(saved: Any, tmp_path: Path) -> None:
    pipe, _ = saved
    pipe.load_prw_weights(tmp_path / "adapter")
    before = pipe.prw

    def refused(match: str, place: str, **options: Any) -> None:
        with pytest.raises((CheckpointError, FileNotFoundError), match=match) as caught:
            pipe.load_prw_weights(tmp_path / place, **options)
        assert "\n" not in str(caught.value)
        assert pipe.prw is before is attached(pipe.transformer)

    lora = {"transformer.single_transformer_blocks.0.attn.to_k.lora_A.weight": torch.ones(1)}
    save_file(lora, tmp_path / "lora.safetensors")
    refused(r"is a LoRA, not a PRW adapter: use pipe\.load_lora_weights", "lora.safetensors")
    (tmp_path / "lora").mkdir()
    save_file(lora, tmp_path / "lora/pytorch_lora_weights.safetensors")
    refused("is a LoRA", "lora")
    refused(r"a PEFT LoRA \(one expert of an adapter.*own folder", "adapter/experts/0-stage0")
    save_file({"weight": torch.ones(1)}, tmp_path / "other.safetensors")
    refused(r"not a PRW adapter \(something else\)", "other.safetensors")
    (tmp_path / "adapter.pt").write_bytes(b"pickle")
    refused("no safetensors file", "adapter.pt")
    (tmp_path / "broken.safetensors").write_bytes(b"12345678")
    refused("damaged", "broken.safetensors")
    refused("There is no file .*: check the name", "missing.safetensors")
    refused(r"add weight_name='adapter.safetensors'", "file")
    (tmp_path / "empty").mkdir()
    refused(r"it has no config\.json and prw\.json\): give a folder", "empty")


def test_an_adapter_is_no_lora(saved: Any, tmp_path: Path) -> None:
    pipe, _ = saved
    for place in ("adapter", "run", "file/adapter.safetensors"):
        with pytest.raises(CheckpointError, match=r"not a LoRA: use pipe\.load_prw_weights"):
            pipe.load_lora_weights(tmp_path / place)


def test_a_lora_still_loads(saved: Any, photo: Any, run: Any, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    pipe, _ = saved
    plain = run(pipe, "a", height=32, width=32)
    name = "transformer.single_transformer_blocks.0.attn.to_v"
    torch.manual_seed(0)
    lora = {
        f"{name}.lora_A.weight": torch.randn(2, 32),
        f"{name}.lora_B.weight": torch.randn(32, 2),
    }
    save_file(lora, tmp_path / "lora.safetensors")
    pipe.load_lora_weights(tmp_path / "lora.safetensors")
    assert not torch.equal(run(pipe, "a", height=32, width=32), plain)
    pipe.unload_lora_weights()
    assert_close(run(pipe, "a", height=32, width=32), plain, **EXACT)


# One file -------------------------------------------------------------------------------------


def test_a_file_is_the_adapter(saved: Any, tmp_path: Path) -> None:
    from prw_flux.digests import adapter_digest

    _, adapter = saved
    found = load_flat(tmp_path / "file/adapter.safetensors")
    assert adapter_digest(found) == adapter_digest(adapter)
    assert [s.name for s in found.weave.stages] == ["stage0", "stage1"]


def test_files_that_cannot_be_read(saved: Any, tmp_path: Path) -> None:
    path = tmp_path / "file/adapter.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])
    with pytest.raises(CheckpointError, match="damaged .*fetch the file again"):
        load_flat(path)
    header = {"format": "prw_flux.adapter", "version": "7"}
    save_file({"router/a": torch.ones(1)}, path, metadata=header)
    with pytest.raises(CheckpointError, match="version 7, this library reads 1: upgrade"):
        load_flat(path)
    header |= {"version": "1", "prw.json": '{"sha256": {}}'}
    save_file({"router/a": torch.ones(1)}, path, metadata=header)
    with pytest.raises(CheckpointError, match="router/a belongs to no file of an adapter"):
        load_flat(path)
    header["prw.json"] = '{"sha256": {"../../escape.safetensors": ""}}'
    save_file({"../../escape/a": torch.ones(1)}, path, metadata=header)
    with pytest.raises(CheckpointError, match="names a path outside its folder"):
        load_flat(path)
