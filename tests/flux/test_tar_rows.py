"""WebDataset tars: usual names, maps, every task, and tars that are cut or hold damage."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as PILImage

from prw import ConfigError
from prw_flux.cli import main
from prw_flux.data.build import build
from prw_flux.data.check import sample_rows
from prw_flux.data.column_map import column_map
from prw_flux.data.manifest import Manifest
from prw_flux.data.readers import Origin, open_reader
from prw_flux.data.rows import DataError
from prw_flux.data.tar_rows import TarRows, guessed


def picture(seed: int, height: int = 48, width: int = 64, kind: str = "PNG") -> bytes:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    PILImage.fromarray(values).save(file, kind)
    return file.getvalue()


def write_tar(path: Path, samples: dict[str, dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        folder = tarfile.TarInfo("a-folder")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for key, fields in samples.items():
            for field, content in fields.items():
                data = content if isinstance(content, bytes) else json.dumps(content).encode()
                member = tarfile.TarInfo(f"{key}.{field}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return path


def captioned(count: int, first: int = 0) -> dict[str, dict[str, Any]]:
    """As img2dataset writes them."""
    return {
        f"{n:05d}": {"jpg": picture(n, kind="JPEG"), "txt": f"caption {n}".encode(), "json": {}}
        for n in range(first, first + count)
    }


def run(reader: TarRows, task: str, out: Path, **how: Any) -> tuple[Manifest, list[dict[str, Any]]]:
    manifest = build(reader, task, out, made_from={}, **how)
    return manifest, sample_rows(out, manifest.kept)


def test_captioned_pictures_of_several_tars(tmp_path: Path) -> None:
    for shard in range(3):
        write_tar(tmp_path / f"s-{shard:03d}.tar", captioned(4, 4 * shard))
    reader = TarRows(str(tmp_path / "s-{000..002}.tar"), "inpaint", licence="CC0")
    assert len(reader) == 12
    every = list(reader.records())
    assert [one.key for one in every] == [f"{n:05d}" for n in range(12)]
    assert [one.text for one in every] == [f"caption {n}" for n in range(12)]
    assert [one.key for one in reader.records(5)] == [f"{n:05d}" for n in range(5, 12)]
    manifest, rows = run(reader, "inpaint", tmp_path / "out")
    assert manifest.kept == 12 and {row["licence"] for row in rows} == {"CC0"}
    assert rows[3]["target"]["bytes"] == picture(3, kind="JPEG")
    for where in (tmp_path, tmp_path / "s-*.tar"):
        assert len(TarRows(str(where), "inpaint")) == 12


def test_every_task_by_the_usual_names(tmp_path: Path) -> None:
    white = io.BytesIO()
    PILImage.new("L", (64, 48), 255).save(white, "PNG")
    thing = {"box": [1, 2, 30, 40], "phrase": "a thing", "label": "thing"}
    sample = {"src.png": picture(0), "tgt.png": picture(1), "mask.png": white.getvalue(),
              "depth.png": white.getvalue(),
              "json": {"text": "do it", "licence": "MIT", "boxes": [thing]}}  # fmt: skip
    path = write_tar(tmp_path / "all.tar", {"x/one": sample})
    for task in ("edit", "customise", "control", "inpaint", "ground"):
        _, (row,) = run(TarRows(path, task), task, tmp_path / task)
        assert (row["key"], row["text"], row["licence"]) == ("x/one", "do it", "MIT")
        main_picture = row["source" if task == "ground" else "target"]
        assert main_picture["bytes"] == picture(0 if task == "ground" else 1)
        boxes = [thing["box"] for thing in row["boxes"]]
        assert boxes == ([[1, 2, 30, 40]] if task in ("ground", "inpaint") else [])
        assert [one["name"] for one in row["conditions"]] == ["depth"]
    assert guessed(["jpg", "caption"]).target == "jpg"


def test_maps_name_fields_and_entries(tmp_path: Path) -> None:
    fields = {"orig.jpg": picture(0, kind="JPEG"), "new.png": picture(1),
              "json": {"ask": "turn it", "id": 7}}  # fmt: skip
    path = write_tar(tmp_path / "a.tar", {"k": fields})
    columns = column_map(["source=orig.jpg", "target=new.png", "text=json.ask", "key=json.id"])
    (record,) = TarRows(path, "edit", columns).records()
    assert (record.key, record.text) == ("7", "turn it")
    with pytest.raises(ConfigError, match="the task 'edit' needs --map source="):
        TarRows(path, "edit", column_map(["target=new.png"]))
    wrong = column_map(["source=orig.jpg", "target=new.jpg", "text=json.ask"])
    with pytest.raises(DataError, match="has the field 'new.jpg'; did you mean 'new.png'"):
        TarRows(path, "edit", wrong)
    odd = column_map(["source=orig.jpg", "target=new.png", "text=json.ask", "licence=json.ask"])
    bad = write_tar(tmp_path / "b.tar", {"k": {**fields, "json": {"ask": ["a"]}}})
    with pytest.raises(DataError, match=r"b.tar: k: json.ask must be a text, got \['a'\]"):
        list(TarRows(bad, "edit", odd).records())


def test_a_corrupt_picture_in_every_tar_is_named_and_counted(tmp_path: Path) -> None:
    for shard in range(3):
        samples = captioned(4, 4 * shard)
        samples[f"{4 * shard + 1:05d}"]["jpg"] = picture(1, kind="JPEG")[:700]
        write_tar(tmp_path / f"{shard}.tar", samples)
    manifest, rows = run(TarRows(tmp_path, "inpaint"), "inpaint", tmp_path / "o", max_rejected=0.3)
    assert manifest.rejected == {"damaged": 3} and len(rows) == 9
    assert [told.split(":")[0] for told in manifest.examples["damaged"]] == [
        "0.tar", "1.tar", "2.tar",
    ]  # fmt: skip


@pytest.mark.parametrize("cut", [1, 700, 1500, 9000, 10300])
def test_a_tar_that_was_cut_keeps_its_whole_samples(tmp_path: Path, cut: int) -> None:
    """`cut` bytes are lost at the end; the tar's own padding there is at most 10,240 bytes."""
    path = write_tar(tmp_path / "s.tar", captioned(5))
    data = path.read_bytes()
    with tarfile.open(path) as tar:
        end = [m.offset_data + -(-m.size // 512) * 512 for m in tar][-1]
    data = data[: end + 1024]  # without the padding to whole records
    path.write_bytes(data[: len(data) - cut])
    manifest, rows = run(TarRows(path, "inpaint"), "inpaint", tmp_path / "o", max_rejected=0.9)
    if cut <= 512:  # one of the two closing blocks is still there
        assert manifest.kept == 5 and not manifest.rejected
        return
    assert manifest.rejected == {"damaged shard": 1}
    assert "s.tar" in manifest.examples["damaged shard"][0]
    assert 1 <= manifest.kept <= 4
    assert [row["text"] for row in rows] == [f"caption {n}" for n in range(manifest.kept)]


def test_what_is_no_tar_is_named(tmp_path: Path) -> None:
    (tmp_path / "no.tar").write_bytes(b"hello" * 500)
    with pytest.raises(DataError, match="no.tar is not a tar, or is damaged"):
        TarRows(tmp_path / "no.tar", "inpaint")
    with pytest.raises(DataError, match="there are no .tar files at .*nowhere.tar"):
        TarRows(tmp_path / "nowhere.tar", "inpaint")
    write_tar(tmp_path / "empty.tar", {})
    with pytest.raises(DataError, match="empty.tar has no samples"):
        TarRows(tmp_path / "empty.tar", "inpaint")


def test_samples_of_one_tar_may_differ_in_their_fields(tmp_path: Path) -> None:
    one = {"src.png": picture(0), "tgt.png": picture(1), "txt": b"first"}
    mask = np.zeros((48, 64), np.uint8)
    mask[4:9] = 255
    file = io.BytesIO()
    PILImage.fromarray(mask).save(file, "PNG")
    other = {"src.jpg": picture(2, kind="JPEG"), "tgt.png": picture(3),
             "mask.png": file.getvalue(), "caption": b"second", "txt": b" "}  # fmt: skip
    write_tar(tmp_path / "a.tar", {"0": one, "1": other})
    reader = TarRows(tmp_path / "a.tar", "edit")
    manifest, rows = run(reader, "edit", tmp_path / "out", max_rejected=0)
    assert manifest.kept == 2 and [row["text"] for row in rows] == ["first", "second"]
    assert rows[0]["mask"] is None and rows[1]["mask"] is not None
    assert rows[1]["source"]["bytes"] == other["src.jpg"]
    columns = column_map(["source=src.jpg;src.png", "target=tgt.png", "text=txt"])
    first, second = TarRows(tmp_path / "a.tar", "edit", columns).records()
    assert first.source is not None and first.source.data == one["src.png"]
    assert second.source is not None and second.source.data == other["src.jpg"]
    with pytest.raises(DataError, match="no sample has the field 'json.words'"):
        TarRows(tmp_path / "a.tar", "edit", column_map(["source=src.png", "target=tgt.png",
                                                        "text=json.words"]))  # fmt: skip


def test_a_json_that_is_none_is_counted_and_one_of_another_form_is_named(tmp_path: Path) -> None:
    samples = captioned(4)
    samples["00001"]["json"], samples["00003"]["json"] = b"{not json", b"[" * 100_000
    path = write_tar(tmp_path / "a.tar", samples)
    manifest, _ = run(TarRows(path, "inpaint"), "inpaint", tmp_path / "o", max_rejected=0.5)
    assert manifest.rejected == {"damaged json": 2}
    samples["00002"]["json"] = {"boxes": [{"box": [1, 2, 3]}]}
    path = write_tar(tmp_path / "b.tar", samples)
    with pytest.raises(DataError, match=r"b.tar: 00002, json.boxes\[0\]: box must be"):
        list(TarRows(path, "inpaint").records())


def test_the_command_line_knows_a_tar_by_its_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_tar(tmp_path / "s.tar", captioned(3))
    command = ["data", "build", "inpaint", "--out", str(tmp_path / "out"), "--json"]
    assert main([*command, "--from", str(path)]) == 0
    assert json.loads(capsys.readouterr().out)["made_from"]["kind"] == "webdataset"
    assert main([*command, "--from", "what"]) != 0
    assert "--from needs KIND PATH, got 'what'" in capsys.readouterr().err
    reader = open_reader(Origin(kind="webdataset", path=str(path)), "inpaint")
    assert len(reader) == 3
