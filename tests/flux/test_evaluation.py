from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prw_flux import CoLoGenPipeline, PRWAdapter, attached
from prw_flux.evaluation import (
    ARMS,
    METRICS,
    EvaluationSample,
    Request,
    Sampling,
    Settings,
    beats,
    bootstrap,
    count_experts,
    draw_samples,
    evaluate_run,
    generate,
    markdown,
    paired_bootstrap,
    rich_table,
    score,
    unusable,
)
from prw_flux.evaluation.edits import touched_items
from prw_flux.evaluation.maps import class_agreement, line_f1
from prw_flux.evaluation.runner import load_pipeline
from prw_flux.evaluation.shapes import hidden_items, means
from prw_flux.rundir import RunError, RunFolder
from prw_flux.shapeweave.change import KINDS, draw_change
from prw_flux.shapeweave.render import render
from prw_flux.shapeweave.scene import draw_scene
from prw_flux.shapeweave.source import ShapeWeave
from prw_flux.tasks import TASKS, Example, Pair

FAST = Sampling(steps=2, batch_size=3)


def held_out(task: str, count: int = 16, size: int = 96) -> tuple[EvaluationSample, ...]:
    data = ShapeWeave(size=size, split="heldout")
    return draw_samples(data, TASKS[task], count, usable=unusable).samples


# Metrics --------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", list(METRICS))
def test_the_true_target_scores_near_one_and_noise_near_zero(task: str) -> None:
    rng = np.random.default_rng(0)
    samples = held_out(task)
    perfect = means([score(s, s.triple.target) for s in samples])
    # the parser itself loses 1 to 3 % of the box IoU at 96 pixels
    assert perfect["headline"] > 0.95
    noise = [rng.integers(0, 255, s.triple.target.shape, dtype=np.uint8) for s in samples]
    assert means([score(s, n) for s, n in zip(samples, noise, strict=True)])["headline"] < 0.15


@pytest.mark.parametrize("task", ["ground", "customise", "edit"])
def test_a_copy_of_the_source_earns_nothing_where_the_answer_is_a_change(task: str) -> None:
    copied = [score(s, s.triple.source)["headline"] for s in held_out(task)]
    assert max(copied) == 0.0


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_edit(kind: str) -> None:
    rng = np.random.default_rng(3)
    for _ in range(3):
        before = draw_scene(rng, count=1 if kind == "add" else 2)
        change = draw_change(before, rng, kind)
        source, target = render(before), render(change.after)
        pair = Pair(source=source, text=change.instruction, target=target,
                    metadata={"change": change})  # fmt: skip
        example = Example(key="k", image=source, caption="", edit=pair, metadata={"scene": before})
        sample = EvaluationSample(
            task="edit", index=0, seed=0, example=example, triple=TASKS["edit"](example, 0)
        )
        assert sample.scene is change.after
        assert unusable(sample) is None
        done, undone = score(sample, target), score(sample, source)
        assert done["changed"] == done["K"] == 1.0 and done["headline"] > 0.85
        assert undone["changed"] == undone["headline"] == 0.0
        blank = np.full_like(target, target[0, 0])
        assert score(sample, blank)["headline"] == 0.0 or kind == "remove"


def test_moving_without_removing_the_old_one_is_no_move() -> None:
    rng = np.random.default_rng(0)
    change = draw_change(draw_scene(rng, count=1), rng, "move")
    both = replace(change.after, items=(*change.before.items, *change.after.items))
    pair = Pair(source=render(change.before), text="", target=render(change.after),
                metadata={"change": change})  # fmt: skip
    example = Example(key="k", image=pair.source, caption="", edit=pair)
    sample = EvaluationSample(
        task="edit", index=0, seed=0, example=example, triple=TASKS["edit"](example, 0)
    )
    assert len(touched_items(change)) == 2
    assert score(sample, render(both))["changed"] == 0.0


def test_samples_without_a_hidden_object_are_refused_and_counted() -> None:
    data = ShapeWeave(size=96, split="heldout")
    draw = draw_samples(data, TASKS["inpaint"], 24, usable=unusable)
    assert len(draw.samples) == 24 and all(hidden_items(s) for s in draw.samples)
    assert set(draw.rejected) == {"the hole hides no object"}


def test_photos_cannot_be_scored() -> None:
    example = Example(key="p", image=np.zeros((96, 96, 3), np.uint8), caption="")
    triple = replace(TASKS["control"](held_out("control", 1)[0].example, 0), metadata={"key": "p"})
    sample = EvaluationSample(task="control", index=0, seed=0, example=example, triple=triple)
    assert unusable(sample) == "the target is not a known scene"
    assert unusable(replace(sample, task="mine")) == "the task has no exact metric"
    with pytest.raises(ValueError, match="no exact metric"):
        score(replace(sample, task="mine"), triple.target)
    with pytest.raises(ValueError, match="differ"):
        score(sample, triple.target[:64])


def test_line_f1_allows_one_pixel() -> None:
    line = np.zeros((96, 96), np.uint8)
    line[40, 20:60] = 255
    assert line_f1(line, line) == line_f1(np.roll(line, 1, axis=0), line) == 1.0
    assert line_f1(np.roll(line, 5, axis=0), line) == 0.0
    assert line_f1(np.zeros_like(line), line) == 0.0
    assert line_f1(np.zeros_like(line), np.zeros_like(line)) == 1.0


def test_class_agreement_ignores_the_background() -> None:
    wanted = np.zeros((96, 96), np.uint8)
    wanted[:10, :10] = 2
    wrong = np.where(wanted > 0, 3, 0).astype(np.uint8)
    assert class_agreement(wanted, wanted) == 1.0
    assert class_agreement(wrong, wanted) == class_agreement(np.zeros_like(wanted), wanted) == 0.0


# Statistics -----------------------------------------------------------------------------------


@given(st.integers(0, 2**32), st.integers(1, 40), st.floats(-1, 1))
def test_bootstrap_encloses_and_moves_with_the_values(seed: int, count: int, by: float) -> None:
    x = list(np.random.default_rng(seed).uniform(size=count))
    a = bootstrap(x, resamples=100)
    assert a.n == len(x) and min(x) - 1e-9 <= a.low <= a.high <= max(x) + 1e-9
    b = bootstrap([v + by for v in x], resamples=100)
    np.testing.assert_allclose(
        [b.mean, b.low, b.high], np.add([a.mean, a.low, a.high], by), atol=1e-9
    )
    assert bootstrap(x, resamples=100) == a


def test_bootstrap_matches_the_normal_interval() -> None:
    x = np.random.default_rng(0).normal(0.5, 0.2, 400)
    found = bootstrap(list(x))
    half = 1.96 * x.std() / 20
    # 10,000 resamples place a 2.5 % quantile within about 0.04 standard errors; 400 draws are
    # not exactly normal
    np.testing.assert_allclose([found.low, found.high], [x.mean() - half, x.mean() + half],
                               atol=0.1 * half)  # fmt: skip


def test_pairing_removes_what_both_arms_share() -> None:
    rng = np.random.default_rng(0)
    shared = rng.uniform(0, 1, 64)
    ours = list(shared + 0.05)
    found = paired_bootstrap(ours, list(shared))
    np.testing.assert_allclose([found.low, found.mean, found.high], 0.05, atol=1e-9)


def test_bootstrap_refuses_what_it_cannot_answer() -> None:
    with pytest.raises(ValueError, match="finite"):
        bootstrap([])
    with pytest.raises(ValueError, match="finite"):
        bootstrap([1.0, float("nan")])
    with pytest.raises(ValueError, match="paired"):
        paired_bootstrap([1.0], [])


def test_beats_needs_the_margin_and_the_bound_against_every_baseline() -> None:
    good = {"mean": 0.2, "low": 0.05}
    for copy, expected in (
        (good, True),
        ({"mean": 0.2, "low": -0.01}, False),
        ({"mean": 0.05, "low": 0.01}, False),
    ):
        row = {"differences": {"stage": {"text": good, "copy": copy}}}
        assert beats(row, "stage") is expected


# Runs -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(short_config: Any, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """Three finished stages on a random base; the experts are random too, but not zero."""
    folder = RunFolder.create(tmp_path_factory.mktemp("runs") / "short", short_config)
    pipe = CoLoGenPipeline.from_pretrained(short_config.base.path)
    torch.manual_seed(1)
    adapter = PRWAdapter.for_transformer(pipe.transformer, rank=2, resolution=64)
    for number, stage in enumerate(short_config.stages):
        adapter.weave.unlock(stage.name)
        with torch.no_grad():
            for parameter in adapter.weave.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
        adapter.weave.close()
        folder.finish_stage(number, {"seconds": 1.0})
    adapter.save_pretrained(folder.adapter)
    return folder


@pytest.fixture(scope="module")
def pipe(run: RunFolder) -> CoLoGenPipeline:
    return load_pipeline(run)


def test_a_picture_depends_on_its_seed_and_not_on_its_batch(pipe: CoLoGenPipeline) -> None:
    samples = held_out("inpaint", 3, 64)
    together = generate(pipe, samples, FAST)
    alone = generate(pipe, samples[::-1], replace(FAST, batch_size=1))[::-1]
    for a, b in zip(together, alone, strict=True):
        # rounding to levels hides what a batch changes in float32, except at a tie
        assert np.abs(a.astype(int) - b.astype(int)).max() <= 1
    assert not np.array_equal(together[0], generate(pipe, samples[:1], FAST, with_source=False)[0])


def test_zero_delta_arm_leaves_the_adapter_in_place(pipe: CoLoGenPipeline) -> None:
    samples = held_out("edit", 2, 64)
    before = generate(pipe, samples, FAST)
    asked = Request(pipe=pipe, samples=samples, sampling=FAST, stage="edit")
    zero = ARMS["zero"].make(asked)
    again = generate(pipe, samples, FAST)
    assert attached(pipe.transformer) is pipe.prw
    assert all(np.array_equal(a, b) for a, b in zip(before, again, strict=True))
    assert not np.array_equal(zero[0], before[0])


def test_routing_counts_every_source_once_per_block(pipe: CoLoGenPipeline) -> None:
    samples = {task: held_out(task, 5, 64) for task in ("inpaint", "customise")}
    found = count_experts(pipe, samples, batch_size=2)
    assert found["stages"] == ["inpaint", "ground", "control"]
    for task in samples:
        assert found["tasks"][task]["n"] == 5
        assert all(sum(counts) == 5 for counts in found["tasks"][task]["counts"])
        (once,) = found["tasks"][task]["times"]
        assert once == {"time": 0.0, "counts": found["tasks"][task]["counts"]}


def test_routing_that_follows_the_timestep_is_counted_by_time(make_pipe: Any) -> None:
    pipe = make_pipe(source_timestep="current")
    found = count_experts(pipe, {"edit": held_out("edit", 3, 64)})["tasks"]["edit"]
    times = found["times"]
    assert [one["time"] for one in times] == [1.0, 0.75, 0.5, 0.25] and found["n"] == 4 * 3
    assert all(sum(counts) == 3 for one in times for counts in one["counts"])
    assert np.sum([one["counts"] for one in times], axis=0).tolist() == found["counts"]


def test_evaluate_run_writes_what_the_report_reads(run: RunFolder, pipe: CoLoGenPipeline) -> None:
    told: list[tuple[str, int, int]] = []
    settings = Settings(n=3, history=2, shown=2, photos=1, sampling=FAST)
    found = evaluate_run(run.path, settings, pipe=pipe, progress=lambda *line: told.append(line))
    assert json.loads((run.path / "evaluation.json").read_text()) == json.loads(json.dumps(found))
    assert list(found["tasks"]) == ["inpaint", "ground", "control"]
    for row in found["tasks"].values():
        assert set(row["arms"]) == set(ARMS) and set(row["differences"]) == {"stage", "prw"}
        for ours, differences in row["differences"].items():
            assert set(differences) == {"text", "zero", "copy"}
            difference = (
                row["arms"][ours]["headline"]["mean"] - row["arms"]["copy"]["headline"]["mean"]
            )
            assert differences["copy"]["mean"] == pytest.approx(difference)
    history = found["forgetting"]
    assert [[v is None for v in line] for line in history["router"]] == [
        [False, True, True], [False, False, True], [False, False, False],
    ]  # fmt: skip
    assert history["at_stage"][1][0] == history["at_stage"][0][0] == history["router"][0][0]
    samples = json.loads((run.path / "samples" / "samples.json").read_text())["samples"]
    assert {s["domain"] for s in samples} == {"scenes", "photos", "worst"}
    worst = [s["headline"] for s in samples if s["domain"] == "worst" and s["task"] == "ground"]
    assert len(worst) == 3 and worst == sorted(worst)
    assert all((run.path / "samples" / s["output"]).is_file() for s in samples)
    assert json.loads((run.path / "routing.json").read_text())["tasks"]["ground"]["n"] == 3
    assert all(done <= total for _, done, total in told)
    assert "| ground | Acc@0.5 |" in (run.path / "evaluation.md").read_text()
    assert markdown(found) and rich_table(found).row_count == 3


def test_what_cannot_be_evaluated_is_refused(tmp_path: Path, short_config: Any) -> None:
    with pytest.raises(RunError, match="is not a run"):
        evaluate_run(tmp_path)
    new = RunFolder.create(tmp_path / "new", short_config)
    with pytest.raises(ValueError, match="no finished stage"):
        evaluate_run(new.path)
    with pytest.raises(ValueError, match="history"):
        Settings(n=2, history=3)
    with pytest.raises(ValueError, match="unknown"):
        Settings(arms=("prw", "best"))
    with pytest.raises(ValueError, match="precision"):
        Sampling(precision="fp8")
