"""load_prw_weights: folders, runs, files and repositories; adapters and LoRAs told apart."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline
from huggingface_hub.utils import filter_repo_objects
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
        return str(tmp_path / "run" if repo.endswith("run") else tmp_path)

    def one_file(repo: str, name: str, **options: Any) -> str:
        asked.append((repo, name, options))
        return str(tmp_path / "file" / name)

    monkeypatch.setattr("prw_flux.locate.snapshot_download", snapshot)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", one_file)
    pipe.load_prw_weights("someone/some-adapter", subfolder="adapter", revision="v1")
    pipe.load_prw_weights("someone/some-adapter", weight_name="adapter.safetensors")
    pipe.load_prw_weights("someone/FLUX.1-adapter", subfolder="adapter")  # no file's ending
    pipe.load_prw_weights("someone/a-run", local_files_only=True)  # the adapter of a run
    with pytest.raises(FileNotFoundError, match="There is no folder ~/adapter"):
        pipe.load_prw_weights("~/adapter")
    assert asked == [
        ("someone/some-adapter", {"allow_patterns": ["adapter/**"], "revision": "v1"}),
        ("someone/some-adapter", "adapter.safetensors", {}),
        ("someone/FLUX.1-adapter", {"allow_patterns": ["adapter/**"]}),
        ("someone/a-run", {"allow_patterns": ["**"], "local_files_only": True}),
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


class Hub:
    """One repository, holding a folder; what is asked for lands in a snapshot, and only that."""

    def __init__(self, folder: Path, snapshot: Path) -> None:
        self.folder, self.snapshot = folder, snapshot

    def model_info(self, repo: str, **_: Any) -> Any:
        found = [p for p in self.folder.rglob("*") if p.is_file()]
        names = [p.relative_to(self.folder).as_posix() for p in found]
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in names])

    def hf_hub_download(self, repo: str, filename: str, **_: Any) -> str:
        target = self.snapshot / filename
        target.parent.mkdir(parents=True, exist_ok=True)
        return str(shutil.copy(self.folder / filename, target))

    def snapshot_download(
        self, repo: str, *, allow_patterns: Any, ignore_patterns: Any = None, **_: Any
    ) -> str:
        names = [one.rfilename for one in self.model_info(repo).siblings]
        asked = filter_repo_objects(
            names, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
        )
        for name in asked:
            self.hf_hub_download(repo, name)
        return str(self.snapshot)


@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("place", ["folder", "repository"])
def test_a_pipeline_travels_with_its_adapter(
    make_pipe: Any, photo: Any, run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    place: str, variant: str | None,
) -> None:  # fmt: skip
    """diffusers fetches files whose names it knows, and looks for variants in every component."""
    pipe = make_pipe()
    edit = {"prompt": "a", "image": photo(), "task": "edit"}
    wanted = run(pipe, **edit)
    folder = tmp_path / "saved"
    pipe.save_pretrained(folder, variant=variant)
    location = str(folder)
    if place == "repository":
        hub = Hub(folder, tmp_path / "snapshot")
        for function in ("model_info", "hf_hub_download", "snapshot_download"):
            name = f"diffusers.pipelines.pipeline_utils.{function}"
            monkeypatch.setattr(name, getattr(hub, function))
        monkeypatch.setattr("diffusers.configuration_utils.hf_hub_download", hub.hf_hub_download)
        monkeypatch.setattr("prw_flux.locate.snapshot_download", hub.snapshot_download)
        location = "someone/pipeline"
    again = CoLoGenPipeline.from_pretrained(location, variant=variant)
    assert_close(run(again, **edit), wanted, **EXACT)
    without = CoLoGenPipeline.from_pretrained(location, variant=variant, prw=None)
    assert without.prw is None
    assert type(FluxPipeline.from_pretrained(location, variant=variant)) is FluxPipeline


def test_an_adapter_that_was_unloaded_is_not_saved(make_pipe: Any, tmp_path: Path) -> None:
    pipe = make_pipe()
    pipe.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text("utf-8"))["_prw"] == "prw"
    pipe.unload_prw_weights()
    pipe.save_pretrained(tmp_path)  # over the first, whose adapter's files are still there
    assert CoLoGenPipeline.from_pretrained(tmp_path).prw is None


def test_dtypes_and_devices_of_a_load(make_pipe: Any, tmp_path: Path) -> None:
    make_pipe().save_pretrained(tmp_path)

    def experts(**options: Any) -> Any:
        pipe = CoLoGenPipeline.from_pretrained(tmp_path, **options)
        return {p.dtype for p in pipe.prw.pools[0].experts.parameters()}

    assert experts() == {torch.float32}
    assert experts(dtype=torch.bfloat16, device_map="cpu") == {torch.bfloat16}
    both = {"default": torch.bfloat16, "prw": torch.float16}
    assert experts(dtype=both) == {torch.float16}
    assert experts(dtype={"default": torch.bfloat16}) == {torch.bfloat16}
    pipe = CoLoGenPipeline.from_pretrained(tmp_path)
    half = CoLoGenPipeline.from_pipe(pipe, dtype=torch.bfloat16)
    assert half.transformer is pipe.transformer and half.vae.dtype == torch.bfloat16
    assert {p.dtype for p in half.prw.pools[0].experts.parameters()} == {torch.bfloat16}


def test_a_device_map_places_the_adapter(
    make_pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """diffusers puts the components it loads on devices, and the adapter is not one of them."""
    make_pipe().save_pretrained(tmp_path)
    place = "prw_flux.loader.get_module_execution_device"
    monkeypatch.setattr(place, lambda _: torch.device("meta"))
    pipe = CoLoGenPipeline.from_pretrained(tmp_path, device_map="cpu")
    assert {p.device.type for p in pipe.prw.parameters()} == {"meta"}
    pipe = CoLoGenPipeline.from_pretrained(tmp_path)
    assert {p.device.type for p in pipe.prw.parameters()} == {"cpu"}


def test_mistakes_of_a_load(saved: Any, tmp_path: Path) -> None:
    pipe, adapter = saved
    with pytest.raises(ValueError, match=r"one PRW adapter at a time.*route=.*from_pipe"):
        pipe.load_prw_weights(tmp_path / "adapter", adapter_name="edit")
    with pytest.raises(TypeError, match="got PRWAdapter: .*from_pipe"):
        pipe.load_prw_weights(adapter)
    for dtype in (torch.float8_e4m3fn, "bf16"):
        with pytest.raises(ValueError, match="compute in one of float32.*not in"):
            pipe.load_prw_weights(tmp_path / "adapter", dtype=dtype)
    with pytest.raises(FileNotFoundError, match="There is no folder .*nothing: check"):
        pipe.load_prw_weights(tmp_path / "nothing")
    assert pipe.prw is None
    for text in ("./nothing", "/nothing/at/all"):
        with pytest.raises(FileNotFoundError, match=f"There is no folder {text}"):
            CoLoGenPipeline.from_pretrained(text)
    with pytest.raises(TypeError, match="loaded pipeline, got 'tiny-flux'"):
        CoLoGenPipeline.from_pipe("tiny-flux")


def test_an_adapter_is_no_lora_by_any_name(saved: Any, tmp_path: Path) -> None:
    pipe, _ = saved
    with pytest.raises(CheckpointError, match="PRW adapter, not a LoRA"):
        pipe.load_lora_weights(tmp_path / "file", weight_name="adapter.safetensors")
    with pytest.raises(CheckpointError, match="PRW adapter, not a LoRA"):
        pipe.load_lora_weights(tmp_path, subfolder="adapter")
    expert = "experts/0-stage0"
    weights = {"subfolder": expert, "weight_name": "adapter_model.safetensors"}
    for place, options in ((tmp_path / "adapter" / expert, {}), (tmp_path / "adapter", weights)):
        with pytest.raises(CheckpointError, match=r"one expert of the PRW adapter .*route="):
            pipe.load_lora_weights(place, **options)
