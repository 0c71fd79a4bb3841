"""What routed LoRA refuses, before it computes anything."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def check(
    results: Sequence[Tensor],
    x: Tensor,
    A: Sequence[Sequence[Tensor]],
    B: Sequence[Sequence[Tensor]],
    scaling: Sequence[Sequence[float]],
    expert: Tensor | None,
    gate: Tensor | None,
) -> None:
    """Raise where the arguments of `prw_kernels.routed_lora` do not fit together.

    An index outside the pool is found on a CPU only; a device is not waited for.

    Raises:
        ValueError: what does not fit, by name and value.
    """
    experts = len(scaling[0]) if scaling else 0
    if not experts:
        raise ValueError("routed_lora needs at least one expert")
    if expert is None and experts > 1:
        raise ValueError(f"routed_lora has {experts} experts: say which with expert=")
    for name, value in (("expert", expert), ("gate", gate)):
        if value is not None and value.shape != x.shape[:-1][: value.dim()]:
            raise ValueError(
                f"{name} has shape {tuple(value.shape)}, which does not begin the shape of the "
                f"input {tuple(x.shape)}"
            )
    if expert is not None:
        _check_choice(expert, gate, experts)
    for p, result in enumerate(results):
        _check_projection(p, result, x, A[p], B[p], len(scaling[p]), experts)


def _check_choice(expert: Tensor, gate: Tensor | None, experts: int) -> None:
    if expert.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"expert has dtype {expert.dtype}: indices are int64")
    if gate is not None and gate.shape != expert.shape:
        raise ValueError(
            f"gate has shape {tuple(gate.shape)} and expert {tuple(expert.shape)}: give one weight "
            "per choice"
        )
    # Of a plain tensor on a CPU, tolist reads memory: no operator, nothing to wait for.
    if type(expert) is Tensor and expert.device.type == "cpu" and expert.numel():
        if not torch.compiler.is_compiling():
            least, most = torch.stack(expert.aminmax()).tolist()
            if least < 0 or most >= experts:
                wrong = least if least < 0 else most
                raise ValueError(f"expert has index {wrong}; the pool has 0 to {experts - 1}")


def _check_projection(
    p: int,
    result: Tensor,
    x: Tensor,
    A_p: Sequence[Tensor],
    B_p: Sequence[Tensor],
    scalings: int,
    experts: int,
) -> None:
    if not len(A_p) == len(B_p) == scalings == experts:
        raise ValueError(
            f"projection {p} has {len(A_p)} A, {len(B_p)} B and {scalings} scalings for {experts} "
            "experts"
        )
    if result.shape[:-1] != x.shape[:-1]:
        raise ValueError(
            f"results[{p}] has shape {tuple(result.shape)}, which does not go with the input "
            f"{tuple(x.shape)}"
        )
    for e, (A_RD, B_OR) in enumerate(zip(A_p, B_p, strict=True)):
        fits = A_RD.shape == (B_OR.shape[1], x.shape[-1]) and B_OR.shape[0] == result.shape[-1]
        if not fits:
            raise ValueError(
                f"A[{p}][{e}] {tuple(A_RD.shape)} and B[{p}][{e}] {tuple(B_OR.shape)} are no pair "
                f"from width {x.shape[-1]} to {result.shape[-1]}"
            )
        if not A_RD.device == B_OR.device == x.device or A_RD.dtype != B_OR.dtype:
            raise ValueError(
                f"A[{p}][{e}] is {A_RD.dtype} on {A_RD.device}, B[{p}][{e}] {B_OR.dtype} on "
                f"{B_OR.device}, x on {x.device}: give one dtype and one device"
            )
