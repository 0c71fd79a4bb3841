"""Encoded samples: pure functions of seed, stage and index, whatever order they are asked in."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prw_flux import CoLoGenPipeline
from prw_flux.batch_order import batch_indices, bucket_of, stable_hash
from prw_flux.data.images import ImageError
from prw_flux.draws import SampleError
from prw_flux.encode import position_ids
from prw_flux.samples import Samples
from prw_flux.shapeweave.source import ShapeWeave
from prw_flux.tasks import TASKS, Example, Task, TaskReject, Triple


@pytest.fixture(scope="module")
def pipe(tiny_base: Path) -> Any:
    return CoLoGenPipeline.from_pretrained(tiny_base)


def make(pipe: Any, task: Task = TASKS["edit"], **changes: Any) -> Samples:
    settings = {"stage": "edit", "seed": 0, "batch_size": 2, "count": 5, **changes}
    return Samples(ShapeWeave(size=64), task, pipe, **settings)


EPOCHS = (st.integers(0, 5), st.integers(1, 7), st.integers(1, 12), st.integers(1, 3))


def require_permutations(seed: int, batch: int, count: int, epochs: int) -> None:
    steps = -(-epochs * count // batch)
    order = [i for s in range(steps) for i in batch_indices(seed, "edit", s, batch, count)]
    assert len(order) == steps * batch
    for epoch in range(epochs):
        assert sorted(order[epoch * count : (epoch + 1) * count]) == list(range(count))


@given(*EPOCHS)
def test_epochs_are_permutations_laid_end_to_end(
    seed: int, batch: int, count: int, epochs: int
) -> None:
    require_permutations(seed, batch, count, epochs)


@given(*EPOCHS)
def test_so_are_those_of_which_no_list_is_made(
    seed: int, batch: int, count: int, epochs: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("prw_flux.batch_order.LISTED", 0)
        require_permutations(seed, batch, count, epochs)


def test_the_hash_is_stable_across_versions() -> None:
    assert stable_hash(0, "edit", "step", 3) == 2301896200712259777
    assert 0 <= stable_hash("x") < 2**63


def test_a_batch_is_a_function_of_seed_stage_and_step(pipe: Any) -> None:
    one, two = make(pipe), make(pipe)
    for samples in (one, two):
        samples.prepare()
    for step in (4, 0, 2):
        a, b = one.batch(step), two.batch(step)
        for name in vars(a):
            seen, again = getattr(a, name), getattr(b, name)
            assert (seen is again is None) or torch.equal(seen, again), name
    other = make(pipe, seed=1)
    other.prepare()
    assert not torch.equal(one.batch(0).target_BTC, other.batch(0).target_BTC)
    assert one.batch(0).target_BTC.shape == (2, 16, 64)
    assert one.batch(0).text_BLE.dtype == torch.float32


def test_batches_encoded_on_demand_draw_the_same_samples(pipe: Any) -> None:
    ahead, demand = make(pipe, count=6), make(pipe, count=None)
    ahead.prepare()
    demand.prepare()
    (encoded,) = ahead._buckets
    for step in range(3):
        wanted = encoded.target_NTC[2 * step : 2 * step + 2].float()
        torch.testing.assert_close(demand.batch(step).target_BTC, wanted, atol=0.05, rtol=0.05)


def test_a_dropped_caption_is_the_empty_text(pipe: Any) -> None:
    samples = make(pipe)
    samples.prepare()
    kept, dropped = samples.batch(0), samples.batch(0, [True, False])
    empty_LE, empty_P = (part[0] for part in samples.texts.gather([0]))
    assert torch.equal(dropped.text_BLE[0], empty_LE) and torch.equal(dropped.pooled_BP[0], empty_P)
    assert torch.equal(dropped.text_BLE[1], kept.text_BLE[1])
    assert not torch.equal(kept.text_BLE[0], empty_LE)


def test_only_an_unaligned_source_is_moved_aside(pipe: Any) -> None:
    for name, columns in (("edit", 0), ("customise", -4)):
        samples = make(pipe, TASKS[name], count=1, batch_size=1)
        samples.prepare()
        batch = samples.batch(0)
        moved = batch.source_ids_S3 - batch.target_ids_T3
        assert torch.equal(moved, torch.tensor([0.0, 0.0, columns]).expand(16, 3))


class Picky(Task):
    """Refuses most draws; never the same ones for another seed."""

    name, sentence = "picky", "Be picky."

    def missing(self, example: Example) -> str | None:
        return None

    def make(self, example: Example, rng: np.random.Generator) -> Triple:
        if rng.random() < 0.7:
            raise TaskReject("not today")
        return self.triple(example, "x", example.image, "", example.image)


class Never(Picky):
    """Refuses everything."""

    def missing(self, example: Example) -> str | None:
        return "no reason"


class Uneven(Picky):
    """Targets of two sizes."""

    def make(self, example: Example, rng: np.random.Generator) -> Triple:
        side = 64 if rng.random() < 0.5 else 32
        return self.triple(example, "x", example.image, "", example.image[:side, :side])


def test_rejects_are_replaced_and_counted(pipe: Any) -> None:
    one, two = make(pipe, Picky()), make(pipe, Picky())
    keys = [one.triple(i).metadata["key"] for i in range(5)]
    assert [two.triple(i).metadata["key"] for i in reversed(range(5))] == keys[::-1]
    assert one.tally.rejected["not today"] == two.tally.rejected["not today"] > 0


def test_kinds_and_rejected_holes_are_counted(pipe: Any) -> None:
    samples = make(pipe, TASKS["inpaint"], stage="inpaint", count=None)
    found = [samples.triple(i).metadata for i in range(40)]
    assert samples.tally.kinds == Counter(one["kind"] for one in found)
    assert set(samples.tally.kinds) >= {"object", "bezier", "free-form"}
    wanted: Counter[str] = Counter()
    for one in found:
        wanted.update(one["rejections"])
    assert samples.tally.rejected == wanted and wanted.total() > 0


def test_a_task_that_never_succeeds_says_why(pipe: Any) -> None:
    with pytest.raises(SampleError, match=r"no sample for 'picky': no reason \(20 x\)"):
        make(pipe, Never()).prepare()


@given(st.integers(0, 5), st.lists(st.integers(1, 6), min_size=1, max_size=4), st.integers(1, 3))
def test_every_bucket_feeds_as_many_steps_as_it_has_samples(
    seed: int, sizes: list[int], epochs: int
) -> None:
    fed = [bucket_of(seed, "edit", step, sizes) for step in range(epochs * sum(sizes))]
    for epoch in range(epochs):
        part = [bucket for bucket, _ in fed[epoch * sum(sizes) : (epoch + 1) * sum(sizes)]]
        assert [part.count(bucket) for bucket in range(len(sizes))] == sizes
    for bucket in range(len(sizes)):  # and its batches follow each other
        turns = [turn for found, turn in fed if found == bucket]
        assert turns == list(range(len(turns)))


def test_one_bucket_is_fed_by_every_step() -> None:
    assert [bucket_of(3, "edit", step, [5]) for step in (0, 7, 100)] == [(0, 0), (0, 7), (0, 100)]


def test_a_batch_holds_one_size_and_all_samples_are_seen_alike(pipe: Any) -> None:
    samples = make(pipe, Uneven(), count=16, batch_size=3)
    samples.prepare()
    sizes = {bucket.grids: len(bucket.rows) for bucket in samples._buckets}
    assert set(sizes) == {((4, 4), (4, 4)), ((4, 4), (2, 2))} and sum(sizes.values()) == 16
    seen: Counter[bytes] = Counter()
    for step in range(16):  # an epoch: each bucket feeds its number of steps
        batch = samples.batch(step)
        side = int(batch.target_BTC.shape[1] ** 0.5)
        assert batch.target_BTC.shape == (3, side * side, 64)
        assert batch.source_BSC.shape == (3, 16, 64)
        assert torch.equal(batch.target_ids_T3, position_ids(side, side))
        assert torch.equal(batch.source_ids_S3, position_ids(4, 4))
        seen.update(target.numpy().tobytes() for target in batch.target_BTC)
    assert len(seen) == 16 and set(seen.values()) == {3}


def test_mixed_sizes_on_demand_are_refused(pipe: Any) -> None:
    samples = make(pipe, Uneven(), count=None, batch_size=8)
    with pytest.raises(SampleError, match=r"one batch must agree in size.*data\.samples"):
        samples.batch(0)


def test_draws_repeat_targets_and_texts_but_not_sources(pipe: Any) -> None:
    samples = make(pipe)
    samples.prepare()
    one, three = samples.batch(0), samples.batch(0).drawn(3)
    for name in ("target_BTC", "text_BLE", "pooled_BP"):
        wanted = getattr(one, name).repeat_interleave(3, dim=0)
        assert torch.equal(getattr(three, name), wanted)
    assert torch.equal(three.source_BSC, one.source_BSC)


class Holes(ShapeWeave):
    """Every n-th picture is damaged."""

    def __init__(self, every: int) -> None:
        super().__init__(size=64)
        self.every = every

    def example(self, task: str, index: int) -> Example:
        if index % self.every == 0:
            raise ImageError(f"picture {index}", "damaged", "truncated or damaged (cut)")
        return super().example(task, index)


def test_damaged_pictures_are_replaced_and_counted(pipe: Any) -> None:
    settings: dict[str, Any] = {"stage": "edit", "seed": 0, "batch_size": 2, "count": 12}
    samples = Samples(Holes(4), TASKS["edit"], pipe, **settings, max_rejected=0.25)
    samples.prepare()
    assert samples.tally.rejected["picture damaged"] == 3
    assert sum(len(bucket.rows) for bucket in samples._buckets) == 12
    strict = Samples(Holes(4), TASKS["edit"], pipe, **settings, max_rejected=0.1)
    with pytest.raises(SampleError, match=r"3 of 15 pictures .* above data.max_rejected=0.1 \(the"):
        strict.prepare()


def test_on_demand_a_share_of_damaged_pictures_stops(pipe: Any) -> None:
    samples = make(pipe, count=None, max_rejected=0.05)
    samples.draws.data = Holes(4)
    with pytest.raises(SampleError, match="of 20[01] pictures of shapeweave cannot be used"):
        for index in range(1000):
            samples.triple(index)
    assert index > 100
