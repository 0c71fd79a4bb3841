"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from pathlib import Path

# One thread per worker, set before torch is imported: sums keep their order, and workers do not
# fight over the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile(
    "prw",
    deadline=None,
    max_examples=int(os.environ.get("PRW_HYPOTHESIS_EXAMPLES", "25")),
    derandomize=True,
    database=None,
)
hypothesis.settings.load_profile("prw")


def pytest_configure() -> None:
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test starts from the same state of torch's generator."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def repository() -> Path:
    """Root of the checkout."""
    return Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def assets() -> Path:
    """Folder of real test inputs, named by PRW_TEST_ASSETS."""
    value = os.environ.get("PRW_TEST_ASSETS")
    if not value:
        pytest.skip("PRW_TEST_ASSETS is not set: this test reads real images and weights")
    path = Path(value)
    if not path.is_dir():
        pytest.fail(f"PRW_TEST_ASSETS={value} is not a folder")
    return path
