"""Launchers, signals and dead ranks: real processes on one machine, over gloo."""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from prw_flux.resume import read_position
from prw_flux.rundir import RunFolder

pytestmark = pytest.mark.slow
ENVIRONMENT = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
SMALL = """size=64 data.samples=6 log_every=1 save_every=100 precision=fp32 adapter.rank=2
adapter.alpha=none stages.*.batch_size=2 remember=0""".split()


@pytest.fixture
def words(tiny_base: Path) -> list[str]:
    """A run that goes on until it is stopped."""
    settings = [f"base.path={tiny_base}", *SMALL, "stages.*.steps=100000"]
    return ["train", "demo", "--no-evaluation", *(a for s in settings for a in ("--set", s))]


@contextmanager
def started(*commands: list[str], ranks: bool = False) -> Iterator[list[subprocess.Popen[str]]]:
    """Processes in sessions of their own, which do not outlive the block."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running = []
    for index, command in enumerate(commands):
        place = {"RANK": index, "LOCAL_RANK": index, "WORLD_SIZE": len(commands),
                 "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}  # fmt: skip
        environment = ENVIRONMENT | {k: str(v) for k, v in place.items() if ranks}
        running.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE,
                             stderr=subprocess.STDOUT, text=True, start_new_session=True)
        )  # fmt: skip
    try:
        yield running
    finally:
        for process in running:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()  # closes its pipe


def wait_for_steps(run: Path, count: int, running: list[subprocess.Popen[str]]) -> None:
    until = time.monotonic() + 200
    log = run / "metrics.jsonl"
    while not log.is_file() or log.read_text().count("\n") < count:
        assert all(process.poll() is None for process in running), running[0].communicate()[0]
        assert time.monotonic() < until
        time.sleep(0.1)


@pytest.mark.parametrize("dying", [0, 1])
def test_when_a_rank_dies_the_other_says_so_and_ends(
    words: list[str], tmp_path: Path, dying: int
) -> None:
    run = tmp_path / "run"
    command = [sys.executable, "-m", "prw_flux.cli", *words, "--out", str(run)]
    command += ["--set", "save_every=2"]
    with started(command, command, ranks=True) as running:
        wait_for_steps(run, 5, running)
        running[dying].kill()
        told, _ = running[1 - dying].communicate(timeout=60)
        assert running[1 - dying].returncode == 1
    line = told.strip().splitlines()[-1]
    assert "another rank of this run has ended or cannot be reached" in line
    assert f"prw-flux train --resume {run}" in line and "Traceback" not in told
    position = read_position(RunFolder.open(run))
    assert position.step >= 4 and position.step % 2 == 0


def test_sigterm_to_the_launcher_saves_once_on_all_ranks(words: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
               "-m", "prw_flux.cli", *words, "--out", str(run)]  # fmt: skip
    with started(command) as running:
        wait_for_steps(run, 3, running)
        assert not (run / "state").exists()
        running[0].terminate()
        told, _ = running[0].communicate(timeout=100)
    assert told.count("prw-flux: stopped after step") == 1  # one of them says it
    steps = len(RunFolder.open(run).read_log())
    assert read_position(RunFolder.open(run)).step == steps >= 3


def test_ranks_told_to_stop_exit_143(words: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = [sys.executable, "-m", "prw_flux.cli", *words, "--out", str(run)]
    with started(command, command, ranks=True) as running:
        wait_for_steps(run, 3, running)
        running[1].terminate()  # either will do: they leave together
        told = [process.communicate(timeout=60)[0] for process in running]
        assert [process.returncode for process in running] == [143, 143]
    assert "stopped after step" in told[0] and "stopped" not in told[1]
    assert read_position(RunFolder.open(run)).step == len(RunFolder.open(run).read_log())


DEEPSPEED = pytest.param(
    ["--use_deepspeed", "--zero_stage=3", "--offload_param_device=cpu"],
    marks=pytest.mark.skipif(
        importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed: pip install it"
    ),
)


@pytest.mark.parametrize("kind", [["--multi_gpu"], ["--use_fsdp", "--fsdp_version=2"], DEEPSPEED])
def test_accelerate_launches_a_whole_run(tiny_base: Path, tmp_path: Path, kind: list[str]) -> None:
    run = tmp_path / "run"
    settings = [f"base.path={tiny_base}", *SMALL, "stages.*.steps=2", "checkpointing=true"]
    launched = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", *kind, "--num_processes=2",
         "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no", "-m", "prw_flux.cli",
         "train", "demo", "--only", "edit", "--out", str(run), "--no-evaluation",
         *(a for s in settings for a in ("--set", s))],
        env=ENVIRONMENT, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert launched.returncode == 0, launched.stderr
    assert launched.stdout.count("run  ") == 1
    assert RunFolder.open(run).finished and len(RunFolder.open(run).read_log()) == 2
