"""Grounding: what is drawn, and that it can be read back."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prw_flux.data.images import open_image, open_map
from prw_flux.tasks import TASKS, Example, Ground, TaskReject, Thing, read_overlay
from prw_flux.tasks.base import Box, box_iou, fill_box, mask_iou
from prw_flux.tasks.grounding import PALETTE, paint_overlay

seeds = st.integers(0, 2**31)


def scene() -> Example:
    rng = np.random.default_rng(0)
    image = rng.integers(40, 200, (96, 96, 3), dtype=np.uint8)
    boxes: list[Box] = [(8, 8, 30, 28), (50, 10, 80, 40), (20, 60, 44, 90)]
    phrases = [("the small circle", "circle"), ("large circle", "circle"), ("star", "star")]
    things = tuple(
        Thing(phrase=phrase, label=label, box=box, mask=fill_box(box, 96, 96))
        for box, (phrase, label) in zip(boxes, phrases, strict=True)
    )
    return Example(key="scene", image=image, caption="shapes", things=things)


@given(seeds)
def test_the_mark_is_over_the_named_thing_and_nowhere_else(seed: int) -> None:
    example = scene()
    sample = Ground(colours=tuple(PALETTE))(example, seed)
    meta = sample.metadata
    box = fill_box(meta["box"], 96, 96)
    np.testing.assert_array_equal(sample.target[~box], example.image[~box])
    blend = 0.5 * example.image[box] + 0.5 * np.array(PALETTE[meta["colour"]])
    assert np.abs(sample.target[box] - blend).max() <= 0.5
    assert sample.text.endswith(f"in {meta['colour']}")
    thing = example.things[meta["thing"]]
    words = {"box": "mark the", "mask": "cover the", "instance": f"mark one {thing.label}"}
    assert sample.text.startswith(words[meta["kind"]])
    assert "the the" not in sample.text
    assert meta["box"] in meta["boxes"]
    assert len(meta["boxes"]) == (
        2 if meta["kind"] == "instance" and thing.label == "circle" else 1
    )


def test_the_three_forms_have_their_shares_and_an_instance_is_any_of_its_class() -> None:
    samples = [TASKS["ground"](replace(scene(), key=f"scene {i}"), 0) for i in range(1000)]
    kinds = Counter(sample.metadata["kind"] for sample in samples)
    # Binomial: three standard deviations of 1000 draws are 0.047 and 0.041.
    assert kinds["box"] / 1000 == pytest.approx(0.5, abs=0.047)
    assert kinds["mask"] / 1000 == pytest.approx(0.25, abs=0.041)
    circles = Counter(
        sample.metadata["thing"]
        for sample in samples
        if sample.text == "mark one circle in magenta"
    )
    assert set(circles) == {0, 1}
    assert min(circles.values()) / circles.total() > 0.35
    for sample in samples[:100]:
        if sample.text == "mark one circle in magenta":
            box = read_overlay(sample.target, sample.source).box
            assert box is not None
            assert box_iou(box, scene().things[sample.metadata["thing"]].box) > 0.9


def test_ambiguous_phrases_are_never_referred_to() -> None:
    example = scene()
    twins = tuple(replace(thing, phrase="circle", label="") for thing in example.things)
    assert TASKS["ground"].missing(replace(example, things=twins)) is not None
    with pytest.raises(TaskReject, match="no thing with a box"):
        TASKS["ground"](replace(example, things=()), 0)
    one = (*twins[:2], replace(twins[2], phrase="star"))
    texts = {TASKS["ground"](replace(example, things=one), i).text for i in range(20)}
    assert texts == {"mark the star in magenta", "cover the star in magenta"}


def test_without_masks_or_labels_only_boxes() -> None:
    bare = tuple(replace(thing, mask=None, label="") for thing in scene().things)
    samples = [TASKS["ground"](replace(scene(), things=bare), i) for i in range(20)]
    assert {sample.metadata["kind"] for sample in samples} == {"box"}


def test_wrong_settings_are_named() -> None:
    with pytest.raises(ValueError, match="'mauve'"):
        Ground(colours=("mauve",))
    with pytest.raises(ValueError, match="outline"):
        Ground(forms=(("outline", 1.0),))
    with pytest.raises(ValueError, match="differ in shape"):
        read_overlay(np.zeros((8, 8, 3), np.uint8), np.zeros((9, 8, 3), np.uint8))


@given(seeds, st.sampled_from(list(PALETTE)), st.data())
def test_exact_targets_read_back(seed: int, colour: str, data: st.DataObject) -> None:
    # The 3 x 3 median cuts one pixel at each corner: sides of 8 pixels keep the IoU above 0.9.
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)
    source = np.repeat(np.repeat(coarse, 8, 0), 8, 1)
    x, y = data.draw(st.integers(0, 80)), data.draw(st.integers(0, 80))
    w, h = data.draw(st.integers(8, 96 - x)), data.draw(st.integers(8, 96 - y))
    box = (float(x), float(y), float(x + w), float(y + h))
    area = fill_box(box, 96, 96)
    found = read_overlay(paint_overlay(source, area, colour), source, colour)
    assert found.box is not None
    assert box_iou(found.box, box) >= 0.9
    assert mask_iou(found.mask, area) >= 0.9
    assert found.confidence > 0.9


@given(seeds)
def test_noise_does_not_move_the_box_and_no_mark_means_none(seed: int) -> None:
    rng = np.random.default_rng(seed)
    example = scene()
    noise = rng.normal(0, 8, example.image.shape)
    sample = TASKS["ground"](example, seed)
    noisy = np.clip(sample.target + noise, 0, 255).astype(np.uint8)
    found = read_overlay(noisy, example.image, "magenta")
    assert found.box is not None
    assert box_iou(found.box, sample.metadata["box"]) > 0.9
    nothing = read_overlay(example.image, example.image, "magenta")
    assert nothing.box is None
    assert not nothing.mask.any()
    assert nothing.confidence == 0


def test_scattered_marks_are_not_trusted() -> None:
    example = scene()
    area = np.zeros((96, 96), bool)
    for y in range(0, 96, 12):
        area[y : y + 6, ::1] = True
    found = read_overlay(paint_overlay(example.image, area, "magenta"), example.image)
    assert 0 < found.confidence < 0.3


def test_a_source_of_the_overlay_colour_hides_part_of_it() -> None:
    image = np.full((96, 96, 3), 200, np.uint8)
    image[40:44, 30:70] = PALETTE["magenta"]
    box = (20.0, 20.0, 80.0, 60.0)
    found = read_overlay(paint_overlay(image, fill_box(box, 96, 96), "magenta"), image)
    assert found.box == box
    assert found.mask[42, 50]


def real_items(assets: Path) -> list[tuple[np.ndarray, Thing]]:
    items = json.loads((assets / "grounding" / "grounding.json").read_text())["items"]
    found = []
    for item in items:
        image = open_image(assets / "grounding" / item["image"])
        mask = None
        if item.get("mask"):
            mask = open_map(assets / "grounding" / item["mask"]) >= 128
        box = tuple(float(v) for v in item["box_xyxy"])
        assert len(box) == 4
        found.append((image, Thing(phrase=item["expression"], box=box, mask=mask, label="thing")))
    return found


def test_real_boxes_and_masks_read_back(assets: Path) -> None:
    items = real_items(assets)
    assert len(items) >= 10
    for image, thing in items:
        height, width = image.shape[:2]
        for area in (fill_box(thing.box, height, width), thing.region(height, width)):
            found = read_overlay(paint_overlay(image, area, "magenta"), image)
            assert mask_iou(found.mask, area) > 0.9, thing.phrase
            assert found.confidence > 0.9
        boxed = read_overlay(
            paint_overlay(image, fill_box(thing.box, height, width), "magenta"), image
        )
        assert boxed.box is not None
        assert box_iou(boxed.box, thing.box) > 0.97, thing.phrase


def test_marks_survive_the_autoencoder_of_flux(assets: Path) -> None:
    from diffusers import AutoencoderTiny

    vae = AutoencoderTiny.from_pretrained(assets / "taef1", dtype=torch.float32)

    def round_trip(image: np.ndarray) -> np.ndarray:
        x = torch.from_numpy(image).float().permute(2, 0, 1)[None] / 127.5 - 1
        with torch.no_grad():
            y = vae.decode(vae.encode(x).latents).sample
        pixels = ((y[0].clamp(-1, 1) + 1) * 127.5).round().byte()
        return pixels.permute(1, 2, 0).numpy()

    overlaps = []
    for image, thing in real_items(assets)[::3]:
        height, width = (side // 16 * 16 for side in image.shape[:2])
        x0, y0, x1, y1 = thing.box
        box = (x0, y0, min(x1, width), min(y1, height))
        source = np.ascontiguousarray(image[:height, :width])
        target = paint_overlay(source, fill_box(box, height, width), "magenta")
        found = read_overlay(round_trip(target), source).box
        overlaps.append(0.0 if found is None else box_iou(found, box))
    assert np.mean(overlaps) > 0.9, overlaps  # 0.967 was measured on 21 boxes
    assert min(overlaps) > 0.5, overlaps
