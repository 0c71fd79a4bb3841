"""Which implementation runs: a table, and the rule by which ``"auto"`` picks from it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from prw_kernels.routed_lora.cpu import cpu
from prw_kernels.routed_lora.per_sample import per_sample
from prw_kernels.routed_lora.reference import reference
from prw_kernels.routed_lora.tiled import tiled, why_not_tiled

logger = logging.getLogger("prw_kernels")

Backend: TypeAlias = Literal["auto", "reference", "cpu", "triton"]
Run: TypeAlias = Callable[..., Sequence[Tensor]]


@dataclass(frozen=True)
class Case:
    """What the choice depends on: shapes, dtypes and devices, never values.

    Attributes:
        x: ``[..., D]`` in the dtype of the factors.
        A: per projection and expert ``[R_e, D]``.
        scaling: per projection and expert.
        expert: shaped like a prefix of ``x.shape[:-1]``; None only with one expert.
    """

    x: Tensor
    A: Sequence[Sequence[Tensor]]
    scaling: Sequence[Sequence[float]]
    expert: Tensor | None

    @property
    def plain(self) -> bool:
        """Whether there is nothing to route: one expert, or no row."""
        return self.expert is None or len(self.A[0]) == 1 or self.x.numel() == 0

    @property
    def alike(self) -> bool:
        """Whether all experts of all projections have one rank and one scaling."""
        ranks = {A_RD.shape[0] for A_p in self.A for A_RD in A_p}
        return len(ranks) == 1 and len({s for row in self.scaling for s in row}) == 1


@dataclass(frozen=True)
class Implementation:
    """A row of the table.

    Attributes:
        run: residuals from (x, A, B, scaling, expert, gate).
        refusal: why it cannot compute a case, and what to do; empty if it can.
        why: for which ``"auto"`` takes it, as the log says it; measured on CPUs, on GPUs counted.
        owned: whether residuals are no views, so that results may be added to them in place.
        adds: whether it also takes ``results=`` and returns the sums.
    """

    run: Run
    refusal: Callable[[Case], str]
    why: str
    owned: bool = False
    adds: bool = False


def _not_on_a_cpu(case: Case) -> str:
    device = case.x.device.type
    return "" if device == "cpu" else f"computes on a CPU and x is on {device}; move it there"


def _not_for_batches(case: Case) -> str:
    if case.expert is None or case.expert.dim() != 1 or case.x.dim() < 3:
        return "takes one choice per sample"
    return "" if case.alike else "takes experts of one rank and one scaling"


IMPLEMENTATIONS: dict[str, Implementation] = {
    "cpu": Implementation(
        cpu,
        _not_on_a_cpu,
        "about 1.1 LoRAs in fp32, 1.3 in bf16, however many experts there are",
        owned=True,
    ),
    "triton": Implementation(
        tiled,
        lambda case: why_not_tiled(case.x),
        "kernels that read x and write each output once, however many experts there are",
        adds=True,
    ),
    "per_sample": Implementation(
        per_sample, _not_for_batches, "batched products of one LoRA, and nothing is read back"
    ),
    "reference": Implementation(
        reference, lambda case: "", "nothing faster computes this here; costs a LoRA per expert"
    ),
}
"""In the order in which ``"auto"`` asks. ``per_sample`` has no name of its own for users."""


def choose(backend: Backend, case: Case) -> Implementation:
    """The implementation for a case. With nothing to route every backend is the plain LoRA.

    Raises:
        ValueError: a backend that does not exist, is not available or cannot compute the case.
    """
    name: str = backend
    if name == "auto":
        name = next(name for name, row in IMPLEMENTATIONS.items() if not row.refusal(case))
        if not (case.plain or torch.compiler.is_compiling()):
            _say(name, case.x.device.type)
    else:
        if name not in IMPLEMENTATIONS or name == "per_sample":
            raise ValueError(
                f"backend={name!r} is not available here; use 'auto', 'reference', 'cpu' or "
                "'triton'"
            )
        refusal = IMPLEMENTATIONS[name].refusal(case)
        if refusal:
            raise ValueError(f"backend={name!r} {refusal}, or use backend='auto'")
    return IMPLEMENTATIONS["reference" if case.plain else name]


@cache
def _say(name: str, device: str) -> None:
    """Once per device and choice."""
    why = IMPLEMENTATIONS[name].why
    logger.info("routed LoRA on %s: backend 'auto' picks %r: %s", device, name, why)
