"""Generating benchmarks' pictures: who makes what, what is kept, and what is said when it fails."""

from __future__ import annotations

import json
import os
import resource
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from prw.atomic import replace_file
from prw_flux.data.images import open_image
from prw_flux.evaluation import Sampling
from prw_flux.evaluation.benchmarks import (
    BenchmarkError,
    DreamBench,
    EmuEdit,
    Encoders,
    MagicBrush,
    Making,
    Shapes,
    produce,
    score_folder,
)
from prw_flux.evaluation.benchmarks.making import RECORD, seed_of
from prw_flux.evaluation.benchmarks.making import save as write_picture
from prw_flux.interrupt import Interrupted
from prw_flux.share import Share, gathering

Asked = tuple[int, str, str, int]


class Pipe:
    """Answers with noise of the seed, brighter by the source; keeps what it was asked."""

    _execution_device = torch.device("cpu")
    transformer = None

    def __init__(self, resolution: int | None = 64) -> None:
        self.calls: list[list[Asked]] = []
        self.broken = ""
        known = SimpleNamespace(resolution=resolution)
        self.prw = SimpleNamespace(task=self._task, route=lambda route: None, config=known)

    def _task(self, name: str) -> None:
        if name not in ("edit", "customise", "inpaint", "ground"):
            raise ValueError(f"There is no task {name!r}")

    def set_progress_bar_config(self, **_: Any) -> None:
        """Nothing to set."""

    def __call__(self, *, image: Any, prompt: Any, task: str, generator: Any, **more: Any) -> Any:
        assert len({picture.shape for picture in image}) == 1
        self.calls.append([
            (int(source[0, 0, 0]), text, task, noise.initial_seed())
            for source, text, noise in zip(image, prompt, generator, strict=True)
        ])  # fmt: skip
        height, width = more.get("height", 48), more.get("width", 48)
        out = []
        for source, text, noise in zip(image, prompt, generator, strict=True):
            grain = torch.rand((height, width, 3), generator=noise).numpy()
            out.append(0.5 * grain + 0.4 * source[0, 0, 0] / 255 + 0.01 * len(image))
            if text == self.broken:
                out[-1] = np.full_like(out[-1], np.nan)
        return SimpleNamespace(images=np.stack(out))

    @property
    def asked(self) -> list[Asked]:
        return [one for call in self.calls for one in call]


def save(path: Path, grey: int, side: int = 48) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((side, side, 3), grey, np.uint8)).save(path)


@pytest.fixture
def sessions(tmp_path: Path) -> MagicBrush:
    """Session 7 of three turns, 8 and 9 of one."""
    data = tmp_path / "data"
    asked = {}
    for name, greys in {"7": (10, 60, 110, 160), "8": (20, 200), "9": (30, 220)}.items():
        save(data / f"{name}/{name}-input.png", greys[0])
        for turn, grey in enumerate(greys[1:], start=1):
            save(data / f"{name}/{name}-output{turn}.png", grey)
        asked[name] = [{"instruction": f"{name} turn {k}"} for k in range(1, len(greys))]
    (data / "edit_sessions.json").write_text(json.dumps(asked))
    return MagicBrush(data, captions=False)


def made(
    benchmark: Any, results: Path, pipe: Any = None, *, batch: int = 1, **more: Any
) -> tuple[Pipe, dict[str, str]]:
    pipe = pipe or Pipe()
    sampling = Sampling(steps=2, batch_size=batch, representation=more.pop("representation", 1.0))
    making = Making(sampling=sampling, **more.pop("making", {}))
    return pipe, produce(pipe, benchmark, results, making, adapter="a", **more)


def contents(results: Path) -> dict[str, bytes]:
    return {p.relative_to(results).as_posix(): p.read_bytes() for p in results.rglob("*.png")}


# What is asked, and where it goes -----------------------------------------------------------------


def test_single_turns_start_from_the_truth_and_chains_from_the_own_output(
    sessions: MagicBrush, tmp_path: Path
) -> None:
    results = tmp_path / "gen"
    pipe, problems = made(sessions, results)
    assert not problems
    assert sorted(contents(results)) == ["7/7_1.png", "7/7_inde_2.png", "7/7_inde_3.png",
                                         "7/7_iter_2.png", "7/7_iter_3.png", "8/8_1.png",
                                         "9/9_1.png"]  # fmt: skip
    by_seed = {seed: (grey, text, task) for grey, text, task, seed in pipe.asked}

    def given(output: str) -> tuple[int, str, str]:
        return by_seed[seed_of(0, "magicbrush", output)]

    assert given("7/7_1.png") == (10, "7 turn 1", "edit")
    assert given("7/7_inde_2.png") == (60, "7 turn 2", "edit")
    assert given("7/7_inde_3.png") == (110, "7 turn 3", "edit")
    first, second = (int(open_image(results / f"7/7_{n}.png")[0, 0, 0]) for n in ("1", "iter_2"))
    assert given("7/7_iter_2.png") == (first, "7 turn 2", "edit")
    assert given("7/7_iter_3.png") == (second, "7 turn 3", "edit")
    scores = score_folder(sessions, results, Encoders(), tmp_path / "s.json")
    assert not scores.problems and len(scores.rows) == 8
    assert scores.rows[0]["text"] == "7 turn 1" and scores.rows[0]["given"].endswith("7-input.png")


def test_dreambench_gives_the_fixed_photo_and_asks_for_squares(tmp_path: Path) -> None:
    data = tmp_path / "dataset"
    prompts = [f"'a {{0}} {{1}} at {i}'.format(unique_token, class_token)" for i in range(25)]
    block = "[\n" + ",\n".join(prompts) + "\n]\n"
    data.mkdir()
    (data / "prompts_and_classes.txt").write_text(
        f"subject_name,class\ncup,cup\n\nObject Prompts\n{block}\nLive Subject Prompts\n{block}"
    )
    for index, grey in enumerate((50, 90)):
        save(data / f"cup/0{index}.jpg", grey, side=80)
    (data / "dreambench_singleip.json").write_text('[{"image_path": "x/cup/01.jpg"}]')
    pipe, problems = made(DreamBench(data), tmp_path / "gen", batch=5)
    assert not problems and [len(call) for call in pipe.calls] == [5] * 5
    assert {(grey, task) for grey, _, task, _ in pipe.asked} == {(90, "customise")}
    assert pipe.asked[3][1] == "a cup at 3"
    assert open_image(tmp_path / "gen/24_0.png").shape == (64, 64, 3)
    with pytest.raises(BenchmarkError, match="use --size"):
        made(DreamBench(data), tmp_path / "other", Pipe(resolution=None))


def test_shapes_draws_the_same_scenes_and_scores_perfect_answers_high(tmp_path: Path) -> None:
    bench = Shapes(["inpaint", "ground", "own"], size=96, per_task=3)
    assert [item.output for item in bench.items] == [
        item.output for item in Shapes(["inpaint", "ground"], size=96, per_task=3).items
    ]
    made(bench, tmp_path / "gen", batch=3, making={"side": 96})
    for item in bench.items:
        Image.fromarray(item.sample.triple.target).save(tmp_path / "gen" / item.output)
    scores = score_folder(bench, tmp_path / "gen", Encoders(), tmp_path / "s.json")
    assert not scores.problems and [line.n for line in scores.lines] == [3, 3]
    assert all(line.metrics["headline"] > 0.95 for line in scores.lines)
    source = open_image(Path(scores.rows[0]["given"]))
    np.testing.assert_array_equal(source, bench.items[0].sample.triple.source)
    target = open_image(Path(scores.rows[0]["target"]))
    np.testing.assert_array_equal(target, bench.items[0].sample.triple.target)
    with pytest.raises(BenchmarkError, match="needs a task with an exact metric"):
        Shapes(["own"], size=96)


# Going on, sharing --------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 2])
def test_what_is_whole_is_kept_and_what_is_made_again_is_the_same(
    sessions: MagicBrush, tmp_path: Path, batch: int
) -> None:
    results = tmp_path / "gen"
    made(sessions, results, batch=batch)
    before = contents(results)
    again, _ = made(sessions, results, batch=batch)
    assert not again.calls
    (results / "7/7_iter_2.png").unlink()
    (results / "9/9_1.png").write_bytes(before["9/9_1.png"][:200])  # cut off
    (results / "9/.9_1.png.0af.new").write_bytes(b"left by a kill")
    resumed, _ = made(sessions, results, batch=batch)
    assert contents(results) == before and not list(results.rglob("*.new"))
    # the same company in a call as before, so the same rounding
    assert [len(call) for call in resumed.calls] == ([1, 1] if batch == 1 else [1, 2])


@pytest.mark.parametrize(("batch", "count"), [(1, 2), (1, 5), (2, 2)])
def test_ranks_share_the_work_and_make_what_one_process_makes(
    sessions: MagicBrush, tmp_path: Path, batch: int, count: int
) -> None:
    made(sessions, tmp_path / "one", batch=batch)
    asked: list[Asked] = []
    for rank in range(count):
        share = Share(rank=rank, count=count)
        pipe, _ = made(sessions, tmp_path / "many", batch=batch, share=share)
        assert len(pipe.asked) < 7
        asked += pipe.asked
    assert len(asked) == len(set(asked)) == 7
    assert contents(tmp_path / "one") == contents(tmp_path / "many")


def test_ranks_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    with gathering() as share:
        assert share == Share() and share.gather("a") == ["a"]
    for rank, count, said in (("2", "2", "not one of WORLD_SIZE=2"), ("a", "2", "are numbers")):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", count)
        with pytest.raises(ValueError, match=said), gathering():
            pass


def test_a_signal_ends_after_the_call_at_hand_and_the_next_run_goes_on(
    sessions: MagicBrush, tmp_path: Path
) -> None:
    def stop(done: int, total: int) -> None:
        if done == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted, match="after 5 of 7 pictures; the same command") as caught:
        made(sessions, tmp_path / "gen", told=stop)
    assert caught.value.status == 143 and len(contents(tmp_path / "gen")) == 5
    pipe, _ = made(sessions, tmp_path / "gen")
    assert len(pipe.asked) == 2


# Bad input ----------------------------------------------------------------------------------------


def test_pictures_that_were_made_otherwise_are_not_mixed_with_new_ones(
    sessions: MagicBrush, tmp_path: Path
) -> None:
    made(sessions, tmp_path / "gen")
    with pytest.raises(BenchmarkError, match="made with seed 0 and not 1: name another folder"):
        made(sessions, tmp_path / "gen", making={"seed": 1})
    with pytest.raises(BenchmarkError, match="made with features None and not 'f', representation"):
        made(sessions, tmp_path / "gen", features="f")
    (tmp_path / "gen" / RECORD).write_text("{")
    with pytest.raises(BenchmarkError, match="cannot be read"):
        made(sessions, tmp_path / "gen")


def test_the_features_and_their_strength_are_part_of_how_pictures_are_made(
    sessions: MagicBrush, tmp_path: Path
) -> None:
    results = tmp_path / "gen"
    made(sessions, results, features="f")
    written = json.loads((results / RECORD).read_text())
    assert (written["features"], written["representation"]) == ("f", 1.0)
    with pytest.raises(BenchmarkError, match="made with features 'f' and not 'g': name"):
        made(sessions, results, features="g")
    with pytest.raises(BenchmarkError, match="made with representation 1.0 and not 0.5: name"):
        made(sessions, results, features="f", representation=0.5)
    pipe, _ = made(sessions, results, features="f")
    assert not pipe.calls


def test_a_source_that_cannot_be_read_costs_what_hangs_on_it_and_no_more(
    sessions: MagicBrush, tmp_path: Path
) -> None:
    (tmp_path / "data/7/7-input.png").write_bytes(b"no picture")
    results = tmp_path / "gen"
    _, problems = made(sessions, results, batch=2)
    assert sorted(problems) == ["7/7_1.png", "7/7_iter_2.png", "7/7_iter_3.png"]
    assert "not a picture" in problems["7/7_1.png"]
    assert sorted(contents(results)) == ["7/7_inde_2.png", "7/7_inde_3.png", "8/8_1.png",
                                         "9/9_1.png"]  # fmt: skip
    scores = score_folder(sessions, results, Encoders(), tmp_path / "s.json", reasons=problems)
    assert problems["7/7_1.png"] in scores.problems
    kept = {f"{setting}/{n}_1.png" for setting in ("single", "multi") for n in (8, 9)}
    kept |= {"single/7_inde_2.png", "single/7_inde_3.png"}
    assert {row["key"] for row in scores.rows} == kept


def test_a_picture_that_is_not_finite_is_not_written(sessions: MagicBrush, tmp_path: Path) -> None:
    pipe = Pipe()
    pipe.broken = "8 turn 1"
    _, problems = made(sessions, tmp_path / "gen", pipe)
    assert problems == {"8/8_1.png": "8/8_1.png was not made: the model's picture is not finite"}


def test_a_disk_that_is_full_keeps_what_was_made_and_the_same_command_goes_on(
    sessions: MagicBrush, tmp_path: Path
) -> None:
    made(sessions, tmp_path / "whole")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(done: int, total: int) -> None:
        if done == 2:  # pictures of noise have 7 kB
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))

    results = tmp_path / "gen"
    try:
        with pytest.raises(BenchmarkError, match=r"png cannot be written \(File too large\)"):
            made(sessions, results, told=fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert len(contents(results)) == 2 and not list(results.rglob(".*"))
    pipe, _ = made(sessions, results)
    assert len(pipe.calls) == 5 and contents(results) == contents(tmp_path / "whole")


def test_ranks_may_write_the_same_map_and_leftovers_do_not_stay(
    sessions: MagicBrush, tmp_path: Path
) -> None:
    path, picture = tmp_path / "annotations/0.png", np.zeros((8, 8, 3), np.uint8)
    with replace_file(path) as other:
        write_picture(path, picture)
        Image.fromarray(picture).save(other, "PNG")
    assert open_image(path, min_side=1).shape == (8, 8, 3)
    results = tmp_path / "gen"
    killed = results / "7/.7_1.png.0123.new"
    killed.parent.mkdir(parents=True)
    killed.write_bytes(b"half")
    made(sessions, results, share=Share(rank=1, count=2))
    assert killed.is_file()  # the other rank may be writing it
    made(sessions, results)
    assert not killed.exists()


def test_without_instructions_nothing_is_begun(sessions: MagicBrush, tmp_path: Path) -> None:
    data, results = tmp_path / "data", tmp_path / "gen"
    asked = json.loads((data / "edit_sessions.json").read_text())
    asked["7"].pop()
    (data / "edit_sessions.json").write_text(json.dumps(asked))
    with pytest.raises(BenchmarkError, match=r"tells no instruction for '7/7_inde_3.png'"):
        made(MagicBrush(data, captions=False), results)
    (data / "edit_sessions.json").write_text('{"7": 3}')
    with pytest.raises(BenchmarkError, match="another version"):
        MagicBrush(data, captions=False)
    save(data / "a.png", 9)
    row = {"id": "0", "image": "a.png", "input_caption": "a", "output_caption": "b"}
    (data / "emu_edit.json").write_text(json.dumps({"version": 1, "items": [row]}))
    with pytest.raises(BenchmarkError, match="item '0' has no instruction"):
        made(EmuEdit(data), results)
    assert not results.exists()


def test_a_task_that_the_adapter_has_not_learned_is_named(tmp_path: Path) -> None:
    bench = Shapes(["control"], size=96, per_task=1)
    with pytest.raises(ValueError, match="no task 'control'"):
        made(bench, tmp_path / "gen")
    with pytest.raises(ValueError, match="multiple of 16, got 50"):
        Making(sampling=Sampling(), side=50)
