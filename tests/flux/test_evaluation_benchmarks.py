"""`prw-flux evaluate --bench` from end to end: small synthetic folders, and the real assets."""

from __future__ import annotations

import errno
import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from prw_flux.cli import main
from prw_flux.data.images import open_image, open_map
from prw_flux.evaluation.benchmarks import (
    BenchmarkError,
    DreamBench,
    EmuEdit,
    Encoders,
    MagicBrush,
    RefCoco,
    score_folder,
)
from prw_flux.evaluation.encoders import Encoder
from prw_flux.evaluation.metrics import l1
from prw_flux.evaluation.published import compare, load
from prw_flux.interrupt import Interrupted
from prw_flux.tasks.base import fill_box
from prw_flux.tasks.grounding import paint_overlay

NO_MODELS = ["--clip", "none", "--dino", "none"]


class Colours(Encoder):
    """Pictures by their mean colour, texts by their length: stands in for CLIP."""

    kind, name = "clip", "colours"

    def images(self, images: Any) -> Any:
        return np.stack([image.mean((0, 1)) + 1 for image in images]).astype(np.float32)

    def texts(self, texts: Any) -> Any:
        return np.array([[len(text), 1, 1] for text in texts], np.float32)


def save(path: Path, colour: tuple[int, int, int] | np.ndarray, side: int = 48) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    array = colour if isinstance(colour, np.ndarray) else np.full((side, side, 3), colour, np.uint8)
    Image.fromarray(array).save(path)


def told(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    status = main(["evaluate", *words])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


# MagicBrush -------------------------------------------------------------------------------------


@pytest.fixture
def magicbrush(tmp_path: Path) -> tuple[Path, Path]:
    """Session 7 with two turns, session 8 with one; outputs are known greys."""
    data, results = tmp_path / "data", tmp_path / "gen"
    for name, greys in {"7": (0, 51, 102), "8": (0, 204)}.items():
        save(data / f"images/{name}/{name}-input.png", (greys[0],) * 3)
        for turn, grey in enumerate(greys[1:], start=1):
            save(data / f"images/{name}/{name}-output{turn}.png", (grey,) * 3)
            save(data / f"images/{name}/{name}-mask{turn}.png", (255,) * 3)
    save(results / "7/7_1.png", (51, 51, 51))  # exact
    save(results / "7/7_inde_2.png", (51, 51, 51))  # a copy of its source
    save(results / "7/7_iter_2.png", (153, 153, 153), side=96)
    save(results / "8/8_1.png", (0, 0, 0))
    captions = {
        "7": {"7-output1.png": "dark", "7-output2.png": "grey"},
        "8": {"8-output1.png": "l"},
    }
    (data / "local_captions.json").write_text(json.dumps(captions))
    return data, results


def test_magicbrush_by_hand(magicbrush: tuple[Path, Path], tmp_path: Path) -> None:
    data, results = magicbrush
    scores = score_folder(
        MagicBrush(data), results, Encoders(clip=Colours()), tmp_path / "scores.json"
    )
    assert not scores.problems
    lines = {line.label: line for line in scores.lines}
    single, multi = (
        lines["single turn, against the target"],
        lines["multi turn, against the target"],
    )
    # single: 51/51, 51/102, 0/204; multi: 153/102 of session 7, 0/204 of session 8
    assert single.n == 3 and multi.n == 2
    assert single.metrics["L1"] == pytest.approx((0 + 0.2 + 0.8) / 3)
    assert single.metrics["L2"] == pytest.approx((0 + 0.04 + 0.64) / 3)
    assert multi.metrics["L1"] == pytest.approx((0.2 + 0.8) / 2)
    assert lines["single turn, against the source"].metrics["L1"] == pytest.approx(0.2 / 3)
    assert lines["multi turn, against the source"].metrics["L1"] == pytest.approx(0.6 / 2)
    assert single.metrics["CLIP-I"] == pytest.approx(1.0)
    expected = np.mean([(n + 2) / np.sqrt(3 * (n * n + 2)) for n in (4, 4, 1)])
    assert single.metrics["CLIP-T"] == pytest.approx(expected, abs=1e-6)
    assert single.protocol["clip"] == "clip:colours"
    assert single.protocol["items"] == "3 of 3"  # not the published set, whatever is complete
    stored = json.loads((tmp_path / "scores.json").read_text())
    assert stored["lines"][0]["metrics"] == single.metrics and len(stored["items"]) == 5


def test_what_is_missing_or_misnamed_is_said_and_the_rest_is_kept(
    magicbrush: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    data, results = magicbrush
    (results / "7/7_inde_2.png").rename(results / "7/7_inde2.png")
    (results / "8/8_1.png").write_bytes(b"no picture")
    words = ["--bench", "magicbrush", "--results", str(results), "--data", str(data), *NO_MODELS]
    status, out, err = told(capsys, *words)
    assert status == 1 and err.count("\n") == 1
    assert "4 problems among 5 pictures" in err and "'7/7_inde_2.png' is missing" in err
    assert "single turn, against the source" in out
    stored = json.loads((results / "scores.json").read_text())
    assert [row["key"] for row in stored["items"]] == ["single/7_1.png", "multi/7_iter_2.png"]
    assert len(stored["problems"]) == 4
    assert stored["lines"][0]["protocol"]["items"] == "1 of 3"


def test_steps_of_a_chain_may_lie_there(magicbrush: tuple[Path, Path], tmp_path: Path) -> None:
    data, results = magicbrush
    save(results / "7/7_iter_1.png", (0, 0, 0))
    scores = score_folder(MagicBrush(data), results, Encoders(), tmp_path / "s.json")
    assert not scores.problems


def test_what_was_scored_is_kept_when_scoring_is_stopped(
    magicbrush: tuple[Path, Path], tmp_path: Path
) -> None:
    data, results = magicbrush

    def stop(done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score_folder(MagicBrush(data), results, Encoders(), tmp_path / "s.json", stop)
    stored = json.loads((tmp_path / "s.json").read_text())
    assert len(stored["items"]) == 2 and stored["lines"][0]["protocol"]["items"] == "2 of 3"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_scoring_after_the_item_at_hand(
    magicbrush: tuple[Path, Path], tmp_path: Path, number: signal.Signals
) -> None:
    data, results = magicbrush

    def stop(done: int, total: int) -> None:
        if done == 2:
            os.kill(os.getpid(), number)

    out = tmp_path / "s.json"
    with pytest.raises(Interrupted, match=rf"stopped after 2 of 5 pictures, .* are in {out}") as e:
        score_folder(MagicBrush(data), results, Encoders(), out, stop)
    assert e.value.status == 128 + number and len(json.loads(out.read_text())["items"]) == 2


def test_scores_that_do_not_fit_on_the_disk_name_their_file(
    magicbrush: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def full(*_: object, **__: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    data, results = magicbrush
    monkeypatch.setattr(Path, "write_text", full)
    out = tmp_path / "s.json"
    words = ["evaluate", "--bench", "magicbrush", "--data", str(data), "--results", str(results)]
    status = main([*words, *NO_MODELS, "--out", str(out)])
    assert (status, capsys.readouterr().err) == (1, f"prw-flux: {out}: No space left on device\n")
    assert list(tmp_path.glob(".s.json*")) == []


def test_a_full_row_stands_beside_the_paper_and_another_protocol_does_not(
    magicbrush: tuple[Path, Path], capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    data, results = magicbrush
    words = ["--bench", "magicbrush", "--results", str(results), "--data", str(data), *NO_MODELS]
    status, out, _ = told(capsys, *words, "--json")
    shown = json.loads(out)["comparisons"]
    assert status == 0 and all(one["rows"][-1][3] == "refused" for one in shown)
    assert "items is 3 of 3 here and all there" in shown[0]["notes"][0]
    monkeypatch.setattr("prw_flux.evaluation.benchmarks.magicbrush.TEST_SIZE", (2, 3))
    shown = json.loads(told(capsys, *words, "--json")[1])["comparisons"]
    l1_of = {one["line"]: one["rows"][-1][3] for one in shown if one["table"] == "magicbrush"}
    assert l1_of["single turn, against the source"] == "0.067"
    assert l1_of["single turn, against the target"] == "refused"


# Emu Edit ---------------------------------------------------------------------------------------


def edits_file(*captions: tuple[str, str], **more: Any) -> str:
    items = [{"id": str(i), "image": f"{i}.png", "input_caption": a, "output_caption": b}
             for i, (a, b) in enumerate(captions)]  # fmt: skip
    return json.dumps({"version": 1, "split": "test", "items": items, **more})


def test_emu_edit_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, results = tmp_path / "data", tmp_path / "gen"
    for index, (before, after) in enumerate([((0, 0, 0), (51, 0, 0)), ((9, 9, 9), (9, 9, 9))]):
        save(data / f"{index}.png", before)
        save(results / f"{index}.png", after)
    (data / "emu_edit.json").write_text(edits_file(("a", "long"), ("same", "same")))

    def measured(captions: str) -> Any:
        (line,) = score_folder(
            EmuEdit(data, captions=captions), results, Encoders(clip=Colours()), tmp_path / "s.json"
        ).lines
        return line

    line = measured("all")
    assert line.metrics["L1"] == pytest.approx(0.2 / 3 / 2)
    unit = [np.array(v) / np.linalg.norm(v) for v in ((52, 1, 1), (1, 1, 1), (4, 1, 1))]
    picture, grey, text = unit
    moved, asked = picture - grey, text - grey  # "a" is (1, 1, 1)
    direction = moved @ asked / np.linalg.norm(moved) / np.linalg.norm(asked)
    assert line.metrics["CLIP-I"] == pytest.approx((picture @ grey + 1) / 2, abs=1e-6)
    assert line.metrics["CLIP-dir"] == pytest.approx((direction + 0) / 2, abs=1e-6)
    assert line.metrics["CLIP-T"] == pytest.approx((picture @ text + grey @ text) / 2, abs=1e-6)
    assert line.protocol["items"] == "2 of 2" and line.protocol["captions"] == "all"
    changed = measured("changed")
    assert changed.metrics["CLIP-dir"] == pytest.approx(direction, abs=1e-6)
    assert changed.metrics["CLIP-T"] == pytest.approx(picture @ text, abs=1e-6)
    assert changed.metrics["L1"] == line.metrics["L1"]
    monkeypatch.setattr("prw_flux.evaluation.benchmarks.emu_edit.SIZES", {"test": 2})
    shown = compare(load("emu_edit"), "mine", measured("all").metrics, measured("all").protocol)
    assert "refused" not in shown.rows[-1]
    assert "the source does not state captions (CLIP-T)" in shown.notes


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (edits_file(("a", "b"), version=3), "expected version 1 and items, got version 3"),
        (edits_file(), "another version"),
        (json.dumps({"version": 1, "items": [{"id": 1}]}), "item 0 needs id, image, input_caption"),
        (edits_file(("a", "b")).replace("0.png", "/etc/0.png"), "'/etc/0.png' leaves the folder"),
    ],
)
def test_emu_edit_bad_files(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "emu_edit.json").write_text(text)
    with pytest.raises(BenchmarkError, match=said):
        EmuEdit(tmp_path)


# DreamBench -------------------------------------------------------------------------------------


def prompts_file(subjects: dict[str, str], objects: list[str], live: list[str]) -> str:
    """As google/dreambooth writes it."""

    def block(prompts: list[str]) -> str:
        lines = [f"'{p}'.format(unique_token, class_token)" for p in prompts]
        return "prompt_list = [\n" + ",\n".join(lines) + "\n]\n"

    rows = "".join(f"{name},{label}\n" for name, label in subjects.items())
    return (
        f"Classes\n\nsubject_name,class\n{rows}\nPrompts\n\n"
        f"Object Prompts\n\n{block(objects)}\nLive Subject Prompts\n\n{block(live)}"
    )


@pytest.fixture
def dreambench(tmp_path: Path) -> tuple[Path, Path]:
    data, results = tmp_path / "dataset", tmp_path / "gen"
    prompts = [[f"a {{0}} {{1}} {place} {i}" for i in range(25)] for place in ("at", "wearing")]
    text = prompts_file({"cup": "cup", "gone": "toy", "rex": "dog"}, *prompts)
    data.mkdir()
    (data / "prompts_and_classes.txt").write_text(text)
    for name, colours in {"cup": [(99, 0, 0), (0, 99, 0)], "rex": [(0, 0, 99)]}.items():
        for index, colour in enumerate(colours):
            save(data / name / f"0{index}.jpg", colour)
    for i in range(25):
        save(results / f"{i}_0.png", (99, 0, 0))
        save(results / f"{50 + i}_0.png", (0, 0, 99))
    return data, results


def test_dreambench_by_hand(dreambench: tuple[Path, Path], tmp_path: Path) -> None:
    data, results = dreambench
    bench = DreamBench(data)
    assert bench.items[0].text == "a cup at 0" and bench.items[-1].text == "a dog wearing 24"
    scores = score_folder(bench, results, Encoders(dino=Colours()), tmp_path / "s.json")
    (line,) = scores.lines
    # cup: 1 and about 0 over its two photos; rex: 1; subjects weigh the same
    assert line.metrics["DINO"] == pytest.approx((0.5 + 1) / 2, abs=0.02)
    assert line.n == 50 and line.protocol["against"] == "all photos"
    rows = [{"image_path": "dreambench/dataset/cup/00.jpg"}, {"image_path": "x/rex/00.jpg"}]
    (data / "dreambench_singleip.json").write_text(json.dumps(rows))
    scores = score_folder(DreamBench(data), results, Encoders(dino=Colours()), tmp_path / "s.json")
    assert scores.lines[1].label == "against the reference"
    assert scores.lines[1].metrics["DINO"] == pytest.approx(1.0, abs=0.01)
    assert "photos of 2 of the 30 subjects" in scores.notes[0]


def test_dreambench_of_another_version(dreambench: tuple[Path, Path], tmp_path: Path) -> None:
    data, _ = dreambench
    text = (data / "prompts_and_classes.txt").read_text()
    (data / "prompts_and_classes.txt").write_text(text.replace("'a {0} {1} at 3'", "x"))
    with pytest.raises(BenchmarkError, match="another version: 3 subjects with 24 and 25 prompts"):
        DreamBench(data)
    with pytest.raises(BenchmarkError, match="expected the folder dataset/ of google/dreambooth"):
        DreamBench(tmp_path / "nowhere")


# RefCOCO ----------------------------------------------------------------------------------------


def refs(items: list[dict[str, Any]], **more: Any) -> str:
    return json.dumps({"version": 1, "name": "refcoco-val", "items": items, **more})


def test_refcoco_by_hand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = np.full((100, 100, 3), 120, np.uint8)
    data, results = tmp_path / "data", tmp_path / "gen"
    save(data / "a.png", source)
    mask = fill_box((10, 10, 50, 50), 100, 100)
    save(data / "m.png", (mask * 255).astype(np.uint8))
    box = [10, 10, 50, 50]
    items = [{"id": str(i), "image": "a.png", "box": box, "mask": "m.png"} for i in range(2)]
    items += [{"id": "2", "image": "a.png", "box": box, "colour": "red"},
              {"id": "3", "image": "a.png", "box": box}]  # fmt: skip
    (data / "refs.json").write_text(refs(items))
    save(results / "0.png", paint_overlay(source, mask, "magenta"))
    save(results / "1.png", paint_overlay(source, fill_box((10, 10, 50, 30), 100, 100), "magenta"))
    save(results / "2.png", paint_overlay(source, fill_box((10, 10, 50, 29), 100, 100), "red"))
    save(results / "3.png", source)  # no mark
    words = ["--bench", "refcoco", "--results", str(results), "--data", str(data)]
    status, out, err = told(capsys, *words, "--json")
    assert status == 0, err
    (line,) = json.loads(out)["lines"]
    assert line["metrics"]["Acc@0.5"] == 0.5  # IoU 1, 0.5, 0.475, none
    assert line["metrics"]["cIoU"] == pytest.approx(2400 / 3200, abs=0.01)
    assert line["metrics"]["mIoU"] == pytest.approx(0.75, abs=0.01)
    assert "The paper reports nothing" in told(capsys, *words)[1]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (refs([], version=2), "another version: expected version 1 and items, got version 2"),
        (refs([{"id": "0"}]), "item 0 needs id, image and box"),
        (refs([{"id": "0", "image": "a", "box": [5, 5, 1, 9]}]), "x0 < x1"),
        (refs([{"id": "0", "image": "../a", "box": [0, 0, 1, 1]}]), "'../a' leaves the folder"),
        (refs([{"id": "0", "image": "a", "box": [0, 0, 1, 1], "colour": "mud"}]), "'mud'"),
        (refs([{"id": "0", "image": "a", "box": [0, 0, 1, 1]}] * 2), "the id '0' 2 times"),
        ("{", "cannot be read"),
    ],
)
def test_refcoco_bad_files(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "refs.json").write_text(text)
    with pytest.raises(BenchmarkError, match=said):
        RefCoco(tmp_path)


# Bad input --------------------------------------------------------------------------------------


def test_a_mistake_is_one_sentence(
    magicbrush: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, results = map(str, magicbrush)
    other = tmp_path / "other"
    save(other / "x/y.png", (0, 0, 0))
    bench = ["--bench", "magicbrush"]
    both = [*bench, "--results", results, "--data", data]
    cases: list[tuple[list[str], str]] = [
        ([], "evaluate needs a RUN, or --bench"),
        ([*both, "--samples", "4"], "--samples 4 means nothing to --bench magicbrush"),
        (["--bench", "shapes", "--data", data], "means nothing to --bench shapes"),
        (["--bench", "shapes", "--clip", data], "it is for magicbrush, emu_edit, dreambench, m"),
        (["--bench", "gedit", "--dino", data], "it is for magicbrush, emu_edit, dreambench."),
        ([*both, "--judge-model", "m"], "--judge-model m means nothing to --bench magicbrush"),
        (["--seed", "3"], "--seed 3 means nothing without --bench"),
        (["--clip", "none"], "--clip none means nothing without --bench: leave it out, or name"),
        ([*both, "--per-task", "9"], "it is for shapes."),
        (["runs/a", *both], "there is no folder runs/a"),
        ([*bench, "--data", data], "needs a RUN, or --results DIR"),
        ([*bench, "--results", results], "needs --data DIR"),
        ([*both, "--clip", str(tmp_path / "gone")], "There is no encoder at"),
        ([*both, "--clip", "nobody/nothing"], "cannot be loaded"),
        ([*both, *NO_MODELS, "--encoder", "gone_module:f"], "gone_module"),
        ([*both[:-1], str(tmp_path / "gone"), *NO_MODELS], "no folder of MagicBrush"),
        ([*both[:-1], str(other), *NO_MODELS], "is no MagicBrush folder"),
        ([*bench, "--results", str(tmp_path / "no"), "--data", data, *NO_MODELS], "no folder of"),
        ([*bench, "--results", str(other), "--data", data, *NO_MODELS], "'7/7_1.png': it holds"),
        (["--bench", "dreambench", "--results", results, "--data", data, *NO_MODELS], "nothing"),
    ]  # fmt: skip
    for words, said in cases:
        status, out, err = told(capsys, *words)
        assert status == 1 and not out and said in err and err.count("\n") == 1, (words, err)
    assert not list(magicbrush[1].glob("*.json"))


def test_captions_of_another_version(magicbrush: tuple[Path, Path]) -> None:
    data, _ = magicbrush
    for text, said in (
        ('{"7": {"7-output1.png": "a"}}', "know no '7-output2.png'"),
        ('{"8": {"8-output1.png": "a"}}', "know no session '7'"),
        ('["a"]', "another version"),
        ("{", "cannot be read"),
    ):
        (data / "local_captions.json").write_text(text)
        with pytest.raises(BenchmarkError, match=said):
            MagicBrush(data)
    (data / "local_captions.json").unlink()
    with pytest.raises(BenchmarkError, match="whose captions CLIP-T needs"):
        MagicBrush(data)
    assert len(MagicBrush(data, captions=False).items) == 5
    (data / "images/7/7-output1.png").unlink()
    with pytest.raises(BenchmarkError, match="is incomplete"):
        MagicBrush(data, captions=False)


# Real pictures ----------------------------------------------------------------------------------

SQUEEZENET = ["--clip", "none", "--dino", "none", "--encoder", "flux.squeezenet:encode"]
SIMILARITY = "cosine[flux.squeezenet:encode]"


def test_real_edits(assets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The true after-image as the output: no distance to the target, some to the source."""
    data, results = tmp_path / "data", tmp_path / "gen"
    edits = json.loads((assets / "edits/edits.json").read_text())
    edits = edits["edits"] if isinstance(edits, dict) else edits
    for number, edit in enumerate(edits):
        before, after = (open_image(assets / "edits" / edit[key]) for key in ("before", "after"))
        save(data / f"{number}/{number}-input.png", before)
        save(data / f"{number}/{number}-output1.png", after)
        save(results / f"{number}/{number}_1.png", after)
    words = ["--bench", "magicbrush", "--results", str(results), "--data", str(data), *SQUEEZENET]
    status, out, err = told(capsys, *words, "--json")
    assert status == 0, err
    answer = json.loads(out)
    lines = {line["label"]: line["metrics"] for line in answer["lines"]}
    exact = lines["single turn, against the target"]
    assert exact["L1"] == exact["L2"] == 0.0 and exact[SIMILARITY] == pytest.approx(1, abs=1e-6)
    near = lines["single turn, against the source"]
    assert 0 < near["L1"] < 0.2 and 0.5 < near[SIMILARITY] < 0.9999
    assert not any("CLIP-I" in metrics for metrics in lines.values())
    assert near["L1"] == pytest.approx(np.mean([
        l1(open_image(assets / "edits" / e["after"]), open_image(assets / "edits" / e["before"]))
        for e in edits
    ]))  # fmt: skip
    assert SIMILARITY in told(capsys, *words)[1]


def test_real_subjects(assets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A photo of the subject as every result is nearer to the subject than one of another."""
    source = json.loads((assets / "dreambench/dreambench.json").read_text())
    chosen = {name: source["subjects"][name] for name in ("dog", "vase")}
    data = tmp_path / "dataset"
    data.mkdir()
    text = prompts_file({name: facts["class"] for name, facts in chosen.items()},
                        source["object_prompts"], source["live_prompts"])  # fmt: skip
    (data / "prompts_and_classes.txt").write_text(text)
    for name in chosen:
        (data / name).symlink_to(assets / "dreambench/images" / name)

    def similarity(order: tuple[str, str]) -> float:
        results = tmp_path / order[0]
        for number, name in enumerate(order):
            picture = open_image(assets / f"dreambench/images/{name}/00.jpg")
            for prompt in range(25):
                save(results / f"{25 * number + prompt}_0.png", picture[::2, ::2])
        words = ["--bench", "dreambench", "--results", str(results), "--data", str(data)]
        status, out, err = told(capsys, *words, *SQUEEZENET, "--json")
        assert status == 0, err
        return float(json.loads(out)["lines"][0]["metrics"][SIMILARITY])

    own, swapped = similarity(("dog", "vase")), similarity(("vase", "dog"))
    assert own > swapped + 0.05


def test_real_expressions(assets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, results = tmp_path / "data", tmp_path / "gen"
    items = []
    for one in json.loads((assets / "grounding/grounding.json").read_text())["items"]:
        source = open_image(assets / "grounding" / one["image"])
        mask = open_map(assets / "grounding" / one["mask"]) >= 128
        save(data / f"images/{one['id']}.png", source)
        save(data / f"masks/{one['id']}.png", (mask * 255).astype(np.uint8))
        save(results / f"{one['id']}.png", paint_overlay(source, mask, "magenta"))
        items.append({"id": one["id"], "image": f"images/{one['id']}.png",
                      "box": one["box_xyxy"], "mask": f"masks/{one['id']}.png"})  # fmt: skip
    (data / "refs.json").write_text(refs(items))
    status, out, err = told(
        capsys, "--bench", "refcoco", "--results", str(results), "--data", str(data), "--json"
    )
    assert status == 0, err
    (line,) = json.loads(out)["lines"]
    assert line["n"] == 13 and line["metrics"]["Acc@0.5"] == 1.0
    assert line["metrics"]["cIoU"] > 0.97 and line["metrics"]["mIoU"] > 0.97
