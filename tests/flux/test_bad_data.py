"""Whatever a stranger's data holds, a build ends with rows, counted rejects, or one sentence."""

from __future__ import annotations

import copy
import io
import json
import struct
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as PILImage

from prw import ConfigError
from prw_flux.data.annotations import PhotoError
from prw_flux.data.build import build
from prw_flux.data.manifest import Manifest
from prw_flux.data.readers import Origin, open_reader
from prw_flux.data.rows import DataError

SENTENCES = (ConfigError, DataError, PhotoError)
"""What a mistake of the user's may raise."""


def noise(seed: int = 0, height: int = 40, width: int = 48) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


COCO = {
    "images": [{"id": 1, "file_name": "a.png"}, {"id": 2, "file_name": "b.png"}],
    "categories": [{"id": 5, "name": "dog"}],
    "annotations": [
        {"id": 7, "image_id": 1, "bbox": [2, 3, 20, 20], "category_id": 5, "iscrowd": 0,
         "segmentation": [[2, 3, 20, 3, 20, 20]]},
        {"id": 8, "image_id": 2, "bbox": [2, 3, 20, 20], "category_id": 5,
         "segmentation": {"size": [40, 48], "counts": [10, 20, 1890]}},
        {"id": 9, "image_id": 2, "bbox": [5, 5, 9, 9], "category_id": 5,
         "segmentation": {"size": [40, 48], "counts": ":20Xk1"}},
    ],
}  # fmt: skip
REFS = [{"ref_id": 3, "ann_id": 7, "split": "train", "sentences": [{"sent": "left dog"}, "dog"]}]
CAPTIONS = {"annotations": [{"id": 1, "image_id": 1, "caption": "a dog"}]}
EDITS = [{"id": "x", "before": "a.png", "after": "b.png", "mask": "m.png", "instruction": "do",
          "licence": "CC0"}]  # fmt: skip
DOG = {"phrase": "dog", "label": "dog", "box": [1, 2, 9, 9], "mask": "m.png"}
NOTES = {
    "images": {
        "a.png": {
            "caption": "a dog",
            "things": [DOG],
            "maps": {"depth": "m.png"},
            "edits": [{"instruction": "do", "target": "b.png", "mask": "m.png"}],
        }
    },
    "subjects": {"rex": {"class": "dog", "images": ["a.png", "b.png"]}},
}

Case = tuple[dict[str, Any], str, dict[str, Any], str]


def cases() -> Iterator[Case]:
    """Files, the one that is changed, the origin, the task."""
    images: dict[str, Any] = {"images": "{0}"}
    coco = {"instances.json": COCO, "captions.json": CAPTIONS}
    yield coco, "instances.json", {"kind": "coco", **images}, "ground"
    inpaint = {"kind": "coco", "captions": "{0}/captions.json", **images}
    yield coco, "instances.json", inpaint, "inpaint"
    yield coco, "captions.json", {**inpaint, "path": "{0}/instances.json"}, "inpaint"
    refs = {"kind": "refcoco", "instances": "{0}/instances.json", **images}
    yield {**coco, "refs.json": REFS}, "refs.json", refs, "ground"
    pairs = {"kind": "pairs", "path": "{0}"}
    yield {"edits.json": EDITS}, "edits.json", pairs, "edit"
    for task in ("ground", "control", "customise", "edit", "inpaint"):
        photos = {"kind": "photos", "path": "{0}"}
        yield {"annotations.json": NOTES}, "annotations.json", photos, task


junk = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 60) | st.text("a/.\ud800\x00 ", max_size=4)
    | st.sampled_from([float("nan"), float("inf"), -1.5, 10**30, "../../etc/passwd", "a.png", ""]),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(["id", "box", "caption", "x"]), inner, max_size=2),
    max_leaves=4,
)  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every node of a JSON value."""
    yield path
    inner: Any = ()
    if isinstance(value, dict):
        inner = value.items()
    elif isinstance(value, list):
        inner = enumerate(value)
    for key, item in inner:
        yield from places(item, (*path, key))


def changed(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    found = copy.deepcopy(value)
    node = found
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = new
    return found


def run(root: Path, origin: dict[str, Any], name: str, task: str) -> Manifest:
    filled = {k: v.format(root) for k, v in {"path": f"{{0}}/{name}", **origin}.items()}
    reader = open_reader(Origin(**filled), task)
    return build(reader, task, root / "out", made_from={}, max_rejected=1.0, workers=1)


def pictures(root: Path) -> None:
    PILImage.fromarray(noise(0)).save(root / "a.png")
    PILImage.fromarray(noise(1)).save(root / "b.png")
    PILImage.new("L", (48, 40), 255).save(root / "m.png")


@pytest.mark.parametrize("case", list(cases()), ids=lambda case: f"{case[1]}-{case[3]}")
def test_the_data_is_sound_before_it_is_damaged(case: Case, tmp_path: Path) -> None:
    files, name, origin, task = case
    pictures(tmp_path)
    for file, content in files.items():
        (tmp_path / file).write_text(json.dumps(content))
    manifest = run(tmp_path, origin, name, task)
    assert manifest.kept >= 1 and not manifest.rejected


@settings(max_examples=12, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("case", list(cases()), ids=lambda case: f"{case[1]}-{case[3]}")
def test_any_change_of_any_entry_ends_well(case: Case, data: st.DataObject) -> None:
    files, name, origin, task = case
    place = data.draw(st.sampled_from(list(places(files[name]))))
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        pictures(root)
        for file, content in files.items():
            told = changed(content, place, data.draw(junk)) if file == name else content
            (root / file).write_text(json.dumps(told))
        try:
            manifest = run(root, origin, name, task)
        except SENTENCES as problem:
            assert "\n" not in str(problem)
        else:
            assert manifest.kept + sum(manifest.rejected.values()) == manifest.read


@settings(max_examples=50, deadline=None)
@given(st.binary(max_size=300), st.sampled_from(["edits.json", "annotations.json"]))
def test_any_bytes_for_a_list_end_well(content: bytes, name: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        pictures(root)
        (root / name).write_bytes(content)
        kind = "pairs" if name == "edits.json" else "photos"
        with pytest.raises(SENTENCES):
            run(root, {"kind": kind, "path": "{0}"}, name, "edit")


def encoded(kind: str, picture: PILImage.Image | None = None, **how: Any) -> bytes:
    file = io.BytesIO()
    (picture or PILImage.fromarray(noise())).save(file, kind, **how)
    return file.getvalue()


def header_of_png(width: int, height: int) -> bytes:
    """A PNG that says it is of some size and has no pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        length, check = (struct.pack(">I", n) for n in (len(data), zlib.crc32(name + data)))
        return length + name + data + check

    size = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = zlib.compress(b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def turned() -> PILImage.Exif:
    exif = PILImage.Exif()
    exif[0x0112] = 6
    return exif


def two(mode: str = "RGB") -> dict[str, Any]:
    return {"save_all": True, "append_images": [PILImage.fromarray(noise(7)).convert(mode)]}


PICTURES: dict[str, tuple[Callable[[], bytes], str]] = {
    "plain": (lambda: encoded("JPEG"), "kept"),
    "grey": (lambda: encoded("PNG", PILImage.fromarray(noise()).convert("L")), "kept"),
    "rgba": (lambda: encoded("PNG", PILImage.fromarray(noise()).convert("RGBA")), "transparent"),
    "cmyk": (lambda: encoded("JPEG", PILImage.fromarray(noise()).convert("CMYK")), "CMYK"),
    "16 bit": (lambda: encoded("PNG", PILImage.fromarray(np.full((40, 48), 9999, "u2"))), "16 bit"),
    "1 bit": (lambda: encoded("PNG", PILImage.fromarray(noise()).convert("1")), "1 bit"),
    "exif jpeg": (lambda: encoded("JPEG", exif=turned()), "turned upright"),
    "exif png": (lambda: encoded("PNG", exif=turned()), "turned upright"),
    "exif webp": (lambda: encoded("WEBP", exif=turned()), "turned upright"),
    "one gif": (lambda: encoded("GIF"), "palette"),
    "bmp": (lambda: encoded("BMP"), "BMP"),
    "gif": (lambda: encoded("GIF", **two()), "animated"),
    "apng": (lambda: encoded("PNG", **two()), "animated"),
    "animated webp": (lambda: encoded("WEBP", **two()), "animated"),
    "pages": (lambda: encoded("TIFF", **two()), "several pages"),
    "float": (
        lambda: encoded("TIFF", PILImage.fromarray(np.ones((40, 48), "f4"))), "unknown range"
    ),
    "billions": (lambda: header_of_png(100_000, 100_000), "too large"),
    "huge": (lambda: header_of_png(10_000, 10_000), "too large"),
    "strip": (lambda: header_of_png(33, 400_000), "extreme shape"),
    "dot": (lambda: header_of_png(4, 4), "too small"),
    "nothing": (lambda: header_of_png(0, 0), "not an image"),
    "no pixels": (lambda: header_of_png(300, 300), "damaged"),
    "half": (lambda: encoded("JPEG")[:500], "damaged"),
    "empty": (bytes, "not an image"),
    "script": (lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 99 99\n", "not an image"),
    "svg": (lambda: b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image"),
}  # fmt: skip


def test_every_strange_picture_is_converted_or_counted(tmp_path: Path) -> None:
    for number, (name, (make, _)) in enumerate(PICTURES.items()):
        (tmp_path / f"{number}.png").write_bytes(make())
        (tmp_path / f"{number}.txt").write_text(name)
    manifest = run(tmp_path, {"kind": "photos", "path": "{0}"}, "", "inpaint")
    outcomes = [outcome for _, outcome in PICTURES.values()]
    rejects = {"animated", "several pages", "unknown range", "too large", "extreme shape",
               "too small", "not an image", "damaged"}  # fmt: skip
    assert manifest.rejected == {reason: outcomes.count(reason) for reason in rejects}
    kept = {name for name in outcomes if name not in rejects} - {"kept"}
    assert manifest.converted == {name: outcomes.count(name) for name in kept}
    for reason, told in manifest.examples.items():
        assert all(".png" in one for one in told), reason
    with pytest.raises(DataError, match=r"57\.7% of the records cannot be used, above the limit"):
        reader = open_reader(Origin(kind="photos", path=str(tmp_path)), "inpaint")
        build(reader, "inpaint", tmp_path / "again", made_from={}, max_rejected=0.5)


def test_things_without_words_are_no_ground_truth(tmp_path: Path) -> None:
    pictures(tmp_path)
    told = {**COCO, "categories": [{"id": 5, "name": " "}]}
    (tmp_path / "instances.json").write_text(json.dumps(told))
    with pytest.raises(DataError, match="no record can be used: 0 of 2 .* 2 empty phrase"):
        run(tmp_path, {"kind": "coco", "images": "{0}"}, "instances.json", "ground")
