"""Two ranks normalise as one process with the whole batch does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

WORKER = Path(__file__).with_name("two_ranks_coredi.py")


def test_two_ranks_normalise_as_one_process(tmp_path: Path) -> None:
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo"}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(rank), str(tmp_path)],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    told = "\n".join(rank.communicate(timeout=120)[0] for rank in ranks)
    for rank in range(2):
        found = tmp_path / f"coredi-{rank}.txt"
        assert found.is_file(), told
        assert not found.read_text(encoding="utf-8")
