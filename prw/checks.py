"""Arguments that must be numbers: one sentence with the name, the bounds and the value."""

from __future__ import annotations

import math
from numbers import Real

from prw.errors import ConfigError


def check_number(name: str, value: object, low: float = -math.inf, high: float = math.inf) -> None:
    """Raise ConfigError unless `value` is a finite number in ``[low, high]``; no tensor is one."""
    if isinstance(value, Real) and not isinstance(value, bool):
        if math.isfinite(value) and low <= float(value) <= high:
            return
    bounds = f" from {low:g} to {high:g}" if math.isfinite(high) else f" of at least {low:g}"
    raise ConfigError(
        f"{name} must be a finite number{bounds if math.isfinite(low) else ''}, got {value!r}"
    )


def check_whole(name: str, value: object, low: int) -> None:
    """Raise ConfigError unless `value` is a whole number of at least `low`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ConfigError(f"{name} must be a whole number of at least {low}, got {value!r}")
