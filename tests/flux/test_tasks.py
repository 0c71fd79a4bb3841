"""Inpainting, control, customised, editing, and finding a task by name."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prw_flux.tasks import TASKS, Control, Edit, Example, Pair, TaskReject, Thing, load_task
from prw_flux.tasks.base import Triple, definite, fill_box
from prw_flux.tasks.control import colour_classes
from prw_flux.tasks.editing import CHANGES, COLOURS, recolour, recolours, to_lab
from prw_flux.tasks.inpainting import GREY

seeds = st.integers(0, 2**31)


def picture(size: int = 96) -> Example:
    """A red square and a blue disc on a shaded background, with masks, maps and captions."""
    yy, xx = np.mgrid[:size, :size]
    image = np.stack([200 + yy // 8, 210 + 0 * yy, 190 + xx // 8], -1).astype(np.uint8)
    square = fill_box((10, 12, 40, 42), size, size)
    disc = (yy - 66) ** 2 + (xx - 64) ** 2 < 16**2
    image[square] = (200, 40, 40)
    image[disc] = (50, 80, 190)
    image[square | disc] += (xx[square | disc] // 4)[:, None].astype(np.uint8)
    things = (
        Thing(phrase="red square", label="square", box=(10, 12, 40, 42), mask=square),
        Thing(phrase="blue circle", label="circle", box=(48, 50, 81, 83), mask=disc),
    )
    return Example(
        key="picture",
        image=image,
        caption="a red square at the top left and a blue circle",
        things=things,
        metadata={"caption_without_positions": "a red square and a blue circle"},
    )


def with_pairs() -> Example:
    example = picture()
    pair = Pair(
        source=example.image,
        text="flip it",
        target=example.image[:, ::-1].copy(),
        metadata={"task": "stranger", "note": 1},
    )
    return replace(example, edit=pair, subject=pair)


def same(a: Triple, b: Triple) -> bool:
    return a.text == b.text and all(
        np.array_equal(x, y) for x, y in ((a.source, b.source), (a.target, b.target))
    )


@pytest.mark.parametrize("name", list(TASKS))
@given(seed=seeds)
def test_a_sample_depends_on_key_and_seed_alone(name: str, seed: int) -> None:
    task, example = TASKS[name], with_pairs()
    image = example.image.copy()
    sample = task(example, seed)
    other = TASKS["edit"](picture(), seed + 1)  # another draw in between changes nothing
    assert other.metadata["task"] == "edit"
    assert same(sample, task(with_pairs(), seed))
    np.testing.assert_array_equal(example.image, image)
    assert {"task": name, "key": "picture"}.items() <= sample.metadata.items()
    assert isinstance(sample.metadata["kind"], str)
    assert sample.source.dtype == sample.target.dtype == np.uint8
    plain = {k: v for k, v in sample.metadata.items() if not isinstance(v, np.ndarray)}
    json.dumps(plain)


def test_keys_and_seeds_both_matter() -> None:
    task, example = TASKS["inpaint"], picture()
    sources = {
        task(replace(example, key=key), seed).source.tobytes() for key in "ab" for seed in range(5)
    }
    assert len(sources) >= 8  # two exact object holes can coincide


@given(seeds)
def test_inpainting_hides_and_tells(seed: int) -> None:
    example = picture()
    sample = TASKS["inpaint"](example, seed)
    mask = sample.metadata["mask"]
    assert (sample.source[mask] == GREY).all()
    np.testing.assert_array_equal(sample.source[~mask], example.image[~mask])
    np.testing.assert_array_equal(sample.target, example.image)
    assert sample.text == "a red square and a blue circle"
    for entry, thing in zip(sample.metadata["hidden"], example.things, strict=True):
        assert thing.mask is not None
        assert entry["share"] == pytest.approx((mask & thing.mask).sum() / thing.mask.sum())
        assert 0 <= entry["box_share"] <= 1
    cut_for = sample.metadata["thing"]
    if sample.metadata["kind"] == "bezier":
        assert sample.metadata["hidden"][cut_for]["share"] > 0.95
    if sample.metadata["kind"] == "object":
        assert sample.metadata["hidden"][cut_for]["share"] > 0.75


@given(seeds)
def test_control_shows_a_map_and_keeps_positions_out_of_the_text(seed: int) -> None:
    example = picture()
    sample = TASKS["control"](example, seed)
    assert sample.source.shape == example.image.shape
    assert sample.text == "a red square and a blue circle"
    assert sample.metadata["condition"] in ("canny", "softedge", "lineart")
    assert sample.metadata["method"] != "true"


def test_control_never_invents_depth() -> None:
    task = Control(conditions=("depth", "segmentation"))
    assert task.missing(picture()) == "no depth or segmentation map"
    with pytest.raises(TaskReject, match="no depth or segmentation map"):
        task(picture(), 0)
    depth = np.tile(np.arange(96, dtype=np.uint8), (96, 1))
    classes = np.arange(9216, dtype=np.uint16).reshape(96, 96).astype(np.uint8) % 5
    example = replace(picture(), maps={"depth": depth, "segmentation": classes})
    samples = {s.metadata["condition"]: s for s in (task(example, i) for i in range(12))}
    assert set(samples) == {"depth", "segmentation"}
    assert all(sample.metadata["method"] == "true" for sample in samples.values())
    np.testing.assert_array_equal(samples["depth"].source[..., 1], depth)
    assert len(np.unique(samples["segmentation"].source.reshape(-1, 3), axis=0)) == 5


def test_a_true_lineart_map_goes_before_a_computed_one() -> None:
    lines = np.full((96, 96), 255, np.uint8)
    sample = Control(conditions=("lineart",))(replace(picture(), maps={"lineart": lines}), 0)
    assert sample.metadata["method"] == "true"
    assert (sample.source == 255).all()


def test_blank_maps_are_refused() -> None:
    flat = Example(key="flat", image=np.full((96, 96, 3), 90, np.uint8), caption="a wall")
    with pytest.raises(TaskReject, match="every map is blank"):
        TASKS["control"](flat, 0)


def test_class_colours_are_distinct_and_zero_is_black() -> None:
    colours = colour_classes(np.arange(256, dtype=np.uint8)[None])[0]
    assert len(np.unique(colours, axis=0)) == 256
    assert not colours[0].any()


def test_customised_and_editing_pass_true_pairs_on() -> None:
    example = with_pairs()
    assert example.edit is not None
    for name in ("customise", "edit"):
        sample = TASKS[name](example, 3)
        np.testing.assert_array_equal(sample.target, example.edit.target)
        assert sample.text == "flip it"
        assert sample.metadata["task"] == name
        assert sample.metadata["note"] == 1
    assert not TASKS["customise"].aligned
    with pytest.raises(TaskReject, match="second picture") as caught:
        TASKS["customise"](picture(), 0)
    assert caught.value.reason == "no second picture of the subject"


@given(seeds)
def test_computed_edits_are_exact(seed: int) -> None:
    example = picture()
    sample = Edit(recolour_share=0.5)(example, seed)
    assert sample.metadata["exact"] is True
    assert (sample.source != sample.target).any()
    if sample.metadata["kind"] == "whole":
        change = CHANGES[sample.metadata["edit"]]
        assert sample.text in change.instructions
        np.testing.assert_array_equal(sample.target, change.apply(example.image))
    else:
        mask = sample.metadata["mask"]
        np.testing.assert_array_equal(sample.target[~mask], example.image[~mask])
        assert sample.metadata["colour"] in sample.text
        assert definite(sample.metadata["phrase"]) in sample.text


@pytest.mark.parametrize("name", list(CHANGES))
def test_every_change_of_the_whole_picture_changes_it(name: str) -> None:
    image = picture().image
    target = CHANGES[name].apply(image)
    assert target.shape == image.shape
    assert target.dtype == np.uint8
    assert np.abs(target.astype(int) - image).mean() > 5


@given(st.sampled_from(list(COLOURS)), seeds)
def test_recolouring_keeps_lightness(colour: str, seed: int) -> None:
    image = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    mask = np.ones((8, 8), bool)
    before = to_lab(image.reshape(-1, 3))
    after = to_lab(recolour(image, mask, COLOURS[colour]).reshape(-1, 3))
    # 8-bit rounding of a channel moves L* by up to 0.9 in the dark; 1e-3 of gamut slack adds 0.9.
    assert np.abs(before[:, 0] - after[:, 0]).max() < 2.0
    target = to_lab(np.array([COLOURS[colour]], np.uint8))[0, 1:]
    chroma = np.hypot(after[:, 1], after[:, 2])
    strong = chroma > 30
    cosine = (after[strong, 1:] @ target) / (chroma[strong] * np.hypot(*target))
    assert (cosine > 0.98).all()


def test_only_colours_that_a_thing_can_take_are_offered() -> None:
    options = {option.thing: option.colours for option in recolours(picture())}
    assert "red" not in options[0]
    assert "blue" not in options[1]
    black = replace(picture(), image=np.zeros((96, 96, 3), np.uint8))
    assert all("yellow" not in option.colours for option in recolours(black))


def test_load_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "blur_tasks.py").write_text(
        "from prw_flux.tasks import Task\n"
        "class Blur(Task):\n"
        "    name, sentence = 'blur', 'Sharpen the picture.'\n"
        "    def missing(self, example): return None\n"
        "    def make(self, example, rng):\n"
        "        return self.triple(example, 'x', example.image, 'sharpen', example.image)\n"
        "blur = Blur()\n"
        "class Nameless(Blur):\n"
        "    name = ''\n"
        "class Sized(Blur):\n"
        "    def __init__(self, size): ...\n"
        "number = 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert load_task("inpaint") is TASKS["inpaint"]
    for spec in ("blur_tasks:Blur", "blur_tasks:blur"):
        assert load_task(spec)(picture(), 0).text == "sharpen"
    wrong: dict[str, Any] = {
        "inpant": "did you mean 'inpaint'",
        "zzz": "known: inpaint, ground, control, customise, edit",
        "no_such_module:x": "cannot import 'no_such_module'",
        ":x": "not a module's name",
        "blur_tasks:Blurr": "did you mean 'Blur'",
        "blur_tasks:": "has no ''",
        "blur_tasks:number": "is a int, not a prw_flux.tasks.Task",
        "blur_tasks:Nameless": "has no name",
        "blur_tasks:Sized": "cannot be made without arguments",
    }
    for spec, message in wrong.items():
        with pytest.raises(ValueError, match="task") as caught:
            load_task(spec)
        assert message in str(caught.value)
