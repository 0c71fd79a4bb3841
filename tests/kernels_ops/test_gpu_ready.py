"""What can be said of the tests marked `gpu` where there is no device."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path

import pytest

HERE = Path(__file__).parent

# Each once per process; the first comes from Triton's knobs, the second from torch's C++.
WARNINGS = (
    "TRITON_DEFAULT_FP_FUSION is unset: defaulting to FP fusion ENABLED for backward compatibility",
    "Synchronization debug mode is a prototype feature and does not yet detect all synchronizing "
    "operations",
)


@pytest.mark.parametrize("message", WARNINGS)
def test_what_a_device_warns_of_fails_no_test(message: str) -> None:
    warnings.warn(message, UserWarning, stacklevel=1)


def test_the_messages_are_those_of_the_library() -> None:
    triton = pytest.importorskip("triton._utils", reason="triton is not installed")
    announced = getattr(triton, "FP_FUSION_DEFAULT_WARNING", WARNINGS[0])
    assert announced.startswith(WARNINGS[0])


def test_they_are_collected() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-m", "gpu", "-n", "0", HERE]
    done = subprocess.run(
        [*command, "-p", "no:cacheprovider"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    for name in ("test_sanitizer", "test_triton_layers", "test_triton_routed_lora", "test_routing"):
        assert f"{name}.py::" in done.stdout
