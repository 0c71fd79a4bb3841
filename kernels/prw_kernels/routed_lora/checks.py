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

    An index outside the pool is found on a CPU only; a device is not waited for, there its row
    becomes NaN.

    Raises:
        ValueError: what does not fit, by name and value.
    """
    if not len(results) == len(A) == len(B) == len(scaling):
        raise ValueError(
            f"{len(results)} results, {len(A)} projections in A, {len(B)} in B and "
            f"{len(scaling)} in scaling: give as many of each"
        )
    experts = len(scaling[0]) if scaling else 0
    if not experts:
        raise ValueError("routed_lora needs at least one expert")
    if expert is None and experts > 1:
        raise ValueError(f"routed_lora has {experts} experts: say which with expert=")
    for name, value in (("expert", expert), ("gate", gate)):
        if value is None:
            continue
        if value.shape != x.shape[:-1][: value.dim()]:
            raise ValueError(
                f"{name} has shape {tuple(value.shape)}, which does not begin the shape of the "
                f"input {tuple(x.shape)}"
            )
        if value.device != x.device:
            raise ValueError(f"{name} is on {value.device} and x on {x.device}; move it there")
    if gate is not None and not gate.is_floating_point():
        raise ValueError(f"gate has dtype {gate.dtype}: weights are real numbers, cast it to float")
    if expert is not None:
        _check_choice(expert, gate, experts)
    for p, result in enumerate(results):
        _check_projection(p, result, x, A[p], B[p], len(scaling[p]), experts)
    dtypes = {factor.dtype for side in (A, B) for of in side for factor in of}
    if len(dtypes) > 1:
        raise ValueError(
            f"the factors are of {sorted(map(str, dtypes))}: give all of them one dtype"
        )


def check_pool(expert: Tensor, experts: int) -> None:
    """Raise where an index on a CPU is outside the pool; one on a device is not looked at.

    Raises:
        ValueError: the index.
    """
    # Of a plain tensor on a CPU, tolist reads memory: no operator, nothing to wait for.
    if type(expert) is not Tensor or expert.device.type != "cpu" or not expert.numel():
        return
    least, most = torch.stack(expert.aminmax()).tolist()
    if least < 0 or most >= experts:
        wrong = least if least < 0 else most
        raise ValueError(f"expert has index {wrong}; the pool has 0 to {experts - 1}")


def check_once() -> None:
    """Raise in a backward pass that is itself to be differentiated (``create_graph=True``).

    At once: torch's own ``once_differentiable`` waits for the second pass, and there
    `torch.autograd.grad` says that the input is not used, or returns zeros where that is allowed.

    Raises:
        RuntimeError: there is no second derivative.
    """
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            "this backend of routed LoRA has no second derivative; use backend='reference', or "
            "leave create_graph=True out"
        )


def _check_choice(expert: Tensor, gate: Tensor | None, experts: int) -> None:
    if expert.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"expert has dtype {expert.dtype}: indices are int64")
    if gate is not None and gate.shape != expert.shape:
        raise ValueError(
            f"gate has shape {tuple(gate.shape)} and expert {tuple(expert.shape)}: give one weight "
            "per choice"
        )
    if not torch.compiler.is_compiling():  # there the operators look when they run
        check_pool(expert, experts)


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
    if result.shape[:-1] != x.shape[:-1] or result.device != x.device:
        raise ValueError(
            f"results[{p}] has shape {tuple(result.shape)} on {result.device}, which does not go "
            f"with the input {tuple(x.shape)} on {x.device}"
        )
    for e, (A_RD, B_OR) in enumerate(zip(A_p, B_p, strict=True)):
        width, size = x.shape[-1], result.shape[-1]
        matrices = A_RD.dim() == B_OR.dim() == 2
        if not matrices or (*B_OR.shape, width) != (size, *A_RD.shape):
            raise ValueError(
                f"A[{p}][{e}] {tuple(A_RD.shape)} and B[{p}][{e}] {tuple(B_OR.shape)} are no pair "
                f"from width {width} to {size}"
            )
        if not A_RD.device == B_OR.device == x.device or A_RD.dtype != B_OR.dtype:
            raise ValueError(
                f"A[{p}][{e}] is {A_RD.dtype} on {A_RD.device}, B[{p}][{e}] {B_OR.dtype} on "
                f"{B_OR.device}, x on {x.device}: give one dtype and one device"
            )
