"""Inpainting: a hole is painted grey, the caption says what belongs there.

Hole kinds and their shares are those of CoLoGen (arXiv 2602.22150, section 3.1); masks.py draws
them. The hole shows where, so the text needs to say only what: positions are left out of the
caption where the data source knows how.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final, final

import numpy as np

from prw_flux.tasks import masks
from prw_flux.tasks.base import Example, Mask, Task, TaskReject, Thing, Triple, fill_box

GREY: Final = 127


@final
@dataclass(frozen=True)
class Inpaint(Task):
    """Restores what a grey hole hides.

    Metadata: "mask" (bool [H, W]), "kind", "wanted", "thing" (index the hole was cut for, or
    None), "coverage", "rejections" (counts by reason) and "hidden", one entry per thing with
    "index", "phrase", "box_share" and "share" (covered part of its box, and of its pixels).
    """

    name: ClassVar[str] = "inpaint"
    sentence: ClassVar[str] = "Fill the grey hole in the picture."

    weights: Mapping[str, float] = field(default_factory=lambda: dict(masks.WEIGHTS))
    """Shares of "free-form", "object" and "bezier" holes."""
    tries: int = masks.TRIES
    """Draws of one kind before the next is tried."""

    def missing(self, example: Example) -> str | None:
        """Nothing: every picture can have a hole."""
        return None

    def make(self, example: Example, rng: np.random.Generator) -> Triple:
        """The picture with a grey hole, its caption, the picture."""
        height, width = example.image.shape[:2]
        try:
            hole = masks.draw_hole(
                rng, height, width, example.things, weights=self.weights, tries=self.tries
            )
        except masks.HoleError as problem:
            raise TaskReject("no acceptable hole", problem.rejections) from None
        source = example.image.copy()
        source[hole.mask] = GREY
        return self.triple(
            example,
            hole.kind,
            source,
            example.concept,
            example.image,
            mask=hole.mask,
            wanted=hole.wanted,
            thing=hole.thing,
            coverage=float(hole.mask.mean()),
            rejections=dict(hole.rejections),
            hidden=[hidden(i, thing, hole.mask) for i, thing in enumerate(example.things)],
        )


def hidden(index: int, thing: Thing, mask: Mask) -> dict[str, Any]:
    """How much of one thing the hole covers: share of its box and share of its pixels."""
    box = fill_box(thing.box, *mask.shape)
    region = thing.region(*mask.shape)
    return {
        "index": index,
        "phrase": thing.phrase,
        "box_share": float((mask & box).sum() / max(1, box.sum())),
        "share": float((mask & region).sum() / max(1, region.sum())),
    }
