"""The run folder: exclusive, atomic, and clear about what is not a run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from prw_flux.recipes import demo
from prw_flux.rundir import RunError, RunFolder, write_atomically


def test_a_run_reads_back_what_it_was_told(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run", demo())
    again = RunFolder.open(run.path)
    assert again.config == demo()
    assert (again.done, again.finished) == (0, False)
    assert again.index["base"] == {"path": "tiny-flux", "revision": None}
    for number in range(5):
        again.finish_stage(number, {"seconds": 1.5})
    assert RunFolder.open(run.path).finished
    assert RunFolder.open(run.path).index["stages"][4]["seconds"] == 1.5


def test_a_local_base_is_stored_by_its_absolute_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "base").mkdir()
    monkeypatch.chdir(tmp_path)
    run = RunFolder.create("run", demo().with_settings(["base.path=base"]))
    assert run.index["base"]["path"] == str(tmp_path / "base")


def test_nothing_is_overwritten_unless_asked(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run", demo())
    with pytest.raises(RunError, match="holds a run already; continue it with --resume"):
        RunFolder.create(run.path, demo())
    again = RunFolder.create(run.path, replace(demo(), seed=5), overwrite=True)
    assert RunFolder.open(again.path).config.seed == 5


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_is_no_run_is_never_replaced(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("x")
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunError, match="not empty and not a run"):
        RunFolder.create(tmp_path / "thesis", demo(), overwrite=overwrite)
    with pytest.raises(RunError, match="is a file"):
        RunFolder.create(tmp_path / "file", demo(), overwrite=overwrite)
    assert (tmp_path / "thesis" / "chapter.tex").read_text() == "x"


def _damage(**changes: Any) -> Any:
    return lambda index: {**index, **changes}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_damage(format_version=9), "format version 9"),
        (_damage(format_version="x"), "damaged"),
        (_damage(config={}), "schema_version must be a whole number"),
        (_damage(config=None), "damaged"),
        (_damage(stages=[]), "its stages contradict its config"),
        (_damage(stages=3), "damaged"),
        (lambda index: [], "damaged"),
    ],
)
def test_a_damaged_run_is_one_sentence(tmp_path: Path, change: Any, said: str) -> None:
    run = RunFolder.create(tmp_path / "run", demo())
    index = json.loads((run.path / "run.json").read_text())
    (run.path / "run.json").write_text(json.dumps(change(index)))
    with pytest.raises(RunError) as caught:
        RunFolder.open(run.path)
    assert said in str(caught.value)


def test_what_is_not_a_run(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="there is no folder"):
        RunFolder.open(tmp_path / "gone")
    with pytest.raises(RunError, match="is not a run: it holds no run.json"):
        RunFolder.open(tmp_path)
    (tmp_path / "run.json").write_bytes(b"\xff\xfe{")
    with pytest.raises(RunError, match="damaged"):
        RunFolder.open(tmp_path)


def test_the_log_survives_a_torn_line_and_forgets_the_future(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run", demo())
    assert run.read_log() == []
    run.forget_log_after(0, 0)
    for stage, step in [("inpaint", 5), ("ground", 2), ("ground", 4)]:
        run.log({"stage": stage, "step": step})
    with run.metrics.open("a") as file:
        file.write('{"stage": "gro')
    run.forget_log_after(1, 2)
    assert [(line["stage"], line["step"]) for line in run.read_log()] == [
        ("inpaint", 5),
        ("ground", 2),
    ]


def test_a_failed_write_leaves_the_old_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "x.json"
    write_atomically(file, "old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(file, "new")
    assert file.read_text() == "old"


def test_one_trainer_at_a_time(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run", demo())
    with run.exclusively(), pytest.raises(RunError, match="another process is training"):
        with run.exclusively():
            pass
    with run.exclusively(), pytest.raises(RunError, match="another process is training"):
        RunFolder.create(run.path, demo(), overwrite=True)
    with run.exclusively():
        pass
