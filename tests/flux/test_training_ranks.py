"""Training under DDP on two gloo ranks: both passes are one forward, so DDP sees one call."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("ddp_ranks.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two ranks wrote what they found."""
    made = tmp_path_factory.mktemp("ranks")
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo"}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(rank), str(made)],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    told = [rank.communicate(timeout=280)[0] for rank in ranks]
    (made / "told.txt").write_text("\n".join(told), encoding="utf-8")
    return made


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("rank", [0, 1])
def test_two_ranks_have_the_gradients_of_one_process(
    folder: Path, checkpointing: bool, rank: int
) -> None:
    """Several draws per source, the veteran gate, and no `find_unused_parameters`."""
    found = folder / f"{checkpointing}-{rank}.txt"
    assert found.is_file(), (folder / "told.txt").read_text(encoding="utf-8")
    assert not found.read_text(encoding="utf-8")
