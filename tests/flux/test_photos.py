"""A folder of photos: what it feeds, what it leaves out, and what it says about mistakes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as PILImage

from prw_flux.data.annotations import PhotoError
from prw_flux.data.images import open_image
from prw_flux.data.photos import PhotoFolder
from prw_flux.tasks import TASKS, DataSource
from prw_flux.tasks.base import box_iou, mask_box


def save(path: Path, seed: int = 0, height: int = 60, width: int = 80) -> None:
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    PILImage.fromarray(coarse).resize((width, height), PILImage.Resampling.NEAREST).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i in range(4):
        save(tmp_path / f"p{i}.png", i)
    save(tmp_path / "sub" / "q.jpg", 9)
    return tmp_path


def write(folder: Path, content: Any, name: str = "annotations.json") -> None:
    (folder / name).write_text(json.dumps(content))


def test_the_default_needs_nothing() -> None:
    photos = PhotoFolder(None, 96, "all")
    assert isinstance(photos, DataSource)
    assert photos.name == "photos:scikit-image"
    assert len(photos) >= 8
    assert photos.tasks() == {"inpaint", "ground", "control", "edit"}
    sides = [PhotoFolder(None, 96, split) for split in ("train", "heldout")]
    keys = [{side.example("inpaint", i).key for i in range(len(side))} for side in sides]
    assert not keys[0] & keys[1]
    assert len(keys[0] | keys[1]) == len(photos)
    for task in photos.tasks():
        for i in range(photos.count(task)):
            example = photos.example(task, i)
            assert example.image.shape == (96, 96, 3)
            assert len(example.caption.split()) > 4
            assert TASKS[task](example, 0).text


def test_plain_folder(folder: Path) -> None:
    photos = PhotoFolder(folder, (48, 64), "all")
    assert len(photos) == 5
    assert photos.tasks() == {"inpaint", "control", "edit"}
    assert photos.summary() == "5 of 5 pictures used"
    example = photos.example("inpaint", 4)
    assert example.key == "sub/q.jpg"
    assert example.caption == "a photograph"
    assert example.image.shape == (48, 64, 3)
    again = photos.example("inpaint", 9)
    assert again.key == "sub/q.jpg#1"
    np.testing.assert_array_equal(again.image, example.image)
    assert photos.example("a task of the user's own", 0).key == "p0.png"
    with pytest.raises(ValueError, match="can feed the task 'ground'; fed: control, edit, inpaint"):
        photos.example("ground", 0)
    with pytest.raises(ValueError, match="negative"):
        photos.example("inpaint", -1)


def test_what_is_held_out_is_told(folder: Path) -> None:
    train, held = (PhotoFolder(folder, 48, side) for side in ("train", "heldout"))
    assert len(held) > 0 and len(train) + len(held) == 5
    assert (
        train.summary() == f"{len(train)} of {len(train)} pictures used, {len(held)} more held out"
    )
    assert "held out" not in held.summary()


def test_captions_come_from_the_nearest_source(folder: Path) -> None:
    (folder / "p0.txt").write_text("from a\n text file ")
    (folder / "p1.txt").write_text("from a text file")
    write(folder, {"p1.png": "from captions", "p2.png": "from captions"}, "captions.json")
    write(folder / "sub", {"q.jpg": "from below"}, "captions.json")
    write(folder, {"images": {"p2.png": {"caption": "from annotations"}}})
    photos = PhotoFolder(folder, 48, "all")
    captions = [photos.example("inpaint", i).caption for i in range(5)]
    expected = ["from a text file", "from captions", "from annotations", "a photograph"]
    assert captions == [*expected, "from below"]


def test_the_fingerprint_follows_the_content_and_not_the_place(folder: Path) -> None:
    def of(split: str = "all", size: int = 48) -> str:
        return PhotoFolder(folder, size, split).fingerprint()

    seen = {of(), of(size=64), of(split="heldout")}
    assert len(seen) == 3
    folder = shutil.copytree(folder, folder.with_name(f"{folder.name}-moved"))
    assert of() in seen
    changes: list[Callable[[], object]] = [
        lambda: (folder / "p0.txt").write_text("a caption"),
        lambda: write(folder, {"images": {"p1.png": {"maps": {"depth": "p0.png"}}}}),
        lambda: save(folder / "p1.png", seed=9),
        lambda: save(folder / "p0.png", seed=10),  # now the depth of p1
        lambda: (folder / "sub" / "q.jpg").unlink(),
    ]
    for number, change in enumerate(changes):
        change()
        seen.add(of())
        assert len(seen) == 4 + number


def test_bad_pictures_are_left_out_and_counted(folder: Path) -> None:
    whole = (folder / "sub" / "q.jpg").read_bytes()
    (folder / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    save(folder / "dot.png", height=3, width=3)
    frames = [PILImage.new("RGB", (40, 40), colour) for colour in ("red", "blue")]
    frames[0].save(folder / "move.gif", save_all=True, append_images=frames[1:])
    PILImage.fromarray(np.full((40, 40), 40_000, np.uint16)).save(folder / "deep.png")
    PILImage.new("CMYK", (40, 40)).save(folder / "print.jpg")
    (folder / ".hidden.png").write_text("")
    (folder / "notes.md").write_text("")
    photos = PhotoFolder(folder, 48, "all")
    assert len(photos) == 7
    assert photos.rejected == {"damaged": 1, "too small": 1, "animated": 1}
    assert photos.summary().startswith(
        "7 of 10 pictures used; left out: 1 animated, 1 damaged, 1 too small (first: "
    )
    with pytest.raises(PhotoError, match="too many unusable pictures .*7 of 10 pictures used"):
        PhotoFolder(folder, 48, "all", max_rejected=0.2)


def test_folders_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(PhotoError, match="nowhere does not exist"):
        PhotoFolder(tmp_path / "nowhere")
    with pytest.raises(PhotoError, match="has no pictures"):
        PhotoFolder(tmp_path)
    save(tmp_path / "one.png")
    with pytest.raises(PhotoError, match="is a file, not a folder"):
        PhotoFolder(tmp_path / "one.png")
    assert len(PhotoFolder(tmp_path, 48, "train")) == 1
    with pytest.raises(PhotoError, match="none for split 'heldout'"):
        PhotoFolder(tmp_path, 48, "heldout")
    with pytest.raises(ValueError, match="unknown split 'test'"):
        PhotoFolder(tmp_path, 48, "test")
    with pytest.raises(ValueError, match="multiple of 16"):
        PhotoFolder(tmp_path, 50)
    (tmp_path / "one.png").write_text("no picture")
    with pytest.raises(PhotoError, match="0 of 1 pictures used; left out: 1 not an image"):
        PhotoFolder(tmp_path, 48)


def test_the_split_is_stable_and_keeps_subjects_together(tmp_path: Path) -> None:
    names = [f"photo{i:02}.png" for i in range(30)]
    for name in names:
        save(tmp_path / name, height=32, width=32)
    write(tmp_path, {"subjects": {"cat": {"class": "cat", "images": names[:6]}}})

    def keys(split: str) -> set[str]:
        photos = PhotoFolder(tmp_path, 32, split, heldout=0.3)
        return {photos.example("inpaint", i).key for i in range(len(photos))}

    train, heldout = keys("train"), keys("heldout")
    assert train | heldout == set(names)
    assert not train & heldout
    assert 3 <= len(heldout) <= 18
    assert set(names[:6]) <= train or set(names[:6]) <= heldout
    save(tmp_path / "zz.png", height=32, width=32)
    assert heldout - keys("heldout") == set()


def test_annotations_feed_every_task(folder: Path) -> None:
    mask = np.zeros((60, 80), np.uint8)
    mask[20:40, 30:50] = 255
    (folder / "extra").mkdir()
    PILImage.fromarray(mask).save(folder / "extra" / "mask.png")
    PILImage.fromarray(mask).save(folder / "extra" / "depth.png")
    PILImage.fromarray(mask // 255 * 7).save(folder / "extra" / "classes.png")
    after = open_image(folder / "p0.png")[:, ::-1]
    PILImage.fromarray(after).save(folder / "extra" / "after.png")
    things = [
        {"phrase": "the block", "label": "block", "mask": "extra/mask.png"},
        {"phrase": "right edge", "box": [60, 10, 75, 50]},
        {"phrase": "cut away", "box": [70, 0, 80, 60]},
    ]
    edits = [{"instruction": "flip it", "target": "extra/after.png", "mask": "extra/mask.png"}]
    maps = {"depth": "extra/depth.png", "segmentation": "extra/classes.png"}
    write(
        folder,
        {
            "images": {"p0.png": {"things": things, "edits": edits, "maps": maps}},
            "subjects": {"it": {"class": "rug", "images": ["p1.png", "p2.png", "sub/q.jpg"]}},
        },
    )
    photos = PhotoFolder(folder, 48, "all")
    assert len(photos) == 5
    counts = {task: photos.count(task) for task in photos.tasks()}
    assert counts == {"inpaint": 5, "control": 5, "ground": 1, "edit": 5, "customise": 6}
    example = photos.example("ground", 0)
    assert [thing.phrase for thing in example.things] == ["the block", "right edge"]
    assert example.things[0].box == pytest.approx((16, 16, 32, 32))
    assert example.things[0].mask is not None
    assert mask_box(example.things[0].mask) == (16, 16, 32, 32)
    assert np.unique(example.maps["segmentation"]).tolist() == [0, 7]
    edit = TASKS["edit"](photos.example("edit", 0), 0)
    assert edit.text == "flip it"
    assert edit.metadata["mask"].sum() == 16 * 16
    assert np.abs(edit.target.astype(int) - edit.source[:, ::-1]).max() <= 1
    keys = [photos.example("customise", i).key for i in range(6)]
    assert len(set(keys)) == 6
    assert TASKS["customise"](photos.example("customise", 0), 0).text == "a photo of the rug"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "expected an object, got []"),
        ({"image": {}}, "unknown key 'image'; did you mean 'images'?"),
        ({"images": {"p9.png": {}}}, "no such file 'p9.png'"),
        ({"images": {"../x.png": {}}}, "'../x.png' lies outside the folder"),
        ({"images": {"/etc/passwd": {}}}, "'/etc/passwd' lies outside the folder"),
        ({"images": {"p0.png": {"maps": {"dept": "p1.png"}}}}, "did you mean 'depth'?"),
        ({"images": {"p0.png": {"maps": {"depth": 3}}}}, "expected a file name, got 3"),
        ({"images": {"p0.png": {"things": {}}}}, "things: expected a list, got {}"),
        ({"images": {"p0.png": {"things": [{"phrase": "a"}]}}}, "needs a box or a mask"),
        ({"images": {"p0.png": {"things": [{"box": [0, 0, 1, 1]}]}}}, "phrase must be a text"),
        (
            {"images": {"p0.png": {"things": [{"phrase": "a", "box": [5, 0, 5, 9]}]}}},
            "needs x0 < x1 and y0 < y1, got [5, 0, 5, 9]",
        ),
        (
            {"images": {"p0.png": {"things": [{"phrase": "a", "box": [0, 0, True, 9]}]}}},
            "expected [x0, y0, x1, y1]",
        ),
        (
            {"images": {"p0.png": {"things": [{"phrase": "a", "box": [0, 0, 99, 9]}]}}},
            "is not inside 80 x 60 pixels",
        ),
        (
            {"images": {"p0.png": {"maps": {"depth": "small.png"}}}},
            "has 40 x 40 pixels, its photo 80 x 60",
        ),
        ({"subjects": {"s": {"class": "cat", "images": ["p0.png"]}}}, "at least two"),
    ],
)
def test_wrong_annotations_are_named(folder: Path, content: Any, message: str) -> None:
    save(folder / "small.png", height=40, width=40)
    write(folder, content)
    with pytest.raises(PhotoError) as caught:
        PhotoFolder(folder, 48, "all")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_links_out_of_the_folder_and_broken_json(folder: Path, tmp_path_factory: Any) -> None:
    outside = tmp_path_factory.mktemp("outside") / "secret.png"
    save(outside)
    (folder / "link.png").symlink_to(outside)
    write(folder, {"images": {"p0.png": {"maps": {"depth": "link.png"}}}})
    with pytest.raises(PhotoError, match="'link.png' lies outside the folder"):
        PhotoFolder(folder, 48)
    (folder / "annotations.json").write_text('{"images": ')
    with pytest.raises(PhotoError, match="is not valid JSON"):
        PhotoFolder(folder, 48)
    (folder / "annotations.json").unlink()
    write(folder, ["a caption"], "captions.json")
    with pytest.raises(PhotoError, match="must have the form"):
        PhotoFolder(folder, 48)


def asset_folder(assets: Path, root: Path) -> Path:
    """The grounding, depth, edit and subject assets as one annotated folder."""
    images: dict[str, Any] = {}

    def take(path: Path, name: str) -> str:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, root / name)
        return name

    def read(name: str) -> Any:
        return json.loads((assets / name).read_text())

    for item in read("grounding/grounding.json")["items"]:
        photo = (assets / "grounding" / item["image"]).resolve()
        name = take(photo, f"{photo.parent.name}_{photo.name}")
        entry = images.setdefault(name, {"caption": item["caption"], "things": []})
        thing = {"phrase": item["expression"], "box": item["box_xyxy"]}
        if item.get("mask"):
            thing["mask"] = take(assets / "grounding" / item["mask"], f"masks/{item['mask']}")
        entry["things"].append(thing)
    for item in read("depth/depth.json"):
        name = item["cond_inverse_depth"]
        maps = {"depth": take(assets / "depth" / name, f"depth/{name}")}
        images[take(assets / "depth" / item["rgb"], item["rgb"])] = {"maps": maps}
    for item in read("edits/edits.json"):
        name, target = item["before"], item["after"]
        edit = {
            "instruction": item["instruction"],
            "target": take(assets / "edits" / target, f"edits/{target}"),
        }
        images[take(assets / "edits" / name, f"edits/{name}")] = {"edits": [edit]}
    subjects = {}
    for name, subject in read("dreambench/dreambench.json")["subjects"].items():
        files = [f for f in subject["images"] if (assets / "dreambench" / "images" / f).is_file()]
        if len(files) > 1:
            files = [take(assets / "dreambench" / "images" / f, f"subjects/{f}") for f in files]
            subjects[name] = {"class": subject["class"], "images": files}
    write(root, {"images": images, "subjects": subjects})
    return root


def test_real_annotated_photos_feed_all_five_tasks(assets: Path, tmp_path: Path) -> None:
    photos = PhotoFolder(asset_folder(assets, tmp_path), 96, "all")
    assert not photos.rejected, photos.summary()
    assert photos.tasks() == set(TASKS)
    assert photos.count("customise") > 100
    kinds: dict[str, set[str]] = {}
    for name, task in TASKS.items():
        for i in range(min(40, photos.count(name))):
            sample = task(photos.example(name, i), i)
            assert sample.source.shape == sample.target.shape == (96, 96, 3)
            kinds.setdefault(name, set()).add(sample.metadata["kind"])
    assert {"free-form", "object", "bezier"} <= kinds["inpaint"]
    assert kinds["ground"] == {"box", "mask"}
    assert {"pair", "whole"} <= kinds["edit"]
    assert "depth" in kinds["control"]
    for i in range(photos.count("ground")):
        for thing in photos.example("ground", i).things:
            if thing.mask is not None:
                extent = mask_box(thing.mask)
                assert extent is not None
                assert box_iou(extent, thing.box) > 0.7
