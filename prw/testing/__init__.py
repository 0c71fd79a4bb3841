"""Property tests for routers, losses and backends of one's own. Needs the extra ``testing``.

`check_router`, `check_loss` and `check_backend` try our invariants on an object of the user's and
raise `BrokenInvariant` with the smallest counterexample. The strategies draw what prw works on.
"""

from prw.testing.backends import BACKEND_INVARIANTS, BackendCase, backend_cases, check_backend
from prw.testing.invariant import BrokenInvariant, Invariant
from prw.testing.losses import LOSS_INVARIANTS, LossCase, check_loss, loss_cases
from prw.testing.routers import ROUTER_INVARIANTS, RouterCase, check_router, router_cases
from prw.testing.strategies import (
    AWKWARD_SHAPES,
    PoolPlan,
    disturb,
    dtypes,
    histories,
    play,
    pools,
    shapes,
)

__all__ = [
    "AWKWARD_SHAPES",
    "BACKEND_INVARIANTS",
    "LOSS_INVARIANTS",
    "ROUTER_INVARIANTS",
    "BackendCase",
    "BrokenInvariant",
    "Invariant",
    "LossCase",
    "PoolPlan",
    "RouterCase",
    "backend_cases",
    "check_backend",
    "check_loss",
    "check_router",
    "disturb",
    "dtypes",
    "histories",
    "loss_cases",
    "play",
    "pools",
    "router_cases",
    "shapes",
]
