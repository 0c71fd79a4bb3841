"""The metric of an edit: was the change made, in the right place, and the rest kept?

    headline = changed x L x K

`changed` looks only at what the instruction changes, so an unchanged copy of the source has 0:

* recolour, retexture, resize, reshape: `changed` is 1 if that one attribute is right; L is the IoU
  of the item; K is taken outside its boxes.
* move: `changed` is the share of the item's attributes found at the new place, and 0 while anything
  is at the old one; L is the IoU at the new place; K is taken outside both places.
* add: `changed` is the share of the new item's attributes found at its place; L its IoU; K outside.
* remove: `changed` and L are 1 if nothing is at its place, else 0; K is taken outside it.
* background: `changed` is 1 if the background is the new one; L is the mean IoU of all items; K is
  taken well inside the items.

"Found" means a box IoU of at least 0.1. K counts pixels within 8 levels of the true after-image.
C is the share of *all* attributes of the changed item (remove: as `changed`; background: of all
items) and does not enter the headline. Shapes: S side in pixels; images uint8 [S, S, 3].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import cv2
import numpy as np

from prw_flux.evaluation.samples import EvaluationSample
from prw_flux.shapeweave.change import Change
from prw_flux.shapeweave.parse import Box, Found, Reading, parse
from prw_flux.shapeweave.render import item_mask
from prw_flux.shapeweave.scene import Item, Scene
from prw_flux.shapeweave.score import MATCH_IOU, TOLERANCE, attributes, iou, kept, match
from prw_flux.tasks.base import Image

ATTRIBUTE: Final = {
    "recolour": "colour",
    "retexture": "texture",
    "resize": "size",
    "reshape": "shape",
}
"""The one attribute that a kind of change touches."""


def score_edit(sample: EvaluationSample, output: Image) -> dict[str, float]:
    """The parts "changed", "C", "L" and "K" of one output.

    Raises:
        ValueError: the sample carries no change.
    """
    change = sample.change
    if change is None:
        raise ValueError(f"sample {sample.triple.metadata['key']!r} carries no change")
    reading = parse(output)
    target = sample.triple.target
    if change.kind == "background":
        return _background(change.after, reading, output, target)
    touched = [item.box() for item in touched_items(change)]
    rest = {"K": kept(output, target, touched)}
    if change.index is None:
        gone = float(not occupied(touched[0], reading.items))
        return {"changed": gone, "C": gone, "L": gone, **rest}
    return {**_item(change, change.after.items[change.index], reading), **rest}


def touched_items(change: Change) -> list[Item]:
    """The changed item as it was and as it becomes; one of the two where it is new or removed."""
    before = [item for item in change.before.items if item not in change.after.items]
    after = [item for item in change.after.items if item not in change.before.items]
    return [*before, *after]


def occupied(box: Box, found: Sequence[Found]) -> bool:
    """Whether something was found at `box`."""
    return any(iou(box, seen.box) >= MATCH_IOU for seen in found)


def _item(change: Change, item: Item, reading: Reading) -> dict[str, float]:
    matched = next((m for m in match(change.after.items, reading.items) if m[0] is item), None)
    if matched is None:
        return {"changed": 0.0, "C": 0.0, "L": 0.0}
    _, seen, overlap = matched
    right = attributes(item, seen)
    share = float(np.mean(list(right.values())))
    if change.kind in ATTRIBUTE:
        return {"changed": float(right[ATTRIBUTE[change.kind]]), "C": share, "L": overlap}
    changed = share
    if change.kind == "move":
        old = next(i for i in change.before.items if i not in change.after.items)
        changed *= float(not occupied(old.box(), reading.items))
    return {"changed": changed, "C": share, "L": overlap}


def _background(scene: Scene, reading: Reading, output: Image, target: Image) -> dict[str, float]:
    matched = match(scene.items, reading.items)
    count = len(scene.items)
    right = [float(np.mean(list(attributes(item, seen).values()))) for item, seen, _ in matched]
    return {
        "changed": float(reading.background == scene.background),
        "C": sum(right) / count,
        "L": sum(overlap for _, _, overlap in matched) / count,
        "K": kept_inside(output, target, scene.items),
    }


def kept_inside(output: Image, target: Image, items: Sequence[Item]) -> float:
    """Share of the pixels at least one pixel inside the items within 8 levels of the target."""
    side = target.shape[0]
    inside = np.zeros((side, side), bool)
    for item in items:
        mask = item_mask(item, side).astype(np.uint8)
        inside |= cv2.erode(mask, np.ones((3, 3), np.uint8)) > 0
    if not inside.any():
        return 1.0
    difference = np.abs(output.astype(np.int64) - target.astype(np.int64)).max(axis=2)
    return float((difference[inside] <= TOLERANCE).mean())
