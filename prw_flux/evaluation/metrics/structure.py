"""How well a generated picture follows a control map: edges, depth, line drawings, classes.

All numbers are on the scales of ControlNet++'s scripts (arXiv 2404.07987, eval/ of
liming-ai/ControlNet_Plus_Plus at 9ffe264), which the paper's Table 3 cites. The maps are made by
the caller: a score is only comparable if the same extractor made both maps.

Shapes: N pictures; H, W pixels; C classes.
"""

from __future__ import annotations

from typing import Any, Final, TypeAlias, final

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image as PILImage

Map: TypeAlias = NDArray[Any]

MS_SSIM_SIDE: Final = 161
"""Smallest side: five scales, and a window of 11 must fit the last."""


def edge_f1(found: Map, wanted: Map) -> float:
    """F1 of two binary edge maps, pixel by pixel, no tolerance.

        F1 = 2 TP / (2 TP + FP + FN)

    Maps of several pictures of one prompt are scored as one stack, as ControlNet++ does with its
    four groups. 0 where both are blank, as there (torchmetrics' BinaryF1Score).

    Args:
        found, wanted: bool or 0/1 of equal shape, e.g. [N, H, W].

    Raises:
        ValueError: the shapes differ.
    """
    _same_shape(found, wanted)
    a, b = found.astype(bool), wanted.astype(bool)
    both, one = int((a & b).sum()), int((a ^ b).sum())
    return 2 * both / (2 * both + one) if both + one else 0.0


def depth_rmse(found_HW: Map, wanted_HW: Map) -> float:
    """sqrt(mean (d - d*)^2) on 0 .. 255, the scale of the paper's 31.79.

    d is `depth_estimate` and d* `depth_label`, which ControlNet++ stores as pictures before it
    compares them.

    Args:
        found_HW: the estimator's map of the generated picture, any positive scale.
        wanted_HW: the label, any scale.

    Raises:
        ValueError: a map is not [H, W], or the estimate is nowhere positive.
    """
    label = depth_label(wanted_HW)
    grey = depth_estimate(found_HW, label.shape)
    return float(np.sqrt(((grey.astype(np.float64) - label.astype(np.float64)) ** 2).mean()))


def depth_estimate(found_HW: Map, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """An estimate divided by its largest value, with 8 bits (cut), then bilinearly to (h, w).

    Raises:
        ValueError: the map is not [H, W], or nowhere positive.
    """
    found = found_HW.astype(np.float64)
    if found.ndim != 2:
        raise ValueError(f"estimated depths are [H, W], got {found.shape}")
    if not found.max() > 0:
        raise ValueError("the estimated depth is nowhere positive")
    grey = np.asarray(np.clip(found / found.max(), 0, 1) * 255, np.uint8)
    if grey.shape == shape:
        return grey
    size = (shape[1], shape[0])
    resized = PILImage.fromarray(grey).resize(size, PILImage.Resampling.BILINEAR)
    return np.array(resized, np.uint8)


def depth_label(wanted_HW: Map) -> NDArray[np.uint8]:
    """A label stretched from its lowest to its highest value, with 8 bits (cut).

    Raises:
        ValueError: the map is not [H, W].
    """
    if wanted_HW.ndim != 2:
        raise ValueError(f"depth labels are [H, W], got {wanted_HW.shape}")
    wanted = wanted_HW.astype(np.float64)
    stretched = (wanted - wanted.min()) / max(float(np.ptp(wanted)), 1e-12)
    return np.asarray(stretched * 255, np.uint8)


def ms_ssim(found: Map, wanted: Map) -> float:
    """Multi-scale SSIM of two maps in [0, 1]; torchmetrics with its defaults and data_range 1.

    What ControlNet++ and the paper's Table 3 print as "SSIM" (times 100) for HED and line art. In
    float32, as there: a tenth of the time of float64 at 512 pixels, and 3e-5 away from it.

    Args:
        found, wanted: float [H, W] or [N, H, W] in [0, 1].

    Raises:
        ValueError: the shapes differ, a side is below 161 pixels, or values leave [0, 1].
    """
    from torchmetrics.functional.image import multiscale_structural_similarity_index_measure

    _same_shape(found, wanted)
    if min(found.shape[-2:]) < MS_SSIM_SIDE:
        height, width = found.shape[-2:]
        raise ValueError(f"MS-SSIM needs sides of {MS_SSIM_SIDE} pixels, got {height} x {width}")
    pair = [torch.from_numpy(np.asarray(x, np.float32)) for x in (found, wanted)]
    if any(bool((x < 0).any() or (x > 1).any()) for x in pair):
        raise ValueError("MS-SSIM takes maps in [0, 1]")
    found_N1HW, wanted_N1HW = (x.reshape(-1, 1, *x.shape[-2:]) for x in pair)
    value = multiscale_structural_similarity_index_measure(found_N1HW, wanted_N1HW, data_range=1.0)
    return float(value)


@final
class Confusion:
    """A confusion matrix over all pictures, from which mIoU is read at the end.

        IoU_c = n_cc / (sum_j n_cj + sum_j n_jc - n_cc),    mIoU = mean of the classes that occur

    mmsegmentation's rule: one matrix over the whole set, not a mean of the pictures' values.

    Args:
        classes: C.
        ignore: a label whose pixels do not count (ADE20K: 0 of the annotation files).
    """

    def __init__(self, classes: int, ignore: int | None = None) -> None:
        self.counts_CC = np.zeros((classes, classes), np.int64)
        self.ignore = ignore

    def add(self, found: Map, wanted: Map) -> None:
        """Counts the pixels of one picture: integer maps of equal shape.

        Raises:
            ValueError: the shapes differ, or a class is not in 0 .. C-1.
        """
        _same_shape(found, wanted)
        kept = np.ones(wanted.shape, bool) if self.ignore is None else wanted != self.ignore
        a, b = found[kept].astype(np.int64), wanted[kept].astype(np.int64)
        classes = len(self.counts_CC)
        for name, labels in (("found", a), ("wanted", b)):
            odd = labels[(labels < 0) | (labels >= classes)]
            if odd.size:
                raise ValueError(f"{name} has class {int(odd[0])}, known are 0 .. {classes - 1}")
        pairs = np.bincount(b * classes + a, minlength=classes**2)
        self.counts_CC += pairs.reshape(classes, classes)

    def miou(self) -> float:
        """Mean IoU over the classes that occur in either map.

        Raises:
            ValueError: nothing was counted.
        """
        hit = np.diag(self.counts_CC)
        union = self.counts_CC.sum(0) + self.counts_CC.sum(1) - hit
        if not union.any():
            raise ValueError("mIoU of no pixels")
        return float((hit[union > 0] / union[union > 0]).mean())


def _same_shape(found: Map, wanted: Map) -> None:
    if found.shape != wanted.shape:
        raise ValueError(f"maps of shapes {found.shape} and {wanted.shape} do not compare")
