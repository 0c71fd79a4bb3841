"""Runs the tests marked `interpreted`, one file in one process.

Triton decides at its import whether kernels are interpreted, and then they all are: a process
that has the interpreter runs nothing else.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent

FILES = sorted(
    file.name
    for file in HERE.glob("test_*.py")
    if file != Path(__file__) and "mark.interpreted" in file.read_text()
)


def test_some_file_has_interpreted_tests() -> None:
    assert "test_routing.py" in FILES


@pytest.mark.parametrize("name", FILES)
def test_interpreted(name: str) -> None:
    pytest.importorskip("triton", reason="triton is not installed: nothing to interpret")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    environment.pop("PYTEST_ADDOPTS", None)
    command = [sys.executable, "-m", "pytest", "-q", "-m", "interpreted and not slow", HERE / name]
    done = subprocess.run(
        [*command, "-p", "no:cacheprovider"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
