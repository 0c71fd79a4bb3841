"""How well a picture follows a control map.

Line maps are extracted from the output and from the target by one and the same extractor and
compared by F1; comparing with the given map itself would punish a perfect picture wherever the
given map is analytic (ShapeWeave's outlines) and the extractor's is not. Depth and segmentation
have no extractor: the regions of the objects, and for segmentation their classes, are read from the
output by the parser and compared over the union, so that a large background earns nothing.

Shapes: S side in pixels; images uint8 [S, S, 3], maps uint8 [S, S], regions bool [S, S].
"""

from __future__ import annotations

from typing import Final

import cv2
import numpy as np
from numpy.typing import NDArray

from prw_flux.data.extractors import EXTRACTORS
from prw_flux.shapeweave.parse import CONTRAST, border_colour, parse
from prw_flux.shapeweave.render import SEGMENTATION_CLASSES, item_mask, segmentation_map
from prw_flux.shapeweave.scene import Scene
from prw_flux.tasks.base import Image, Mask, fill_box, mask_iou

LINE: Final = 128
"""Level from which a pixel of a line map is a line."""


def map_agreement(condition: str, output: Image, target: Image, scene: Scene) -> float:
    """Agreement in [0, 1] of the map that `output` shows with the one it was given.

    Args:
        condition: a condition of tasks/control.py.
        output: the generated picture.
        target: the picture that the map was made from.
        scene: what the target shows.

    Raises:
        ValueError: the condition is unknown.
    """
    if condition in EXTRACTORS:
        extract = EXTRACTORS[condition]
        return line_f1(extract(output), extract(target))
    if condition == "depth":
        return mask_iou(foreground(output), objects(scene, target.shape[0]))
    if condition == "segmentation":
        return class_agreement(classes(output), segmentation_map(scene, target.shape[0]))
    raise ValueError(f"no agreement is defined for the condition {condition!r}")


def line_f1(found: NDArray[np.uint8], wanted: NDArray[np.uint8]) -> float:
    """F1 of line pixels that lie within one pixel (per 96 of the side) of a line of the other map.

    1 where both maps are blank, 0 where one is.
    """
    a, b = found >= LINE, wanted >= LINE
    if not a.any() or not b.any():
        return float(a.any() == b.any())
    radius = max(1, round(found.shape[0] / 96))
    precision = float((a & _near(b, radius)).sum() / a.sum())
    recall = float((b & _near(a, radius)).sum() / b.sum())
    return 2 * precision * recall / (precision + recall) if precision + recall > 0 else 0.0


def _near(lines: Mask, radius: int) -> Mask:
    element = cv2.getStructuringElement(cv2.MORPH_RECT, (2 * radius + 1, 2 * radius + 1))
    return np.asarray(cv2.dilate(lines.astype(np.uint8), element) > 0)


def foreground(image: Image) -> Mask:
    """Pixels that differ from the background by the parser's contrast."""
    difference = image.astype(np.float64) - border_colour(image)
    return np.asarray(np.linalg.norm(difference, axis=2) > CONTRAST)


def objects(scene: Scene, side: int) -> Mask:
    """Pixels of the scene's items."""
    region = np.zeros((side, side), bool)
    for item in scene.items:
        region |= item_mask(item, side)
    return region


def classes(image: Image) -> NDArray[np.uint8]:
    """The segmentation map that the parser reads: the foreground in each item's box, its class."""
    side, front = image.shape[0], foreground(image)
    found = np.zeros(front.shape, np.uint8)
    for item in parse(image).items:
        x0, y0, x1, y1 = (value * side for value in item.box)
        found[front & fill_box((x0, y0, x1, y1), side, side)] = SEGMENTATION_CLASSES[item.shape]
    return found


def class_agreement(found: NDArray[np.uint8], wanted: NDArray[np.uint8]) -> float:
    """Share of the pixels with a class in either map that have the same one in both."""
    either = (found > 0) | (wanted > 0)
    return float((found == wanted)[either].mean()) if either.any() else 1.0
