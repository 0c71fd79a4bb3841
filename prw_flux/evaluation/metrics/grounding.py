"""Referring expressions: the box or mask that was read back from a drawn mark, against the truth.

Shapes: boxes (x0, y0, x1, y1), exclusive; masks bool [H, W].
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from prw_flux.tasks.base import Box, Mask, box_iou

HIT = 0.5


def box_accuracy(found: Sequence[Box | None], wanted: Sequence[Box], hit: float = HIT) -> float:
    """Acc@0.5: the share of answers whose box has an IoU of at least `hit`.

    An answer without a mark counts as wrong. Some scripts ask for more than 0.5; an IoU of exactly
    0.5 is the only case where that differs.

    Raises:
        ValueError: the numbers differ, or there is nothing to score.
    """
    _paired(found, wanted)
    right = [a is not None and box_iou(a, b) >= hit for a, b in zip(found, wanted, strict=True)]
    return float(np.mean(right))


def cumulative_iou(found: Sequence[Mask], wanted: Sequence[Mask]) -> float:
    """cIoU (also oIoU): intersections summed over all items by unions summed over all items.

    Large objects weigh more. 0 where every mask is empty.

    Raises:
        ValueError: the numbers or the shapes of two masks differ, or there is nothing to score.
    """
    both, either = (sum(part) for part in zip(*_areas(found, wanted), strict=True))
    return both / either if either else 0.0


def mean_iou(found: Sequence[Mask], wanted: Sequence[Mask]) -> float:
    """mIoU (also gIoU): the mean over items of intersection by union; 0 where the union is empty.

    Raises:
        ValueError: as `cumulative_iou`.
    """
    return float(np.mean([both / max(either, 1) for both, either in _areas(found, wanted)]))


def _areas(found: Sequence[Mask], wanted: Sequence[Mask]) -> list[tuple[int, int]]:
    _paired(found, wanted)
    for index, (a, b) in enumerate(zip(found, wanted, strict=True)):
        if a.shape != b.shape:
            raise ValueError(f"mask {index}: found {a.shape}, wanted {b.shape}")
    return [(int((a & b).sum()), int((a | b).sum())) for a, b in zip(found, wanted, strict=True)]


def _paired(found: Sequence[object], wanted: Sequence[object]) -> None:
    if len(found) != len(wanted) or not wanted:
        raise ValueError(f"{len(found)} answers for {len(wanted)} expressions")
