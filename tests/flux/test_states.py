"""Saved states: rotation, verification, falling back, and a disk that fails at any write."""

from __future__ import annotations

import errno
import logging
import shutil
from pathlib import Path

import pytest
from flux.failing import failing
from hypothesis import given, settings
from hypothesis import strategies as st

from prw import CheckpointError
from prw_flux.states import INDEX, States, verified


def write(states: States, step: int, keep: int = 2) -> None:
    with states.new(step, {"n": step}, keep) as folder:
        (folder / "adapter").mkdir()
        (folder / "adapter" / "weights").write_bytes(bytes([step]) * 100)
        (folder / "moments").write_text(f"moments of {step}")


@pytest.fixture
def states(tmp_path: Path) -> States:
    states = States(tmp_path / "states")
    assert states.newest() is None
    for step in (1, 2, 3):
        write(states, step)
    return states


def steps(states: States) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in states.paths()]


def test_the_newest_are_kept(states: States) -> None:
    assert steps(states) == [2, 3]
    newest = states.newest()
    assert newest is not None and newest.facts["n"] == 3
    write(states, 3, keep=1)
    assert steps(states) == [3]
    assert sorted(p.name for p in states.folder.iterdir()) == ["step-000000003"]


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_any_changed_byte_is_noticed(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    states = States(tmp_path_factory.mktemp("run") / "states")
    write(states, 1)
    path = states.path(1)
    files = sorted(file for file in path.rglob("*") if file.is_file())
    file = data.draw(st.sampled_from(files))
    old = file.read_bytes()
    place = data.draw(st.integers(0, len(old) - 1))
    change = data.draw(st.sampled_from(["flip", "cut", "gone"]))
    if change == "gone":
        file.unlink()
    elif change == "cut":
        file.write_bytes(old[:place])
    else:
        flip = data.draw(st.integers(1, 255))
        file.write_bytes(old[:place] + bytes([old[place] ^ flip]) + old[place + 1 :])
    with pytest.raises(CheckpointError, match=file.name):
        verified(path)


def test_a_damaged_one_is_passed_over(states: States, caplog: pytest.LogCaptureFixture) -> None:
    file = states.path(3) / "moments"
    file.write_text("x")
    again = States(states.folder)
    with caplog.at_level(logging.WARNING):
        newest = again.newest()
    assert newest is not None and newest.facts["n"] == 2
    assert len(caplog.messages) == 1 and f"{file} was changed or truncated" in caplog.messages[0]
    assert "going on from" in caplog.messages[0]
    again.settle_on(newest)
    assert sorted(p.name for p in states.folder.iterdir()) == [
        "damaged-step-000000003", "step-000000002"
    ]  # fmt: skip
    write(again, 3)
    assert steps(again) == [2, 3]


def test_without_a_whole_one_nothing_goes_on(states: States) -> None:
    for path in states.paths():
        (path / INDEX).unlink()
    with pytest.raises(CheckpointError, match=r"is whole: .*state.json is damaged.*; remove"):
        States(states.folder).newest()


def test_a_full_disk_at_any_write_leaves_what_was(states: States) -> None:
    for at in range(100):
        try:
            with failing(at):
                write(states, 4)
        except OSError as problem:
            assert problem.errno == errno.ENOSPC
        else:
            break
        newest = States(states.folder).newest()
        assert newest is not None and newest.facts["n"] in (3, 4)
        if newest.facts["n"] == 4:  # it was in place when the last sync or the rotation failed
            shutil.rmtree(newest.path)
            states._newest = None
    assert at > 8, "the save makes more than a few writes"
    assert steps(states) == [3, 4]
