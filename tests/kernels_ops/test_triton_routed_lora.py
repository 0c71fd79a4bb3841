"""Routed LoRA by Triton kernels: in the interpreter, without it, and on a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from prw.testing.backends import BackendCase
from prw_kernels import routed_lora
from prw_kernels.backend import installed, interpreted

needs_triton = pytest.mark.skipif(not installed(), reason="needs triton")


@needs_triton
def test_in_the_interpreter(repository: Path) -> None:
    """Everything of `interpreted_routed_lora.py`, where the variable is set before the import."""
    tests = Path(__file__).with_name("interpreted_routed_lora.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tests)]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, cwd=repository, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


@pytest.mark.skipif(interpreted(), reason="the interpreter takes CPU tensors")
def test_without_a_device_or_without_triton_the_backend_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = BackendCase((5,)).begin()

    def run() -> None:
        given.run(lambda *arguments: routed_lora(*arguments, backend="triton"))

    if installed():
        with pytest.raises(ValueError, match="x is on cpu; use backend"):
            run()
    monkeypatch.setattr("prw_kernels.routed_lora.tiled.installed", lambda: False)
    with pytest.raises(ValueError, match="needs the package triton"):
        run()
