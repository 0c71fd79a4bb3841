"""PRW under diffusers' parallelism: Ulysses on two gloo ranks, everything else refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ContextParallelConfig, ParallelConfig, TensorParallelConfig
from two_processes import require_quiet, run_two

from prw_flux.parallel import require_spreadable

WORKER = Path(__file__).with_name("ulysses_ranks.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two ranks wrote what they found."""
    made = tmp_path_factory.mktemp("ranks")
    run_two(WORKER, made)
    return made


@pytest.mark.slow
@pytest.mark.parametrize("granularity", ["sample", "token"])
@pytest.mark.parametrize("rank", [0, 1])
def test_ulysses_on_two_ranks_is_one_process(folder: Path, granularity: str, rank: int) -> None:
    """Whole samples are routed by the mean over all ranks, or each rank would choose for itself."""
    require_quiet(folder, granularity, rank)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"tensor_parallel_config": TensorParallelConfig(tp_degree=2)}, "cut by tensor"),
        ({"context_parallel_config": ContextParallelConfig(ring_degree=2)}, "ring attention and"),
        (
            {
                "context_parallel_config": ContextParallelConfig(
                    ulysses_degree=2, ulysses_anything=True
                )
            },
            "ulysses_anything do not",
        ),
    ],
    ids=["tensor", "ring", "anything"],
)
def test_other_parallelism_is_refused(
    make_transformer: Any, config: dict[str, Any], reason: str
) -> None:
    transformer = make_transformer()
    transformer._parallel_config = ParallelConfig(**config)
    with pytest.raises(ValueError, match=f"{reason}.*ulysses_degree=..."):
        require_spreadable(transformer, torch.zeros(1, 4, 64))
