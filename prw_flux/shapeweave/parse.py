"""Reading a picture back into items: the exact metric's eyes.

Background by border median; connected components of what differs from it; a sub-pixel box at half
contrast; then analysis by synthesis: every shape x texture is drawn into the box, its colour is
found in closed form, and the template with the least squared residual wins.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import cv2
import numpy as np
from numpy.typing import NDArray

from prw_flux.shapeweave.render import STRIPE_PERIOD, STRIPE_TONE, unit_outline
from prw_flux.shapeweave.scene import BACKGROUNDS, COLOURS, SHAPES, SIZES, TEXTURES, Glyph

Image = NDArray[np.uint8]
Box = tuple[float, float, float, float]

CONTRAST = 40.0
"""Euclidean RGB distance from the background above which a pixel belongs to an object."""
MIN_AREA = 0.008
"""Components below this share of the picture are noise (the smallest item covers 0.011)."""
TEMPLATE = 24
TIPS: dict[str, Box] = {
    "star": (1.7, 1.8, 1.5, 0.4),
    "triangle": (0.9, 1.3, 0.7, 0.0),
}
"""Pixels that pointed corners lose at half contrast, measured on exact renders (x0, y0, x1, y1)."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """One object read from a picture; the box is in fractions of the side."""

    box: Box
    shape: str
    colour: str
    texture: str
    size: str


@dataclass(frozen=True, kw_only=True)
class Reading:
    """Background name and objects, largest first."""

    background: str
    items: tuple[Found, ...]


def nearest(colour: NDArray[np.float64], palette: dict[str, tuple[int, int, int]]) -> str:
    """Name of the palette's closest colour, Euclidean in RGB."""
    return min(palette, key=lambda name: float(np.square(colour - palette[name]).sum()))


def border_colour(image: Image) -> NDArray[np.float64]:
    """Median colour of the outer ring of pixels."""
    ring = np.concatenate([image[:2].reshape(-1, 3), image[-2:].reshape(-1, 3),
                           image[:, :2].reshape(-1, 3), image[:, -2:].reshape(-1, 3)])  # fmt: skip
    return np.asarray(np.median(ring, axis=0), dtype=np.float64)


def parse(image: Image) -> Reading:
    """Read a picture [S, S, 3]. Two items that touch are read as one."""
    side = image.shape[0]
    ground = border_colour(image)
    distance = np.linalg.norm(image.astype(np.float64) - ground, axis=2)
    mask = (distance > CONTRAST).astype(np.uint8)
    count, labels, stats, _ = cv2.connectedComponentsWithStats(mask, connectivity=8)
    order = sorted(range(1, count), key=lambda i: -int(stats[i, cv2.CC_STAT_AREA]))
    items = []
    for label in order:
        if stats[label, cv2.CC_STAT_AREA] >= MIN_AREA * side * side:
            box = half_contrast_box(np.where(labels == label, distance, 0.0))
            items.append(identify(image, box, ground))
    return Reading(background=nearest(ground, BACKGROUNDS), items=tuple(items))


def half_contrast_box(distance: NDArray[np.float64]) -> Box:
    """Sub-pixel extent of one component: where the edge profile crosses half its plateau."""
    side = distance.shape[0]
    edges = []
    for axis in (0, 1):
        profile = np.sort(distance, axis=axis)
        strength = profile[-2, :] if axis == 0 else profile[:, -2]
        edges.append(_extent(strength))
    (x0, x1), (y0, y1) = edges
    return (x0 / side, y0 / side, x1 / side, y1 / side)


def _extent(strength: NDArray[np.float64]) -> tuple[float, float]:
    plateau = float(np.median(strength[strength > 0.5 * strength.max()]))
    half = 0.5 * plateau
    inside = np.flatnonzero(strength > half)
    first, last = int(inside[0]), int(inside[-1])
    before = strength[first - 1] if first > 0 else 0.0
    after = strength[last + 1] if last + 1 < len(strength) else 0.0
    return (
        first - float(np.clip(before / plateau, 0, 1)) + _missing(strength[first], plateau),
        last + 1 + float(np.clip(after / plateau, 0, 1)) - _missing(strength[last], plateau),
    )


def _missing(value: float, plateau: float) -> float:
    """Uncovered share of an edge pixel."""
    return float(np.clip(1 - value / plateau, 0, 0.5))


@cache
def template(shape: str) -> NDArray[np.float64]:
    """Coverage [TEMPLATE, TEMPLATE] of a shape stretched to its own bounding box."""
    points = unit_outline(shape)
    low, high = points.min(axis=0), points.max(axis=0)
    scale = 8
    canvas = np.zeros((TEMPLATE * scale,) * 2, np.uint8)
    scaled = (points - low) / (high - low) * TEMPLATE * scale
    cv2.fillPoly(canvas, [np.round(scaled * 16).astype(np.int32)], (255,), shift=4)
    small = cv2.resize(canvas, (TEMPLATE, TEMPLATE), interpolation=cv2.INTER_AREA)
    return np.asarray(small, np.float64) / 255


def crop(image: Image, box: Box, size: int = TEMPLATE) -> NDArray[np.float64]:
    """The box resampled to [size, size, 3], bilinear at sub-pixel positions."""
    side = image.shape[0]
    x0, y0, x1, y1 = (value * side for value in box)
    xs = x0 + (np.arange(size, dtype=np.float32) + 0.5) * (x1 - x0) / size - 0.5
    ys = y0 + (np.arange(size, dtype=np.float32) + 0.5) * (y1 - y0) / size - 0.5
    map_x, map_y = np.meshgrid(xs.astype(np.float32), ys.astype(np.float32))
    patch = cv2.remap(image, map_x, map_y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    return np.asarray(patch, np.float64)


def extents(shape: str, size: str) -> tuple[float, float]:
    """Width and height of an item's box, as fractions of the side."""
    points = unit_outline(shape)
    width, height = (points.max(axis=0) - points.min(axis=0)) * SIZES[size]
    return float(width), float(height)


def identify(image: Image, box: Box, ground: NDArray[np.float64]) -> Found:
    """The shape, texture, colour and size that explain the pixels of ``box`` best."""
    patch = crop(image, box)
    best, least = None, np.inf
    for shape in SHAPES:
        for texture in TEXTURES:
            tone = _tone(shape, texture, box)
            coverage = template(shape)
            weight = coverage * tone
            colour = _fit(patch - ground * (1 - coverage)[..., None], weight)
            name = nearest(colour, COLOURS)
            model = ground * (1 - coverage)[..., None] + weight[..., None] * np.asarray(
                COLOURS[name]
            )
            residual = float(np.square(patch - model).mean())
            if residual < least:
                least = residual
                whole = with_tips(shape, box, image.shape[0])
                best = Found(box=whole, shape=shape, colour=name, texture=texture,
                             size=_size(shape, whole))  # fmt: skip
    assert best is not None
    return best


def with_tips(shape: str, box: Box, side: int) -> Box:
    """The measured box grown by what the corners of the shape lose."""
    x0, y0, x1, y1 = (inset / side for inset in TIPS.get(shape, (0.0, 0.0, 0.0, 0.0)))
    return (box[0] - x0, box[1] - y0, box[2] + x1, box[3] + y1)


def _tone(shape: str, texture: str, box: Box) -> NDArray[np.float64]:
    """Brightness [TEMPLATE, 1] of each row of the box; stripes hang on the item's centre."""
    if texture == "plain":
        return np.ones((TEMPLATE, 1))
    points = unit_outline(shape)
    low, high = points[:, 1].min(), points[:, 1].max()
    size = (box[3] - box[1]) / (high - low)
    fine = 8
    rows = low + (np.arange(TEMPLATE * fine) + 0.5) / (TEMPLATE * fine) * (high - low)
    dark = np.floor(rows * size / (STRIPE_PERIOD / 2)).astype(np.int64) % 2 == 1
    tone = np.where(dark, STRIPE_TONE, 1.0).reshape(TEMPLATE, fine).mean(axis=1)
    return np.asarray(tone[:, None])


def _fit(patch: NDArray[np.float64], weight: NDArray[np.float64]) -> NDArray[np.float64]:
    """Least-squares colour c of patch = weight * c, clipped to the gamut."""
    energy = max(float(np.square(weight).sum()), 1e-9)
    return np.asarray(np.clip((patch * weight[..., None]).sum(axis=(0, 1)) / energy, 0, 255))


def _size(shape: str, box: Box) -> str:
    measured = np.sqrt(max(box[2] - box[0], 1e-6) * max(box[3] - box[1], 1e-6))
    return min(SIZES, key=lambda s: abs(float(measured - np.sqrt(np.prod(extents(shape, s))))))


def read_glyph(image: Image, box: Box, truth: Glyph) -> float:
    """Share of the 8 bits that the picture shows in ``box``, given the two colours of ``truth``.

    A bit is read from the mean of its cell and of its mirror cell: ink or paper, whichever colour
    is nearer.
    """
    cells = crop(image, box, 16).reshape(4, 4, 4, 4, 3)[:, 1:3, :, 1:3].mean(axis=(1, 3))
    mirrored = (cells + cells[:, ::-1]) / 2
    ink, paper = (np.asarray(COLOURS[c], np.float64) for c in (truth.ink, truth.paper))
    is_ink = np.square(mirrored - ink).sum(-1) < np.square(mirrored - paper).sum(-1)
    return float((is_ink.astype(np.int64) == truth.grid())[:, :2].mean())
