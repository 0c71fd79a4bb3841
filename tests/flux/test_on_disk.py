"""Built data as a data source: every task, whole epochs, mixtures, and the held-out side."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as PILImage

from prw import ConfigError
from prw_flux import recipes
from prw_flux.data.build import build
from prw_flux.data.choose import open_data
from prw_flux.data.images import ImageError
from prw_flux.data.on_disk import OnDisk
from prw_flux.data.rows import DataError, Picture, Record, ThingBox
from prw_flux.data.sample_order import Part, SampleOrder
from prw_flux.evaluation.sheets import photo_samples
from prw_flux.rundir import RunFolder
from prw_flux.tasks import TASKS, DataSource


class Listed:
    """A reader over a list."""

    inputs: tuple[Path, ...] = ()
    listed = ""

    def __init__(self, records: list[Record]) -> None:
        self.found = records

    def __len__(self) -> int:
        return len(self.found)

    def records(self, start: int = 0) -> Any:
        return iter(self.found[start:])


def photo(seed: int, height: int = 60, width: int = 80) -> Picture:
    from prw_flux.data.row_checks import encode

    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    near = PILImage.fromarray(coarse).resize((width, height), PILImage.Resampling.NEAREST)
    return Picture(name=f"photo {seed}", data=encode(np.array(near)))


def make(out: Path, task: str, count: int) -> Path:
    """A data set with everything that the task can have."""
    mask = Picture(name="mask", pixels=np.pad(np.full((20, 20), 255, np.uint8), ((20,), (30,))))
    things = (
        ThingBox(box=(30, 20, 50, 40), phrase="the block", label="block"),
        ThingBox(box=(0, 0, 9, 60), phrase="cut away"),
    )
    records = [
        Record(
            where=f"record {i}",
            key=f"k{i}",
            text=f"text {i}",
            source=photo(i) if task in ("ground", "edit", "customise") else None,
            target=photo(i + 500) if task != "ground" else None,
            mask=mask if task == "edit" else None,
            conditions={"depth": mask} if task == "control" else {},
            boxes=things if task in ("ground", "inpaint") else (),
        )
        for i in range(count)
    ]
    build(Listed(records), task, out, made_from={}, shard_rows=4)
    return out


def test_every_task_is_fed(tmp_path: Path) -> None:
    folders = ",".join(str(make(tmp_path / task, task, 3)) for task in TASKS)
    data = OnDisk(folders, 48, split="all", cache=tmp_path / "cache")
    assert isinstance(data, DataSource)
    assert data.tasks() == set(TASKS) and len(data) == 15
    assert "edit 3 rows" in data.summary()
    for name, task in TASKS.items():
        for index in range(6):
            triple = task(data.example(name, index), 0)
            assert triple.source.shape == triple.target.shape == (48, 48, 3)
    ground = data.example("ground", 0)
    assert [thing.phrase for thing in ground.things] == ["the block"]
    assert ground.things[0].box == pytest.approx((16, 16, 32, 32))
    edit = data.example("edit", 0).edit
    assert edit is not None and edit.metadata["mask"].sum() == 256
    assert set(data.example("control", 0).maps) == {"depth"}
    subject = data.example("customise", 0).subject
    assert subject is not None and not np.array_equal(subject.source, subject.target)


def test_an_epoch_has_every_row_once_and_the_next_has_other_keys(tmp_path: Path) -> None:
    data = OnDisk(str(make(tmp_path / "d", "edit", 9)), 48, split="all", cache=tmp_path / "c")
    keys = [data.example("edit", i).key for i in range(18)]
    assert sorted(keys[:9]) == [f"d:k{i}" for i in range(9)]
    assert sorted(keys[9:]) == [f"d:k{i}#1" for i in range(9)]
    again = OnDisk(str(tmp_path / "d"), 48, split="all", cache=tmp_path / "c")
    assert [again.example("edit", i).key for i in reversed(range(18))] == keys[::-1]
    other = OnDisk(str(tmp_path / "d"), 48, seed=1, split="all", cache=tmp_path / "c")
    assert [other.example("edit", i).key for i in range(9)] != keys[:9]
    order = SampleOrder([Part(name="d", size=9)], seed=0).at(np.arange(9)).sample_N
    assert keys[:9] == [f"d:k{i}" for i in order]


def test_the_fingerprint_is_that_of_rows_and_order(tmp_path: Path) -> None:
    make(tmp_path / "d", "edit", 9)
    make(tmp_path / "e", "edit", 8)

    def of(folders: str = "{0}/d", size: int = 48, **how: Any) -> str:
        return OnDisk(folders.format(tmp_path), size, cache=tmp_path / "c", **how).fingerprint()

    others = [of(size=64), of(seed=1), of(split="all"), of("{0}/e"), of("{0}/d,{0}/e*2")]
    assert len({of(), *others}) == 6
    before = of()
    build_json = json.loads((tmp_path / "d" / "build.json").read_text())
    build_json["shards"][0]["sha256"] = "0" * 64
    (tmp_path / "d" / "build.json").write_text(json.dumps(build_json))
    changed = of()
    assert changed != before
    (tmp_path / "moved").mkdir()
    (tmp_path / "d").rename(tmp_path / "moved" / "d")
    assert of("{0}/moved/d") == changed


def test_a_mixture_keeps_its_weights(tmp_path: Path) -> None:
    names = [str(make(tmp_path / name, "edit", 4)) for name in ("a", "b")]
    data = OnDisk(f"{names[0]}*3, {names[1]}*1", 48, cache=tmp_path / "c")
    assert len(data) == 6
    keys = [data.example("edit", i).key for i in range(16)]
    assert Counter(key[0] for key in keys) == {"a": 12, "b": 4}


def test_the_held_out_side_is_never_trained_on(tmp_path: Path) -> None:
    folder = str(make(tmp_path / "d", "edit", 7))
    keys = {}
    for split in ("train", "heldout", "all"):
        data = OnDisk(folder, 48, split=split, cache=tmp_path / "c")
        keys[split] = {data.example("edit", i).key for i in range(len(data))}
    assert keys["heldout"] == {"d:k6"} and not keys["heldout"] & keys["train"]
    assert keys["heldout"] | keys["train"] == keys["all"]


def test_a_picture_that_was_damaged_since_is_named(tmp_path: Path) -> None:
    import pyarrow.parquet as parquet

    folder = make(tmp_path / "d", "edit", 4)
    shard = folder / "data" / "train-00000.parquet"
    rows = parquet.read_table(shard)
    changed = rows.to_pylist()
    changed[2]["target"]["bytes"] = changed[2]["target"]["bytes"][:60]
    parquet.write_table(type(rows).from_pylist(changed, schema=rows.schema), shard)
    told = json.loads((folder / "build.json").read_text())
    told["shards"][0]["bytes"] = shard.stat().st_size
    (folder / "build.json").write_text(json.dumps(told))
    data = OnDisk(str(folder), 48, split="all", cache=tmp_path / "c")
    lost = 0
    for index in range(4):
        try:
            data.example("edit", index)
        except ImageError as problem:
            assert problem.reason == "damaged" and "d:k2" in str(problem)
            lost += 1
    assert lost == 1


def test_sources_that_cannot_be_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = str(make(tmp_path / "d", "edit", 1))
    assert len(open_data(f"disk:{folder}", size=48, split="all")) == 1
    with pytest.raises(DataError, match="has one row, so there is none for split 'train'"):
        open_data(f"disk:{folder}", size=48)
    with pytest.raises(DataError, match="was not made by"):
        open_data(f"disk:{tmp_path}", size=48)
    with pytest.raises(ConfigError, match="the weight 'x' is not a number"):
        open_data(f"disk:{folder}*x", size=48)
    with pytest.raises(ConfigError, match="different names"):
        open_data(f"disk:{folder},{folder}", size=48, split="all")
    with pytest.raises(ValueError, match="feeds edit, not 'ground'"):
        open_data(f"disk:{folder}", size=48, split="all").example("ground", 0)
    with pytest.raises(ValueError, match="multiple of 16"):
        open_data(f"disk:{folder}", size=50)
    with pytest.raises(ConfigError, match="is a dict without name, tasks, example, fingerprint"):
        open_data("sys:modules", size=48)
    manifest = json.loads((tmp_path / "d" / "build.json").read_text())
    (tmp_path / "d" / "build.json").write_text(json.dumps({**manifest, "done": False}))
    with pytest.raises(DataError, match="is not finished"):
        open_data(f"disk:{folder}", size=48, split="all")


def test_the_report_of_a_run_shows_the_held_out_rows_of_its_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    source = f"disk:{make(tmp_path / 'd', 'edit', 6)}"
    config = recipes.photos().with_settings([f"data.source={source}"])
    run = RunFolder.create(tmp_path / "run", config)
    found = photo_samples(run, ["inpaint", "edit"], 3, 0)
    assert {task: [s.example.key for s in part] for task, part in found.items()} == {
        "edit": ["d:k5"]
    }
    assert found.told.startswith(f"{source}, held out; outside the base's")
    named = config.with_settings([f"data.photos={tmp_path / 'nowhere'}"])
    monkeypatch.setattr(OnDisk, "example", lambda self, task, index: 1 // 0)
    for number, failing in enumerate((config, named)):
        run = RunFolder.create(tmp_path / f"failing-{number}", failing)
        assert photo_samples(run, ["edit"], 3, 0) == {}
    assert caplog.text.count("no photos in the report") == 2
