"""Building a data set from pairs: rows, rejects by reason, kills, and what a second look finds."""

from __future__ import annotations

import json
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as PILImage

from prw import ConfigError, atomic
from prw_flux.data import build as building
from prw_flux.data.build import build
from prw_flux.data.edit_pairs import EditPairs
from prw_flux.data.manifest import read_manifest
from prw_flux.data.rows import DataError


def noise(seed: int = 0, height: int = 48, width: int = 64) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def pair_folder(root: Path, count: int = 6) -> list[dict[str, str]]:
    """Good pairs and their list."""
    pairs = []
    for i in range(count):
        for side in ("before", "after"):
            (root / side).mkdir(parents=True, exist_ok=True)
            PILImage.fromarray(noise(2 * i + (side == "after"))).save(root / side / f"{i}.png")
        pairs.append({"id": f"pair{i}", "before": f"before/{i}.png", "after": f"after/{i}.png",
                      "instruction": f"change  it {i}", "licence": "CC0"})  # fmt: skip
    (root / "edits.json").write_text(json.dumps(pairs))
    return pairs


def run(root: Path, out: Path, **changes: Any) -> Any:
    return build(EditPairs(root), "edit", out, made_from={"kind": "pairs"}, **changes)


def opened(picture: Any) -> np.ndarray[Any, Any]:
    return np.array(PILImage.open(BytesIO(picture["bytes"])))


def rows_of(out: Path) -> list[dict[str, Any]]:
    import pyarrow.parquet as parquet

    return [
        row
        for shard in read_manifest(out).shards
        for row in parquet.read_table(out / shard["file"]).to_pylist()
    ]


def test_pairs_become_rows_that_datasets_opens(tmp_path: Path) -> None:
    from datasets import load_dataset

    pairs = pair_folder(tmp_path / "in")
    mask = np.zeros((48, 64), np.uint8)
    mask[8:20, 10:30] = 1
    PILImage.fromarray(mask).save(tmp_path / "in" / "mask.png")
    pairs[0]["mask"] = "mask.png"
    (tmp_path / "in" / "edits.json").write_text(json.dumps(pairs))
    manifest = run(tmp_path / "in", tmp_path / "out", shard_rows=4)
    assert [shard["rows"] for shard in manifest.shards] == [4, 2]
    assert manifest.done and manifest.kept == 6 and not manifest.rejected
    assert manifest.sizes == {"64 x 48": 6}
    found = load_dataset(str(tmp_path / "out"), split="train", cache_dir=str(tmp_path / "cache"))
    assert found.column_names == [
        "key", "task", "source", "target", "mask", "conditions", "boxes", "text", "licence",
    ]  # fmt: skip
    row = found[0]
    assert (row["key"], row["task"], row["text"], row["licence"]) == (
        "pair0", "edit", "change it 0", "CC0",
    )  # fmt: skip
    np.testing.assert_array_equal(np.array(row["source"]), noise(0))
    np.testing.assert_array_equal(np.array(row["target"]), noise(1))
    np.testing.assert_array_equal(np.array(row["mask"]), mask * 255)
    assert found[1]["mask"] is None and found[1]["boxes"] == [] and found[1]["conditions"] == []
    stored = rows_of(tmp_path / "out")[0]["source"]["bytes"]
    assert stored == (tmp_path / "in" / "before" / "0.png").read_bytes()


def test_folders_side_by_side_need_no_list(tmp_path: Path) -> None:
    for side, seed in (("source", 0), ("target", 1)):
        (tmp_path / "in" / side / "a").mkdir(parents=True)
        PILImage.fromarray(noise(seed)).save(tmp_path / "in" / side / "a" / "x.png")
    (tmp_path / "in" / "target" / "a" / "x.txt").write_text("swap\nthem")
    PILImage.fromarray(noise(2)).save(tmp_path / "in" / "source" / "alone.png")
    manifest = run(tmp_path / "in", tmp_path / "out", max_rejected=0.5)
    assert [(row["key"], row["text"]) for row in rows_of(tmp_path / "out")] == [
        ("a/x", "swap them")
    ]
    assert manifest.rejected == {"missing picture": 1}


def test_two_pictures_for_one_side_are_a_mistake(tmp_path: Path) -> None:
    for name in ("source/x.png", "source/x.webp", "target/x.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        PILImage.fromarray(noise(0)).save(tmp_path / name)
    with pytest.raises(DataError, match=r"x.webp and x.png would be one and the same side"):
        EditPairs(tmp_path)


def test_zero_is_an_id(tmp_path: Path) -> None:
    pairs: list[dict[str, Any]] = [*pair_folder(tmp_path / "in", 3)]
    for pair, number in zip(pairs, (2, 1, 0), strict=True):
        pair["id"] = number
    (tmp_path / "in/edits.json").write_text(json.dumps(pairs))
    assert not run(tmp_path / "in", tmp_path / "out").rejected
    assert [row["key"] for row in rows_of(tmp_path / "out")] == ["2", "1", "0"]


def test_a_file_that_cannot_be_read_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair_folder(tmp_path / "in", 3)
    whole = Path.read_bytes

    def failing(path: Path) -> bytes:
        if path.name == "1.png":
            raise PermissionError(13, "Permission denied", str(path))
        return whole(path)

    monkeypatch.setattr(Path, "read_bytes", failing)
    manifest = run(tmp_path / "in", tmp_path / "out", max_rejected=0.5)
    assert manifest.kept == 2 and manifest.rejected == {"unreadable": 1}
    assert manifest.told().endswith("before/1.png: Permission denied)")


def test_strange_pictures_are_converted_or_left_out_by_reason(tmp_path: Path) -> None:
    root = tmp_path / "in"
    pairs = pair_folder(root, 13)
    picture = PILImage.fromarray(noise(0))
    transparent = PILImage.fromarray(np.dstack([noise(0), np.full((48, 64), 128, np.uint8)]))
    sixteen = PILImage.fromarray(np.full((48, 64), 257 * 9, np.uint16))
    transparent.save(root / "before/0.png")
    picture.convert("CMYK").save(root / "before/1.jpg")
    sixteen.save(root / "before/2.png")
    picture.save(root / "before/3.gif", save_all=True, append_images=[picture.rotate(90)])
    (root / "before/4.png").write_bytes((root / "before/5.png").read_bytes()[:900])
    (root / "after/5.png").unlink()
    PILImage.new("1", (9000, 9000)).save(root / "before/6.png")
    picture.resize((20, 20)).save(root / "before/7.png")
    picture.resize((48, 48)).save(root / "before/8.png")
    picture.convert("L").save(root / "mask9.png")
    PILImage.new("L", (64, 40), 255).save(root / "mask10.png")
    PILImage.new("L", (64, 48)).save(root / "mask11.png")
    pairs[1]["before"], pairs[3]["before"] = "before/1.jpg", "before/3.gif"
    pairs[10]["mask"], pairs[11]["mask"] = "mask10.png", "mask11.png"
    pairs[12]["instruction"], pairs[9]["id"] = " ", "pair0"
    (root / "edits.json").write_text(json.dumps(pairs))
    manifest = run(root, tmp_path / "out", max_rejected=1)
    assert manifest.rejected == {
        "animated": 1, "damaged": 1, "missing": 1, "too large": 1, "too small": 1,
        "target of another size": 1, "mask of another size": 1, "empty mask": 1,
        "empty caption": 1, "duplicate key": 1,
    }  # fmt: skip
    assert manifest.converted == {"transparent": 1, "CMYK": 1, "16 bit": 1}
    rows = {row["key"]: row for row in rows_of(tmp_path / "out")}
    assert set(rows) == {"pair0", "pair1", "pair2"}
    laid = opened(rows["pair0"]["source"])
    assert laid.shape == (48, 64, 3) and np.abs(laid - (noise(0) / 2 + 127)).max() < 2
    assert (opened(rows["pair2"]["source"]) == 9).all()
    told = manifest.examples["mask of another size"][0]
    assert "mask10.png has 64 x 40 pixels, its picture 64 x 48" in told


def test_too_many_rejects_stop_the_build(tmp_path: Path) -> None:
    pairs = pair_folder(tmp_path / "in", 8)
    pairs[2]["instruction"] = ""
    (tmp_path / "in" / "edits.json").write_text(json.dumps(pairs))
    with pytest.raises(DataError, match=r"12\.5% of the records.*limit of 5\.0%.*1 empty caption"):
        run(tmp_path / "in", tmp_path / "out")
    assert run(tmp_path / "in", tmp_path / "out", max_rejected=0.2).kept == 7


def test_a_build_that_stopped_begins_again_when_the_data_is_mended(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Also the records of shards that were finished: the mended ones may be among them."""
    pair_folder(tmp_path / "in", 120)
    run(tmp_path / "in", tmp_path / "whole", shard_rows=50)
    damaged = [tmp_path / "in" / "before" / f"{i}.png" for i in (3, 57, 110)]
    good = [path.read_bytes() for path in damaged]
    for path in damaged:
        path.write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"2\.5% of the records.*mend the data and build again"):
        run(tmp_path / "in", tmp_path / "out", shard_rows=50, max_rejected=0.02)
    assert len(read_manifest(tmp_path / "out").shards) == 2
    for path, content in zip(damaged, good, strict=True):
        path.write_bytes(content)
    manifest = run(tmp_path / "in", tmp_path / "out", shard_rows=50, max_rejected=0.02)
    assert manifest == read_manifest(tmp_path / "whole") == read_manifest(tmp_path / "out")
    assert "begins again without its 100 rows: it stopped with 2.5% left out" in caplog.text


def test_a_raised_limit_goes_on_after_the_finished_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = pair_folder(tmp_path / "in", 104)
    pairs[2]["instruction"] = pairs[3]["instruction"] = ""
    (tmp_path / "in" / "edits.json").write_text(json.dumps(pairs))
    with pytest.raises(DataError, match=r"1\.9% of the records"):
        run(tmp_path / "in", tmp_path / "out", shard_rows=101, max_rejected=0.01)
    (first,) = read_manifest(tmp_path / "out").shards
    starts: list[int] = []
    real = EditPairs.records
    monkeypatch.setattr(
        EditPairs, "records", lambda self, start=0: starts.append(start) or real(self, start)
    )
    manifest = run(tmp_path / "in", tmp_path / "out", shard_rows=101, max_rejected=0.5)
    assert starts == [103] and manifest.shards[0] == first and manifest.kept == 102
    assert manifest.stopped is None and manifest.rejected == {"empty caption": 2}


def test_an_unfinished_build_follows_its_input_and_keeps_to_what_was_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = pair_folder(tmp_path / "in", 6)
    real = building.write_shard

    def twice(out: Path, manifest: Any, rows: Any) -> None:
        if len(manifest.shards) == 2:
            raise KeyboardInterrupt
        real(out, manifest, rows)

    monkeypatch.setattr(building, "write_shard", twice)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "in", tmp_path / "out", shard_rows=2)
    monkeypatch.undo()
    with pytest.raises(DataError, match="begun with kind 'pairs', not 'others'; choose another"):
        build(EditPairs(tmp_path / "in"), "edit", tmp_path / "out", made_from={"kind": "others"})
    assert len(read_manifest(tmp_path / "out").shards) == 2
    (tmp_path / "in" / "edits.json").write_text(json.dumps(pairs[1:]))
    run(tmp_path / "in", tmp_path / "out")
    assert [row["key"] for row in rows_of(tmp_path / "out")] == [f"pair{i}" for i in range(1, 6)]


@pytest.mark.parametrize("done", [True, False])
def test_lost_and_truncated_shards_are_made_again_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, done: bool
) -> None:
    pairs = pair_folder(tmp_path / "in", 8)
    pairs[7]["id"], pairs[3]["instruction"] = "pair0", ""
    (tmp_path / "in" / "edits.json").write_text(json.dumps(pairs))
    out, how = tmp_path / "out", {"shard_rows": 2, "max_rejected": 0.5}
    whole = run(tmp_path / "in", out, **how)
    content = {path.name: path.read_bytes() for path in (out / "data").iterdir()}
    assert [shard["rows"] for shard in whole.shards] == [2, 2, 2]
    if not done:
        text = json.loads((out / "build.json").read_text())
        (out / "build.json").write_text(json.dumps({**text, "done": False}))
    first, second, third = sorted((out / "data").iterdir())
    second.unlink()
    third.write_bytes(content[third.name][:-1])
    before = first.stat().st_mtime_ns
    run(tmp_path / "in", out, **how)
    assert {path.name: path.read_bytes() for path in (out / "data").iterdir()} == content
    assert first.stat().st_mtime_ns == before
    second.unlink()
    PILImage.fromarray(noise(99)).save(tmp_path / "in" / "before" / "2.png")
    with pytest.raises(DataError, match="its pictures, or pyarrow .*; remove .*build again"):
        run(tmp_path / "in", out, **how)
    assert not second.exists()


def test_a_folder_without_a_list_is_told_apart_by_its_names(tmp_path: Path) -> None:
    for name in ("source/a.png", "source/b.png", "target/a.png", "target/b.png"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        PILImage.fromarray(noise(len(name))).save(tmp_path / "in" / name)
    for key in "ab":
        (tmp_path / "in" / "target" / f"{key}.txt").write_text("words")
    run(tmp_path / "in", tmp_path / "out")
    for side in ("source", "target"):
        (tmp_path / "in" / side / "a.png").rename(tmp_path / "in" / side / "c.png")
    (tmp_path / "in/target/a.txt").rename(tmp_path / "in/target/c.txt")
    with pytest.raises(DataError, match=r"the input of .*out has changed since it was built"):
        run(tmp_path / "in", tmp_path / "out")


@pytest.mark.parametrize("done", [True, False])
def test_what_an_older_version_built_is_gone_on_with(tmp_path: Path, done: bool) -> None:
    """Its build.json told neither the records of a shard nor the names of a folder."""
    for i in range(4):
        for side in ("source", "target"):
            (tmp_path / "in" / side).mkdir(parents=True, exist_ok=True)
            PILImage.fromarray(noise(i)).save(tmp_path / "in" / side / f"{i}.png")
        (tmp_path / "in" / "target" / f"{i}.txt").write_text("words")
    out = tmp_path / "out"
    assert run(tmp_path / "in", out, shard_rows=2).made_from["listed"]
    content = {path.name: path.read_bytes() for path in (out / "data").iterdir()}
    told = json.loads((out / "build.json").read_text())
    del told["made_from"]["listed"], told["stopped"]
    for shard in told["shards"]:
        del shard["first"], shard["read"]
    first, second = sorted((out / "data").iterdir())
    if not done:
        second.unlink()
        told |= {"done": False, "shards": told["shards"][:1], "read": 2, "kept": 2}
    (out / "build.json").write_text(json.dumps(told))
    before = first.stat().st_mtime_ns
    run(tmp_path / "in", out, shard_rows=2)
    assert {path.name: path.read_bytes() for path in (out / "data").iterdir()} == content
    assert first.stat().st_mtime_ns == before
    first.unlink()
    with pytest.raises(DataError, match=r"train-00000.parquet is damaged; remove .* build again"):
        run(tmp_path / "in", out, shard_rows=2)


@pytest.mark.parametrize(
    "change", [{"max_rejected": 2.0}, {"max_rejected": float("nan")}, {"workers": 0},
               {"shard_rows": 0}],
)  # fmt: skip
def test_numbers_out_of_range_are_named(tmp_path: Path, change: dict[str, Any]) -> None:
    pair_folder(tmp_path / "in", 2)
    with pytest.raises(ConfigError, match="must be"):
        run(tmp_path / "in", tmp_path / "out", **change)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("moment", range(14))
def test_a_build_killed_at_any_write_goes_on_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: int
) -> None:
    """Every write in turn fails as on a full disk; the build is then run again."""
    pair_folder(tmp_path / "in", 8)
    run(tmp_path / "in", tmp_path / "whole", shard_rows=3)
    count = 0

    def failing(path: Path) -> None:
        nonlocal count
        count += 1
        if count == moment + 1:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(atomic, "_fsync", failing)
    with pytest.raises(OSError, match="No space left"):
        run(tmp_path / "in", tmp_path / "out", shard_rows=3)
    monkeypatch.undo()
    manifest = run(tmp_path / "in", tmp_path / "out", shard_rows=3)
    assert manifest == read_manifest(tmp_path / "whole")
    files = sorted(path.name for path in (tmp_path / "out" / "data").iterdir())
    assert files == ["train-00000.parquet", "train-00001.parquet", "train-00002.parquet"]


def test_a_finished_build_is_left_alone_and_another_input_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = pair_folder(tmp_path / "in")
    run(tmp_path / "in", tmp_path / "out")
    monkeypatch.setattr(building, "write_shard", None)
    assert run(tmp_path / "in", tmp_path / "out").kept == 6
    with pytest.raises(DataError, match="begun with task 'edit', not 'customise'"):
        build(
            EditPairs(tmp_path / "in"), "customise", tmp_path / "out", made_from={"kind": "pairs"}
        )
    pairs[0]["instruction"] = "something else"
    (tmp_path / "in" / "edits.json").write_text(json.dumps(pairs))
    with pytest.raises(DataError, match="has changed since it was built .fingerprint"):
        run(tmp_path / "in", tmp_path / "out")
    with pytest.raises(DataError, match="is not a data set; choose another folder"):
        run(tmp_path / "in", tmp_path / "in")
    (tmp_path / "out" / "build.json").write_text('{"format": 2}')
    with pytest.raises(DataError, match="is damaged"):
        run(tmp_path / "in", tmp_path / "out")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "edits.json: expected a list, got {}"),
        ([3], r"edits.json\[0\]: expected an object, got 3"),
        ([{"before": "a.png"}], r"edits.json\[0\] has no 'target' or 'after'.*"),
        ([{"befor": "a.png", "after": "a.png"}], r"\[0\] has no 'source'.*"),
        ([{"before": 3, "after": "a.png"}], r"\[0\]: before must be a text, got 3"),
        ([{"before": "../a.png", "after": "a.png"}], r"'../a.png' lies outside the folder"),
        ([{"before": "/etc/passwd", "after": "a.png"}], "lies outside the folder"),
        ([{"before": "a.png", "after": "a.png", "id": [1]}], "id must be a text or a whole number"),
    ],
)
def test_mistakes_in_a_list_are_named(tmp_path: Path, content: Any, message: str) -> None:
    (tmp_path / "edits.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=message):
        EditPairs(tmp_path)


def test_folders_without_pairs(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not a folder of pairs"):
        EditPairs(tmp_path / "nowhere")
    with pytest.raises(DataError, match="has no pairs"):
        EditPairs(tmp_path)
    (tmp_path / "pairs.json").write_text("[")
    with pytest.raises(DataError, match="is not valid JSON"):
        EditPairs(tmp_path)


def test_the_real_edit_pairs(assets: Path, tmp_path: Path) -> None:
    manifest = build(EditPairs(assets / "edits"), "edit", tmp_path / "out", made_from={})
    assert manifest.kept == manifest.read == 10 and not manifest.rejected
    assert sum(row["mask"] is not None for row in rows_of(tmp_path / "out")) >= 5
