"""Experts folded into the weights of the base: exactly for one route, with a price for the average.

Shape suffixes: D input width, O output width, R rank, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prw.call import Call, Record
from prw.checks import check_number
from prw.errors import ConfigError, StageError
from prw.ledger import Ledger
from prw.linear import RoutedLinear, is_transposed

Shares = Mapping[str, tuple[float, ...]]


@dataclass(frozen=True, kw_only=True)
class Fidelity:
    """What an average of experts costs, measured against the routed model.

    Attributes:
        model: relative error of the model's output, ``|merged - routed| / |routed|``.
        layers: the same of each layer's output on the input it has in the routed model.
        shares: by routed group, the mean gate each expert received: its factor in the average.
    """

    model: float
    layers: Mapping[str, float]
    shares: Shares


def check_mergeable(layers: Mapping[str, RoutedLinear]) -> None:
    """Raise StageError where a weight cannot take a residual without a loss nobody asked for."""
    if not layers:
        raise StageError("this weave was built over bare pools; there are no weights to merge into")
    for target, layer in layers.items():
        weight = dict(layer.base.named_parameters(recurse=False)).get("weight")
        kind = type(layer.base).__name__
        if not isinstance(layer.base, nn.Linear) and not is_transposed(layer.base):
            raise StageError(f"{target!r} is a {kind}, into which nothing can be merged")
        if weight is None:
            raise StageError(f"the weight of {target!r} is computed, not stored; nothing can merge")
        plain = type(weight) is nn.Parameter and weight.is_floating_point()
        if not plain or weight.dtype.itemsize < 2 or weight.is_meta:
            raise StageError(
                f"the weight of {target!r} is a quantised or distributed {type(weight).__name__} "
                f"({weight.dtype}); merging would round it anew: load the base in 16 or 32 bits "
                "on one device first"
            )


@torch.no_grad()
def merged_weights(layers: Mapping[str, RoutedLinear], shares: Shares) -> dict[str, nn.Parameter]:
    """``W + sum_e share_e * alpha_e / R_e * B_e A_e`` of each layer, new parameters typed like W.

    The sum is taken in fp32 (fp64 where W is) and rounded once.

    Raises:
        StageError: a result is not finite in the dtype of W.
    """
    merged = {}
    for target, layer in layers.items():
        weight = layer.base.get_parameter("weight")
        total = weight.to(torch.promote_types(weight.dtype, torch.float32))
        for index, share in enumerate(shares[layer.pool.name]):
            if share:
                expert = layer.pool.expert(index)
                A_RD, B_OR = (factor.to(total) for factor in expert.pair(layer.projection))
                delta_OD = B_OR @ A_RD * (expert.scaling(layer.projection) * share)
                total = total + (delta_OD.T if is_transposed(layer.base) else delta_OD)
        rounded = total.to(weight.dtype)
        if not rounded.isfinite().all():
            raise StageError(f"the merged weight of {target!r} does not fit into {weight.dtype}")
        merged[target] = nn.Parameter(rounded, requires_grad=weight.requires_grad)
    return merged


def put_weights(
    layers: Mapping[str, RoutedLinear], merged: Mapping[str, nn.Parameter]
) -> dict[str, nn.Parameter]:
    """Give the layers other weights; returns those they had."""
    before = {}
    for target, weight in merged.items():
        base = layers[target].base
        before[target] = base.get_parameter("weight")
        base.weight = weight.requires_grad_(before[target].requires_grad)
    return before


@torch.no_grad()
def average(
    layers: Mapping[str, RoutedLinear],
    run: Callable[[], Tensor],
    record: Record,
    bind: Callable[[Call], AbstractContextManager[Call]],
) -> tuple[dict[str, nn.Parameter], Fidelity]:
    """The weights with the average of all experts, and what they cost; the model stays as it is.

    Args:
        layers: the routed layers.
        run: as in `Weave.merge_average`.
        record: a fresh deterministic record, for the routed run.
        bind: binds a call to the weave inside a with block.

    Raises:
        StageError: a layer is not run.
        ConfigError: `run` returns no tensor.
    """
    with bind(record), record:
        routed = run()
    shares = _shares(record)
    missed = {layer.pool.name for layer in layers.values()} - set(shares)
    if missed:
        raise StageError(f"{min(missed)!r} was not run; call the whole model in run()")
    merged = merged_weights(layers, shares)
    quiet = Call(mask=record.mask, context=record.context)
    with bind(quiet), _layer_errors(layers, merged) as errors:
        run()
    with bind(quiet), _trial(layers, merged):
        averaged = run()
    price = _relative(*_squares(averaged, routed))
    return merged, Fidelity(model=price, layers=errors, shares=shares)


def _shares(record: Record) -> dict[str, tuple[float, ...]]:
    """By group, the mean gate that each expert received, over the rows that count."""
    found = {}
    for name, group in record.tally.groups.items():
        total_E, count = torch.zeros(()), 0
        for routing, keep in zip(group.routings, group.masks, strict=True):
            kept = torch.ones_like(routing.expert, dtype=torch.bool) if keep is None else keep
            chosen_TE = nn.functional.one_hot(routing.expert[kept], routing.probs.shape[-1])
            total_E = total_E + (chosen_TE * routing.gate[kept][:, None].double()).sum(0).cpu()
            count += int(kept.sum())
        found[name] = tuple((total_E / max(count, 1)).tolist())
    return found


@contextmanager
def _layer_errors(
    layers: Mapping[str, RoutedLinear], merged: Mapping[str, nn.Parameter]
) -> Iterator[dict[str, float]]:
    """Inside, compare each layer's routed output with its merged one; filled at the end."""
    sums: dict[str, list[float]] = {}
    found: dict[str, float] = {}

    def watch(target: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
        def compare(layer: nn.Module, given: tuple[Any, ...], routed: Tensor) -> None:
            assert isinstance(layer, RoutedLinear)
            weights = {"weight": merged[target].detach()}
            ours = torch.func.functional_call(layer.base, weights, given)
            total = sums.setdefault(target, [0.0, 0.0])
            for place, part in enumerate(_squares(ours, routed)):
                total[place] += part

        return compare

    with ExitStack() as stack:
        for target, layer in layers.items():
            stack.callback(layer.register_forward_hook(watch(target)).remove)
        yield found
    found.update((target, _relative(*total)) for target, total in sums.items())


@contextmanager
def _trial(
    layers: Mapping[str, RoutedLinear], merged: Mapping[str, nn.Parameter]
) -> Iterator[None]:
    """Inside, the model is the merged one; afterwards every tensor is the one it was before."""
    pools = {id(layer.pool): layer.pool for layer in layers.values()}.values()
    ledgers = [pool.ledger for pool in pools]
    before = put_weights(layers, merged)
    try:
        for pool in pools:
            pool.ledger = Ledger()
        yield
    finally:
        for pool, ledger in zip(pools, ledgers, strict=True):
            pool.ledger = ledger
        put_weights(layers, before)


def _squares(ours: Tensor, wanted: Tensor) -> tuple[float, float]:
    """``|ours - wanted|^2`` and ``|wanted|^2``, in fp64."""
    if not isinstance(ours, Tensor) or not isinstance(wanted, Tensor):
        raise ConfigError(f"run() should return one tensor, got a {type(wanted).__name__}")
    ours, wanted = ours.detach().double(), wanted.detach().double()
    return float((ours - wanted).square().sum()), float(wanted.square().sum())


def _relative(error: float, size: float) -> float:
    """The square root of a quotient; 0 for 0 / 0."""
    if error == 0:
        return 0.0
    return math.sqrt(error / size) if size else math.inf


def check_tolerance(tolerance: float) -> None:
    """Raise ConfigError for what is no relative error."""
    check_number("tolerance, a relative error,", tolerance, 0)


def check_price(fidelity: Fidelity, tolerance: float) -> None:
    """Raise StageError when an average costs more than the caller accepts."""
    if fidelity.model <= tolerance:
        return
    worst = max(fidelity.layers, key=fidelity.layers.__getitem__)
    raise StageError(
        f"the average of the experts changes the model's output by {fidelity.model:.2%}, more than "
        f"the tolerance of {tolerance:.2%} (worst layer: {worst!r}, {fidelity.layers[worst]:.2%}); "
        "nothing was changed: keep the routed model, or merge() one expert"
    )
