"""How the arithmetic of a forward is done: precision, and attention on a CPU."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel


@contextmanager
def arithmetic(device: str, precision: str) -> Iterator[None]:
    """Inside, forwards and their backwards run in a precision; on a CPU they train faster.

    At the sizes that a CPU trains, the backward of torch's fused CPU attention is the slowest part
    of a step (docs: Log, 2026-11-20): where there will be a backward, attention is written out.

    Args:
        device: type of the device, as "cpu".
        precision: "fp32", or "bf16" autocast.
    """
    with ExitStack() as stack:
        if device == "cpu" and torch.is_grad_enabled():
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        narrow = precision == "bf16"
        stack.enter_context(torch.autocast(device, torch.bfloat16, enabled=narrow))
        if narrow:
            # norms keep fp32 weights: torch mentions its slower path for such a mixture
            stack.enter_context(warnings.catch_warnings())
            warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")
        yield
