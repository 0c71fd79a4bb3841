"""Parquet files of published schemas: every known map on a small file of exactly that schema."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, Features, List, Value
from datasets import Image as ImageFeature
from PIL import Image as PILImage
from PIL import ImageDraw

from prw import ConfigError
from prw_flux.data.build import build
from prw_flux.data.column_map import ColumnMap, column_map
from prw_flux.data.parquet_rows import ParquetRows
from prw_flux.data.readers import Origin, open_reader
from prw_flux.data.rows import DataError


def picture(seed: int, height: int = 48, width: int = 64) -> PILImage.Image:
    rng = np.random.default_rng(seed)
    return PILImage.fromarray(rng.integers(0, 200, (height, width, 3), dtype=np.uint8))


def write(path: Path, rows: list[dict[str, Any]], features: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Dataset.from_list(rows, features=Features(features)).to_parquet(path, batch_size=2)


def rows_of(path: Path, kind: str, task: str, out: Path, **options: Any) -> tuple[Any, Any]:
    import pyarrow.parquet as parquet

    reader = open_reader(Origin(kind=kind, path=str(path), **options), task)
    manifest = build(reader, task, out, made_from={}, max_rejected=0.9)
    files = [out / shard["file"] for shard in manifest.shards]
    return [row for file in files for row in parquet.read_table(file).to_pylist()], manifest


def pixels(stored: Any) -> np.ndarray[Any, Any]:
    return np.array(PILImage.open(BytesIO(stored["bytes"])))


def test_magicbrush(tmp_path: Path) -> None:
    masked = picture(0).copy()
    ImageDraw.Draw(masked).rectangle((8, 8, 19, 29), fill="white")
    row = {"img_id": "242679", "turn_index": 1, "source_img": picture(0), "mask_img": masked,
           "instruction": "Put a cat on the seat.", "target_img": picture(1)}  # fmt: skip
    rows = [row, {**row, "turn_index": 2, "instruction": None}, row]
    schema = {"img_id": Value("string"), "turn_index": Value("int32"), "source_img": ImageFeature(),
              "mask_img": ImageFeature(), "instruction": Value("string"),
              "target_img": ImageFeature()}  # fmt: skip
    write(tmp_path / "in" / "train-0.parquet", rows, schema)
    found, manifest = rows_of(tmp_path / "in", "magicbrush", "edit", tmp_path / "out")
    assert manifest.rejected == {"empty caption": 1, "duplicate key": 1}
    assert manifest.examples["empty caption"] == ["train-0.parquet row 1 has no text"]
    assert [(row["key"], row["text"]) for row in found] == [
        ("242679/1", "Put a cat on the seat."),
    ]
    mask = pixels(found[0]["mask"]) > 0
    assert mask.sum() == 12 * 22 and mask[8:30, 8:20].all()
    np.testing.assert_array_equal(pixels(found[0]["source"]), np.array(picture(0)))


def test_omniedit(tmp_path: Path) -> None:
    schema = {"omni_edit_id": Value("string"), "task": Value("string"), "src_img": ImageFeature(),
              "edited_img": ImageFeature(), "edited_prompt_list": List(Value("string")),
              "width": Value("int64"), "height": Value("int64"), "sc_score_1": Value("int64"),
              "sc_score_2": Value("int64"), "sc_reasoning": Value("string"),
              "pq_score": Value("int64"), "pq_reasoning": Value("string"),
              "o_score": Value("float64")}  # fmt: skip
    base = {name: None for name in schema}
    rows = [
        {**base, "omni_edit_id": f"task_obj_add_{i}", "src_img": picture(i),
         "edited_img": picture(i + 9), "edited_prompt_list": ["Add it", f"Add thing {i}", ""]}
        for i in range(5)
    ]  # fmt: skip
    rows[3]["edited_img"] = None
    for i in range(2):
        write(tmp_path / "in" / f"train-{i}.parquet", rows[3 * i : 3 * i + 3], schema)
    found, manifest = rows_of(tmp_path / "in", "omniedit", "edit", tmp_path / "out")
    assert [row["text"] for row in found] == [f"Add thing {i}" for i in (0, 1, 2, 4)]
    assert manifest.rejected == {"missing picture": 1}
    reader = open_reader(Origin(kind="omniedit", path=str(tmp_path / "in")), "edit")
    keys = [record.key for record in reader.records()]
    for start in range(6):
        assert [record.key for record in reader.records(start)] == keys[start:]


def test_subjects200k(tmp_path: Path) -> None:
    composite = PILImage.new("RGB", (2 * 80, 80), "black")
    for i, left in enumerate((8, 88)):
        composite.paste(picture(i, 64, 64), (left, 8))
    good = {"compositeStructure": 5, "objectConsistency": 5, "imageQuality": 5}
    text = {"item": "mug", "description_0": "a mug on a desk", "description_1": "a mug in snow",
            "category": "Mug", "description_valid": True}  # fmt: skip
    row = {"image": composite, "collection": "collection_2", "quality_assessment": good,
           "description": text}  # fmt: skip
    poor = {**good, "imageQuality": 3}
    rows = [row, {**row, "quality_assessment": poor}, {**row, "quality_assessment": None}]
    schema = {
        "image": ImageFeature(),
        "collection": Value("string"),
        "quality_assessment": {name: Value("int64") for name in good},
        "description": {
            name: Value("bool" if name == "description_valid" else "string") for name in text
        },
    }
    write(tmp_path / "x.parquet", rows, schema)
    found, manifest = rows_of(
        tmp_path / "x.parquet", "subjects200k", "customise", tmp_path / "out", licence="Apache-2.0"
    )
    assert manifest.rejected == {"low rating": 2, "not rated": 2}
    assert manifest.share == 0  # a choice among good pairs, which stops no build
    assert manifest.examples["low rating"][0] == "x.parquet row 1 is rated imageQuality 3, below 5"
    assert manifest.converted == {"cut out": 4}
    assert [(row["key"], row["text"]) for row in found] == [
        ("x:0/1", "a mug in snow"), ("x:0/0", "a mug on a desk"),
    ]  # fmt: skip
    for row, source in zip(found, (0, 1), strict=True):
        np.testing.assert_array_equal(pixels(row["source"]), np.array(picture(source, 64, 64)))
        np.testing.assert_array_equal(pixels(row["target"]), np.array(picture(1 - source, 64, 64)))
        assert row["licence"] == "Apache-2.0"


def test_control_maps(tmp_path: Path) -> None:
    schema = {"image": ImageFeature(), "text": Value("string"), "control_depth": ImageFeature()}
    depth = PILImage.fromarray(np.arange(48 * 64).reshape(48, 64).astype(np.uint8))
    rows = [
        {"image": picture(0), "text": "a street", "control_depth": depth},
        {"image": picture(1), "text": "a room", "control_depth": depth.resize((32, 32))},
        {"image": picture(2), "text": "a hill", "control_depth": None},
    ]
    write(tmp_path / "x.parquet", rows, schema)
    found, manifest = rows_of(tmp_path / "x.parquet", "multigen-depth", "control", tmp_path / "a")
    assert manifest.rejected == {"map of another size": 1, "no conditions": 1}
    assert [entry["name"] for entry in found[0]["conditions"]] == ["depth"]
    np.testing.assert_array_equal(pixels(found[0]["conditions"][0]["image"]), np.array(depth))
    columns = ("target=image", "text=text", "depth=control_depth")
    again, _ = rows_of(
        tmp_path / "x.parquet", "parquet", "control", tmp_path / "b", columns=columns
    )
    assert again == found


def test_a_column_of_nulls_has_no_type_and_is_right(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet as parquet

    buffer = BytesIO()
    picture(0).save(buffer, "PNG")
    stored = {"bytes": buffer.getvalue(), "path": None}
    row = {"img_id": "1", "turn_index": 1, "source_img": stored, "mask_img": None,
           "instruction": "Do it.", "target_img": stored}  # fmt: skip
    (tmp_path / "in").mkdir()
    parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "in/a.parquet")
    found, manifest = rows_of(tmp_path / "in", "magicbrush", "edit", tmp_path / "out")
    assert manifest.kept == 1 and found[0]["mask"] is None


def test_mistakes_name_the_file_and_the_column(tmp_path: Path) -> None:
    schema = {"before": ImageFeature(), "after": ImageFeature(), "caption": Value("string")}
    write(tmp_path / "x.parquet", [{"before": None, "after": None, "caption": "x"}], schema)
    for columns, message in (
        ({"source": "befor"}, "x.parquet has no column 'befor'; did you mean 'before'"),
        ({"source": "caption"}, "x.parquet: column caption must hold pictures, it is string"),
        ({"text": "before"}, "x.parquet: column before must hold texts, it is struct"),
        ({"rated": "caption"}, "column caption must be a struct"),
    ):
        names: dict[str, Any] = {"source": "before", "target": "after", "text": "caption"}
        with pytest.raises(DataError, match=message):
            ParquetRows(tmp_path, "edit", ColumnMap(**{**names, **columns}))
    (tmp_path / "x.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match="x.parquet is not a parquet file, or is damaged"):
        ParquetRows(tmp_path, "edit", column_map(["source=a", "target=b", "text=c"]))
    with pytest.raises(DataError, match="there are no .parquet files at"):
        ParquetRows(tmp_path / "none", "edit", column_map(["source=a", "target=b", "text=c"]))


def test_maps_that_are_wrong() -> None:
    for pairs, message in (
        (["source"], "'source' must have the form name=column"),
        (["sorce=a"], "nothing called 'sorce'; did you mean 'source'"),
        (["source=a", "text=b"], "needs --map target=COLUMN"),
    ):
        with pytest.raises(ConfigError, match=message):
            ParquetRows(Path(__file__), "edit", column_map(pairs))
    with pytest.raises(ConfigError, match="needs --map depth=COLUMN"):
        ParquetRows(Path(__file__), "control", column_map(["target=a", "text=b"]))
    with pytest.raises(ConfigError, match="needs boxes"):
        ParquetRows(Path(__file__), "ground", column_map(["source=a", "text=b"]))


def test_rows_of_a_damaged_row_group_are_counted_and_the_others_kept(tmp_path: Path) -> None:
    import pyarrow.parquet as parquet

    schema = {"before": ImageFeature(), "after": ImageFeature(), "caption": Value("string")}
    rows = [{"before": picture(i), "after": picture(i + 9), "caption": f"c{i}"} for i in range(9)]
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / "x.parquet"
    write(path, rows, schema)
    parquet.write_table(parquet.read_table(path), path, row_group_size=3, compression="gzip")
    column = parquet.ParquetFile(path).metadata.row_group(1).column(0)
    data = bytearray(path.read_bytes())
    start = column.data_page_offset
    data[start : start + column.total_compressed_size // 2] = bytes(
        column.total_compressed_size // 2
    )
    path.write_bytes(data)
    names = column_map(["source=before", "target=after", "text=caption"])
    reader = ParquetRows(tmp_path / "in", "edit", names)
    assert [one.where for one in reader.records(4)][0] == "x.parquet row 4"
    manifest = build(reader, "edit", tmp_path / "out", made_from={}, max_rejected=0.5)
    assert manifest.rejected == {"damaged shard": 3} and manifest.kept == 6
    assert "x.parquet row 3 cannot be read" in manifest.examples["damaged shard"][0]
