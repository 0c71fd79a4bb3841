"""PRW under diffusers' parallelism: Ulysses on two gloo ranks, everything else refused."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ContextParallelConfig, ParallelConfig, TensorParallelConfig

from prw_flux.parallel import require_spreadable

WORKER = Path(__file__).with_name("ulysses_ranks.py")


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
@pytest.mark.parametrize("granularity", ["sample", "token"])
@pytest.mark.parametrize("rank", [0, 1])
def test_ulysses_on_two_ranks_is_one_process(folder: Path, granularity: str, rank: int) -> None:
    """Whole samples are routed by the mean over all ranks, or each rank would choose for itself."""
    found = folder / f"{granularity}-{rank}.txt"
    assert found.is_file(), (folder / "told.txt").read_text(encoding="utf-8")
    assert not found.read_text(encoding="utf-8")


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
