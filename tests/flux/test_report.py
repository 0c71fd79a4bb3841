from __future__ import annotations

import json
import math
import random
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as PILImage
from safetensors.numpy import save_file

from prw_flux import recipes
from prw_flux.data.photos import PhotoFolder
from prw_flux.evaluation.samples import draw_samples
from prw_flux.evaluation.sheets import OUTSIDE, Photos, photo_samples, write_sheets
from prw_flux.report import write_report
from prw_flux.report.charts import Dot, Series, axis_ticks, dot_plot, line_chart, smooth
from prw_flux.report.facts import count_parameters, read_facts
from prw_flux.report.text import count, duration
from prw_flux.rundir import EVALUATION_VERSION, RunError, RunFolder
from prw_flux.shapeweave.source import ShapeWeave
from prw_flux.tasks import TASKS

BLOCKS = [f"transformer_blocks.{i}.attn" for i in range(2)]
BLOCKS += [f"single_transformer_blocks.{i}.attn" for i in range(6)]
ARMS = {"stage": "PRW at the task's own stage", "prw": "PRW, final router"}
ARMS |= {"text": "text only", "zero": "zero-delta experts"}
ARMS |= {"copy": "copy of the source", "ceiling": "true target through the autoencoder"}


def fabricate(
    path: Path, stages: int = 5, *, measured: bool = True, pictures: int = 4
) -> RunFolder:
    """A run folder with the files of a real one and invented numbers, for this test alone."""
    config = recipes.demo()
    run = RunFolder.create(path, config)
    rng = random.Random(0)
    for number, stage in enumerate(config.stages[:stages]):
        for step in range(5, stage.steps + 1, 5):
            usage = [
                1.0 if number == 0 else min(1.0, 0.8 - 0.5 * math.exp(-step / 60) + rng.gauss(0, s))
                for s in (0.05, 0.02)
            ]
            run.log(
                {
                    "stage": stage.name,
                    "task": stage.task,
                    "step": step,
                    "loss": 0.4 * math.exp(-step / 90) + 0.35 + 0.05 * rng.random(),
                    "usage_noisy": usage[0],
                    "usage_deterministic": usage[1],
                    "seconds": 0.2 * step,
                    "memory_mib": 1800.0,
                }
            )
        kinds = {"object": 30, "bezier": 10}
        rejected = {"free-form: overlaps a thing": 7}
        facts = {"seconds": 0.2 * stage.steps, "kinds": kinds, "rejected": rejected}
        run.finish_stage(number, facts)
        expert = run.adapter / "experts" / f"{number}-{stage.name}"
        expert.mkdir(parents=True)
        save_file({"A": np.zeros((32, 128), "f4")}, expert / "adapter_model.safetensors")
    if measured:
        _measure(run, [stage.task for stage in config.stages[:stages]], pictures, rng)
    return run


def _measure(run: RunFolder, tasks: list[str], pictures: int, rng: random.Random) -> None:
    names = [stage.name for stage in run.config.stages[: len(tasks)]]
    shares = [[[rng.random() for _ in names] for _ in BLOCKS] for _ in tasks]
    routing = {
        "version": 1,
        "groups": BLOCKS,
        "stages": names,
        "tasks": {
            task: {"n": 32, "counts": [[round(32 * v) for v in row] for row in block], "gate": []}
            for task, block in zip(tasks, shares, strict=True)
        },
    }
    matrix = [[0.8 - 0.05 * (i - j) if j <= i else None for j in range(len(tasks))]
              for i in range(len(tasks))]  # fmt: skip
    evaluation = {
        "version": EVALUATION_VERSION,
        "source": "shapeweave",
        "size": 96,
        "stages": names,
        "seconds": 41.0,
        "settings": {"seed": 0, "sampling": {"steps": 12, "precision": "bf16"}},
        "tasks": {task: _row() for task in tasks},
        "forgetting": {
            "n": 12, "stages": names, "tasks": tasks, "router": matrix, "at_stage": matrix,
        },
    }  # fmt: skip
    (run.path / "routing.json").write_text(json.dumps(routing))
    (run.path / "evaluation.json").write_text(json.dumps(evaluation))
    data = ShapeWeave(size=96, split="heldout")
    draws = {t: draw_samples(data, TASKS[t], pictures).samples for t in tasks}
    shown = {t: [(s, s.triple.target, 0.91) for s in draw] for t, draw in draws.items()}
    photos = Photos({tasks[0]: list(draws[tasks[0]][:1])}, f"photos:x; {OUTSIDE}")
    write_sheets(run.path / "samples", shown, photos, [draws[tasks[0]][0].triple.target])


def _row() -> dict[str, Any]:
    means = {"stage": 0.78, "prw": 0.60, "text": 0.21, "zero": 0.02, "copy": 0.52, "ceiling": 0.97}
    spread = {k: {"mean": v, "low": v - 0.05, "high": v + 0.03, "n": 32} for k, v in means.items()}
    return {
        "n": 32,
        "rejected": {},
        "headline": "mean of C and L",
        "parts": {"C": "attributes", "L": "box IoU"},
        "arms": {
            name: {
                "label": label,
                "heading": name,
                "trained": name in ("stage", "prw"),
                "headline": spread[name],
                "parts": {"C": 0.5, "L": 0.6},
            }
            for name, label in ARMS.items()
        },
        "differences": {
            ours: {
                name: {"mean": means[ours] - means[name], "low": 0.1, "high": 0.4, "n": 32}
                for name in ("text", "zero", "copy")
            }
            for ours in ("stage", "prw")
        },
    }


class Page(HTMLParser):
    """Collects identifiers, addresses and unbalanced tags."""

    VOID = frozenset({"meta", "img", "br", "line", "path", "rect", "circle", "link", "input"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.addresses: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.ids |= {values["id"]} if values.get("id") else set()
        self.addresses += [str(values[k]) for k in ("src", "href") if values.get(k)]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        return None

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"unbalanced </{tag}>"


def test_report_of_a_whole_run_is_complete_and_self_contained(tmp_path: Path) -> None:
    run = fabricate(tmp_path / "demo")
    path = write_report(run.path)
    text = path.read_text("utf-8")
    page = Page(text)
    assert not page.open
    assert page.ids >= {"comparison", "samples", "training", "routing", "forgetting", "cost"}
    assert all(a.startswith(("#", "data:image/png;base64,")) for a in page.addresses)
    assert {a[1:] for a in page.addresses if a.startswith("#")} <= page.ids
    assert not re.search(r"https?://|@import|<script", text)
    assert "object 30 (75%), bezier 10 (25%)" in text
    assert "free-form: overlaps a thing 7" in text
    assert "not finished" not in text
    assert text.count("<figure") == 5 * 4 + 1
    assert "outside the base&#x27;s training domain" in text


def pictures_below(folder: Path, count: int) -> Path:
    """A folder of photos, each with a colour of its own."""
    folder.mkdir()
    for i in range(count):
        colour = np.random.default_rng(i).integers(0, 255, (96, 96, 3), np.uint8)
        PILImage.fromarray(colour).save(folder / f"{i}.png")
    return folder


def keys(found: Photos) -> set[str]:
    return {sample.example.key for samples in found.values() for sample in samples}


def test_photos_shown_are_the_held_out_ones_of_the_run(tmp_path: Path) -> None:
    photos = pictures_below(tmp_path / "photos", 6)

    def shown(name: str, *settings: str) -> Photos:
        config = recipes.photos().with_settings([f"data.photos={photos}", *settings])
        return photo_samples(RunFolder.create(tmp_path / name, config), ["inpaint"], 3, 0)

    trained = PhotoFolder(photos, 96)
    used = {trained.example("inpaint", i).key for i in range(len(trained))}
    found = shown("tiny")
    assert keys(found) and not keys(found) & used and len(found["inpaint"]) == len(keys(found))
    assert found.told == f"photos:photos, held out; {OUTSIDE}"
    assert shown("flux", "base.path=a/flux").told == "photos:photos, held out"
    for i in range(1, 6):
        (photos / f"{i}.png").unlink()
    alone = shown("one")
    assert keys(alone) == {"0.png"} and "trained on: nothing of it is held out" in alone.told


def test_report_of_a_partial_run_says_what_is_missing(tmp_path: Path) -> None:
    run = fabricate(tmp_path / "partial", stages=2, measured=False)
    text = write_report(run.path, tmp_path / "partial.html").read_text("utf-8")
    assert "2 of 5 stages are done, control, customise, edit are still to come" in text
    assert "Not there yet: comparison, samples, routing, forgetting." in text
    assert not Page(text).open


def test_an_evaluation_that_is_older_than_the_last_stage_is_told(tmp_path: Path) -> None:
    run = fabricate(tmp_path / "older", stages=2, pictures=1)
    run.finish_stage(2, {"seconds": 1.0})
    assert "older than the last finished stage" in write_report(run.path).read_text("utf-8")


def test_report_of_a_run_that_has_only_begun(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "new", recipes.demo())
    run.log({"stage": "inpaint", "task": "inpaint", "step": 5, "loss": float("nan")})
    assert "0 of 5" in write_report(run.path).read_text("utf-8")


def test_the_held_out_loss_has_a_line_where_it_was_measured(tmp_path: Path) -> None:
    run = fabricate(tmp_path / "run", stages=2, measured=False)
    page = write_report(run.path).read_text()
    assert "same held-out samples" not in page
    lines = page.count('class="line second"')
    for step in (100, 200):
        line = {"stage": "ground", "task": "ground", "step": step, "loss": 0.4, "usage_noisy": 1.0,
                "usage_deterministic": 1.0, "held_out_loss": 0.3}  # fmt: skip
        run.log(line)
    page = write_report(run.path).read_text()
    assert "same held-out samples" in page and page.count('class="line second"') == lines + 1


def test_prompts_are_escaped(tmp_path: Path) -> None:
    run = fabricate(tmp_path / "demo", stages=1, pictures=1)
    index = run.path / "samples" / "samples.json"
    entries = json.loads(index.read_text())
    entries["samples"][0]["prompt"] = "<script>alert(1)</script>" + "long" * 60
    index.write_text(json.dumps(entries))
    text = write_report(run.path).read_text("utf-8")
    assert "<script" not in text and "&lt;script&gt;" in text


def test_pictures_that_are_gone_and_damaged_files_do_not_stop_a_report(tmp_path: Path) -> None:
    run = fabricate(tmp_path / "demo", stages=1, pictures=1)
    next((run.path / "samples").glob("*-output.png")).unlink()
    (run.path / "evaluation.json").write_text('{"tasks": ')
    assert "comparison" in write_report(run.path).read_text("utf-8")


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="is not a run"):
        write_report(tmp_path)


def test_facts_count_parameters_from_headers(tmp_path: Path) -> None:
    run = fabricate(tmp_path / "demo", stages=2, measured=False)
    assert [stage.parameters for stage in read_facts(run.path).stages[:3]] == [4096, 4096, None]
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"\xff" * 12)
    assert count_parameters(broken) is None
    assert count_parameters(tmp_path / "absent.safetensors") is None


def test_large_pictures_are_scaled_down(tmp_path: Path) -> None:
    from PIL import Image

    from prw_flux.report.pictures import data_uri

    noise = np.random.default_rng(0).integers(0, 255, (900, 600, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "large.png")
    assert len(data_uri(tmp_path / "large.png")) < 256 * 256 * 3 * 4 / 3
    assert data_uri(tmp_path / "absent.png") == ""


def scored(run: RunFolder, bench: str, rows: list[dict[str, Any]], **line: Any) -> Path:
    """A benchmark's scores as `score_folder` writes them."""
    home = run.path / "benchmarks" / bench
    made = {"label": "a line", "metrics": {}, "protocol": {"bench": bench}, "n": len(rows), **line}
    file = {
        "version": 1,
        "benchmark": bench,
        "results": str(home / "pictures"),
        "lines": [made],
        "notes": ["<b>half</b> of it"],
        "problems": ["x.png: no such file"],
        "items": rows,
    }
    home.mkdir(parents=True)
    (home / "scores.json").write_text(json.dumps(file))
    return home


def test_benchmarks_show_rows_failures_and_what_is_refused(tmp_path: Path) -> None:
    from PIL import Image

    run = fabricate(tmp_path / "demo", stages=1, pictures=1)
    rows = [
        {
            "key": f"k{i}",
            "output": f"{i}.png",
            "text": f"edit {i}",
            "given": None,
            "target": str(run.path / "benchmarks/emu_edit/wanted.png") if i == 14 else None,
            "n": 3,
            "wanted": [1.0, 2.0, 3.0, 4.0],
            "L1": i / 20,
            "DINO": i / 20,
            "CLIP-T of the target": 0.1,
        }
        for i in range(15)
    ]
    home = scored(
        run,
        "emu_edit",
        rows,
        metrics={"L1": 0.0712, "DINO": 0.8},
        protocol={"bench": "emu_edit", "split": "test", "items": "15 of 15"},
    )
    (home / "pictures").mkdir()
    Image.fromarray(np.zeros((300, 200, 3), np.uint8)).save(home / "pictures/0.png")
    Image.fromarray(np.zeros((30, 20, 3), np.uint8)).save(home / "wanted.png")
    (run.path / "benchmarks/old").mkdir()
    (run.path / "benchmarks/old/scores.json").write_text('{"version": 99, "lines": [1]}')
    text = write_report(run.path).read_text("utf-8")
    page = Page(text)
    assert "benchmarks" in page.ids and not page.open
    assert "&lt;b&gt;half" in text and "1 picture has no score, the first: x.png" in text
    assert "0.0712" in text and "refused: items is 15 of 15 here" in text and "CoLoGen" in text
    assert "Worst 10 of 15 by L1" in text and "Worst 10 of 15 by DINO" in text
    assert ">L1 ↓</th>" in text and "DINO ↓" not in text
    assert "by CLIP-T of the target" not in text and "by n<" not in text
    by_l1 = text.split("Worst 10 of 15 by L1")[1].split("</details>")[0]
    by_dino = text.split("Worst 10 of 15 by DINO")[1].split("</details>")[0]
    assert re.findall(r"edit (\d+)", by_l1) == [str(i) for i in range(14, 4, -1)]
    assert re.findall(r"edit (\d+)", by_dino) == [str(i) for i in range(10)]
    assert by_dino.count("data:image/jpeg;base64,") == 1  # the others cannot be read
    first, second, *_ = by_l1.split("<figure")[1:]
    assert 'alt="target"' in first and 'class="strip"' in first
    assert 'alt="target"' not in second and 'class="strip two"' in second


def test_worst_of_tasks_are_kept_apart() -> None:
    from prw_flux.report.benchmarks import worst

    rows = [
        {"task": task, "headline": value, "C": 0.5}
        for task, value in (("edit", 0.3), ("ground", 0.1), ("edit", 0.2))
    ]
    found = dict(worst(rows))
    assert list(found) == [
        "Editing: worst 2 of 2 by headline",
        "Grounding: worst 1 of 1 by headline",
    ]
    assert [value for _, value in found["Editing: worst 2 of 2 by headline"]] == [0.2, 0.3]


def test_a_column_has_as_many_decimals_in_every_row() -> None:
    from prw_flux.report.benchmarks import decimals

    assert decimals([0.3548, None, -1.2]) == 4
    assert decimals([2.4545, 1.9091]) == 2
    assert decimals([]) == 4


def test_a_picture_that_stands_in_two_rows_is_shown_once_and_what_it_is_compared_with_is_said() -> (
    None
):
    from prw_flux.report.benchmarks import worst

    rows = [
        {"output": output, "setting": setting, "L1 target": value, "DINO all photos": 0.5}
        for output, setting, value in (
            ("7/7_1.png", "single", 0.3), ("8/8_1.png", "single", 0.4), ("7/7_1.png", "multi", 0.3)
        )
    ]  # fmt: skip
    found = dict(worst(rows))
    assert list(found) == [
        "Worst 2 of 2 by L1 against the target", "Worst 2 of 2 by DINO against all photos"
    ]  # fmt: skip
    shown = found["Worst 2 of 2 by L1 against the target"]
    assert [(row["output"], value) for row, value in shown] == [
        ("8/8_1.png", 0.4), ("7/7_1.png", 0.3)
    ]  # fmt: skip


def test_failures_are_shown_worst_first(tmp_path: Path) -> None:
    run = fabricate(tmp_path / "demo", stages=1, pictures=2)
    samples = draw_samples(ShapeWeave(size=96, split="heldout"), TASKS["inpaint"], 2).samples
    rows = [(s, s.triple.target, value) for s, value in zip(samples, (0.1, 0.7), strict=True)]
    write_sheets(run.path / "samples", {"inpaint": rows}, Photos(), [], {"inpaint": rows})
    text = write_report(run.path).read_text("utf-8")
    part = text.split('id="failures"')[1].split("</section>")[0]
    assert re.findall(r'class="score">([\d.]+)', part) == ["0.10", "0.70"]
    assert text.count("<figure") == 4


def test_routing_is_shown_by_time_where_it_depends_on_it(tmp_path: Path) -> None:
    run = fabricate(tmp_path / "demo", stages=1, pictures=1)
    text = write_report(run.path).read_text("utf-8")
    assert "does not change with the timestep" in text and "time 1<" not in text
    routing = json.loads((run.path / "routing.json").read_text())
    one = routing["tasks"]["inpaint"]
    one["times"] = [{"time": t, "counts": one["counts"]} for t in (1.0, 0.5)]
    (run.path / "routing.json").write_text(json.dumps(routing))
    text = write_report(run.path).read_text("utf-8")
    assert "<h4>time 1</h4>" in text and "<h4>time 0.5</h4>" in text and not Page(text).open
    assert text.count("<h3>Inpainting by time</h3>") == 1
    above, _, below = text.partition("<h3>Inpainting by time</h3>")
    assert "<th>inpaint</th>" in above and "<th>1</th>" in below.split("</section>")[0]
    assert "<th>inpaint</th>" not in below.split("</section>")[0]


def test_axis_ticks_are_round_and_enclose() -> None:
    assert axis_ticks(0.0, 1.0) == [0.0, 0.5, 1.0]
    for low, high in ((0.31, 0.78), (-3.0, 12000.0), (5.0, 5.0), (0.0, 1e-7)):
        ticks = axis_ticks(low, high)
        assert ticks[0] <= low + 1e-9 and ticks[-1] >= high - 1e-9 and 2 <= len(ticks) <= 7


def test_a_chart_says_where_it_is_cut_and_few_values_are_not_cut(tmp_path: Path) -> None:
    line = Series(x=[1, 2, 3], y=[2.584, 1.0, 0.9], style="main", name="a")
    whole, cut = line_chart([line], title="t"), line_chart([line], title="t", high=1.2)
    assert "cut at" not in whole and "cut at 1.2, highest 2.58" in cut
    run = fabricate(tmp_path / "run", stages=0, measured=False)
    for step in range(1, 101):
        first = {"loss": 9.0 if step == 1 else 1 + step / 1000}
        run.log({"stage": "inpaint", "task": "inpaint", "step": step, **first})
        if step in (10, 100):
            assert ("cut at" in write_report(run.path).read_text()) == (step == 100)


def test_charts_skip_gaps() -> None:
    gap = Series(x=[1, 2, 3], y=[1.0, math.nan, 2.0], style="main", name="a")
    assert line_chart([gap], title="t").count("M") == 2
    assert line_chart([gap], title="t").count("<circle") == 2  # a line of one point is nothing
    alone = Series(x=[4], y=[1.0], style="second", name="b")
    assert 'class="lone second"' in line_chart([alone], title="t")
    whole = Series(x=[1, 2, 3], y=[1.0, 1.5, math.nan], style="main", name="a")
    assert "<circle" not in line_chart([whole], title="t")
    assert line_chart([], title="t") == ""
    assert smooth([1.0, math.nan, 3.0], 1) == [1.0, 2.0, 3.0]
    dot = Dot(mean=0.5, low=0.4, high=1.7, style="prw", name="<x>")
    assert "&lt;x&gt;" in dot_plot([dot], title="t")


def test_numbers_in_words() -> None:
    assert [duration(s) for s in (None, 9.4, 200, 7500)] == ["", "9 s", "3 min 20 s", "2 h 05 min"]
    assert [count(n) for n in (None, 4096, 45_600, 7_812_345)] == ["", "4,096", "45.6 k", "7.81 M"]
