"""Hole shapes for inpainting: pure functions of a generator.

Three families (CoLoGen, section 3.1 of arXiv 2602.22150, mixes them 20 : 40 : 40):

* free-form: thick strokes or boxes anywhere, after LaMa (arXiv 2109.07161) but with continuous
  stroke angles; the scene-level holes.
* object: the pixels of one thing, exact, dilated or eroded.
* Bezier: a smooth outline round one thing's box, after Paint by Example (arXiv 2211.13227).

Every length scales with the short side, so that a hole looks alike at 96 and at 1024 pixels.
Shapes: H, W pixels; masks are bool [H, W], True where the picture is hidden.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, final

import cv2
import numpy as np
from numpy.typing import NDArray

from prw_flux.tasks.base import Box, Mask, Thing, mask_iou

MIN_COVERAGE: Final = 0.005
MAX_COVERAGE: Final = 0.75
MAX_IOU: Final = 0.3
WEIGHTS: Final[Mapping[str, float]] = {"free-form": 0.2, "object": 0.4, "bezier": 0.4}
TRIES: Final = 16


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Hole:
    """A drawn hole.

    Args:
        mask: bool [H, W].
        kind: "free-form", "object", "bezier" or "bezier-random".
        wanted: the kind that was drawn first; differs from `kind` after a fallback.
        thing: index of the thing that the hole was cut for, None for random holes.
        rejections: rejected draws by reason.
    """

    mask: Mask
    kind: str
    wanted: str
    thing: int | None
    rejections: Mapping[str, int] = field(default_factory=dict)


class HoleError(Exception):
    """No draw was acceptable; `rejections` says why, by reason."""

    def __init__(self, rejections: Mapping[str, int]) -> None:
        super().__init__("no acceptable hole")
        self.rejections = dict(rejections)


def strokes(rng: np.random.Generator, height: int, width: int) -> Mask:
    """One to five broken strokes: up to five segments each, round joints; bool [H, W].

    At 256 pixels a segment is 10 to 210 pixels long and 5 to 105 wide.
    """
    scale = min(height, width) / 256
    canvas = np.zeros((height, width), np.uint8)
    for _ in range(rng.integers(1, 6)):
        x, y = rng.uniform(0, width), rng.uniform(0, height)
        for _ in range(rng.integers(1, 6)):
            angle = rng.uniform(0, 2 * np.pi)
            length = (10 + rng.uniform(0, 200)) * scale
            thickness = max(1, round((5 + rng.uniform(0, 100)) * scale))
            end_x = float(np.clip(x + length * np.cos(angle), 0, width - 1))
            end_y = float(np.clip(y + length * np.sin(angle), 0, height - 1))
            cv2.line(canvas, (int(x), int(y)), (int(end_x), int(end_y)), 1, thickness)
            x, y = end_x, end_y
    return canvas > 0


def boxes(rng: np.random.Generator, height: int, width: int) -> Mask:
    """One to four rectangles with sides of 30 to 150 pixels at 256, 10 off the border."""
    scale = min(height, width) / 256
    margin = round(10 * scale)
    mask = np.zeros((height, width), bool)
    for _ in range(rng.integers(1, 5)):
        w = min(max(1, round(rng.uniform(30, 150) * scale)), width - 2 * margin)
        h = min(max(1, round(rng.uniform(30, 150) * scale)), height - 2 * margin)
        x = int(rng.integers(margin, width - margin - w + 1))
        y = int(rng.integers(margin, height - margin - h + 1))
        mask[y : y + h, x : x + w] = True
    return mask


def free_form(rng: np.random.Generator, height: int, width: int) -> Mask:
    """Strokes or boxes with equal chances; bool [H, W]."""
    return (strokes if rng.random() < 0.5 else boxes)(rng, height, width)


def object_shaped(rng: np.random.Generator, mask: Mask) -> Mask:
    """A thing's pixels: exact (30 %), dilated (50 %) or eroded (20 %).

    The radius is uniform up to 10 % (dilation) or 4 % (erosion) of the square root of the area,
    at least one pixel; the structuring element is an ellipse or a square.
    """
    choice = rng.choice(3, p=(0.3, 0.5, 0.2))
    if choice == 0:
        return mask.copy()
    extent = float(np.sqrt(np.count_nonzero(mask)))
    radius = max(1, round(rng.uniform(0, 0.10 if choice == 1 else 0.04) * extent))
    shape = cv2.MORPH_ELLIPSE if rng.random() < 0.5 else cv2.MORPH_RECT
    element = cv2.getStructuringElement(shape, (2 * radius + 1, 2 * radius + 1))
    change = cv2.dilate if choice == 1 else cv2.erode
    return np.asarray(change(mask.astype(np.uint8), element) > 0)


def bezier_outline(
    rng: np.random.Generator, box: Box, height: int, width: int
) -> NDArray[np.float64]:
    """The outline round a box: four quadratic curves of 20 points each; float [80, 2] as (x, y).

    Each side of the box moves outward by a uniform share, at most 0.4, of the free space there.
    Side i runs from corner c_i to c_{i+1} of the *given* box with the middle m_i of the moved side
    as control point,

        b(t) = (1 - t)^2 c_i + 2 t (1 - t) m_i + t^2 c_{i+1},    t = 0, 1/20, ..., 19/20,

    and every point is jittered by up to +-5 pixels per 512 pixels of the short side, but by no more
    than 4 % of the box's shorter side: a small box keeps a shape.
    """
    x0, y0, x1, y1 = box
    share = rng.uniform(0, 0.4, size=4)
    left, top = x0 - share[0] * x0, y0 - share[1] * y0
    right, bottom = x1 + share[2] * (width - x1), y1 + share[3] * (height - y1)
    corners = np.array([(x0, y0), (x1, y0), (x1, y1), (x0, y1)])
    middle_x, middle_y = (left + right) / 2, (top + bottom) / 2
    controls = np.array([(middle_x, top), (right, middle_y), (middle_x, bottom), (left, middle_y)])
    t = (np.arange(20) / 20)[None, :, None]
    ends = np.roll(corners, -1, axis=0)
    curves = (
        (1 - t) ** 2 * corners[:, None] + 2 * t * (1 - t) * controls[:, None] + t**2 * ends[:, None]
    )
    jitter = min(5 * min(height, width) / 512, 0.04 * min(x1 - x0, y1 - y0))
    outline: NDArray[np.float64] = curves.reshape(80, 2) + rng.uniform(-jitter, jitter, (80, 2))
    return outline


def bezier(rng: np.random.Generator, box: Box, height: int, width: int) -> Mask:
    """The filled `bezier_outline` of a box; bool [H, W]."""
    outline = bezier_outline(rng, box, height, width)
    canvas = np.zeros((height, width), np.uint8)
    # fillPoly counts pixel centres as integers; boxes count them as halves. 1/256 pixel units.
    points = np.round((outline - 0.5) * 256).astype(np.int32)
    cv2.fillPoly(canvas, [points], 1, shift=8)
    return canvas > 0


def random_box(rng: np.random.Generator, height: int, width: int) -> Box:
    """A box with sides of 20 to 60 % of the short side, anywhere inside."""
    w, h = rng.uniform(0.2, 0.6, size=2) * min(height, width)
    x, y = rng.uniform(0, width - w), rng.uniform(0, height - h)
    return float(x), float(y), float(x + w), float(y + h)


def fault(mask: Mask) -> str | None:
    """Why a hole of this size is useless, or None: "empty" below 0.5 %, "over-large" above 75 %."""
    coverage = float(mask.mean())
    if coverage < MIN_COVERAGE:
        return "empty"
    return "over-large" if coverage > MAX_COVERAGE else None


def cut(
    rng: np.random.Generator, kind: str, things: Sequence[Thing], height: int, width: int
) -> tuple[Mask, int | None]:
    """One draw of the named kind, unchecked: the mask and the index of the thing it is for."""
    if kind == "free-form":
        return free_form(rng, height, width), None
    if kind == "bezier-random":
        return bezier(rng, random_box(rng, height, width), height, width), None
    index = int(rng.integers(len(things)))
    if kind == "bezier":
        return bezier(rng, things[index].box, height, width), index
    with_mask = [i for i, thing in enumerate(things) if thing.mask is not None]
    index = with_mask[index % len(with_mask)]
    mask = things[index].mask
    assert mask is not None
    return object_shaped(rng, mask), index


def draw_hole(
    rng: np.random.Generator,
    height: int,
    width: int,
    things: Sequence[Thing] = (),
    *,
    weights: Mapping[str, float] = WEIGHTS,
    tries: int = TRIES,
) -> Hole:
    """Draws a kind by weight, then holes of it until one is good.

    A hole is refused when it is empty or over-large, and a random one also when its IoU with any
    thing exceeds 0.3. A kind that the picture cannot give (no thing, no mask), or that failed
    `tries` times, falls back to the next of: its own, Bezier, free-form, Bezier round a random box;
    that, too, is counted. Bezier without things is drawn round a random box first.

    Raises:
        HoleError: every kind failed.
    """
    names = list(weights)
    shares = np.array([weights[name] for name in names], float)
    wanted = names[int(rng.choice(len(names), p=shares / shares.sum()))]
    regions = [thing.region(height, width) for thing in things]
    rejections: Counter[str] = Counter()
    order: tuple[str, ...] = (wanted, "bezier", "free-form", "bezier-random")
    if wanted == "bezier" and not things:
        rejections["no thing for a bezier outline"] += 1
        order = ("bezier-random", "free-form")
    for kind in dict.fromkeys(order):
        if kind == "bezier" and not things:
            continue
        if kind == "object" and all(thing.mask is None for thing in things):
            rejections["no object mask"] += 1
            continue
        for _ in range(tries):
            mask, thing = cut(rng, kind, things, height, width)
            reason = fault(mask)
            if reason is None and thing is None:
                touching = any(mask_iou(mask, region) > MAX_IOU for region in regions)
                reason = "overlaps a thing" if touching else None
            if reason is None:
                return Hole(
                    mask=mask, kind=kind, wanted=wanted, thing=thing, rejections=dict(rejections)
                )
            rejections[f"{kind}: {reason}"] += 1
    raise HoleError(rejections)
