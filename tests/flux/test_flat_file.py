"""An adapter as one file: the same bytes both ways, and nothing that is something else."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from prw import CheckpointError
from prw_flux import PRWAdapter
from prw_flux.cli import main
from prw_flux.flat_file import FORMAT, load_flat, pack, save_flat, unpack


@pytest.fixture
def folder(make_transformer: Any, make_adapter: Any, tmp_path: Path) -> Path:
    """Two stages, the first closed, the experts in half precision."""
    adapter = make_adapter(make_transformer())
    adapter.to(torch.bfloat16)
    adapter.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def bytes_of(folder: Path) -> dict[str, str]:
    files = [file for file in folder.rglob("*") if file.is_file()]
    return {
        file.relative_to(folder).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in files
    }


def same(one: Path, other: Path) -> bool:
    """Whether two files hold the same; safetensors writes the entries of a header in any order."""
    ours, theirs = load_file(one), load_file(other)
    with safe_open(one, "pt") as a, safe_open(other, "pt") as b:
        headers = a.metadata() == b.metadata()
    return (
        headers
        and ours.keys() == theirs.keys()
        and all(
            torch.equal(ours[name], theirs[name]) and ours[name].dtype == theirs[name].dtype
            for name in ours
        )
    )


def test_the_round_trip_is_bitwise(folder: Path, tmp_path: Path) -> None:
    flat, again = tmp_path / "flat.safetensors", tmp_path / "again.safetensors"
    pack(folder, flat)
    unpack(flat, tmp_path / "back")
    assert bytes_of(tmp_path / "back") == bytes_of(folder)
    pack(tmp_path / "back", again)
    assert same(again, flat)
    wanted, found = PRWAdapter.from_pretrained(folder).state_dict(), load_flat(flat).state_dict()
    assert list(found) == list(wanted)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_a_file_of_the_object_is_the_file_of_its_folder(folder: Path, tmp_path: Path) -> None:
    pack(folder, tmp_path / "a.safetensors")
    save_flat(PRWAdapter.from_pretrained(folder), tmp_path / "b.safetensors")
    assert same(tmp_path / "a.safetensors", tmp_path / "b.safetensors")


def test_loading_writes_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A gigabyte is read once, and neither copied to another file nor read from there."""
    pack(folder, tmp_path / "one.safetensors")
    monkeypatch.setattr("tempfile.TemporaryDirectory", None)
    monkeypatch.setattr("prw_flux.flat_file.save_file", None)
    found, wanted = load_flat(tmp_path / "one.safetensors"), PRWAdapter.from_pretrained(folder)
    for (name, tensor), other in zip(
        found.state_dict().items(), wanted.state_dict().values(), strict=True
    ):
        assert torch.equal(tensor, other), name
    assert found.weave.fingerprint == wanted.weave.fingerprint and not found.training


def test_other_front_ends_can_tell_what_it_is(folder: Path, tmp_path: Path) -> None:
    """The header says so, and no key is one that LoRA loaders look for."""
    pack(folder, tmp_path / "flat.safetensors")
    with safe_open(tmp_path / "flat.safetensors", "pt") as file:
        header, keys = file.metadata(), list(file.keys())
    assert header["format"] == FORMAT
    assert json.loads(header["config.json"])["rank"] == 4
    assert [stage["name"] for stage in json.loads(header["prw.json"])["stages"]] == [
        "stage0",
        "stage1",
    ]
    tops = {tuple(key.split("/")[:2]) for key in keys if key.startswith("experts")}
    assert tops == {("experts", "0-stage0"), ("experts", "1-stage1")}
    assert not any(word in key for key in keys for word in ("processor", "lora_down", "alpha"))


def test_the_verb_converts_both_ways(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flat, back = str(tmp_path / "flat.safetensors"), str(tmp_path / "back")
    assert main(["convert", str(folder), flat, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["files"] == 1
    assert main(["convert", flat, back]) == 0
    assert bytes_of(tmp_path / "back") == bytes_of(folder)
    before = bytes_of(tmp_path)
    assert main(["convert", str(folder), flat]) == 1
    assert "flat.safetensors exists: choose the name of a new file" in capsys.readouterr().err
    assert main(["convert", flat, back]) == 1
    assert "back exists: choose the name of a new folder" in capsys.readouterr().err
    assert main(["convert", str(folder), str(tmp_path / "flat.bin")]) == 1
    assert "with .safetensors" in capsys.readouterr().err
    expert = folder / "experts/0-stage0"
    assert main(["convert", str(expert), str(tmp_path / "x.safetensors")]) == 1
    assert "is a PEFT LoRA" in capsys.readouterr().err
    assert main(["convert", str(expert / "adapter_model.safetensors"), str(tmp_path / "x")]) == 1
    assert "is a LoRA, not a PRW adapter" in capsys.readouterr().err
    assert main(["convert", str(tmp_path / "nowhere"), str(tmp_path / "x")]) == 1
    assert "There is no file" in capsys.readouterr().err
    assert bytes_of(tmp_path) == before


@pytest.mark.parametrize("harm", ["cut", "changed", "foreign key", "path", "version", "no index"])
def test_wrong_files_are_refused(folder: Path, tmp_path: Path, harm: str) -> None:
    """One sentence, and nothing is left behind."""
    flat = tmp_path / "flat.safetensors"
    pack(folder, flat)
    tensors = load_file(flat)
    with safe_open(flat, "pt") as file:
        header = dict(file.metadata())
    key = next(key for key in tensors if key.startswith("experts"))
    reasons = {
        "cut": "damaged",
        "changed": "changed or truncated",
        "foreign key": "no file of an",
        "path": "outside its folder",
        "version": "upgrade prw",
        "no index": "prw.json",
    }
    if harm == "changed":
        tensors[key] = tensors[key] + 1
    elif harm == "foreign key":
        tensors["router2/x"] = torch.zeros(1)
    elif harm == "path":
        header["../../evil.json"] = "{}"
    elif harm == "version":
        header["version"] = "99"
    elif harm == "no index":
        del header["prw.json"]
    save_file(tensors, flat, metadata=header)
    if harm == "cut":
        flat.write_bytes(flat.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match=reasons[harm]):
        unpack(flat, tmp_path / "back")
    assert not (tmp_path / "back").exists() and not (tmp_path.parent / "evil.json").exists()


def test_a_damaged_folder_is_not_packed(folder: Path, tmp_path: Path) -> None:
    file = folder / "router.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(file).items()}, file)
    with pytest.raises(CheckpointError, match="router was changed or truncated"):
        pack(folder, tmp_path / "flat.safetensors")
    assert not (tmp_path / "flat.safetensors").exists()
