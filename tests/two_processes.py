"""Running a worker script as two gloo ranks, for the tests that compare them with one process."""

from __future__ import annotations

import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist


def run_two(worker: Path, folder: Path, timeout: float = 280) -> None:
    """Start the worker twice with (rank, folder); what both print is kept in ``told.txt``."""
    inherited = os.environ.get("PYTHONPATH")
    paths = os.pathsep.join(filter(None, [str(Path(__file__).parent), inherited]))
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": paths}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(worker), str(rank), str(folder)],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    told = [rank.communicate(timeout=timeout)[0] for rank in ranks]
    (folder / "told.txt").write_text("\n".join(told), encoding="utf-8")


def require_quiet(folder: Path, name: str, rank: int) -> None:
    """Raise AssertionError unless a rank finished a check, and with nothing to complain of."""
    found = folder / f"{name}-{rank}.txt"
    assert found.is_file(), (folder / "told.txt").read_text(encoding="utf-8")
    complaint = found.read_text(encoding="utf-8")
    assert not complaint, complaint


def report(checks: Mapping[str, Callable[[int, Path], None]], seconds: float = 120) -> None:
    """A worker's main: meet the other rank, run checks, write what each complains of."""
    torch.set_num_threads(1)
    rank, folder = int(sys.argv[1]), Path(sys.argv[2])
    store = dist.FileStore(str(folder / "store"), 2)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=seconds)
    )
    for name, check in checks.items():
        complaint = ""
        try:
            check(rank, folder)
        except BaseException:
            complaint = traceback.format_exc()
        (folder / f"{name}-{rank}.txt").write_text(complaint, encoding="utf-8")
        if complaint:  # the other rank would wait for this one
            break
    dist.destroy_process_group()
