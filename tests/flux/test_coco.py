"""COCO, LVIS and RefCOCO annotations: rows, masks, and mistakes by their place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as PILImage

from prw import ConfigError
from prw_flux.data.build import build
from prw_flux.data.object_masks import Polygons, RunLengths, read_mask, unpack
from prw_flux.data.readers import Origin, open_reader
from prw_flux.data.rows import DataError, Reject
from prw_flux.tasks.base import box_iou, mask_box

POLYGON = [10, 5, 30, 5, 30, 25, 10, 25]


def instances() -> dict[str, Any]:
    """Two pictures; a dog with a polygon, a dog in runs, a crowd, a box without area."""
    runs = {"size": [48, 64], "counts": [48 * 2 + 4, 10, 38, 10, 48 * 60 + 34]}
    return {
        "images": [
            {"id": 1, "file_name": "one.png"},
            {"id": 2, "coco_url": "http://images.cocodataset.org/val/two.png"},
        ],
        "categories": [{"id": 5, "name": "dog"}, {"id": 6, "name": "alarm_clock"}],
        "annotations": [
            {"id": 10, "image_id": 1, "category_id": 5, "bbox": [10, 5, 20, 20],
             "segmentation": [POLYGON], "iscrowd": 0},
            {"id": 11, "image_id": 1, "category_id": 6, "bbox": [2, 4, 2, 10],
             "segmentation": runs},
            {"id": 12, "image_id": 2, "category_id": 5, "bbox": [0, 0, 9, 9], "iscrowd": 1},
            {"id": 13, "image_id": 2, "category_id": 5, "bbox": [3, 3, 0, 9]},
        ],
    }  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    (tmp_path / "images" / "val").mkdir(parents=True)
    for name in ("one.png", "val/two.png"):
        pixels = rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)
        PILImage.fromarray(pixels).save(tmp_path / "images" / name)
    write(tmp_path, instances())
    return tmp_path


def write(folder: Path, content: Any, name: str = "instances.json") -> None:
    (folder / name).write_text(json.dumps(content))


def made(folder: Path, kind: str, task: str, name: str, **options: Any) -> tuple[Any, Any]:
    """The rows (pictures decoded) and the manifest."""
    from datasets import load_dataset

    options = {"images": str(folder / "images"), **options}
    reader = open_reader(Origin(kind=kind, path=str(folder / name), **options), task)
    out = folder / "out"
    manifest = build(reader, task, out, made_from={}, max_rejected=0.5)
    assert len(reader) == manifest.read
    return load_dataset(str(out), split="train", cache_dir=str(folder / "cache")), manifest


def test_grounding_by_class(folder: Path) -> None:
    rows, manifest = made(folder, "coco", "ground", "instances.json", licence="CC BY 4.0")
    assert manifest.rejected == {"zero-area box": 1} and not manifest.converted
    (row,) = rows
    assert (row["key"], row["text"], row["licence"]) == ("1", "", "CC BY 4.0")
    assert row["target"] is None and row["source"].size == (64, 48)
    assert [thing["phrase"] for thing in row["boxes"]] == ["dog", "alarm clock"]
    assert [thing["box"] for thing in row["boxes"]] == [[10, 5, 30, 25], [2, 4, 4, 14]]
    extents = [mask_box(np.array(thing["mask"]) > 0) for thing in row["boxes"]]
    assert extents[0] is not None and box_iou(extents[0], (10, 5, 30, 25)) > 0.85
    assert extents[1] == (2, 4, 4, 14)


def test_inpainting_with_captions_and_objects(folder: Path) -> None:
    captions = [
        {"id": 1, "image_id": 1, "caption": "a dog\nby a clock"},
        {"id": 2, "image_id": 2, "caption": "nothing much"},
        {"id": 3, "image_id": 2, "caption": " "},
    ]
    write(folder, {"annotations": captions}, "captions.json")
    rows, manifest = made(
        folder, "coco", "inpaint", "instances.json", captions=str(folder / "captions.json")
    )
    assert [(row["key"], row["text"]) for row in rows] == [
        ("1/1", "a dog by a clock"), ("2/2", "nothing much"),
    ]  # fmt: skip
    assert [[thing["label"] for thing in row["boxes"]] for row in rows] == [
        ["dog", "alarm clock"], [],
    ]  # fmt: skip
    assert manifest.rejected == {"empty caption": 1}
    assert manifest.converted == {"left out a zero-area box": 1}
    assert rows[0]["source"] is None and rows[0]["target"].size == (64, 48)


def test_referring_expressions(folder: Path) -> None:
    references = [
        {"ref_id": 7, "ann_id": 10, "split": "train",
         "sentences": [{"sent": "left dog"}, "the big dog", " "]},
        {"ref_id": 8, "ann_id": 11, "split": "val", "sentences": [{"raw": "clock"}]},
    ]  # fmt: skip
    write(folder, references, "refs.json")
    options = {"instances": str(folder / "instances.json"), "split": "train"}
    rows, manifest = made(folder, "refcoco", "ground", "refs.json", **options)
    assert [(row["key"], row["text"]) for row in rows] == [
        ("7/0", "left dog"), ("7/1", "the big dog"),
    ]  # fmt: skip
    assert rows[1]["boxes"][0]["phrase"] == "the big dog"
    assert rows[1]["boxes"][0]["label"] == "dog" and manifest.rejected == {"empty caption": 1}


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("annotations", 1, "bbox"), [1, 2, 3], r"annotations\[1\]: bbox must be \[x, y, width"),
        (("annotations", 1, "bbox"), [1, 2, 3, 10**400], r"annotations\[1\]: bbox must be \[x, y"),
        (("annotations", 1, "bbox"), None, r"annotations\[1\] has no 'bbox'"),
        (("annotations", 2, "image_id"), 99, r"annotations\[2\]: there is no image_id 99"),
        (("annotations", 2, "category_id"), "5", r"there is no category_id '5'"),
        (("annotations", 2, "id"), 10, r"annotations\[2\]: the id 10 was there before"),
        (("annotations",), None, "annotations: expected a list, got None"),
        (("images", 0, "file_name"), 3, r"images\[0\]: file_name must be a text, got 3"),
        (("categories", 0, "name"), None, r"categories\[0\] has no 'name'"),
    ],
)
def test_mistakes_are_named(folder: Path, path: tuple[Any, ...], value: Any, message: str) -> None:
    content = instances()
    place: Any = content
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    write(folder, content)
    with pytest.raises(DataError, match=message):
        made(folder, "coco", "ground", "instances.json")


def test_a_missing_picture_is_named_by_its_file_and_its_entry(folder: Path) -> None:
    captions = [{"id": i, "image_id": i, "caption": "words"} for i in (1, 2)]
    write(folder, {"annotations": captions}, "captions.json")
    references = [{"ref_id": 7, "ann_id": 12, "sentences": ["a dog"]},
                  {"ref_id": 8, "ann_id": 10, "sentences": ["a dog"]}]  # fmt: skip
    write(folder, references, "refs.json")
    (folder / "images/val/two.png").unlink()
    file = f"no such file: {folder / 'images/val/two.png'}"
    for kind, task, name, options, place in (
        ("coco", "ground", "instances.json", {}, "instances.json: images[1], id 2"),
        ("coco", "inpaint", "instances.json", {"captions": str(folder / "captions.json")},
         "captions.json: annotations[1], image 2"),
        ("refcoco", "ground", "refs.json", {"instances": str(folder / "instances.json")},
         "refs.json[0]: sentences[0], image 2"),
    ):  # fmt: skip
        origin = Origin(
            kind=kind, path=str(folder / name), images=str(folder / "images"), **options
        )
        out = folder / f"{kind}-{task}"
        manifest = build(open_reader(origin, task), task, out, made_from={}, max_rejected=0.5)
        assert manifest.examples == {"missing": [f"{place}: {file}"]}


def test_references_that_lead_nowhere(folder: Path) -> None:
    options = {"instances": str(folder / "instances.json")}
    for content, message in (
        (
            [{"ref_id": 1, "ann_id": 99, "sentences": []}],
            r"refs.json\[0\]: there is no annotation 99",
        ),
        ([{"ref_id": 1, "ann_id": 10, "sentences": [3]}], r"sentences\[0\]: expected a text"),
        ([{"ref_id": 1, "ann_id": 10, "sentences": []}], "has no references"),
    ):
        write(folder, content, "refs.json")
        with pytest.raises(DataError, match=message):
            made(folder, "refcoco", "ground", "refs.json", **options)
    with pytest.raises(DataError, match="is a pickle, which may run any program"):
        made(folder, "refcoco", "ground", "refs(unc).p", **options)
    content = instances()
    content["images"][0]["file_name"] = "../instances.json"
    write(folder, content)
    with pytest.raises(DataError, match="lies outside the folder"):
        made(folder, "coco", "ground", "instances.json")


def test_origins_that_do_not_fit() -> None:
    for origin, task, message in (
        (
            Origin(kind="cocoo", path="x"),
            "ground",
            "cannot build from 'cocoo'; did you mean 'coco'",
        ),
        (Origin(kind="coco", path="x"), "edit", "coco feeds ground, inpaint, control, not 'edit'"),
        (Origin(kind="coco", path="x"), "ground", "needs --images, the folder of the pictures"),
        (Origin(kind="refcoco", path="x", images="y"), "ground", "needs --instances"),
    ):
        with pytest.raises(ConfigError, match=message):
            open_reader(origin, task)


def packed(counts: list[int]) -> str:
    """The packed form of run lengths, written from its description."""
    text = ""
    for i, count in enumerate(counts):
        value = count - (counts[i - 2] if i > 2 else 0)
        while True:
            group, value = value & 31, value >> 5
            last = value == (-1 if group & 16 else 0)
            text += chr(48 + group + (0 if last else 32))
            if last:
                break
    return text


@given(st.lists(st.integers(0, 100_000), min_size=1, max_size=30))
def test_packed_runs_are_read(counts: list[int]) -> None:
    assert unpack(packed(counts)) == counts


def test_masks_are_drawn_or_refused() -> None:
    runs = read_mask({"size": [4, 3], "counts": packed([5, 2, 5])}, "here")
    assert isinstance(runs, RunLengths)
    assert np.argwhere(runs.draw(4, 3)).tolist() == [[1, 1], [2, 1]]
    with pytest.raises(Reject, match="3 x 4 pixels, its picture 4 x 3"):
        runs.draw(3, 4)
    with pytest.raises(Reject, match="do not fill"):
        RunLengths([1, 2], 4, 3).draw(4, 3)
    assert read_mask([], "here") is None
    assert isinstance(read_mask([POLYGON], "here"), Polygons)
    for value in (float("nan"), float("inf"), 10**400):
        with pytest.raises(Reject, match="a point that is not finite"):
            Polygons([[*POLYGON[:-1], value]]).draw(4, 3)
    for raw in ([[1, 2, 3]], [["a"] * 6], {"counts": [1]}, {"size": [4, 3], "counts": 5}, "x"):
        with pytest.raises(DataError, match="here: segmentation must be polygons"):
            read_mask(raw, "here")
    with pytest.raises(DataError, match="ends within a number"):
        read_mask({"size": [4, 3], "counts": "P"}, "here")
