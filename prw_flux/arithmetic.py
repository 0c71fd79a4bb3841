"""How the arithmetic of a forward is done: precision, and attention on a CPU."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Final

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

_WRITTEN_OUT: Final = ContextVar("attention is written out", default=False)


@contextmanager
def arithmetic(device: str, precision: str, *, alone: bool = True) -> Iterator[None]:
    """Inside, forwards and their backwards run in a precision; on a CPU they train faster.

    At the sizes that a CPU trains, the backward of torch's fused CPU attention is the slowest part
    of a step (docs: Log, 2026-11-20): where there will be a backward, attention is written out.

    Args:
        device: type of the device, as "cpu".
        precision: "fp32", or "bf16" autocast.
        alone: whether no other thread computes meanwhile. torch chooses its attention by a switch
            of the process, which would change the bits of what a second thread encodes; else only
            the processors of this package write it out, to the same bits (`attention`).
    """
    with ExitStack() as stack:
        if device == "cpu" and torch.is_grad_enabled():
            if alone:
                stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            else:
                stack.callback(_WRITTEN_OUT.reset, _WRITTEN_OUT.set(True))
        narrow = precision == "bf16"
        stack.enter_context(torch.autocast(device, torch.bfloat16, enabled=narrow))
        if narrow:
            # norms keep fp32 weights: torch mentions its slower path for such a mixture
            if alone:  # else the other thread's filters would be put back in place of ours
                stack.enter_context(warnings.catch_warnings())
            warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")
        yield


def written_out() -> bool:
    """Whether this thread is to write attention out."""
    return _WRITTEN_OUT.get()


def attention(query_BSHD: Tensor, key_BTHD: Tensor, value_BTHD: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v as torch writes it out, whatever its switches say; [B, S, H, D].

    Bit for bit `scaled_dot_product_attention` under SDPBackend.MATH, autocast included, on a CPU.
    """
    heads = [x.permute(0, 2, 1, 3) for x in (query_BSHD, key_BTHD, value_BTHD)]
    if torch.is_autocast_enabled("cpu"):
        heads = [x.to(torch.get_autocast_dtype("cpu")) for x in heads]
    with torch.autocast("cpu", enabled=False):
        out_BHSD: Tensor = torch.ops.aten._scaled_dot_product_attention_math(*heads)[0]
    return out_BHSD.permute(0, 2, 1, 3)
