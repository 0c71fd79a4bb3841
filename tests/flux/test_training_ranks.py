"""Training under DDP on two gloo ranks: both passes are one forward, so DDP sees one call."""

from __future__ import annotations

from pathlib import Path

import pytest
from two_processes import require_quiet, run_two

WORKER = Path(__file__).with_name("ddp_ranks.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two ranks wrote what they found."""
    made = tmp_path_factory.mktemp("ranks")
    run_two(WORKER, made)
    return made


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("rank", [0, 1])
def test_two_ranks_have_the_gradients_of_one_process(
    folder: Path, checkpointing: bool, rank: int
) -> None:
    """Several draws per source, the veteran gate, and no `find_unused_parameters`."""
    require_quiet(folder, str(checkpointing), rank)
