"""Keeping a torch optimizer in step with pools that grow and freeze."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from prw.experts import Expert


class Kinds:
    """Remembers which parameters are or were routed ones, and of which kind."""

    def __init__(self) -> None:
        self._kinds = WeakIdKeyDictionary()
        self._homes: WeakKeyDictionary[torch.optim.Optimizer, dict[str, int]] = WeakKeyDictionary()

    def homes(self, optimizer: torch.optim.Optimizer) -> dict[str, int]:
        """By kind, the index of the group of `optimizer` that holds it, or held it last."""
        return self._homes.setdefault(optimizer, {})

    def learn(self, named: Mapping[str, nn.Parameter]) -> None:
        """Take note of parameters, named as in a pool: ``experts...`` or ``columns...``."""
        for name, parameter in named.items():
            self._kinds[parameter] = name.split(".")[0]

    def __getitem__(self, parameter: torch.Tensor) -> str | None:
        """``"experts"``, ``"columns"``, or None for a parameter that was never a pool's."""
        kind: str | None = self._kinds.get(parameter)
        return kind


def sync(
    optimizer: torch.optim.Optimizer, learning: list[tuple[str, nn.Parameter]], kinds: Kinds
) -> None:
    """Let `optimizer` hold, of all routed parameters, exactly those that learn.

    Frozen and dropped ones leave with their state; survivors keep theirs. A new one joins the last
    group that held its kind, else the last group that held any routed parameter, else the first
    group. Parameters that never belonged to a pool are left alone.

    Args:
        optimizer: any optimizer with parameter groups.
        learning: names and parameters that it should hold now. The names matter to an optimizer
            that was itself given names.
        kinds: the kind of every parameter that is or was in a pool.
    """
    wanted = {id(parameter) for _, parameter in learning}
    held: set[int] = set()
    homes = kinds.homes(optimizer)
    for index, group in enumerate(optimizer.param_groups):
        for parameter in group["params"]:
            kind = kinds[parameter]
            if kind is not None:
                homes[kind] = homes["any"] = index
            if kind is not None and id(parameter) not in wanted:
                optimizer.state.pop(parameter, None)
        stays = [kinds[p] is None or id(p) in wanted for p in group["params"]]
        for field in ("params", "param_names"):
            if field in group:
                group[field] = [x for x, kept in zip(group[field], stays, strict=True) if kept]
        held.update(id(parameter) for parameter in group["params"])
    for name, parameter in learning:
        if id(parameter) not in held:
            home = homes.get(kinds[parameter] or "any", homes.get("any", 0))
            group = optimizer.param_groups[home]
            group["params"].append(parameter)
            if "param_names" in group:
                group["param_names"].append(name)


def never_stepped(experts: Iterable[Expert]) -> bool:
    """Whether some ``B`` has a gradient that is not zero, and yet every ``B`` is still zero.

    That is an expert which took part in training while no optimizer held it. Waits for the device.
    """
    factors = [B_OR for expert in experts for B_OR in expert.B]
    pushed = any(bool(B_OR.grad.any()) for B_OR in factors if B_OR.grad is not None)
    return pushed and not any(bool(B_OR.any()) for B_OR in factors)
