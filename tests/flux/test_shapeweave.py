"""ShapeWeave: drawing, words, reading back, and the split that training never sees."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prw_flux.shapeweave import ShapeWeave
from prw_flux.shapeweave.caption import caption
from prw_flux.shapeweave.change import KINDS, draw_change
from prw_flux.shapeweave.parse import parse, read_glyph
from prw_flux.shapeweave.render import render
from prw_flux.shapeweave.scene import HELD_OUT_TRIPLES, draw_glyph, draw_scene
from prw_flux.shapeweave.score import iou, kept, score_items, score_scene
from prw_flux.tasks import TASKS

SEEDS = st.integers(0, 2**32 - 1)


@given(seed=SEEDS)
@settings(max_examples=60, deadline=None)
def test_every_scene_is_read_back_exactly(seed: int) -> None:
    scene = draw_scene(np.random.default_rng(seed))
    score = score_scene(render(scene), scene)
    assert score["C"] == 1.0
    assert score["background"] == 1.0
    # half a pixel of anti-aliasing on every side of a 17-pixel star
    assert score["L"] > 0.9


@given(seed=SEEDS)
@settings(max_examples=40, deadline=None)
def test_glyph_bits_are_read_back_and_a_wrong_glyph_is_noticed(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scene = draw_scene(rng, count=1)
    item = draw_glyph(rng, scene.items[0].place)
    scene = scene.with_item(0, item)
    assert item.glyph is not None
    image = render(scene)
    assert read_glyph(image, item.box(), item.glyph) == 1.0
    flipped = type(item.glyph)(
        bits=tuple(1 - bit for bit in item.glyph.bits), ink=item.glyph.ink, paper=item.glyph.paper
    )
    assert read_glyph(image, item.box(), flipped) == 0.0


@given(seed=SEEDS, sigma=st.floats(0, 8))
@settings(max_examples=30, deadline=None)
def test_reading_survives_noise(seed: int, sigma: float) -> None:
    rng = np.random.default_rng(seed)
    scene = draw_scene(rng)
    noisy = np.clip(render(scene) + rng.normal(0, sigma, (96, 96, 3)), 0, 255).astype(np.uint8)
    assert score_scene(noisy, scene)["C"] >= 0.75


def test_missing_and_extra_objects_count_zero() -> None:
    rng = np.random.default_rng(3)
    scene = draw_scene(rng, count=2)
    one = scene.with_item(1, None)
    assert score_scene(render(one), scene)["C"] == 0.5
    assert score_scene(render(scene), one)["C"] == 0.5
    assert score_items(render(scene), one.items)["C"] == 1.0


@pytest.mark.parametrize("kind", KINDS)
def test_a_change_differs_from_its_scene_in_one_thing(kind: str) -> None:
    rng = np.random.default_rng(7)
    for _ in range(20):
        before = draw_scene(rng, count=2 if kind == "remove" else 1)
        change = draw_change(before, rng, kind)
        assert change.kind == kind
        assert change.after != before
        shared = set(before.items) & set(change.after.items)
        assert len(shared) >= len(before.items) - 1
        assert score_scene(render(change.after), change.after)["C"] == 1.0


@pytest.mark.parametrize("task", sorted(TASKS))
@pytest.mark.parametrize("split", ["train", "heldout"])
def test_examples_are_pure_and_stay_in_their_split(task: str, split: str) -> None:
    source = ShapeWeave(split=split)
    for index in range(8):
        example = source.example(task, index)
        again = ShapeWeave(split=split).example(task, index)
        assert example.key == again.key
        np.testing.assert_array_equal(example.image, again.image)
        scene = example.metadata["scene"]
        assert scene.held_out() == (split == "heldout")
        triples = {item.triple for item in scene.items if item.glyph is None}
        assert split == "heldout" or not triples & HELD_OUT_TRIPLES
        triple = TASKS[task](example, 0)
        assert triple.target.shape == (96, 96, 3)


def test_captions_without_positions_name_no_place() -> None:
    scene = draw_scene(np.random.default_rng(0), count=2)
    assert " at the " in caption(scene)
    assert " at the " not in caption(scene, positions=False)


def test_grounding_scenes_have_a_distractor_that_shares_two_attributes() -> None:
    source = ShapeWeave()
    pairs = [source.example("ground", i).metadata["scene"].items for i in range(40)]
    for first, second in (items for items in pairs if len(items) == 2):
        names = ("shape", "colour", "texture", "size")
        assert sum(getattr(first, n) == getattr(second, n) for n in names) == 2


def test_subject_moves_to_another_place() -> None:
    source = ShapeWeave()
    for index in range(20):
        example = source.example("customise", index)
        assert example.subject is not None
        before = example.subject.metadata["before"].items[0]
        after = example.metadata["scene"].items[0]
        assert before.glyph == after.glyph
        assert before.place != after.place


def test_kept_ignores_the_affected_box_only() -> None:
    scene = draw_scene(np.random.default_rng(1), count=1)
    truth = render(scene)
    image = truth.copy()
    box = scene.items[0].box()
    rows, columns = (int(box[1] * 96), int(box[3] * 96)), (int(box[0] * 96), int(box[2] * 96))
    image[rows[0] : rows[1], columns[0] : columns[1]] = 0
    assert kept(image, truth, [box]) == 1.0
    assert kept(image, truth, []) < 1.0


def test_iou_by_hand() -> None:
    assert iou((0, 0, 2, 2), (1, 1, 3, 3)) == pytest.approx(1 / 7)
    assert iou((0, 0, 1, 1), (1, 0, 2, 1)) == 0.0


def test_an_empty_picture_has_no_objects() -> None:
    reading = parse(np.full((96, 96, 3), 250, np.uint8))
    assert reading.items == ()
    assert reading.background == "white"


@pytest.mark.parametrize(("size", "split"), [(90, "train"), (48, "train"), (96, "test")])
def test_bad_arguments_are_named(size: int, split: str) -> None:
    with pytest.raises(ValueError, match=str(size) if size != 96 else split):
        ShapeWeave(size=size, split=split)


def test_the_fingerprint_tells_sources_apart() -> None:
    told = [ShapeWeave(96, 0, "train"), ShapeWeave(96, 0, "heldout"), ShapeWeave(96, 1, "train"),
            ShapeWeave(64, 0, "train")]  # fmt: skip
    assert len({source.fingerprint() for source in told}) == 4
    assert ShapeWeave(96).fingerprint() == told[0].fingerprint()
