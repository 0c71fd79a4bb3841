"""`data build`, `data inspect` and `data check` on the command line, and data that was harmed."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as parquet
import pytest
from PIL import Image as PILImage

from prw_flux.cli import main
from prw_flux.data import check as checking
from prw_flux.data.build import build
from prw_flux.data.check import check, sample_rows
from prw_flux.data.edit_pairs import EditPairs
from prw_flux.data.manifest import MANIFEST, read_manifest, sha256
from prw_flux.data.rows import DataError


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    listed = []
    for i in range(10):
        for side in ("before", "after"):
            pixels = rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)
            (tmp_path / "in").mkdir(exist_ok=True)
            PILImage.fromarray(pixels).save(tmp_path / "in" / f"{side}{i}.png")
        listed.append({"before": f"before{i}.png", "after": f"after{i}.png", "text": f"edit {i}"})
    listed[4]["text"] = ""
    (tmp_path / "in" / "pairs.json").write_text(json.dumps(listed))
    return tmp_path / "in"


@pytest.fixture
def data(pairs: Path) -> Path:
    out = pairs.parent / "out"
    build(EditPairs(pairs), "edit", out, made_from={}, max_rejected=0.2, shard_rows=4)
    return out


def rewrite(data: Path, change: Any) -> None:
    """Change the rows of the first shard, and its hash in the manifest."""
    path = data / "data" / "train-00000.parquet"
    table = parquet.read_table(path)
    rows = table.to_pylist()
    change(rows)
    parquet.write_table(type(table).from_pylist(rows, schema=table.schema), path)
    manifest = json.loads((data / MANIFEST).read_text())
    manifest["shards"][0]["sha256"] = sha256(path)
    (data / MANIFEST).write_text(json.dumps(manifest))


def test_whole_data_is_looked_at_once(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[int, int]] = []
    assert check(data, tick=lambda done, total: told.append((done, total))) == []
    assert told[-1] == (9, 9) and told == sorted(told)
    monkeypatch.setattr(checking, "_wrong", None)
    assert check(data) == []


def test_a_stopped_check_goes_on(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, seen = checking._wrong, []

    def stopping(place: Any, task: str) -> str:
        seen.append(place[1]["key"])
        if len(seen) == 6:
            raise KeyboardInterrupt
        return whole(place, task)

    monkeypatch.setattr(checking, "_wrong", stopping)
    with pytest.raises(KeyboardInterrupt):
        check(data, workers=1)
    seen.clear()
    monkeypatch.setattr(checking, "_wrong", lambda place, task: seen.append(place[1]["key"]) or "")
    assert check(data) == []
    assert sorted(seen) == ["5", "6", "7", "8", "9"]


def test_harm_is_found_and_named(data: Path) -> None:
    shard = data / "data" / "train-00001.parquet"
    kept = shard.read_bytes()
    shard.write_bytes(kept[:-100])
    (told,) = check(data)
    assert told.startswith("data/train-00001.parquet has changed since it was built")
    shard.unlink()
    assert check(data) == ["data/train-00001.parquet is missing; run the same `data build` again"]
    shard.write_bytes(kept)
    (data / "data" / "train-00009.parquet").write_bytes(kept)
    assert check(data) == ["data/train-00009.parquet is not in build.json; remove it"]
    (data / "data" / "train-00009.parquet").unlink()
    assert check(data) == []
    with pytest.raises(DataError, match="was not made by"):
        check(data / "data")


def test_every_row_is_judged(data: Path) -> None:
    def harm(rows: list[dict[str, Any]]) -> None:
        rows[0]["target"]["bytes"] = rows[0]["target"]["bytes"][:500]
        rows[1]["text"] = ""
        rows[2]["mask"] = {"bytes": checking_png(40, 40), "path": None}
        rows[3]["boxes"] = [{"box": [1, 1, 99, 9], "phrase": "x", "label": "", "mask": None}]

    rewrite(data, harm)
    found = check(data)
    assert len(found) == 4
    for told, wanted in zip(
        found,
        (
            "train-00000.parquet row 0: column target: truncated or damaged",
            "row 1: text is missing",
            "row 2: mask has 40 x 40 pixels, its picture 64 x 48",
            "row 3: box (1.0, 1.0, 99.0, 9.0) is not inside 64 x 48",
        ),
        strict=True,
    ):
        assert wanted in told
    assert check(data) == found


def checking_png(height: int, width: int) -> bytes:
    from prw_flux.data.row_checks import encode

    return encode(np.full((height, width), 255, np.uint8))


def test_samples_are_spread_over_the_shards(data: Path) -> None:
    assert [row["key"] for row in sample_rows(data, 3)] == ["0", "3", "7"]
    assert len(sample_rows(data, 100)) == 9
    assert sample_rows(data, 0) == []


def test_the_command_line(pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")
    order = ["data", "build", "edit", "--from", "pairs", str(pairs), "--out", out]
    assert main(order) == 1
    assert "10.0% of the records cannot be used, above the limit" in capsys.readouterr().err
    assert main([*order, "--max-rejected", "0.1"]) == 0
    assert "9 of 10 records used; left out: 1 empty caption" in capsys.readouterr().out
    assert main(["data", "inspect", out, "--out", str(tmp_path / "sheet.png")]) == 0
    shown = capsys.readouterr().out
    assert "9 rows in 1 shard," in shown and "empty caption" in shown and "64 x 48" in shown
    with PILImage.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > 900 and np.array(sheet).std() > 30
    assert main([*order, "--max-rejected", "0.1", "--licence", "CC0"]) == 1
    assert "was begun with licence None, not 'CC0'" in capsys.readouterr().err
    assert main(["data", "inspect", out, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kept"] == 9
    assert main(["data", "check", out]) == 0
    assert "9 rows, all as they were built" in capsys.readouterr().out
    (tmp_path / "out" / "data" / "train-00000.parquet").write_bytes(b"")
    assert main(["data", "check", out, "--json"]) == 1
    assert "has changed" in json.loads(capsys.readouterr().out)["problems"][0]
    assert main(["data", "build", "paint", "--from", "pairs", str(pairs), "--out", out]) == 1
    assert "pairs feeds edit, customise, not 'paint'" in capsys.readouterr().err


def test_a_sheet_shows_class_indices_in_colours(tmp_path: Path) -> None:
    from prw_flux.data.row_checks import encode
    from prw_flux.data.row_sheet import write_row_sheet

    labels = np.zeros((40, 60), np.uint8)
    labels[:, 20:40], labels[:, 40:] = 1, 2
    grey = {"bytes": encode(np.full((40, 60, 3), 128, np.uint8)), "path": None}
    maps = [{"name": "segmentation", "method": "", "image": {"bytes": encode(labels)}}]
    row = {"source": None, "target": grey, "mask": None, "conditions": maps, "boxes": [],
           "text": "words " * 90}  # fmt: skip
    write_row_sheet(tmp_path / "sheet.png", [row])
    with PILImage.open(tmp_path / "sheet.png") as sheet:
        colours = {colour for _, colour in sheet.convert("RGB").getcolors(10_000) or []}
    assert {(128, 128, 128), (0, 0, 0), (67, 151, 199), (134, 46, 142)} <= colours


KILLED = """
import sys, time
from pathlib import Path
from prw_flux.data import build as building
from prw_flux.data.edit_pairs import EditPairs
whole = building.write_shard
def slow(*args):
    whole(*args)
    sys.stdout.write("shard\\n"); sys.stdout.flush()
    time.sleep(30)
building.write_shard = slow
building.build(EditPairs(Path(sys.argv[1])), "edit", Path(sys.argv[2]), made_from={},
               max_rejected=0.2, shard_rows=4)
"""


def test_a_killed_build_keeps_its_shards(pairs: Path, tmp_path: Path, data: Path) -> None:
    out = tmp_path / "killed"
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(pairs), str(out)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "shard\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert read_manifest(out).read == 4 and not read_manifest(out).done
    assert "is not finished" in check(out)[0]
    before = (out / "data" / "train-00000.parquet").stat().st_mtime_ns
    time.sleep(0.01)
    build(EditPairs(pairs), "edit", out, made_from={}, max_rejected=0.2, shard_rows=4)
    assert read_manifest(out) == read_manifest(data)
    assert (out / "data" / "train-00000.parquet").stat().st_mtime_ns == before
