"""The scene grammar: what a ShapeWeave picture can contain, and which pictures are held out.

A scene is a background and one or two items in distinct cells of a 3 x 3 grid. An item is a
shape x colour x texture x size at a place, or a *glyph*: a two-colour 4 x 4 pattern, left-right
symmetric, that no words describe, so that its bits can only come from a source image.

All lengths are fractions of the image side; (0, 0) is the top left corner.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

import numpy as np

SHAPES = ("circle", "square", "triangle", "star")
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 39, 40),
    "green": (44, 160, 44),
    "blue": (31, 90, 220),
    "yellow": (240, 205, 20),
    "purple": (140, 60, 180),
    "orange": (245, 130, 25),
}
TEXTURES = ("plain", "striped")
SIZES: dict[str, float] = {"small": 0.20, "large": 0.29}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (250, 250, 250),
    "cream": (252, 240, 210),
    "mint": (210, 245, 225),
    "sky": (205, 230, 250),
    "lilac": (232, 218, 248),
    "grey": (205, 205, 205),
}
PLACES = (
    "top left", "top", "top right",
    "left", "center", "right",
    "bottom left", "bottom", "bottom right",
)  # fmt: skip
JITTER = 0.02
GLYPH_BITS = 8
HELD_OUT_TRIPLES = frozenset(
    {
        ("circle", "purple", "striped"),
        ("square", "orange", "plain"),
        ("triangle", "blue", "striped"),
        ("star", "red", "plain"),
        ("star", "yellow", "striped"),
    }
)
"""10 % of the 48 (shape, colour, texture) triples; no training picture contains one."""


@dataclass(frozen=True, kw_only=True)
class Glyph:
    """A 4 x 4 left-right symmetric pattern: ``bits`` of the left half, row by row, two colours."""

    bits: tuple[int, ...]
    ink: str
    paper: str

    def grid(self) -> np.ndarray:
        """The full pattern as a [4, 4] array of 0 (paper) and 1 (ink)."""
        left = np.asarray(self.bits, dtype=np.int64).reshape(4, 2)
        return np.concatenate([left, left[:, ::-1]], axis=1)


@dataclass(frozen=True, kw_only=True)
class Item:
    """One object; ``glyph`` is set for identity objects, whose shape and texture are unused."""

    place: int
    size: str = "large"
    shape: str = "square"
    colour: str = "red"
    texture: str = "plain"
    jitter: tuple[float, float] = (0.0, 0.0)
    glyph: Glyph | None = None

    @property
    def triple(self) -> tuple[str, str, str]:
        """Shape, colour and texture: what the held-out combinations are made of."""
        return (self.shape, self.colour, self.texture)

    @property
    def centre(self) -> tuple[float, float]:
        """Centre (x, y): the cells of the grid have a third of the side each."""
        row, column = divmod(self.place, 3)
        return ((column + 0.5) / 3 + self.jitter[0], (row + 0.5) / 3 + self.jitter[1])

    def box(self) -> tuple[float, float, float, float]:
        """Exact bounding box (x0, y0, x1, y1) of the drawn outline."""
        from prw_flux.shapeweave.render import outline

        points = outline(self)
        (x0, y0), (x1, y1) = points.min(axis=0), points.max(axis=0)
        return (float(x0), float(y0), float(x1), float(y1))


@dataclass(frozen=True, kw_only=True)
class Scene:
    """A background and its items, in painter's order (the cells are disjoint: no overlap)."""

    background: str
    items: tuple[Item, ...]

    def with_item(self, index: int, item: Item | None) -> Scene:
        """This scene with one item replaced, or removed when ``item`` is None."""
        items = list(self.items)
        items[index : index + 1] = [] if item is None else [item]
        return replace(self, items=tuple(items))

    def held_out(self) -> bool:
        """Whether training may never see this content: a held-out triple, or 30 % by hash.

        The hash covers everything that a caption can say (not the jitter), so that a held-out
        caption is never a training caption.
        """
        said = [(*i.triple, i.size, i.place) for i in self.items if i.glyph is None]
        glyphs = [(*i.glyph.bits, i.glyph.ink, i.glyph.paper) for i in self.items if i.glyph]
        if any(tuple(s[:3]) in HELD_OUT_TRIPLES for s in said):
            return True
        digest = hashlib.sha256(repr((self.background, sorted(said), glyphs)).encode()).digest()
        return digest[0] < 77


def draw_item(rng: np.random.Generator, place: int) -> Item:
    """A plain item with every attribute uniform."""
    return Item(
        place=place,
        size=str(rng.choice(list(SIZES))),
        shape=str(rng.choice(SHAPES)),
        colour=str(rng.choice(list(COLOURS))),
        texture=str(rng.choice(TEXTURES)),
        jitter=draw_jitter(rng),
    )


def draw_jitter(rng: np.random.Generator) -> tuple[float, float]:
    """A small uniform displacement (x, y)."""
    x, y = rng.uniform(-JITTER, JITTER, size=2)
    return (float(x), float(y))


def draw_glyph(rng: np.random.Generator, place: int) -> Item:
    """An identity object: 2 to 6 of the 8 bits set, two different colours."""
    while True:
        bits = tuple(int(b) for b in rng.integers(0, 2, size=GLYPH_BITS))
        if 2 <= sum(bits) <= GLYPH_BITS - 2:
            break
    ink, paper = (str(c) for c in rng.choice(list(COLOURS), size=2, replace=False))
    glyph = Glyph(bits=bits, ink=ink, paper=paper)
    return Item(place=place, size="large", jitter=draw_jitter(rng), glyph=glyph)


def draw_scene(rng: np.random.Generator, count: int | None = None) -> Scene:
    """A scene of ``count`` items (default 1 with probability 0.3, else 2) from the full grammar."""
    if count is None:
        count = 1 if rng.random() < 0.3 else 2
    places = rng.choice(len(PLACES), size=count, replace=False)
    items = [draw_item(rng, int(place)) for place in places]
    return Scene(background=str(rng.choice(list(BACKGROUNDS))), items=tuple(items))
