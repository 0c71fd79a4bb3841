"""A trained run through every benchmark: generate, score, report. Real pictures where there are."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from flux import bench_folders

from prw_flux.cli import main
from prw_flux.data.images import open_image
from prw_flux.rundir import RunFolder

SQUEEZENET = ("--clip", "none", "--dino", "none", "--encoder", "flux.squeezenet:encode")
SIMILARITY = "cosine[flux.squeezenet:encode]"
DISTANCE = "frechet[flux.squeezenet:encode]"


@pytest.fixture(scope="module")
def run(short_config: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All five stages, a step each, on a random base."""
    from prw_flux.recipes import demo
    from prw_flux.session import open_session
    from prw_flux.trainer import open_training_data, train

    stages = tuple(replace(stage, steps=1, batch_size=2) for stage in demo().stages)
    config = replace(short_config, stages=stages)
    session = open_session(config)
    folder = RunFolder.create(tmp_path_factory.mktemp("runs") / "five", config)
    train(folder, session, open_training_data(config, session))
    return folder.path


@pytest.fixture
def told(capsys: pytest.CaptureFixture[str], run: Path) -> Callable[..., dict[str, Any]]:
    def evaluate(*words: str | Path, status: int = 0) -> dict[str, Any]:
        found = main(["evaluate", str(run), "--steps", "1", "--json", *map(str, words)])
        captured = capsys.readouterr()
        assert found == status, captured.err
        return dict(json.loads(captured.out)) if captured.out else {"err": captured.err}

    return evaluate


def metrics(answer: dict[str, Any]) -> dict[str, float]:
    assert not answer["problems"], answer["problems"]
    return dict(answer["lines"][0]["metrics"])


def pictures(home: Path) -> dict[str, bytes]:
    return {p.relative_to(home).as_posix(): p.read_bytes() for p in sorted(home.rglob("*.png"))}


def test_shapes_is_generated_scored_and_shown(run: Path, told: Any) -> None:
    answer = told("--bench", "shapes", "--per-task", "2")
    assert [line["label"].split()[0] for line in answer["lines"]] == [
        "inpaint", "ground", "control", "customise", "edit"
    ]  # fmt: skip
    assert all(line["n"] == 2 for line in answer["lines"]) and not answer["problems"]
    assert answer["time"]["pictures"]["items"] == answer["time"]["scores"]["items"] == 10
    assert answer["time"]["pictures"]["processor"] > 0 < answer["time"]["loading"]["seconds"]
    home = run / "benchmarks/shapes"
    assert answer["out"] == str(home / "scores.json")
    before = pictures(home)
    assert len(before) == 3 * 10
    page = (run / "report.html").read_text()
    assert 'id="benchmarks"' in page and "data:image/jpeg;base64," in page
    (home / "pictures/edit").rename(home / "gone")
    assert not told("--bench", "shapes", "--per-task", "2")["problems"]
    assert {k: v for k, v in pictures(home).items() if not k.startswith("gone")} == before
    assert "made with batch 32 and not 3" in told("--bench", "shapes", "--batch", "3",
                                                  "--per-task", "2", status=1)["err"]  # fmt: skip


def test_mistakes_are_found_before_anything_is_generated(
    run: Path, told: Any, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    bench_folders.save(data / "a.png", bench_folders.np.zeros((48, 48, 3), "uint8"))
    row = {"id": "0", "image": "a.png", "instruction": "x", "input_caption": "a",
           "output_caption": "b"}  # fmt: skip
    bench_folders.write(data / "emu_edit.json", {"version": 1, "split": "test", "items": [row]})
    bench = ("--bench", "emu_edit", "--data", data, "--results", tmp_path / "gen")
    for words, said in (
        (("--bench", "magicbrush"), "needs --data DIR"),
        ((*bench, "--clip", tmp_path / "gone"), "There is no encoder at"),
        ((*bench, *SQUEEZENET[:4], "--route", "stage:nothing"), "nothing"),
        ((*bench, *SQUEEZENET[:4], "--base", tmp_path / "gone"), "does not exist"),
        ((*bench, *SQUEEZENET[:4], "--size", "50"), "multiple of 16, got 50"),
        (("--bench", "gedit", "--data", data), "gedit.json"),
        (("--bench", "shapes", "--per-task", "0"), "at least one"),
        (("--bench", "shapes", "--size", "128"), "drawn at the run's 64 pixels"),
    ):
        err = told(*words, status=1)["err"]
        assert said in err and err.count("\n") == 1, (words, err)
    assert not (tmp_path / "gen").exists()
    bench_folders.write(data / "emu_edit.json", {"version": 7})
    assert "got version 7" in told(*bench, status=1)["err"]


@pytest.mark.slow
def test_real_edits(assets: Path, run: Path, told: Any, tmp_path: Path) -> None:
    data = bench_folders.magicbrush(assets, tmp_path / "mb")
    answer = told("--bench", "magicbrush", "--data", data, *SQUEEZENET)
    assert [line["n"] for line in answer["lines"]] == [4, 4, 2, 2]
    assert set(metrics(answer)) == {"L1", "L2", SIMILARITY}
    home = run / "benchmarks/magicbrush/pictures"
    assert len(pictures(home)) == 6 and (home / "100/100_iter_3.png").is_file()
    assert answer["comparisons"][0]["rows"][-1][3] == "refused"
    data = bench_folders.emu_edit(assets, tmp_path / "emu")
    assert set(metrics(told("--bench", "emu_edit", "--data", data, *SQUEEZENET))) == {
        "L1", SIMILARITY
    }  # fmt: skip


@pytest.mark.slow
def test_real_subjects_and_expressions(assets: Path, run: Path, told: Any, tmp_path: Path) -> None:
    data = bench_folders.dreambench(assets, tmp_path / "db")
    answer = told("--bench", "dreambench", "--data", data, *SQUEEZENET)
    assert [line["label"] for line in answer["lines"]] == [
        "against all photos", "against the reference"
    ]  # fmt: skip
    assert 0 < metrics(answer)[SIMILARITY] < 1 and answer["lines"][0]["n"] == 25
    data = bench_folders.refcoco(assets, tmp_path / "ref")
    assert set(metrics(told("--bench", "refcoco", "--data", data))) == {"Acc@0.5", "cIoU", "mIoU"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("condition", "maps", "metric"),
    [
        ("canny", None, "canny F1"),
        ("hed", None, "hed SSIM"),
        ("lineart", None, "lineart SSIM"),
        ("depth", "flux.bench_folders:brightness", "depth RMSE"),
        ("seg", "flux.bench_folders:grey_classes", "seg mIoU trial"),
    ],
)
def test_real_maps(
    assets: Path, run: Path, told: Any, tmp_path: Path, condition: str, maps: str | None,
    metric: str,
) -> None:  # fmt: skip
    data = bench_folders.multigen(assets, tmp_path / "mg", condition)
    spec = () if maps is None else ("--maps", maps)
    answer = told("--bench", "multigen", "--data", data, "--samples", "2", *spec, *SQUEEZENET)
    more = {"lineart SSIM unwrapped"} if condition == "lineart" else set()
    assert set(metrics(answer)) == {metric, f"{condition} {DISTANCE}"} | more
    home = run / f"benchmarks/multigen-{condition}-trial/pictures"
    assert open_image(next((home / "images/group_1").glob("*.png"))).ndim == 3
    assert len(list((home / "annotations").iterdir())) == 2


@pytest.mark.slow
def test_real_grading_from_recorded_answers(
    assets: Path, run: Path, told: Any, tmp_path: Path
) -> None:
    data = bench_folders.gedit(assets, tmp_path / "gedit")
    rows = [{"key": f"{group}/en/k{n}", "part": part, "answer": f'{{"score": [{n + 1}, 9]}}'}
            for n, group in enumerate(("color_alter", "style", "color_alter"))
            for part in ("SC", "PQ")]  # fmt: skip
    answers = tmp_path / "answers.jsonl"
    answers.write_text("".join(json.dumps(row) + "\n" for row in rows))
    answer = told("--bench", "gedit", "--data", data, "--answers", answers)
    assert metrics(answer)["G_O"] == pytest.approx(((1 + 3) / 2 + 2) / 2)
    assert (run / "benchmarks/gedit/pictures/fullset/style/en/k1_SRCIMG.png").is_file()
    rows.pop()
    answers.write_text("".join(json.dumps(row) + "\n" for row in rows))
    told("--bench", "gedit", "--data", data, "--answers", answers, status=1)
    stored = json.loads((run / "benchmarks/gedit/scores.json").read_text())
    assert len(stored["items"]) == 2 and "no answer was recorded" in stored["problems"][0]


# Processes ----------------------------------------------------------------------------------------

COMMAND = "import sys; from prw_flux.cli import main; sys.exit(main(sys.argv[1:]))"


def start(run: Path, results: Path, **environment: str) -> subprocess.Popen[str]:
    words = ["evaluate", str(run), "--bench", "shapes", "--per-task", "4", "--steps", "1",
             "--batch", "2", "--results", str(results), "--json"]  # fmt: skip
    return subprocess.Popen(
        [sys.executable, "-c", COMMAND, *words], env=os.environ | environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_killed_generation_and_one_of_two_ranks_make_what_one_process_makes(
    run: Path, tmp_path: Path
) -> None:
    plain = start(run, tmp_path / "plain")
    out, _ = plain.communicate(timeout=280)
    assert plain.returncode == 0, out
    whole = pictures(tmp_path / "plain")
    assert len(whole) == 3 * 20

    killed = start(run, tmp_path / "killed")
    while killed.poll() is None and len(pictures(tmp_path / "killed")) < 9:
        time.sleep(0.01)
    killed.kill()
    killed.communicate()
    assert killed.returncode == -9 and len(pictures(tmp_path / "killed")) < len(whole)
    again = start(run, tmp_path / "killed")
    out, _ = again.communicate(timeout=280)
    assert again.returncode == 0, out
    assert pictures(tmp_path / "killed") == whole

    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
              "GLOO_SOCKET_IFNAME": "lo"}  # fmt: skip
    ranks = [start(run, tmp_path / "two", RANK=str(rank), **shared) for rank in range(2)]
    outs = [rank.communicate(timeout=280)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], outs
    assert pictures(tmp_path / "two") == whole
    assert '"lines"' in outs[0] and '"lines"' not in outs[1]
