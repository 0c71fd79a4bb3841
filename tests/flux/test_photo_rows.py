"""A folder of photos as a data set on disk: every task that its annotations can feed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as PILImage

from prw_flux.data.build import build
from prw_flux.data.check import check, sample_rows
from prw_flux.data.readers import Origin, open_reader
from prw_flux.data.rows import DataError


def save(path: Path, seed: int) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    PILImage.fromarray(pixels).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "in"
    (root / "extra").mkdir(parents=True)
    for i in range(4):
        save(root / f"p{i}.png", i)
    save(root / "extra" / "after.png", 9)
    mask = np.zeros((48, 64), np.uint8)
    mask[10:30, 20:50] = 255
    PILImage.fromarray(mask).save(root / "extra" / "mask.png")
    PILImage.fromarray(mask[:, :40]).save(root / "extra" / "narrow.png")
    photo = {
        "caption": "a photo of noise",
        "things": [
            {"phrase": "the block", "label": "block", "mask": "extra/mask.png"},
            {"phrase": "misfit", "box": [1, 1, 9, 9], "mask": "extra/narrow.png"},
        ],
        "maps": {"depth": "extra/mask.png"},
        "edits": [{"instruction": "change it", "target": "extra/after.png",
                   "mask": "extra/mask.png"}],
    }  # fmt: skip
    subject = {"class": "rug", "images": ["p1.png", "p2.png"]}
    content = {"images": {"p0.png": photo}, "subjects": {"it": subject}}
    (root / "annotations.json").write_text(json.dumps(content))
    return root


@pytest.mark.parametrize(
    ("task", "keys", "text"),
    [
        ("inpaint", [f"p{i}.png" for i in range(4)], "a photo of noise"),
        ("ground", ["p0.png"], "a photo of noise"),
        ("control", ["p0.png"], "a photo of noise"),
        ("edit", ["p0.png@0"], "change it"),
        ("customise", ["p2.png->p1.png", "p1.png->p2.png"], "a photo of the rug"),
    ],
)
def test_every_task_has_its_rows(folder: Path, task: str, keys: list[str], text: str) -> None:
    reader = open_reader(Origin(kind="photos", path=str(folder)), task)
    out = folder.parent / "out"
    manifest = build(reader, task, out, made_from={}, max_rejected=0.8)
    assert not manifest.rejected
    rows = sample_rows(out, 9)
    assert [row["key"] for row in rows] == keys and rows[0]["text"] == text
    assert check(out) == []
    if task in ("inpaint", "ground"):
        (thing,) = rows[0]["boxes"]
        assert thing["box"] == [20, 10, 50, 30] and thing["phrase"] == "the block"
        assert manifest.converted["left out a mask of another size"] == 1
    if task == "inpaint":
        assert [row["text"] for row in rows[1:]] == ["a photograph"] * 3
        assert manifest.converted["without a caption: a photograph"] == 3


def test_a_folder_that_cannot_feed_a_task(folder: Path) -> None:
    (folder / "annotations.json").unlink()
    reader = open_reader(Origin(kind="photos", path=str(folder)), "edit")
    with pytest.raises(DataError, match="there are no records"):
        build(reader, "edit", folder.parent / "out", made_from={})
