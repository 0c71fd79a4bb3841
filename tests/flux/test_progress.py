"""What a person watching sees: the stage, the whole curriculum, and a reader that is slow."""

from __future__ import annotations

import io
import logging
import threading
import time

import pytest
from rich.console import Console

from prw_flux import waiting as waiting_module
from prw_flux.curriculum import Stage
from prw_flux.progress import Bars, samples_of, watching
from prw_flux.waiting import waiting

STAGES = (
    Stage(task="inpaint", steps=10, batch_size=4, lr=1e-3),
    Stage(task="edit", steps=20, batch_size=2, lr=1e-3),
)


def terminal() -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=160)


def seen(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_whole_curriculum_counts_samples_not_steps() -> None:
    assert samples_of(STAGES) == 80 and samples_of(()) == 0
    bars = Bars(terminal())
    bars.plan(STAGES, 0, 0)
    assert bars._whole is not None
    whole = next(task for task in bars._bars.tasks if task.id == bars._whole)
    assert (whole.completed, whole.total) == (0, 80)
    bars.begin(0, 2, STAGES[0])
    bars.stepped(5)
    assert whole.completed == 20
    bars.begin(1, 2, STAGES[1])
    bars.stepped(7)
    assert whole.completed == 40 + 14


@pytest.mark.parametrize(("number", "done", "expected"), [(0, 3, 12), (1, 0, 40), (1, 5, 50)])
def test_a_resumed_curriculum_begins_where_it_was(number: int, done: int, expected: int) -> None:
    bars = Bars(terminal())
    bars.plan(STAGES, number, done)
    assert [task.completed for task in bars._bars.tasks] == [expected]


def test_one_stage_has_one_bar() -> None:
    bars = Bars(terminal())
    bars.plan(STAGES[:1], 0, 0)
    assert not bars._bars.tasks


def test_bars_say_what_they_wait_for_and_forget_it() -> None:
    console = terminal()
    with Bars(console) as bars:
        bars.plan(STAGES, 1, 3)
        bars.begin(1, 2, STAGES[1])
        bars.stepped(4)
        bars.logged({"loss": 0.5, "usage_noisy": 1, "usage_deterministic": 1,
                     "held_out_loss": 0.25})  # fmt: skip
        bars.waiting(7.2)
        bars._bars.refresh()
        assert "waiting for data 7 s" in seen(console)
        bars.stepped(5)
        state = bars._bars.tasks[-1].fields["state"]
        assert state == "loss 0.5000  usage 1.00/1.00  held out 0.2500"
    assert "all stages" in seen(console) and "stage 2/2 edit" in seen(console)


def test_without_a_terminal_nothing_is_shown() -> None:
    console = Console(file=io.StringIO())
    with watching(console) as progress:
        progress.plan(STAGES, 0, 0)
        progress.begin(0, 2, STAGES[0])
        progress.waiting(3.0)
        progress.stepped(1)
    assert seen(console) == ""


def test_a_quick_read_tells_nobody() -> None:
    told: list[float] = []
    with waiting(told.append):
        time.sleep(0.01)
    assert not told
    assert not [thread for thread in threading.enumerate() if thread.name == "waiting for data"]


def test_a_slow_read_tells_again_and_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(waiting_module, "WORTH_A_LINE", 0.2)
    told: list[float] = []
    with (
        caplog.at_level(logging.WARNING),
        pytest.raises(OSError, match="gone"),
        waiting(told.append, 0.02),
    ):
        time.sleep(0.6)
        raise OSError("gone")
    assert len(told) >= 5 and told == sorted(told) and told[-1] > 0.3
    assert 1 <= len(caplog.messages) <= 3
    assert "training has waited for data" in caplog.messages[0]
