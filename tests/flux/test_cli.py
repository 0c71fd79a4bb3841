"""prw-flux: exit statuses, one sentence per mistake, and the whole path on a small base."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from prw_flux.cli import build_parser, main, show
from prw_flux.cli.train import configured
from prw_flux.config import RunConfig
from prw_flux.rundir import RunFolder

SMALL = """size=64 data.samples=6 log_every=2 save_every=2 precision=fp32 adapter.rank=2
adapter.alpha=none stages.*.steps=2 stages.*.batch_size=2 held_out.samples=2""".split()


@pytest.fixture(scope="module")
def small(tiny_base: Path) -> list[str]:
    """Arguments that make a recipe a run of a second."""
    return [a for s in [f"base.path={tiny_base}", *SMALL] for a in ("--set", s)]


@pytest.fixture(scope="module")
def trained(short_config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    from prw_flux.session import open_session
    from prw_flux.trainer import open_training_data, train

    session = open_session(short_config)
    run = RunFolder.create(tmp_path_factory.mktemp("trained") / "run", short_config)
    train(run, session, open_training_data(short_config, session))
    return run.path


def told(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of a command."""
    status = main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    return status, out, err


def size_of(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.size


def test_some_of_the_stages_only(capsys: pytest.CaptureFixture[str]) -> None:
    names = ["train", "demo", "--only", "edit", "--only", "ground"]
    config = configured(build_parser().parse_args(names))
    assert [stage.name for stage in config.stages] == ["ground", "edit"]  # in the recipe's order
    status, _, err = told(capsys, "train", "demo", "--only", "paint")
    assert status == 1
    assert "--only paint: there is no such stage, but inpaint, ground" in err


@pytest.mark.parametrize("verb", ["", "demo", "train", "generate", "evaluate", "report", "inspect",
                                  "memory", "data", "tiny", "tiny build"])  # fmt: skip
def test_every_verb_explains_itself(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*verb.split(), "--help"])
    assert stop.value.code == 0
    assert "usage: prw-flux" in capsys.readouterr().out


@pytest.mark.parametrize("words", [[], ["fly"], ["generate"], ["inspect"], ["train", "--fly"]])
def test_wrong_usage_is_status_2(words: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        build_parser().parse_args(words)
    assert stop.value.code == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train"], "train needs a recipe"),
        (["train", "shpes"], "there is no recipe 'shpes'; did you mean 'shapes'"),
        (["train", "demo", "--set", "adapter.rnk=3"], "did you mean 'adapter.rank'"),
        (["train", "demo", "--set", "seed=abc"], "seed must be a whole number, got 'abc'"),
        (["train", "demo", "--stage", "colour"], "unknown task 'colour'"),
        (["train", "demo", "--set", "base.path=gone"], "The base gone does not exist"),
        (["train", "--from", "gone"], "there is no folder gone"),
        (["demo", "--photos", "gone"], "gone"),
        (["train", "photos", "--photos", "gone"], "gone"),
        (["train", "--resume", "gone"], "there is no folder gone"),
        (["train", "--resume"], "--resume needs the run folder"),
        (["train", "demo", "--resume", "x", "--stage", "edit"], "keeps its configuration"),
        (["inspect", "."], "is not a run: it holds no run.json"),
        (["evaluate", "."], "is not a run"),
        (["report", "."], "is not a run"),
        (["generate", "--run", ".", "--prompt", "x", "--out", "x.png"], "is not a run"),
        (["generate", "--run", ".", "--prompt", "x", "--out", "x.xyz"], "use .png"),
        (["data", "--photos", "gone"], "gone"),
        (["data", "--task", "colour"], "unknown task 'colour'"),
        (["data", "--size", "97"], "97"),
    ],
)
def test_a_mistake_is_one_sentence_and_writes_nothing(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    status, out, err = told(capsys, *arguments)
    assert status == 1
    assert said in err and err.count("\n") == 1 and err.startswith("prw-flux: ")
    assert not out and not list(tmp_path.iterdir())


def test_train_inspect_and_extend(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, small: list[str]
) -> None:
    run = tmp_path / "run"
    command = ["train", "demo", "--out", run, "--no-evaluation", *small]
    assert told(capsys, *command)[0] == 0
    status, _, err = told(capsys, *command)
    assert status == 1 and "holds a run already" in err
    assert told(capsys, "train", "--resume", run, "--no-evaluation", "--json") == (
        0, json.dumps({"run": str(run)}, indent=1) + "\n", ""
    )  # fmt: skip

    status, _, err = told(capsys, "train", "--resume", run, "--set", "stages.edit.lr=0.3")
    assert status == 1 and "stages.edit.lr of" in err and "not 0.3" in err

    status, out, _ = told(capsys, "inspect", run, "--json")
    facts = json.loads(out)
    assert [s["name"] for s in facts["stages"]] == [
        "inpaint", "ground", "control", "customise", "edit"
    ]  # fmt: skip
    assert all(s["rank"] == 2 and len(s["sha256"]) == 64 for s in facts["stages"])
    assert "inpaint" in told(capsys, "inspect", run)[1]

    more = tmp_path / "more"
    extend = ["train", "--from", run, "--out", more, "--no-evaluation"]
    assert "add one with --stage" in told(capsys, *extend)[2]
    assert "named differently" in told(capsys, *extend, "--stage", "edit")[2]
    extend += ["--stage", "edit-2=edit"]
    assert "cannot be changed" in told(capsys, *extend, "--set", "stages.edit.steps=9")[2]
    assert "--set adapter.gate=softmax" in told(capsys, *extend, "--set", "adapter.gate=one")[2]
    extend[4] = run
    assert "cannot extend itself" in told(capsys, *extend)[2]
    assert not more.exists()


def test_a_run_without_any_metric_still_has_its_report(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    small: list[str],
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "only_mine.py").write_text(
        "from dataclasses import replace\n"
        "from prw_flux.curriculum import Stage\n"
        "from prw_flux.recipes import demo\n"
        "from prw_flux.tasks import Task\n"
        "class Grey(Task):\n"
        "    name, sentence = 'grey', 'Give the grey picture its colours.'\n"
        "    def missing(self, example):\n        return None\n"
        "    def make(self, example, rng):\n"
        "        return self.triple(example, 'grey', example.image, 'grey', example.image)\n"
        "def recipe():\n"
        "    stage = Stage(task='only_mine:Grey', steps=2, batch_size=2)\n"
        "    return replace(demo(), stages=(stage,))\n"
    )
    run = tmp_path / "run"
    status, out, err = told(capsys, "train", "only_mine:recipe", "--out", run, "--quiet", *small)
    assert status == 0 and "has an exact metric: grey" in err
    assert (run / "report.html").is_file() and str(run / "report.html") in out


def test_the_newest_expert_can_be_trained_on_a_task_of_ones_own(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    trained: Path,
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "grey_tasks.py").write_text(
        "from prw_flux.tasks import Task\n"
        "class Grey(Task):\n"
        "    name, sentence = 'grey', 'Give the grey picture its colours.'\n"
        "    def missing(self, example):\n        return None\n"
        "    def make(self, example, rng):\n"
        "        source = example.image.mean(-1, keepdims=True).repeat(3, -1).astype('uint8')\n"
        "        return self.triple(example, 'grey', source, example.caption, example.image)\n"
    )
    more = tmp_path / "more"
    assert told(capsys, "train", "--from", trained, "--out", more, "--no-evaluation",
                "--stage", "grey_tasks:Grey")[0] == 0  # fmt: skip
    facts = json.loads(told(capsys, "inspect", more, "--json")[1])
    old = json.loads(told(capsys, "inspect", trained, "--json")[1])
    assert [s["name"] for s in facts["stages"]] == ["inpaint", "ground", "control", "grey"]
    assert [s["sha256"] for s in facts["stages"]][:3] == [s["sha256"] for s in old["stages"]]
    assert facts["parent"] == str(trained)

    Image.fromarray(np.full((70, 90, 3), 99, np.uint8)).save(tmp_path / "photo.png")
    photo, made = tmp_path / "photo.png", tmp_path / "new" / "out.png"
    generate = ["generate", "--run", more, "--task", "grey", "--image", photo, "--steps", "1"]
    generate += ["--prompt", "a circle", "--out", made]
    status, out, err = told(capsys, *generate, "--route", "expert:grey", "--json")
    assert not err
    assert status == 0 and json.loads(out)["route"] == "expert:grey"
    assert size_of(made) == (64, 64)
    status, _, err = told(capsys, *generate, "--route", "expert:gray")
    assert status == 1 and "did you mean 'grey'" in err


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ([], ""),
        (["--task", "control", "--image", "photo.png"], ""),
        (
            ["--task", "edit", "--image", "photo.png"],
            "not trained for 'edit', only for inpaint, gr",
        ),
        (["--task", "inpaint", "--image", "photo.png", "--mask", "mask.png"], ""),
        (["--task", "control", "--image", "photo.png", "--lines", "canny"], ""),
        (["--task", "edit"], "give one with --image"),
        (["--image", "photo.png"], "--image needs --task"),
        (["--task", "edit", "--image", "photo.png", "--mask", "mask.png"], "belongs to --task inp"),
        (["--task", "inpaint", "--image", "photo.png", "--mask", "small.png"], "has 40 x 40 pix"),
        (["--task", "edit", "--image", "gone.png"], "gone.png: no such file"),
        (["--task", "edit", "--image", "cut.jpg"], "truncated or damaged"),
        (["--task", "edit", "--image", "3x3.png"], "below the minimum"),
        (["--task", "edti", "--image", "photo.png"], "edti"),
        (["--steps", "0"], "--steps must be at least 1"),
    ],
)
def test_generate(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    trained: Path,
    extra: list[str],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    photo = Image.fromarray(rng.integers(0, 255, (100, 80, 3), dtype=np.uint8))
    photo.save("photo.png")
    photo.save("cut.jpg")
    Path("cut.jpg").write_bytes(Path("cut.jpg").read_bytes()[:900])
    Image.new("RGB", (3, 3)).save("3x3.png")
    Image.new("L", (80, 100), 255).save("mask.png")
    Image.new("L", (40, 40), 255).save("small.png")
    status, _, err = told(
        capsys, "generate", "--run", trained, "--prompt", "a red circle", "--out", "out.png",
        *(["--steps", "1"] if "--steps" not in extra else []), *extra,
    )  # fmt: skip
    if said:
        assert status == 1 and said in err and err.count("\n") == 1
        assert not Path("out.png").exists()
    else:
        assert (status, err) == (0, "")
        assert size_of(Path("out.png")) == (64, 64)


@pytest.mark.parametrize(
    "size, said",
    [
        ((96, 64), "centre square of 96 x 64"),
        ((80, 80), "80 x 80 resized"),
        ((64, 64), None),
    ],
)
def test_generate_tells_that_it_crops(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    trained: Path,
    size: tuple[int, int],
    said: str | None,
) -> None:
    photo = tmp_path / "photo.png"  # read before it is written over
    Image.new("RGB", size, "white").save(photo)
    words = ["generate", "--run", trained, "--prompt", "a circle", "--out", photo, "--steps", "1"]
    status, out, err = told(capsys, *words, "--task", "control", "--image", photo)
    told_once = " ".join(out.split())
    assert (status, err) == (0, "") and size_of(photo) == (64, 64)
    assert said in told_once if said else "square" not in told_once and "resized" not in told_once


def test_grounding_tells_what_it_marked(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    trained: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (64, 64), "white").save("photo.png")
    words = ["generate", "--run", trained, "--prompt", "mark it in cyan", "--out", "out.png",
             "--task", "ground", "--image", "photo.png", "--steps", "1"]  # fmt: skip
    status, out, _ = told(capsys, *words, "--json")
    facts = json.loads(out)
    assert status == 0 and 0 <= facts["confidence"] <= 1
    assert (facts["box"] is None) == (facts["confidence"] == 0)
    status, out, _ = told(capsys, *words)
    assert status == 0 and ("nothing marked" in out or "confidence" in out)


def test_data_shows_what_each_task_gets(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    sheet = tmp_path / "sheet.png"
    status, out, _ = told(capsys, "data", "--size", "64", "--count", "3", "--out", sheet, "--json")
    tasks = json.loads(out)["tasks"]
    assert status == 0 and {t["task"] for t in tasks} == {
        "inpaint", "ground", "control", "customise", "edit"
    }  # fmt: skip
    assert all(sum(t["kinds"].values()) == 3 for t in tasks)
    assert size_of(sheet) == (3 * (2 * 64 + 8), 5 * 68)


def test_a_damaged_expert_is_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, trained: Path
) -> None:
    import shutil

    run = shutil.copytree(trained, tmp_path / "run")
    file = run / "adapter" / "experts" / "1-ground" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    for words in (["inspect", run], ["train", "--from", run, "--stage", "edit", "--out", "x"]):
        if words[0] == "train":
            shutil.rmtree(run / "states")
        status, _, err = told(capsys, *words)
        assert status == 1 and "expert 'ground'" in err and err.count("\n") == 1
    assert not Path("x").exists()


@pytest.mark.slow
@pytest.mark.timeout(900)  # five processes, each with its imports
@pytest.mark.parametrize(("number", "expected"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_in_stage_3_then_resume_gives_the_same_bytes(
    tmp_path: Path, small: list[str], number: int, expected: int
) -> None:
    program = "import sys; from prw_flux.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", program, "train"]
    extra = [*small, "--no-evaluation", "--set", "stages.control.steps=40"]

    def hashes(run: Path) -> list[str]:
        out = subprocess.run(
            [*command[:-1], "inspect", str(run), "--json"], capture_output=True, check=True
        ).stdout
        facts: dict[str, Any] = json.loads(out)
        return [facts["router"]["sha256"], *(s["sha256"] for s in facts["stages"])]

    whole, cut = tmp_path / "whole", tmp_path / "cut"
    subprocess.run([*command, "demo", "--out", str(whole), *extra], check=True)
    process = subprocess.Popen(
        [*command, "demo", "--out", str(cut), *extra], stderr=subprocess.PIPE, text=True
    )
    log = cut / "metrics.jsonl"
    deadline = time.monotonic() + 240
    while not (log.exists() and '"control", "task": "control", "step": 2,' in log.read_text()):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, number)
    _, err = process.communicate(timeout=120)
    assert process.returncode == expected
    assert err.count("\n") == 1 and f"prw-flux train --resume {cut}" in err
    subprocess.run([*command, "--resume", str(cut), "--no-evaluation"], check=True)
    assert hashes(cut) == hashes(whole)


def test_no_bar_where_none_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "HF_DATASETS_DISABLE_PROGRESS_BARS"
    monkeypatch.setenv(name, "")  # put back afterwards, whatever it was
    for terminal, quiet, silenced in ((True, False, None), (False, False, "1"), (True, True, "1")):
        monkeypatch.delenv(name)
        monkeypatch.setattr("sys.stderr.isatty", lambda terminal=terminal: terminal)
        show.quiet_loading(quiet)
        assert os.environ.get(name) == silenced
        monkeypatch.setenv(name, "")
