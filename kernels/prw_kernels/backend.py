"""Where Triton kernels can run: on a CUDA or ROCm device, or in Triton's interpreter.

Nothing here imports Triton at module level, so that the package works without it.
"""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor

_INSTALLED = importlib.util.find_spec("triton") is not None


def installed() -> bool:
    """Whether the package triton can be imported; looked up once, as torch.compile reads it too."""
    return _INSTALLED


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter: ``TRITON_INTERPRET=1``.

    Triton reads the variable when a module with kernels is imported, so it must be set before.
    """
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def runs_triton(device: torch.device) -> bool:
    """Whether Triton kernels take tensors of this device."""
    return installed() and (device.type == "cuda" or interpreted())


def check_interpreted(*tensors: Tensor | None) -> None:
    """Refuse what the interpreter computes wrongly without saying so.

    Its bf16 arithmetic is done on the bit patterns, with errors of 1e10; fp64 through fp32
    accumulators loses half its digits.

    Raises:
        ValueError: kernels are interpreted and some tensor is bf16 or fp64.
    """
    if not interpreted():
        return
    for tensor in tensors:
        if tensor is not None and tensor.dtype in (torch.bfloat16, torch.float64):
            raise ValueError(
                f"Triton's interpreter computes {tensor.dtype} wrongly; give float32 or float16 "
                "tensors, or unset TRITON_INTERPRET"
            )
