"""Which parameters may learn, as a pure function of the ledger and the configuration."""

from __future__ import annotations

from dataclasses import dataclass

from prw.config import Config
from prw.ledger import Ledger


@dataclass(frozen=True)
class Learning:
    """Indices of the experts and of the router columns that may learn now; all else is frozen."""

    experts: frozenset[int] = frozenset()
    columns: frozenset[int] = frozenset()


def schedule(ledger: Ledger, config: Config) -> Learning:
    """The freezing rule of progressive weaving (CoLoGen, arXiv 2602.22150, section 3).

    Only the expert of the open stage learns, unless the ledger says that an expert was frozen or
    thawed. With ``router_train="all"`` every router column learns in an open stage, with ``"new"``
    only that of the stage, whatever was frozen or thawed. Between stages nothing learns.
    """
    newest = ledger.newest
    if newest is None:
        return Learning()
    experts = frozenset(stage.index for stage in ledger.stages if stage.learns)
    every = range(len(ledger)) if config.router_train == "all" else [newest.index]
    return Learning(experts, frozenset(every))
