"""Ranks encode the samples of a stage together, and each has what one process would have."""

from __future__ import annotations

from pathlib import Path

import pytest
from flux.together_ranks import CHECKS
from two_processes import require_quiet, run_two

WORKER = Path(__file__).with_name("together_ranks.py")


@pytest.fixture(scope="module")
def folder(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two ranks wrote what they found."""
    made = tmp_path_factory.mktemp("together")
    (made / "base.txt").write_text(str(tiny_base))
    run_two(WORKER, made)
    return made


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("check", CHECKS)
def test_two_ranks_make_the_samples_of_one_process(folder: Path, check: str, rank: int) -> None:
    require_quiet(folder, check, rank)
