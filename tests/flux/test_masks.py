"""Inpainting holes: reproducible, of the stated sizes, and round what they should hide."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prw_flux.tasks import Inpaint, masks
from prw_flux.tasks.base import (
    Box,
    Example,
    Mask,
    TaskReject,
    Thing,
    fill_box,
    keyed_rng,
    mask_box,
    mask_iou,
)

seeds = st.integers(0, 2**63 - 1)
sides = st.integers(2, 16).map(lambda n: 16 * n)


@st.composite
def boxes(draw: st.DrawFn, height: int, width: int) -> Box:
    w = draw(st.integers(6, width // 2))
    h = draw(st.integers(6, height // 2))
    x = draw(st.integers(0, width - w))
    y = draw(st.integers(0, height - h))
    return float(x), float(y), float(x + w), float(y + h)


@st.composite
def scenes(draw: st.DrawFn) -> tuple[int, int, list[Thing]]:
    height, width = draw(sides), draw(sides)
    things = []
    for i, box in enumerate(draw(st.lists(boxes(height, width), max_size=3))):
        mask = fill_box(box, height, width) if draw(st.booleans()) else None
        things.append(Thing(phrase=f"thing {i}", box=box, mask=mask))
    return height, width, things


@given(scenes(), seeds)
def test_a_hole_keeps_every_promise(scene: tuple[int, int, list[Thing]], seed: int) -> None:
    height, width, things = scene
    try:
        hole = masks.draw_hole(keyed_rng(seed, "x"), height, width, things)
    except masks.HoleError as problem:
        assert sum(problem.rejections.values()) >= masks.TRIES
        return
    again = masks.draw_hole(keyed_rng(seed, "x"), height, width, things)
    np.testing.assert_array_equal(hole.mask, again.mask)
    assert (hole.kind, hole.thing, hole.rejections) == (again.kind, again.thing, again.rejections)
    assert hole.mask.shape == (height, width)
    assert hole.mask.dtype == np.bool_
    assert masks.MIN_COVERAGE <= hole.mask.mean() <= masks.MAX_COVERAGE
    assert (hole.thing is not None) == (hole.kind in ("object", "bezier"))
    if hole.thing is None:
        regions = [thing.region(height, width) for thing in things]
        assert all(mask_iou(hole.mask, region) <= masks.MAX_IOU for region in regions)


@given(st.data(), sides, sides, seeds)
def test_bezier_surrounds_its_box(data: st.DataObject, height: int, width: int, seed: int) -> None:
    box = data.draw(boxes(height, width))
    mask = masks.bezier(keyed_rng(seed, "b"), box, height, width)
    inside = fill_box(box, height, width)
    assert (mask & inside).sum() >= 0.80 * inside.sum()  # jitter and pixel rounding, tiny boxes
    x0, y0, x1, y1 = box
    outline = masks.bezier_outline(keyed_rng(seed, "b"), box, height, width)
    assert outline.shape == (80, 2)
    jitter = 5 * min(height, width) / 512
    # A quadratic curve reaches half way to its control point, which is at most 0.4 of the way out.
    assert outline[:, 0].min() >= x0 - 0.2 * x0 - jitter
    assert outline[:, 1].min() >= y0 - 0.2 * y0 - jitter
    assert outline[:, 0].max() <= x1 + 0.2 * (width - x1) + jitter
    assert outline[:, 1].max() <= y1 + 0.2 * (height - y1) + jitter


@given(seeds)
def test_object_holes_stay_near_the_object(seed: int) -> None:
    yy, xx = np.mgrid[:128, :128]
    disc: Mask = (yy - 60) ** 2 + (xx - 70) ** 2 < 30**2
    hole = masks.object_shaped(keyed_rng(seed, "o"), disc)
    assert mask_iou(hole, disc) > 0.65
    assert (hole | disc).sum() in (hole.sum(), disc.sum())  # one contains the other


def test_shares_of_the_kinds() -> None:
    box = (40.0, 40.0, 80.0, 80.0)
    thing = Thing(phrase="square", box=box, mask=fill_box(box, 128, 128))
    wanted = Counter(
        masks.draw_hole(keyed_rng(i, "shares"), 128, 128, [thing]).wanted for i in range(2000)
    )
    # Binomial: three standard deviations of 2000 draws are 0.027 and 0.033.
    assert wanted["free-form"] / 2000 == pytest.approx(0.2, abs=0.027)
    assert wanted["object"] / 2000 == pytest.approx(0.4, abs=0.033)


@pytest.mark.parametrize("side", [96, 512])
def test_coverage_does_not_depend_on_resolution(side: int) -> None:
    # Means of 300 draws; one standard deviation of such a mean is 0.013 and 0.007.
    strokes = np.mean([masks.strokes(keyed_rng(i, "s"), side, side).mean() for i in range(300)])
    rectangles = np.mean([masks.boxes(keyed_rng(i, "r"), side, side).mean() for i in range(300)])
    assert strokes == pytest.approx(0.45, abs=0.05)
    assert rectangles == pytest.approx(0.247, abs=0.03)


def test_without_things_only_random_shapes() -> None:
    holes = [masks.draw_hole(keyed_rng(i, "none"), 96, 96) for i in range(60)]
    assert {hole.kind for hole in holes} == {"free-form", "bezier-random"}
    for hole in holes:
        missing = {"object": "no object mask", "bezier": "no thing for a bezier outline"}
        if hole.wanted in missing:
            assert hole.rejections[missing[hole.wanted]] == 1
    assert {hole.kind for hole in holes if hole.wanted == "bezier"} == {"bezier-random"}


def test_a_thing_that_fills_the_picture_is_refused_and_counted() -> None:
    thing = Thing(phrase="wall", box=(0, 0, 96, 96), mask=np.ones((96, 96), bool))
    seen: Counter[str] = Counter()
    for i in range(20):
        try:
            hole = masks.draw_hole(keyed_rng(i, "wall"), 96, 96, [thing])
        except masks.HoleError as problem:
            seen.update(problem.rejections)
        else:
            assert hole.kind in ("free-form", "bezier-random")
            seen.update(hole.rejections)
    assert seen["object: over-large"] and seen["bezier: over-large"]
    assert seen["free-form: overlaps a thing"]


def test_empty_object_masks_are_refused() -> None:
    dot = np.zeros((96, 96), bool)
    dot[40:42, 40:42] = True
    thing = Thing(phrase="dot", box=mask_box(dot) or (0, 0, 1, 1), mask=dot)
    hole = masks.draw_hole(keyed_rng(0, "dot"), 96, 96, [thing], weights={"object": 1.0})
    assert hole.kind == "bezier"  # its sides move outward, so it is not empty
    assert hole.wanted == "object"
    assert hole.rejections == {"object: empty": masks.TRIES}


@given(scenes(), st.integers(0, 99), st.text("abc", min_size=1, max_size=4))
def test_a_hole_is_decided_by_key_and_epoch_alone(
    scene: tuple[int, int, list[Thing]], seed: int, key: str
) -> None:
    """Neither the order of the calls nor other pictures matter."""
    height, width, things = scene
    image = np.zeros((height, width, 3), np.uint8)

    def mask(of: str) -> Mask | None:
        example = Example(key=of, image=image, caption="", things=tuple(things))
        try:
            return np.asarray(Inpaint()(example, seed).metadata["mask"])
        except TaskReject as refusal:
            assert refusal.counts
            return None

    first = mask(key)
    mask(f"{key}#1")
    again = mask(key)
    assert (first is None) == (again is None)
    if first is not None and again is not None:
        np.testing.assert_array_equal(first, again)


def test_epochs_have_other_holes() -> None:
    image = np.zeros((96, 96, 3), np.uint8)
    masks_of = [
        Inpaint()(Example(key=f"photo#{epoch}", image=image, caption=""), 0).metadata["mask"]
        for epoch in range(8)
    ]
    different = [mask_iou(a, b) < 0.99 for i, a in enumerate(masks_of) for b in masks_of[:i]]
    assert all(different)


def test_random_holes_over_a_thing_are_refused_by_their_overlap() -> None:
    """Of free-form draws, exactly those are refused that cover a thing with an IoU above 0.3."""
    thing = Thing(phrase="square", box=(24.0, 24.0, 72.0, 72.0))
    region = thing.region(96, 96)
    refused = accepted = 0
    for i in range(200):
        hole = masks.draw_hole(keyed_rng(i, "iou"), 96, 96, [thing], weights={"free-form": 1.0})
        rng = keyed_rng(i, "iou")
        rng.choice(1, p=[1.0])  # draws the kind
        first, _ = masks.cut(rng, "free-form", [thing], 96, 96)
        if masks.fault(first) is not None:
            continue
        kept = np.array_equal(first, hole.mask)
        if mask_iou(first, region) > masks.MAX_IOU:
            assert not kept and hole.rejections["free-form: overlaps a thing"] >= 1
            refused += 1
        else:
            assert kept and not hole.rejections
            accepted += 1
    assert refused > 10 and accepted > 10
