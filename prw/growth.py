"""Where the router column of a new expert begins.

Shape suffixes: D width of what the router reads, E experts there are.
"""

from __future__ import annotations

from torch import Tensor


def first_column(kind: str, signal_ED: Tensor) -> Tensor | None:
    """The value a new signal column begins with, ``[D]``; None for zero.

    ``"zero"``
        ``w = 0``, the paper's. Its logit is 0 for every input, so it takes every input whose other
        logits are all negative: few while columns grow from zero together, most of them after
        `Weave.consolidate`, which centres the largest logits around 0.
    ``"mean"``
        ``w = mean_e w_e``. Its logit is the mean of the others and never exceeds the largest of
        them, whatever the input: no input changes its expert, except where the two largest tie up
        to rounding.

    Measured by ``python -m benchmarks.flip_rate``. Routers that are not linear in the columns get
    the same value without that guarantee.

    Args:
        kind: as `Config.new_column`.
        signal_ED: the columns there are.
    """
    if kind == "zero" or not len(signal_ED):
        return None
    # In fp64, so that the mean of equal columns is that very column and ties go to the oldest.
    return signal_ED.double().mean(0)
