"""The exact metric of each task on ShapeWeave scenes.

Every metric gives its parts and one *headline* in [0, 1]; comparisons between arms use the
headline. C is the share of correct attributes, L the box IoU, K the share of kept pixels (see
shapeweave/score.py). Shapes: S side in pixels; images uint8 [S, S, 3].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, final

import numpy as np

from prw_flux.evaluation.edits import score_edit
from prw_flux.evaluation.maps import map_agreement
from prw_flux.evaluation.samples import EvaluationSample
from prw_flux.shapeweave.parse import parse, read_glyph
from prw_flux.shapeweave.scene import Item, Scene
from prw_flux.shapeweave.score import match, score_items, score_scene
from prw_flux.tasks.base import Image, box_iou, fill_box
from prw_flux.tasks.grounding import read_overlay

HIDDEN_SHARE: Final = 0.5
"""An item counts as hidden when the hole covers at least this share of its box."""


@final
@dataclass(frozen=True, kw_only=True)
class Metric:
    """How outputs of one task are scored.

    Args:
        headline: what the headline is, in words.
        parts: names and meanings of the parts, in the order in which they are shown.
        compute: parts of one output; a part that does not apply to a sample is left out.
        combine: the headline from the parts.
        usable: why a sample cannot be scored, or None.
    """

    headline: str
    parts: Mapping[str, str]
    compute: Callable[[EvaluationSample, Image], dict[str, float]]
    combine: Callable[[Mapping[str, float]], float]
    usable: Callable[[EvaluationSample], str | None]


def score(sample: EvaluationSample, output: Image) -> dict[str, float]:
    """All parts of the task's metric and the "headline".

    Args:
        sample: one that `unusable` does not refuse.
        output: uint8, the size of the target.

    Raises:
        ValueError: the task has no exact metric, or the output another size than the target.
    """
    metric = METRICS.get(sample.task)
    if metric is None:
        raise ValueError(f"task {sample.task!r} has no exact metric; known: {', '.join(METRICS)}")
    if output.shape != sample.triple.target.shape:
        raise ValueError(f"output {output.shape} and target {sample.triple.target.shape} differ")
    parts = metric.compute(sample, output)
    return {"headline": metric.combine(parts), **parts}


def unusable(sample: EvaluationSample) -> str | None:
    """Why the exact metric does not apply to the sample, or None if it does."""
    if sample.task not in METRICS:
        return "the task has no exact metric"
    if sample.scene is None:
        return "the target is not a known scene"
    return METRICS[sample.task].usable(sample)


def hidden_items(sample: EvaluationSample) -> list[Item]:
    """The items of which the hole covers at least half of the box."""
    mask = np.asarray(sample.triple.metadata["mask"], bool)
    side = mask.shape[0]
    hidden = []
    for item in scene_of(sample).items:
        x0, y0, x1, y1 = (value * side for value in item.box())
        box = fill_box((x0, y0, x1, y1), *mask.shape)
        if (mask & box).sum() >= HIDDEN_SHARE * max(1, box.sum()):
            hidden.append(item)
    return hidden


def scene_of(sample: EvaluationSample) -> Scene:
    """The scene of the target.

    Raises:
        ValueError: the target is not a scene.
    """
    if sample.scene is None:
        raise ValueError(f"sample {sample.triple.metadata['key']!r} carries no scene")
    return sample.scene


def _inpaint(sample: EvaluationSample, output: Image) -> dict[str, float]:
    return score_items(output, hidden_items(sample))


def _ground(sample: EvaluationSample, output: Image) -> dict[str, float]:
    """Best IoU of the box that is read from the overlay with any acceptable box."""
    metadata = sample.triple.metadata
    overlay = read_overlay(output, sample.triple.source, metadata["colour"])
    overlap = 0.0
    if overlay.box is not None:
        overlap = max(box_iou(overlay.box, box) for box in metadata["boxes"])
    return {"Acc@0.5": float(overlap >= 0.5), "IoU": overlap, "confidence": overlay.confidence}


def _control(sample: EvaluationSample, output: Image) -> dict[str, float]:
    scene = scene_of(sample)
    found = score_scene(output, scene)
    condition = str(sample.triple.metadata["condition"])
    agreement = map_agreement(condition, output, sample.triple.target, scene)
    return {"C": found["C"], "L": found["L"], "F1": agreement}


def _customise(sample: EvaluationSample, output: Image) -> dict[str, float]:
    """Bits of the subject where it should be (0 if nothing is there), C and L of the other item."""
    items = scene_of(sample).items
    subject = next(item for item in items if item.glyph is not None)
    others = [item for item in items if item is not subject]
    parts = {"bits": 0.0, "subject L": 0.0}
    for item, seen, overlap in match(items, parse(output).items):
        if item is subject and item.glyph is not None:
            parts = {"bits": read_glyph(output, seen.box, item.glyph), "subject L": overlap}
    if others:
        rest = score_items(output, others)
        parts |= {"other C": rest["C"], "other L": rest["L"]}
    return parts


def _mean(*names: str) -> Callable[[Mapping[str, float]], float]:
    return lambda parts: float(np.mean([parts[name] for name in names]))


def _any(sample: EvaluationSample) -> str | None:
    return None


def _has_hidden(sample: EvaluationSample) -> str | None:
    return None if hidden_items(sample) else "the hole hides no object"


def _has_subject(sample: EvaluationSample) -> str | None:
    found = any(item.glyph is not None for item in scene_of(sample).items)
    return None if found else "the target has no emblem"


def _has_change(sample: EvaluationSample) -> str | None:
    return None if sample.change is not None else "the edit is not a known change"


METRICS: Final[Mapping[str, Metric]] = MappingProxyType(
    {
        "inpaint": Metric(
            headline="mean of C and L of the hidden objects",
            parts={"C": "attributes of the hidden objects", "L": "their box IoU"},
            compute=_inpaint,
            combine=_mean("C", "L"),
            usable=_has_hidden,
        ),
        "ground": Metric(
            headline="Acc@0.5",
            parts={
                "Acc@0.5": "box IoU of the overlay is at least 0.5",
                "IoU": "box IoU of the overlay",
                "confidence": "how clear the overlay is",
            },
            compute=_ground,
            combine=_mean("Acc@0.5"),
            usable=_any,
        ),
        "control": Metric(
            headline="mean of C, L and map F1",
            parts={"C": "attributes", "L": "box IoU", "F1": "agreement of the map"},
            compute=_control,
            combine=_mean("C", "L", "F1"),
            usable=_any,
        ),
        "customise": Metric(
            headline="glyph bits at the right place",
            parts={
                "bits": "glyph bits, 0 where nothing is at its place (a guess gives 0.5)",
                "subject L": "box IoU of the glyph",
                "other C": "attributes of the other object",
                "other L": "its box IoU",
            },
            compute=_customise,
            combine=_mean("bits"),
            usable=_has_subject,
        ),
        "edit": Metric(
            headline="changed attributes x L x K",
            parts={
                "changed": "accuracy of what the instruction changes (a copy has 0)",
                "C": "attributes of the changed object",
                "L": "its box IoU",
                "K": "share of the rest that is kept",
            },
            compute=score_edit,
            combine=lambda parts: parts["changed"] * parts["L"] * parts["K"],
            usable=_has_change,
        ),
    }
)
"""How each task is measured on a scene that is known exactly, by the task's name."""


def means(scores: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Mean of every part over the samples that have it."""
    names = dict.fromkeys(name for row in scores for name in row)
    return {name: float(np.mean([row[name] for row in scores if name in row])) for name in names}
