"""Distances between the pixels of two pictures.

Shapes: H, W pixels; pictures uint8 [H, W, 3] RGB.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image as PILImage

from prw_flux.tasks.base import Image


def l1(output: Image, reference: Image) -> float:
    """mean |output - reference| / 255 over pixels and channels, in [0, 1].

    An output of another size is first resized to the reference's. Source: MagicBrush,
    evaluation/image_eval.py, `eval_distance`.
    """
    return float(np.abs(_difference(output, reference)).mean())


def l2(output: Image, reference: Image) -> float:
    """mean ((output - reference) / 255)^2 over pixels and channels: a mean square, no root.

    An output of another size is first resized to the reference's. Source: as `l1`.
    """
    return float((_difference(output, reference) ** 2).mean())


def resized_like(output: Image, reference: Image) -> Image:
    """The output at the reference's size: PIL's bicubic, rounded to uint8; itself if equal.

    Raises:
        ValueError: one of the two is not uint8 [H, W, 3].
    """
    for name, picture in (("output", output), ("reference", reference)):
        if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[-1] != 3:
            raise ValueError(f"{name} must be uint8 [H, W, 3], got {picture.dtype} {picture.shape}")
    if output.shape == reference.shape:
        return output
    height, width = reference.shape[:2]
    fitted = PILImage.fromarray(output).resize((width, height), PILImage.Resampling.BICUBIC)
    return np.asarray(fitted, np.uint8)


def _difference(output: Image, reference: Image) -> NDArray[np.float64]:
    """float64 [H, W, 3] in [-1, 1]."""
    fitted = resized_like(output, reference)
    return (fitted.astype(np.float64) - reference.astype(np.float64)) / 255.0
