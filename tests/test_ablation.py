"""The ablation: its loop is the trainer's, its arms get what they claim, its files survive."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import _ablation_base, ablation
from benchmarks._ablation_plan import QUICK, VARIED, Arm, Protocol, arms, picks, progressive
from benchmarks._ablation_report import text
from benchmarks._ablation_statistics import NONE, UNMEASURED, Rows, hypotheses, own
from benchmarks._ablation_train import Course
from benchmarks._page import between
from prw_flux.rundir import RunFolder
from prw_flux.session import open_session
from prw_flux.tiny.base import BaseRecipe
from prw_flux.trainer import open_training_data, train


def small() -> Protocol:
    return replace(QUICK, steps=(2, 2, 1, 1, 2))


def test_a_curriculum_gets_the_bits_of_the_trainer(tmp_path: Path) -> None:
    protocol = small()
    phases = progressive(protocol, ("inpaint", "ground"))
    config = replace(protocol.config(3), stages=tuple(p.stage for p in phases), remember=3)
    session = open_session(config)
    run = RunFolder.create(tmp_path / "run", config)
    train(run, session, open_training_data(config, session))

    arm = Arm(label="", group="main", phases=phases, adapter={}, remember=3)
    course = Course(arm, protocol, 3)
    course.train(lambda phase: None)
    wanted, found = session.adapter.weave, course.adapter.weave
    assert found.stages == wanted.stages
    for group, pool in wanted.pools.items():
        for name, parameter in pool.named_parameters():
            theirs = dict(found.pools[group].named_parameters())[name]
            assert torch.equal(theirs, parameter), f"{group} {name}"
        for stage in (0, 1):
            ours, theirs_ = pool.columns.snapshot(stage), found.pools[group].columns.snapshot(stage)
            assert ours is not None and theirs_ is not None
            assert torch.equal(ours[0], theirs_[0])


def test_mixing_shuffles_exactly_the_samples_of_the_stages() -> None:
    protocol = replace(small(), steps=(3, 2, 1, 4, 2))
    (phase,) = arms(protocol)["cotrain"].phases
    plan = picks(phase, protocol, 0)
    assert plan is not None and len(plan) == phase.stage.steps == 12
    wanted = {task: protocol.length(task) * protocol.batch_size for task in phase.tasks}
    assert Counter(task for step in plan for task, _ in step) == wanted
    assert all(len(set(step)) == protocol.batch_size for step in plan)
    assert len({pick for step in plan for pick in step}) == sum(wanted.values())
    assert picks(phase, protocol, 1) != plan

    store = Course(arms(protocol)["cotrain"], protocol, 0).store
    alone = store.one_task("customise", 1, 3, [False, True, False])[0].batch
    chosen = [("customise", 3), ("edit", 0), ("customise", 4), ("inpaint", 2), ("customise", 5)]
    parts = store.several(chosen, [False, False, True, False, False])
    assert sorted(len(part.rows) for part in parts) == [2, 3]
    part = next(part for part in parts if part.rows == [0, 2, 4])
    torch.testing.assert_close(part.batch.source_BSC, alone.source_BSC, rtol=0, atol=0)
    torch.testing.assert_close(part.batch.text_BLE, alone.text_BLE, rtol=0, atol=0)
    torch.testing.assert_close(part.batch.source_ids_S3, alone.source_ids_S3, rtol=0, atol=0)
    other = next(part for part in parts if part.rows == [1, 3])
    assert not torch.equal(other.batch.source_ids_S3, alone.source_ids_S3)
    assert not torch.equal(other.pooled_BP[0], other.pooled_BP[1])


@pytest.mark.parametrize("learns", ["newest", "all"])
def test_veterans_move_only_where_an_arm_says_so(learns: Any) -> None:
    protocol = small()
    phases = progressive(protocol, ("inpaint", "edit"), learns=learns)
    arm = Arm(label="", group="main", phases=phases, adapter={})
    course = Course(arm, protocol, 0)
    pools = course.adapter.weave.pools.values()
    first: list[list[torch.Tensor]] = []

    def keep(phase: Any) -> None:
        first.append([p.detach().clone() for pool in pools for p in pool.expert(0).parameters()])

    told = course.train(keep)
    moved = any(not torch.equal(a, b) for a, b in zip(*first, strict=True))
    assert moved == (learns == "all") == (not arm.frozen)
    assert [phase["curve"][-1]["step"] for phase in told] == [2, 2]
    assert any(bool(pool.expert(1).B[0].any()) for pool in pools)


def fake(name: str, seed: int, protocol: Any, *rest: object) -> dict[str, Any]:
    return {"arm": name, "seed": seed, "protocol": protocol.digest, "seconds": 0.0}


def test_what_is_there_is_not_trained_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ablation, "one", fake)
    monkeypatch.setattr(ablation, "held_out", lambda protocol: object())
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    file, protocol = tmp_path / "rows.jsonl", small()
    ablation.append(file, fake("cologen", 0, replace(protocol, lr=1.0)))
    with file.open("a") as cut:
        cut.write('{"arm": "baseline", "see')
    ablation.run(["cologen", "cotrain"], range(2), protocol, file)
    rows = own(ablation.read(file), protocol)
    assert [(row["arm"], row["seed"]) for row in rows] == [
        ("cologen", 0), ("cotrain", 0), ("cologen", 1), ("cotrain", 1)
    ]  # fmt: skip
    size = file.stat().st_size
    ablation.run(["cologen", "cotrain"], range(2), protocol, file)
    assert file.stat().st_size == size
    assert len(ablation.read(file)) == 5


def test_what_is_varied_has_rows_and_a_base_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digests = {Protocol().varied(**change).digest for change in VARIED.values()}
    assert len(digests) == len(VARIED)
    every = ablation.read(ablation.RESULTS)
    assert own(every, Protocol()) and {row["protocol"] for row in every} <= digests

    built: list[BaseRecipe] = []

    def build(out: Path, *, recipe: BaseRecipe) -> None:
        assert (out / "vae" / "config.json").is_file()
        built.append(recipe)
        (out / "recipe.json").write_text("{}")

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(_ablation_base, "build", build)
    config = Protocol().varied(base=0.1).config(0)
    assert Path(config.base.path).is_relative_to(tmp_path)
    assert Protocol().varied(base=0.1).config(1).base == config.base
    assert [phase.steps for phase in built[0].phases] == [1200, 360] and len(built) == 1
    assert Protocol().config(0).base.path == "tiny-flux"


def test_an_arm_is_taken_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    protocol = small()
    with ablation.claim(protocol, "cologen", 0) as mine:
        with ablation.claim(protocol, "cologen", 0) as theirs:
            assert (mine, theirs) == (True, False)
        with ablation.claim(protocol, "cologen", 1) as theirs:
            assert theirs
    with ablation.claim(protocol, "cologen", 0) as again:
        assert again


def row(arm: str, seed: int, **parts: list[float | None]) -> dict[str, Any]:
    return {"arm": arm, "seed": seed, "items": {"edit": parts}}


def test_differences_are_paired_and_zero_is_no_difference() -> None:
    n = 200
    noisy = [float(i % 2) for i in range(n)]
    rows = [
        row("cologen", 0, C=[x + 0.1 for x in noisy], L=noisy),
        row("cologen", 1, C=[x + 0.3 for x in noisy], L=noisy),
        row("cotrain", 0, C=noisy, L=[1.0 - x for x in noisy]),
        row("cotrain", 1, C=noisy, L=[1.0 - x for x in noisy]),
        row("joint-finetune", 1, C=noisy, L=[x + 0.5 for x in noisy]),
        row("baseline", 0, C=noisy, L=noisy),
        row("rl-only", 0, C=[x + 0.1 for x in noisy], L=[None, *(x + 0.4 for x in noisy[1:])]),
    ]
    found = {(name, what): (d, verdict) for name, what, d, verdict in hypotheses(Rows(rows))}
    d, verdict = found["H1", "C: `cologen` minus `cotrain`"]
    assert verdict == "supported" and d is not None and d.interval.n == n
    assert d.interval.mean == pytest.approx(0.2) and d.interval.low == pytest.approx(0.2)
    assert d.seeds == pytest.approx({0: 0.1, 1: 0.3})
    assert found["H1", "L: `cologen` minus `cotrain`"][1] == NONE
    d, verdict = found["H1", "L: `cologen` minus `joint-finetune`"]
    assert verdict == "contradicted" and d is not None and list(d.seeds) == [1]
    d, verdict = found["H2", "`rl-only` over `baseline`: L gained minus C gained"]
    assert verdict == "supported" and d is not None
    assert d.interval.mean == pytest.approx(0.3) and d.interval.n == n - 1
    assert found["H3", "`rc-only` over `baseline`: C gained minus L gained"] == (None, UNMEASURED)


@pytest.mark.parametrize(
    ("lost", "verdict"), [(0, "supported"), (10, "undecided"), (60, "contradicted")]
)
def test_grounding_is_kept_only_within_five_points(lost: int, verdict: str) -> None:
    before = [1.0] * 200
    after = [0.0] * lost + [1.0] * (200 - lost)
    made = {"arm": "cologen", "seed": 0, "stages": ["inpaint", "ground", "edit"],
            "matrix": [{}, {"ground": before}, {"ground": after}]}  # fmt: skip
    assert hypotheses(Rows([made]))[-1][3] == verdict


def test_the_page_tells_what_the_rows_say() -> None:
    protocol = Protocol()
    every = ablation.read(ablation.RESULTS)
    assert text(every, arms(protocol), protocol) in between(ablation.PAGE, "ablation")
    keys = [(row["protocol"], row["arm"], row["seed"]) for row in every]
    assert len(keys) == len(set(keys))


def test_bad_requests_are_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ablation.main(["--arms", "cologne", "--results", str(tmp_path / "x")]) == 1
    told = capsys.readouterr().err
    assert "no arm or group 'cologne'" in told and "cologen" in told
    for words in (["--base-share", "2"], ["--rank", "0"], ["--steps-scale", "-1"]):
        with pytest.raises(SystemExit):
            ablation.main(words)
        assert words[0] in capsys.readouterr().err
    page = tmp_path / "page.md"
    page.write_text("nothing")
    with pytest.raises(ValueError, match="to write between"):
        ablation.report.write(page, "", [])
