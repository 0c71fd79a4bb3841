"""Batches that another thread makes: the same bits, and nothing of it is left afterwards."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel

from prw_flux.ahead import Ahead, Check, Ended
from prw_flux.arithmetic import arithmetic, attention, written_out
from prw_flux.config import RunConfig
from prw_flux.interrupt import Interrupted, Stop
from prw_flux.progress import Quiet
from prw_flux.resume import adapter_to_continue
from prw_flux.rundir import RunFolder
from prw_flux.samples import Samples
from prw_flux.session import open_session
from prw_flux.shapeweave.source import ShapeWeave
from prw_flux.tasks import DataSource, Example
from prw_flux.trainer import open_training_data, train


def others() -> list[str]:
    return [thread.name for thread in threading.enumerate() if "batches" in thread.name]


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    yield
    assert not others()


@given(st.integers(0, 3), st.integers(0, 6), st.integers(1, 4))
def test_everything_is_made_once_in_order_and_never_far_ahead(
    first: int, count: int, depth: int
) -> None:
    made: list[int] = []
    taken = 0

    def make(step: int, check: Check) -> int:
        made.append(step)
        assert len(made) <= taken + depth + 1  # one is taken and not counted yet
        return step * step

    steps = range(first, first + count)
    with Ahead(make, steps, depth) as ahead:
        for step in steps:
            assert ahead.take(step) == step * step
            taken += 1
        with pytest.raises(ValueError, match=r"is not the next of range"):
            ahead.take(first + count)
    assert made == list(steps) and not others()


def test_an_error_is_told_at_its_own_step() -> None:
    def make(step: int, check: Check) -> int:
        if step == 2:
            raise OSError("the picture of step 2 is gone")
        return step

    with Ahead(make, range(5), 4) as ahead:
        assert [ahead.take(0), ahead.take(1)] == [0, 1]
        for _ in range(2):
            with pytest.raises(OSError, match="step 2 is gone"):
                ahead.take(2)


def test_what_nobody_waits_for_is_given_up() -> None:
    inside = threading.Event()
    ended = threading.Event()

    def make(step: int, check: Check) -> None:
        inside.set()
        try:
            while True:
                check()
                time.sleep(0.001)
        except Ended:
            ended.set()
            raise

    with pytest.raises(KeyError), Ahead(make, range(3), 1):
        assert inside.wait(60)
        raise KeyError
    assert ended.is_set()


def test_a_read_that_never_returns_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("prw_flux.ahead.PATIENCE", 0.05)
    inside, released = threading.Event(), threading.Event()

    def make(step: int, check: Check) -> None:
        inside.set()
        released.wait(60)

    with Ahead(make, range(3), 1) as ahead:
        assert inside.wait(60)
    assert "has not returned" in caplog.text and ahead._thread.daemon
    released.set()
    ahead._thread.join(60)


def test_the_other_thread_begins_as_this_one_began() -> None:
    def make(step: int, check: Check) -> tuple[Any, ...]:
        return torch.get_num_threads(), torch.is_autocast_enabled("cpu"), written_out()

    with arithmetic("cpu", "bf16", alone=False), Ahead(make, range(1), 1) as ahead:
        assert written_out()
        assert ahead.take(0) == (torch.get_num_threads(), False, False)
    assert not written_out()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_attention_written_out_by_us_has_torchs_bits(precision: str) -> None:
    found = []
    for ours in (False, True):
        draw = torch.Generator().manual_seed(0)
        leaves = [torch.randn(2, n, 3, 16, generator=draw) for n in (9, 14, 14)]
        leaves[2] = leaves[2].to(torch.bfloat16 if precision == "bf16" else torch.float32)
        query, key, value = (leaf.requires_grad_() for leaf in leaves)
        with arithmetic("cpu", precision, alone=not ours):
            assert written_out() == ours
            if ours:
                out = attention(query, key, value)
            else:
                heads = [x.permute(0, 2, 1, 3) for x in (query, key, value)]
                with sdpa_kernel(SDPBackend.MATH):
                    out = torch.nn.functional.scaled_dot_product_attention(*heads)
                out = out.permute(0, 2, 1, 3)
        out.square().sum().backward()
        found.append([out, query.grad, key.grad, value.grad])
    for theirs, mine in zip(*found, strict=True):
        assert theirs is not None and mine is not None
        assert theirs.dtype == mine.dtype and torch.equal(theirs, mine)


# Training --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def config(short_config: RunConfig) -> RunConfig:
    """Two stages on samples that are encoded when they are needed, in two micro-batches."""
    return replace(short_config, stages=short_config.stages[:2]).with_settings(
        ["data.samples=none", "accumulate=2", "log_every=1", "stages.*.steps=4", "precision=bf16"]
    )


def go(run: RunFolder, data: DataSource | None = None, **told: Any) -> None:
    session = open_session(run.config, adapter_to_continue(run))
    train(run, session, data or open_training_data(run.config, session), **told)


def result(run: RunFolder) -> tuple[dict[str, bytes], list[dict[str, Any]], Any]:
    """Weights, log and what was drawn."""
    files = [*run.adapter.rglob("*.safetensors"), *run.states.paths()[-1].rglob("*.safetensors")]
    clock = ("seconds", "memory_mib")
    log = [{k: v for k, v in line.items() if k not in clock} for line in run.read_log()]
    stages = json.loads((run.path / "run.json").read_text())["stages"]
    drawn = [(stage["kinds"], stage["rejected"]) for stage in stages]
    return {str(f.relative_to(run.path)): f.read_bytes() for f in files}, log, drawn


def begun(config: RunConfig, path: Path, *settings: str) -> RunFolder:
    return RunFolder.create(path, config.with_settings(list(settings)))


@pytest.fixture(scope="module")
def plain(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A run whose batches are made between its steps."""
    run = begun(config, tmp_path_factory.mktemp("plain") / "run", "data.prefetch=0")
    go(run)
    return result(RunFolder.open(run.path))


class Threads(Quiet):
    """Which threads make samples."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def stepped(self, done: int) -> None:
        self.seen += others()


def test_a_run_has_the_bits_of_one_without(plain: Any, config: RunConfig, tmp_path: Path) -> None:
    run, threads = begun(config, tmp_path / "run"), Threads()
    go(run, progress=threads)
    assert len(threads.seen) == 8  # one, in every step
    assert result(RunFolder.open(run.path)) == plain
    steps = [line["step"] for line in plain[1]]
    assert steps == [1, 2, 3, 4] * 2
    kinds, _ = plain[2][0]
    assert sum(kinds.values()) == 4 * 2  # the log does not draw again


def test_batches_that_were_made_too_early_are_made_again(
    plain: Any, config: RunConfig, tmp_path: Path
) -> None:
    class Stops(Quiet):
        def begin(self, number: int, total: int, stage: Any) -> None:
            self.number = number

        def stepped(self, done: int) -> None:
            if (self.number, done) == (1, 2):
                os.kill(os.getpid(), signal.SIGTERM)

    run = begun(config, tmp_path / "run", "data.prefetch=4")
    with pytest.raises(Interrupted) as stopped, Stop() as stop:
        go(run, progress=Stops(), stop=stop)
    assert stopped.value.status == 143 and not others()
    go(RunFolder.open(run.path))
    weights, log, _ = result(RunFolder.open(run.path))
    assert weights == plain[0] and log == plain[1]


class Breaks(ShapeWeave):
    """Ends with an error of its own at one example."""

    def example(self, task: str, index: int) -> Example:
        if index == 5:
            raise ZeroDivisionError("example 5 of mine")
        return super().example(task, index)


class Steps(Quiet):
    def __init__(self) -> None:
        self.done: list[int] = []

    def stepped(self, done: int) -> None:
        self.done.append(done)


def test_an_error_of_the_source_ends_the_step_that_needs_it(
    config: RunConfig, tmp_path: Path
) -> None:
    run, steps = begun(config, tmp_path / "run", "data.prefetch=4"), Steps()
    with pytest.raises(ZeroDivisionError, match="example 5 of mine"):
        go(run, Breaks(size=64), progress=steps)
    assert steps.done == [1, 2]  # examples 0 to 3; 4 and 5 are the third step's


def test_pictures_are_drawn_while_batches_are_made(
    plain: Any, config: RunConfig, tmp_path: Path
) -> None:
    run = begun(config, tmp_path / "run", "sample_every=1", "evaluation.steps=1")
    go(run)
    weights, log, _ = result(RunFolder.open(run.path))
    assert weights == plain[0] and log == plain[1]
    assert len(list(run.grids.glob("*.png"))) == 8


def test_only_what_is_not_in_memory_needs_another_thread(config: RunConfig, tmp_path: Path) -> None:
    session = open_session(config)
    samples = Samples(
        ShapeWeave(size=64), session.tasks[0], session.pipe, stage="x", seed=0, batch_size=2,
        count=4,
    )  # fmt: skip
    samples.prepare()
    with samples.ahead(range(3), range(2), 2):
        assert not others()
        samples.batch(2)
