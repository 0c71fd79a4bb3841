"""Two ranks normalise as one process with the whole batch does."""

from __future__ import annotations

from pathlib import Path

from two_processes import require_quiet, run_two

WORKER = Path(__file__).with_name("two_ranks_coredi.py")


def test_two_ranks_normalise_as_one_process(tmp_path: Path) -> None:
    run_two(WORKER, tmp_path, timeout=120)
    for rank in range(2):
        require_quiet(tmp_path, "coredi", rank)
