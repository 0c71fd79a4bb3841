"""Drawing: a scene to pixels, and to the exact maps that the control tasks use as sources."""

from __future__ import annotations

from functools import cache

import cv2
import numpy as np
from numpy.typing import NDArray

from prw_flux.shapeweave.scene import BACKGROUNDS, COLOURS, SHAPES, SIZES, Item, Scene

Image = NDArray[np.uint8]
SUPERSAMPLING = 4
STRIPE_PERIOD = 1 / 12
STRIPE_TONE = 0.4
SEGMENTATION_CLASSES = {shape: 1 + index for index, shape in enumerate(SHAPES)}


@cache
def unit_outline(shape: str) -> NDArray[np.float64]:
    """Polygon [P, 2] of a shape in the square [-0.5, 0.5]^2, touching it on every side."""
    if shape == "circle":
        angle = np.linspace(0, 2 * np.pi, 48, endpoint=False)
        return 0.5 * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    if shape == "square":
        return np.array([[-0.42, -0.42], [0.42, -0.42], [0.42, 0.42], [-0.42, 0.42]])
    if shape == "triangle":
        return np.array([[0.0, -0.5], [0.5, 0.46], [-0.5, 0.46]])
    if shape == "star":
        angle = -np.pi / 2 + np.arange(10) * np.pi / 5
        radius = np.where(np.arange(10) % 2 == 0, 0.54, 0.23)
        return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
    raise ValueError(f"unknown shape {shape!r}; the grammar has {', '.join(SHAPES)}")


def outline(item: Item) -> NDArray[np.float64]:
    """Polygon [P, 2] of an item in image fractions."""
    shape = "square" if item.glyph is not None else item.shape
    return np.asarray(unit_outline(shape) * SIZES[item.size] + np.asarray(item.centre))


def _fill(canvas: Image, points: NDArray[np.float64], value: tuple[int, ...]) -> None:
    side = canvas.shape[0]
    subpixel = np.round((points * side - 0.5) * 16).astype(np.int32)
    cv2.fillPoly(canvas, [subpixel], value, shift=4)


def _shrink(canvas: Image, size: int) -> Image:
    return np.asarray(cv2.resize(canvas, (size, size), interpolation=cv2.INTER_AREA), np.uint8)


def _stripes(item: Item, side: int) -> NDArray[np.bool_]:
    """Rows [side] that carry the darker tone; anchored to the item's centre."""
    rows = (np.arange(side) + 0.5) / side - item.centre[1]
    return np.asarray(np.floor(rows / (STRIPE_PERIOD / 2)).astype(np.int64) % 2 == 1)


def _paint(canvas: Image, item: Item) -> None:
    side = canvas.shape[0]
    inside = np.zeros((side, side), np.uint8)
    _fill(inside, outline(item), (1,))
    if item.glyph is not None:
        _paint_glyph(canvas, item)
        return
    colour = np.asarray(COLOURS[item.colour], dtype=np.float64)
    canvas[inside > 0] = colour.astype(np.uint8)
    if item.texture == "striped":
        dark = (inside > 0) & _stripes(item, side)[:, None]
        canvas[dark] = (STRIPE_TONE * colour).astype(np.uint8)


def _paint_glyph(canvas: Image, item: Item) -> None:
    assert item.glyph is not None
    x0, y0, x1, y1 = item.box()
    xs, ys = np.linspace(x0, x1, 5), np.linspace(y0, y1, 5)
    for row, bits in enumerate(item.glyph.grid()):
        for column, bit in enumerate(bits):
            corners = [(xs[column + i], ys[row + j]) for i, j in ((0, 0), (1, 0), (1, 1), (0, 1))]
            _fill(canvas, np.array(corners), COLOURS[item.glyph.ink if bit else item.glyph.paper])


def render(scene: Scene, size: int = 96) -> Image:
    """The picture [size, size, 3], uint8 RGB, anti-aliased by 4 x 4 supersampling."""
    side = size * SUPERSAMPLING
    canvas = np.empty((side, side, 3), np.uint8)
    canvas[:] = BACKGROUNDS[scene.background]
    for item in scene.items:
        _paint(canvas, item)
    return _shrink(canvas, size)


def item_mask(item: Item, size: int = 96) -> NDArray[np.bool_]:
    """Pixels [size, size] more than half covered by the item."""
    canvas = np.zeros((size * SUPERSAMPLING,) * 2, np.uint8)
    _fill(canvas, outline(item), (255,))
    return _shrink(canvas, size) >= 128


def lineart_map(scene: Scene, size: int = 96) -> Image:
    """Analytic outlines, white one-pixel lines on black, [size, size]."""
    side = size * SUPERSAMPLING
    canvas = np.zeros((side, side), np.uint8)
    for item in scene.items:
        points = np.round((outline(item) * side - 0.5) * 16).astype(np.int32)
        cv2.polylines(canvas, [points], True, (255,), thickness=SUPERSAMPLING + 2, shift=4)
    return _shrink(canvas, size)


def softedge_map(scene: Scene, size: int = 96) -> Image:
    """HED-like soft edge: the outlines blurred at three scales, largest response, [size, size]."""
    line = lineart_map(scene, size).astype(np.float32)
    blurred = [cv2.GaussianBlur(line, (0, 0), sigma) for sigma in (0.8, 1.6, 3.2)]
    peak = [b / max(float(b.max()), 1e-6) for b in blurred]
    return np.asarray(255 * np.maximum.reduce(peak), dtype=np.uint8)


def depth_map(scene: Scene, size: int = 96) -> Image:
    """Inverse depth, near is white: a floor ramp with each item as a plane in painter's order."""
    ramp = np.linspace(20, 90, size)[:, None].repeat(size, axis=1)
    for order, item in enumerate(scene.items):
        ramp[item_mask(item, size)] = 160 + 40 * order
    return ramp.astype(np.uint8)


def segmentation_map(scene: Scene, size: int = 96) -> Image:
    """Class indices [size, size]: 0 the background, then the shapes in the grammar's order."""
    canvas = np.zeros((size, size), np.uint8)
    for item in scene.items:
        shape = "square" if item.glyph else item.shape
        canvas[item_mask(item, size)] = SEGMENTATION_CLASSES[shape]
    return canvas
