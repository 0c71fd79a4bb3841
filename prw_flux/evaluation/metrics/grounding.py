"""Referring expressions: the box or mask that was read back from a drawn mark, against the truth.

Shapes: boxes (x0, y0, x1, y1), exclusive; masks bool [H, W].
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from prw_flux.tasks.base import Box, Mask, box_iou

HIT = 0.5


def box_accuracy(found: Sequence[Box | None], wanted: Sequence[Box]) -> float:
    """Acc@0.5: the share of answers whose box has an IoU of at least 0.5.

    An answer without a mark counts as wrong. Some scripts ask for more than 0.5; an IoU of exactly
    0.5 is the only case where that differs.

    Raises:
        ValueError: the numbers differ, or there is nothing to score.
    """
    _paired(found, wanted)
    right = [a is not None and box_iou(a, b) >= HIT for a, b in zip(found, wanted, strict=True)]
    return float(np.mean(right))


def mask_overlap(found: Mask, wanted: Mask) -> tuple[int, int]:
    """(pixels of the intersection, pixels of the union).

    Raises:
        ValueError: the shapes differ.
    """
    if found.shape != wanted.shape:
        raise ValueError(f"masks of shapes {found.shape} and {wanted.shape} do not compare")
    return int((found & wanted).sum()), int((found | wanted).sum())


def cumulative_iou(overlaps: Sequence[tuple[int, int]]) -> float:
    """cIoU (also oIoU): intersections summed over all items by unions summed over all items.

    Large objects weigh more. 0 where every mask is empty.

    Raises:
        ValueError: there is nothing to score.
    """
    _paired(overlaps, overlaps)
    both, either = (sum(part) for part in zip(*overlaps, strict=True))
    return both / either if either else 0.0


def mean_iou(overlaps: Sequence[tuple[int, int]]) -> float:
    """mIoU (also gIoU): the mean over items of intersection by union; 0 where the union is empty.

    Raises:
        ValueError: there is nothing to score.
    """
    _paired(overlaps, overlaps)
    return float(np.mean([both / max(either, 1) for both, either in overlaps]))


def _paired(found: Sequence[object], wanted: Sequence[object]) -> None:
    if len(found) != len(wanted) or not wanted:
        raise ValueError(f"{len(found)} answers for {len(wanted)} expressions")
