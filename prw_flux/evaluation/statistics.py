"""Means with their uncertainty: the percentile bootstrap, plain and paired."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, final

import numpy as np

RESAMPLES: Final = 10_000
SEED: Final = 20_240_229
BLOCK: Final = 2_000_000
"""Most resampled values held at once."""


@final
@dataclass(frozen=True, kw_only=True)
class Interval:
    """A mean with the bounds of its 95 % interval over `n` samples."""

    mean: float
    low: float
    high: float
    n: int

    def to_json(self) -> dict[str, float | int]:
        """Plain numbers for a JSON file."""
        return {"mean": self.mean, "low": self.low, "high": self.high, "n": self.n}


def bootstrap(values: Sequence[float], *, resamples: int = RESAMPLES, seed: int = SEED) -> Interval:
    """The mean of `values` and the 2.5 and 97.5 % quantiles of the means of resamples.

    For the paired comparison of two arms the values are their differences on the same samples.

    Raises:
        ValueError: there are no values, or one is not finite.
    """
    x = np.asarray(values, dtype=np.float64)
    if x.size == 0 or not np.isfinite(x).all():
        raise ValueError(f"a bootstrap needs finite values, got {x.size} with gaps or none")
    rng = np.random.default_rng(seed)
    step = max(1, BLOCK // x.size)
    means = np.concatenate(
        [
            x[rng.integers(x.size, size=(min(step, resamples - done), x.size))].mean(axis=1)
            for done in range(0, resamples, step)
        ]
    )
    low, high = np.quantile(means, [0.025, 0.975])
    return Interval(mean=float(x.mean()), low=float(low), high=float(high), n=int(x.size))


def paired_bootstrap(
    ours: Sequence[float],
    theirs: Sequence[float],
    *,
    resamples: int = RESAMPLES,
    seed: int = SEED,
) -> Interval:
    """Mean of `ours - theirs`, sample by sample, with its 95 % interval.

    Raises:
        ValueError: the two have different lengths, or no values.
    """
    if len(ours) != len(theirs):
        raise ValueError(f"a paired comparison of {len(ours)} and {len(theirs)} values")
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    return bootstrap(differences, resamples=resamples, seed=seed)
