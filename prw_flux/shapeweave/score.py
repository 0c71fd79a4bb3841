"""Scores of a picture against the scene it should show: C attributes, L boxes, K background.

C, L: objects are matched greedily by box IoU (at least 0.1). C is the share of correct
attributes (shape, colour, texture, size), L the mean IoU; a missing or an extra object counts 0.
K: share of pixels outside the affected boxes that differ from the truth by at most 8 levels.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from prw_flux.shapeweave.parse import Box, Found, Image, parse, read_glyph
from prw_flux.shapeweave.scene import Item, Scene

MATCH_IOU = 0.1
TOLERANCE = 8


def iou(a: Box, b: Box) -> float:
    """Intersection over union of two boxes (x0, y0, x1, y1)."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    inter = width * height
    area = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1])
    return inter / (area - inter)


def match(wanted: Sequence[Item], found: Sequence[Found]) -> list[tuple[Item, Found, float]]:
    """Pairs in order of falling IoU, each item and each object at most once."""
    pairs = sorted(
        ((iou(item.box(), seen.box), i, j)
         for i, item in enumerate(wanted) for j, seen in enumerate(found)),
        reverse=True,
    )  # fmt: skip
    used_items: set[int] = set()
    used_found: set[int] = set()
    matched = []
    for overlap, i, j in pairs:
        if overlap >= MATCH_IOU and i not in used_items and j not in used_found:
            used_items.add(i)
            used_found.add(j)
            matched.append((wanted[i], found[j], overlap))
    return matched


def attributes(item: Item, seen: Found) -> dict[str, bool]:
    """Which attributes of a plain item were read correctly."""
    return {
        "shape": item.shape == seen.shape,
        "colour": item.colour == seen.colour,
        "texture": item.texture == seen.texture,
        "size": item.size == seen.size,
    }


def item_score(image: Image, item: Item, seen: Found) -> float:
    """Share of correct attributes, or of correct bits when the item is a glyph."""
    if item.glyph is not None:
        return read_glyph(image, seen.box, item.glyph)
    return float(np.mean(list(attributes(item, seen).values())))


def score_scene(image: Image, scene: Scene) -> dict[str, float]:
    """C, L and background correctness of a whole picture [S, S, 3] against ``scene``."""
    reading = parse(image)
    matched = match(scene.items, reading.items)
    count = max(len(scene.items), len(reading.items), 1)
    return {
        "C": sum(item_score(image, item, seen) for item, seen, _ in matched) / count,
        "L": sum(overlap for _, _, overlap in matched) / count,
        "background": float(reading.background == scene.background),
    }


def score_items(image: Image, items: Sequence[Item]) -> dict[str, float]:
    """C and L of some items of a picture; other objects in it are not counted against it."""
    matched = match(items, parse(image).items)
    count = max(len(items), 1)
    return {
        "C": sum(item_score(image, item, seen) for item, seen, _ in matched) / count,
        "L": sum(overlap for _, _, overlap in matched) / count,
    }


def kept(image: Image, truth: Image, affected: Sequence[Box], margin: float = 0.03) -> float:
    """K: share of the pixels outside ``affected`` (grown by ``margin``) that are as in truth."""
    outside = np.ones(truth.shape[:2], dtype=np.bool_)
    side = truth.shape[0]
    for x0, y0, x1, y1 in affected:
        rows = slice(max(0, int((y0 - margin) * side)), int(np.ceil((y1 + margin) * side)))
        columns = slice(max(0, int((x0 - margin) * side)), int(np.ceil((x1 + margin) * side)))
        outside[rows, columns] = False
    if not outside.any():
        return 1.0
    difference = np.abs(image.astype(np.int64) - truth.astype(np.int64)).max(axis=2)
    return float((difference[outside] <= TOLERANCE).mean())


def psnr(image: NDArray[np.uint8], truth: NDArray[np.uint8]) -> float:
    """Peak signal-to-noise ratio in dB of two uint8 pictures; infinite when equal."""
    error = float(np.square(image.astype(np.float64) - truth.astype(np.float64)).mean())
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))
