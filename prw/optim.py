"""Keeping a torch optimizer in step with pools that grow and freeze."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary


class Kinds:
    """Remembers which parameters are or were routed ones, and of which kind."""

    def __init__(self) -> None:
        self._kinds = WeakIdKeyDictionary()

    def learn(self, named: Mapping[str, nn.Parameter]) -> None:
        """Take note of parameters, named as in a pool: ``experts...`` or ``columns...``."""
        for name, parameter in named.items():
            self._kinds[parameter] = name.split(".")[0]

    def __getitem__(self, parameter: torch.Tensor) -> str | None:
        """``"experts"``, ``"columns"``, or None for a parameter that was never a pool's."""
        kind: str | None = self._kinds.get(parameter)
        return kind


def sync(optimizer: torch.optim.Optimizer, learning: list[nn.Parameter], kinds: Kinds) -> None:
    """Let `optimizer` hold, of all routed parameters, exactly those that learn.

    Frozen and dropped ones leave with their state; survivors keep theirs. A new one joins the last
    group that held its kind, else the last group that held any routed parameter, else the first
    group. Parameters that never belonged to a pool are left alone.

    Args:
        optimizer: any optimizer with parameter groups.
        learning: the parameters that may learn now.
        kinds: the kind of every parameter that is or was in a pool.
    """
    wanted = {id(parameter) for parameter in learning}
    held: set[int] = set()
    homes: dict[str, int] = {}
    for index, group in enumerate(optimizer.param_groups):
        for parameter in group["params"]:
            kind = kinds[parameter]
            if kind is not None:
                homes[kind] = homes["any"] = index
            if kind is not None and id(parameter) not in wanted:
                optimizer.state.pop(parameter, None)
        group["params"] = [p for p in group["params"] if kinds[p] is None or id(p) in wanted]
        held.update(id(parameter) for parameter in group["params"])
    for parameter in learning:
        if id(parameter) not in held:
            home = homes.get(kinds[parameter] or "any", homes.get("any", 0))
            optimizer.param_groups[home]["params"].append(parameter)
