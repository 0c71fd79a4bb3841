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

    Only the expert of the open stage learns. With ``router_train="all"`` every router column
    learns beside it, with ``"new"`` only that expert's. Between stages nothing learns.
    """
    newest = ledger.newest
    if newest is None:
        return Learning()
    own = frozenset({newest.index})
    return Learning(own, own if config.router_train == "new" else frozenset(range(len(ledger))))
