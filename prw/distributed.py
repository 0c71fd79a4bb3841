"""Data parallel training: routed parameters stay whole on every rank, their gradients are averaged.

Under DDP nothing here is needed. FSDP2 and DeepSpeed's ZeRO-3 shard the frozen base and are kept
away from the routed parameters: they are small, a stage may add some at any time, and a checkpoint
needs them whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import groupby
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

from prw.errors import StageError
from prw.pool import Pool

if TYPE_CHECKING:
    from prw.weaving import Weave


def ranks() -> int:
    """How many processes train together: 1 without torch.distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def routed_parameters(weave: Weave) -> set[nn.Parameter]:
    """All parameters of the pools, for ``fully_shard(..., ignored_params=...)``."""
    return {parameter for pool in weave.pools.values() for parameter in pool.parameters()}


@contextmanager
def apart(model: nn.Module, weave: Weave) -> Iterator[None]:
    """Inside, the pools are no part of `model`: what happens to its parameters leaves them alone.

    For ``deepspeed.initialize`` with stage 3 of ZeRO, which shards every parameter that it finds.

    Args:
        model: the woven model, on its device already; it cannot run meanwhile.
        weave: whose pools are taken out, and put back at the end.
    """
    pools = set(weave.pools.values())
    homes = [
        (module, name, child)
        for module in model.modules()
        for name, child in module.named_children()
        if child in pools
    ]
    for module, name, _ in homes:
        setattr(module, name, None)  # torch keeps the place of a child that is None
    try:
        yield
    finally:
        for module, name, pool in homes:
            setattr(module, name, pool)


@torch.no_grad()
def broadcast(weave: Weave, source: int = 0) -> None:
    """Give every rank the routed parameters that rank `source` holds, and what its routers keep.

    Call it after `unlock`: each rank draws the new expert from its own generator. DDP does it
    itself when it wraps the model. Call it after `consolidate` where ranks may round differently;
    all must remember as many inputs. Does nothing without torch.distributed.
    """
    if ranks() > 1:
        whole(weave.pools)
        for pool in weave.pools.values():
            for tensor in (*pool.parameters(), *pool.buffers()):
                if tensor.numel():
                    dist.broadcast(tensor.data, source)


@torch.no_grad()
def average_gradients(weave: Weave) -> None:
    """Replace the gradient of every parameter that may learn by its mean over ranks.

    For parameters that no wrapper looks after, as under FSDP2 with ``ignored_params`` and ZeRO-3
    with `apart`; call it once per step, after the last backward and before clipping. Does nothing
    without torch.distributed.
    """
    if ranks() > 1:
        average(weave.parameters())


@torch.no_grad()
def average(parameters: Iterable[nn.Parameter]) -> None:
    """Replace the gradient of each parameter by its mean over ranks.

    A gradient that is absent counts as zeros. The sums run in the dtype of the gradients, one
    collective per dtype and device.

    Args:
        parameters: the same on every rank, in the same order.
    """
    if ranks() == 1:
        return
    learning = list(parameters)
    for parameter in learning:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    grads = [parameter.grad for parameter in learning if parameter.grad is not None]
    for _, alike in groupby(sorted(grads, key=_kind), key=_kind):
        _average(list(alike))


def whole(pools: Mapping[str, Pool]) -> None:
    """Refuse routed parameters that something has sharded.

    Raises:
        StageError: a parameter is a DTensor, or one that ZeRO-3 has marked as its own.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return
    from torch.distributed.tensor import DTensor  # costs a second to import, so only where needed

    for group, pool in pools.items():
        for name, parameter in pool.named_parameters():
            if isinstance(parameter, DTensor):
                raise StageError(
                    f"{name!r} of the routed group {group!r} is sharded; call fully_shard(..., "
                    "ignored_params=prw.distributed.routed_parameters(weave))"
                )
            if "ds_id" in vars(parameter):
                raise StageError(
                    f"{name!r} of the routed group {group!r} is sharded by ZeRO-3; call "
                    "deepspeed.initialize inside `with prw.distributed.apart(model, weave):`"
                )


def _average(grads: Iterable[Tensor]) -> None:
    grads = list(grads)
    flat = torch.cat([grad.flatten() for grad in grads])
    dist.all_reduce(flat)
    flat /= ranks()
    for grad, mean in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
        grad.copy_(mean.view_as(grad))


def _kind(tensor: Tensor) -> tuple[str, str]:
    return str(tensor.dtype), str(tensor.device)
