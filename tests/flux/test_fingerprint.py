"""Fingerprints of data: the same for the same samples, another one for others."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as PILImage

from prw_flux.data.build import build
from prw_flux.data.choose import open_data
from prw_flux.data.fingerprint import fingerprint
from prw_flux.data.on_disk import OnDisk
from prw_flux.data.photos import PhotoFolder
from prw_flux.data.row_checks import encode
from prw_flux.data.rows import DataError, Picture, Record
from prw_flux.tasks import Example


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(6):
        picture = PILImage.fromarray(rng.integers(0, 256, (60, 70, 3), dtype=np.uint8))
        picture.save(folder / f"p{i}.png")
    PILImage.fromarray(rng.integers(0, 256, (60, 70, 3), dtype=np.uint8)).save(tmp_path / "e.png")
    shutil.move(tmp_path / "e.png", folder / "after.png")
    edits = [{"instruction": "do", "target": "after.png"}]
    notes = {"images": {"p1.png": {"caption": "one", "edits": edits}}}
    (folder / "annotations.json").write_text(json.dumps(notes))
    return folder


def cut(folder: Path) -> None:
    (folder / "p2.png").write_bytes((folder / "p2.png").read_bytes() + b"\0")


def caption(folder: Path) -> None:
    (folder / "p3.txt").write_text("three")


def target(folder: Path) -> None:
    shutil.copy(folder / "p4.png", folder / "after.png")


def more(folder: Path) -> None:
    shutil.copy(folder / "p4.png", folder / "p9.png")


def instruction(folder: Path) -> None:
    text = (folder / "annotations.json").read_text().replace('"do"', '"undo"')
    (folder / "annotations.json").write_text(text)


@pytest.mark.parametrize("change", [cut, caption, target, more, instruction])
def test_photos_are_known_by_their_content(photos: Path, tmp_path: Path, change: Any) -> None:
    before = fingerprint(PhotoFolder(photos, 48, "all"))
    moved = shutil.copytree(photos, tmp_path / "elsewhere" / "photos")
    assert fingerprint(PhotoFolder(moved, 48, "all")) == before
    assert fingerprint(PhotoFolder(photos, 48, "train")) != before
    change(moved)
    assert fingerprint(PhotoFolder(moved, 48, "all")) != before


def test_generated_data_are_known_by_examples() -> None:
    def of(**settings: Any) -> str:
        return fingerprint(open_data("shapeweave", **{"size": 64, **settings}))

    assert of() == of()
    assert len({of(), of(seed=1), of(size=96), of(split="heldout")}) == 4


class Own:
    """A source of a user's, with grey pictures."""

    def __init__(self, level: int = 3, length: int = 10) -> None:
        self.name, self.level, self.length = "own", level, length

    def __len__(self) -> int:
        return self.length

    def tasks(self) -> frozenset[str]:
        return frozenset({"inpaint"})

    def example(self, task: str, index: int) -> Example:
        image = np.full((64, 64, 3), self.level, np.uint8)
        return Example(key=f"k{index}", image=image, caption="grey")


def test_a_source_of_ones_own() -> None:
    assert fingerprint(Own()) == fingerprint(Own())
    assert len({fingerprint(x) for x in (Own(), Own(4), Own(length=11))}) == 3
    kept = replace(Own().example("inpaint", 1), caption="white")

    class Named(Own):
        def example(self, task: str, index: int) -> Example:
            return kept if index == 1 else super().example(task, index)

    assert fingerprint(Named()) != fingerprint(Own())


class Listed:
    """A reader of grey photos."""

    inputs: tuple[Path, ...] = ()

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def records(self, start: int = 0) -> Any:
        for i in range(start, self.count):
            data = encode(np.full((60, 60, 3), i, np.uint8))
            picture = Picture(name=f"photo {i}", data=data)
            yield Record(where=f"record {i}", key=f"k{i}", text=f"text {i}", target=picture)


def test_built_data_are_known_by_their_shards_and_their_mixture(tmp_path: Path) -> None:
    one, two = tmp_path / "a" / "x", tmp_path / "b" / "y"
    for folder, count in ((one, 8), (two, 9)):
        build(Listed(count), "inpaint", folder, made_from={}, shard_rows=4)

    def of(folders: str, **settings: Any) -> str:
        return fingerprint(OnDisk(folders, 48, cache=tmp_path / "cache", **settings))

    before = of(f"{one},{two}")
    assert before == of(f"{one},{two}")
    moved = shutil.copytree(one, tmp_path / "c" / "x")
    assert before == of(f"{moved},{two}")
    others = [f"{one}*2,{two}", str(one), str(two)]
    found = {before, of(f"{one},{two}", seed=1), of(f"{one},{two}", split="all"), *map(of, others)}
    assert len(found) == 6


def test_a_truncated_shard_is_named_before_training(tmp_path: Path) -> None:
    build(Listed(8), "inpaint", tmp_path / "x", made_from={}, shard_rows=4)
    shard = tmp_path / "x" / "data" / "train-00001.parquet"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-100])
    with pytest.raises(DataError, match=rf"train-00001.parquet has {len(whole) - 100:,} bytes, it"):
        OnDisk(str(tmp_path / "x"), 48, cache=tmp_path / "c")
    shard.write_bytes(bytes(len(whole)))
    with pytest.raises(DataError, match="cannot be read .* prw-flux data check .*/x names the sha"):
        OnDisk(str(tmp_path / "x"), 48, cache=tmp_path / "c")
    shard.unlink()
    with pytest.raises(DataError, match="train-00001.parquet is missing; build .* again"):
        OnDisk(str(tmp_path / "x"), 48, cache=tmp_path / "c")
