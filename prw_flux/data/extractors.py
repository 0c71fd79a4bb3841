"""Line maps computed from a picture by classical means: no weights, no downloads.

Each one is named with its method, because a soft edge from a Sobel filter is not HED and a line
drawing from a difference of Gaussians is not a learned one; a metric that compares maps says
which method made them.

Shapes: H, W pixels. Input uint8 [H, W, 3] RGB; output uint8 [H, W], white lines on black. Lengths
scale with the short side S relative to 512 pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, TypeAlias, final

import cv2
import numpy as np
from numpy.typing import NDArray

Image: TypeAlias = NDArray[np.uint8]


@final
@dataclass(frozen=True)
class Extractor:
    """A named map: `condition` is what it stands for, `method` how it is computed."""

    condition: str
    method: str
    compute: Callable[[Image], NDArray[np.uint8]]

    def __call__(self, image: Image) -> NDArray[np.uint8]:
        """uint8 [H, W, 3] -> uint8 [H, W].

        Raises:
            ValueError: the picture is not uint8 [H, W, 3].
        """
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
            raise ValueError(
                f"{self.condition} needs uint8 [H, W, 3], got {image.dtype} {image.shape}"
            )
        return self.compute(image)


def canny(image: Image) -> NDArray[np.uint8]:
    """Canny's edges of the RGB picture (not of its grey values), thresholds 100 and 200."""
    return np.asarray(cv2.Canny(image, 100, 200), np.uint8)


def soft_edge(image: Image) -> NDArray[np.uint8]:
    """Largest Sobel magnitude over channels and three blurs.

        e = max over sigma in (1, 2, 4) S / 512 and over channels of sigma |grad (G_sigma * x)|

    divided by its 99.5th percentile (at least 8 levels, so that a flat picture stays black).
    """
    x = image.astype(np.float32)
    scale = min(image.shape[:2]) / 512
    best = np.zeros(image.shape[:2], np.float32)
    for octave in (1.0, 2.0, 4.0):
        sigma = max(0.6, octave * scale)
        blurred = cv2.GaussianBlur(x, (0, 0), sigma)
        dx, dy = (cv2.Sobel(blurred, cv2.CV_32F, i, 1 - i, ksize=3, scale=0.25) for i in (1, 0))
        magnitude = np.asarray(np.hypot(dx, dy).max(axis=-1), np.float32)
        best = np.maximum(best, sigma * magnitude)
    top = max(8.0, float(np.percentile(best, 99.5)))
    return np.asarray(np.rint(np.clip(best / top, 0, 1) * 255), np.uint8)


def line_art(image: Image) -> NDArray[np.uint8]:
    """Extended difference of Gaussians (Winnemoeller 2012), strongest channel, lines in white.

        d = G_{1.6 sigma} * x - G_sigma * x,    line = tanh(max(0, d - 2 levels) / 12 levels)

    with sigma = max(0.7, 1.6 S / 512): the dark side of every edge becomes one line.
    """
    x = image.astype(np.float32)
    sigma = max(0.7, 1.6 * min(image.shape[:2]) / 512)
    near = cv2.GaussianBlur(x, (0, 0), sigma)
    far = cv2.GaussianBlur(x, (0, 0), 1.6 * sigma)
    response = np.asarray((far - near).max(axis=-1), np.float32)
    line = np.tanh(np.maximum(0.0, response - 2.0) / 12.0)
    return np.asarray(np.rint(line * 255), np.uint8)


EXTRACTORS: Final[Mapping[str, Extractor]] = MappingProxyType(
    {
        "canny": Extractor("canny", "cv2-rgb-100-200", canny),
        "softedge": Extractor("softedge", "classical-multiscale-sobel", soft_edge),
        "lineart": Extractor("lineart", "classical-xdog", line_art),
    }
)
