"""Routing: the operators, their checks, and the choice of implementation.

Shape suffixes: T tokens, D width of h, E experts, S slots, C chunks of tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from prw_kernels.backend import check_interpreted, runs_triton
from prw_kernels.routing.reference import (
    Routed,
    Segments,
    route_reference,
    segments_reference,
    slots,
)

MOST = 64
"""Experts up to which the kernels are used: their registers hold rows of this width."""

MOST_SLOTS = 2**30
"""Indices are int32, with room for the last program's masked ones."""


def route(
    h_TD: Tensor,
    signal_ED: Tensor,
    noise_ED: Tensor | None = None,
    eps_TE: Tensor | None = None,
) -> Routed:
    """Choose one expert per row: CoLoGen (arXiv 2602.22150), Eq. 2 to 4.

    ``w = h W_r + eps * softplus(h W_n)``, ``p = softmax(w)``, ``e = argmax w``, ``gate = p_e``

    All arithmetic is fp32 (fp64 for fp64 inputs), autocast is off, a tie goes to the lowest index,
    and the choice has no gradient: gate and probabilities have one, by h and by both kinds of
    columns. One launch forward, two backward on CUDA and ROCm devices; elsewhere, and for fp64 or
    more than `MOST` experts, plain PyTorch.

    Args:
        h_TD: what the router reads, any floating dtype.
        signal_ED: W_r, one row per expert, any floating dtype.
        noise_ED: W_n, shaped like ``signal_ED``; unused without ``eps_TE``.
        eps_TE: standard normal noise; None in deterministic calls.

    Returns:
        Routed. A NaN in a row of h makes its gate and probabilities NaN; its expert stays one of
        the pool.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, ``eps_TE`` without ``noise_ED``, or bf16
            in Triton's interpreter.
    """
    if eps_TE is None:
        noise_ED = None
    _check_route(h_TD, signal_ED, noise_ED, eps_TE)
    given = [tensor for tensor in (h_TD, signal_ED, noise_ED, eps_TE) if tensor is not None]
    fits = signal_ED.shape[0] <= MOST and all(t.dtype != torch.float64 for t in given)
    if not (fits and runs_triton(h_TD.device)):
        return route_reference(h_TD, signal_ED, noise_ED, eps_TE)
    check_interpreted(*given)
    expert_T, gate_T, probs_TE, _, count_CE = route_op(h_TD, signal_ED, noise_ED, eps_TE)
    return Routed(expert=expert_T, gate=gate_T, probs=probs_TE, count=count_CE)


def segments(
    expert_T: Tensor, experts: int, *, block: int, count: Tensor | None = None
) -> Segments:
    """Group tokens by expert in tiles of ``block`` slots; see `Segments` for a worked example.

    Stable, deterministic, without host synchronisation on CUDA, and its shapes follow from
    ``(T, experts, block)`` alone: ``S = (ceil(T / block) + experts) * block``. Two Triton launches
    on CUDA and ROCm devices (and in Triton's interpreter), a stable sort elsewhere.

    Args:
        expert_T: the expert of each token, integers in ``[0, experts)``, ``[T]``.
        experts: E.
        block: slots per tile.
        count: `Routed.count` of the very same routing, which spares the first launch.

    Returns:
        Segments.

    Raises:
        ValueError: not a vector of integers, no expert, an empty block, more slots than int32 can
            count, counts of another shape, or, on the CPU, an index outside the pool. On other
            devices that would need a synchronisation: there such an index is taken to the nearest
            one of the pool, so that no kernel reads or writes out of bounds, and ``TRITON_DEBUG=1``
            makes it a device assertion.
    """
    _check_segments(expert_T, experts, block)
    if torch.compiler.is_compiling():
        token_S, slot_T, tile_I, offset_F = segments_op(expert_T, experts, block, count)
        return Segments(token=token_S, slot=slot_T, expert=tile_I, offset=offset_F, block=block)
    return _segments(expert_T, experts, block, count)


@torch.library.custom_op("prw_kernels::segments", mutates_args=())
def segments_op(
    expert_T: Tensor, experts: int, block: int, count: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`segments` as one operator for compiled graphs: token, slot, expert, offset."""
    found = _segments(expert_T, experts, block, count)
    return found.token, found.slot, found.expert, found.offset


@segments_op.register_fake
def _(
    expert_T: Tensor, experts: int, block: int, count: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    total = slots(expert_T.shape[0], experts, block)
    sizes = (total, expert_T.shape[0], total // block, experts + 1)
    token_S, slot_T, tile_I, offset_F = (
        expert_T.new_empty(size, dtype=torch.int32) for size in sizes
    )
    return token_S, slot_T, tile_I, offset_F


def _segments(expert_T: Tensor, experts: int, block: int, count: Tensor | None) -> Segments:
    if expert_T.device.type == "cpu" and expert_T.numel():
        lowest, highest = (int(end) for end in expert_T.aminmax())
        if lowest < 0 or highest >= experts:
            wrong = lowest if lowest < 0 else highest
            raise ValueError(f"expert index {wrong} is outside the pool of {experts} experts")
    if experts > MOST or not runs_triton(expert_T.device):
        return segments_reference(expert_T, experts, block=block)
    from prw_kernels.routing.launch import launch_segments

    with torch.cuda.device_of(expert_T):
        return launch_segments(expert_T, experts, block=block, count_CE=count)


def _check_segments(expert_T: Tensor, experts: int, block: int) -> None:
    if expert_T.dim() != 1 or expert_T.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"expert_T is {expert_T.dtype} of shape {tuple(expert_T.shape)}; give a vector of "
            "int32 or int64, one index per token"
        )
    if experts < 1 or block < 1:
        raise ValueError(f"{experts} experts in tiles of {block} slots: both must be at least 1")
    if slots(expert_T.shape[0], experts, block) > MOST_SLOTS:
        raise ValueError(
            f"{expert_T.shape[0]} tokens need more slots than int32 can count; split them"
        )


@torch.library.custom_op("prw_kernels::route", mutates_args=())
def route_op(
    h_TD: Tensor, signal_ED: Tensor, noise_ED: Tensor | None, eps_TE: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Expert, gate, probabilities, slope of the noise (empty without) and counts per chunk."""
    from prw_kernels.routing.launch import launch_route

    noise_ED = None if noise_ED is None else noise_ED.contiguous()
    eps_TE = None if eps_TE is None else eps_TE.contiguous()
    with torch.cuda.device_of(h_TD):
        expert_T, gate_T, probs_TE, slope_TE, count_CE = launch_route(
            h_TD.contiguous(), signal_ED.contiguous(), noise_ED, eps_TE
        )
    return expert_T, gate_T, probs_TE, _or_empty(slope_TE, probs_TE), count_CE


@route_op.register_fake
def _(
    h_TD: Tensor, signal_ED: Tensor, noise_ED: Tensor | None, eps_TE: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    from prw_kernels.routing.launch import count_shape

    tokens, experts = h_TD.shape[0], signal_ED.shape[0]
    probs_TE = h_TD.new_empty((tokens, experts), dtype=torch.float32)
    return (
        h_TD.new_empty(tokens, dtype=torch.int64),
        h_TD.new_empty(tokens, dtype=torch.float32),
        probs_TE,
        _or_empty(None if eps_TE is None else torch.empty_like(probs_TE), probs_TE),
        h_TD.new_empty(count_shape(tokens, experts, h_TD.device), dtype=torch.int32),
    )


@torch.library.custom_op("prw_kernels::route_backward", mutates_args=())
def route_backward_op(
    expert_T: Tensor,
    probs_TE: Tensor,
    slope_TE: Tensor,
    d_gate_T: Tensor | None,
    d_probs_TE: Tensor | None,
    h_TD: Tensor,
    signal_ED: Tensor,
    noise_ED: Tensor | None,
    needs_h: bool,
    needs_columns: bool,
) -> tuple[Tensor, Tensor]:
    """The derivatives by h and by the columns, signal above noise; empty where not needed."""
    from prw_kernels.routing.launch import launch_route_backward, launch_route_weight

    h_TD = h_TD.contiguous()
    with torch.cuda.device_of(h_TD):
        d_logit_TF, d_h_TD = launch_route_backward(
            expert_T,
            probs_TE,
            None if noise_ED is None else slope_TE,
            None if d_gate_T is None else d_gate_T.contiguous(),
            None if d_probs_TE is None else d_probs_TE.contiguous(),
            h_TD,
            signal_ED.contiguous(),
            None if noise_ED is None else noise_ED.contiguous(),
            needs_h,
        )
        d_columns = launch_route_weight(d_logit_TF, h_TD) if needs_columns else None
    return _or_empty(d_h_TD, h_TD), _or_empty(d_columns, probs_TE)


@route_backward_op.register_fake
def _(
    expert_T: Tensor,
    probs_TE: Tensor,
    slope_TE: Tensor,
    d_gate_T: Tensor | None,
    d_probs_TE: Tensor | None,
    h_TD: Tensor,
    signal_ED: Tensor,
    noise_ED: Tensor | None,
    needs_h: bool,
    needs_columns: bool,
) -> tuple[Tensor, Tensor]:
    columns = signal_ED.shape[0] * (1 if noise_ED is None else 2)
    d_columns = probs_TE.new_empty((columns, h_TD.shape[1]))
    return (
        _or_empty(torch.empty_like(h_TD.contiguous()) if needs_h else None, h_TD),
        _or_empty(d_columns if needs_columns else None, probs_TE),
    )


def _or_empty(tensor: Tensor | None, like: Tensor) -> Tensor:
    """An operator returns tensors only: nothing is one without elements."""
    return like.new_empty(0) if tensor is None else tensor


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    h_TD, signal_ED, noise_ED, _ = inputs
    expert_T, _, probs_TE, slope_TE, _ = output
    ctx.mark_non_differentiable(slope_TE)
    ctx.save_for_backward(expert_T, probs_TE, slope_TE, h_TD, signal_ED, noise_ED)


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    expert_T, probs_TE, slope_TE, h_TD, signal_ED, noise_ED = ctx.saved_tensors
    needs_h, needs_signal, needs_noise, _ = ctx.needs_input_grad
    given = (grads[1], grads[2], h_TD, signal_ED, noise_ED)
    d_h_TD, d_columns = route_backward_op(
        expert_T, probs_TE, slope_TE, *given, needs_h, needs_signal or needs_noise
    )
    experts = signal_ED.shape[0]
    return (
        d_h_TD if needs_h else None,
        d_columns[:experts].to(signal_ED.dtype) if needs_signal else None,
        d_columns[experts:].to(noise_ED.dtype) if needs_noise else None,
        None,
    )


route_op.register_autograd(_backward, setup_context=_keep)


def _check_route(
    h_TD: Tensor, signal_ED: Tensor, noise_ED: Tensor | None, eps_TE: Tensor | None
) -> None:
    if h_TD.dim() != 2 or signal_ED.dim() != 2 or h_TD.shape[1] != signal_ED.shape[1]:
        raise ValueError(
            f"h is {tuple(h_TD.shape)} and the signal columns {tuple(signal_ED.shape)}; they must "
            "be [T, D] and [E, D]"
        )
    tokens, experts = h_TD.shape[0], signal_ED.shape[0]
    if experts < 1:
        raise ValueError("routing needs the column of at least one expert")
    if eps_TE is not None and noise_ED is None:
        raise ValueError("eps needs the noise columns it scales; give noise_ED")
    for name, tensor, shape in (
        ("noise_ED", noise_ED, tuple(signal_ED.shape)),
        ("eps_TE", eps_TE, (tokens, experts)),
    ):
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {shape}")
    for name, tensor in (("h", h_TD), ("signal_ED", signal_ED), ("noise_ED", noise_ED)):
        if tensor is not None and not tensor.is_floating_point():
            raise ValueError(f"{name} is {tensor.dtype}; routing reads floating numbers")
        if tensor is not None and tensor.device != h_TD.device:
            raise ValueError(f"{name} is on {tensor.device} and h on {h_TD.device}; move one")
