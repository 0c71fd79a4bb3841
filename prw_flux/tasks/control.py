"""Control: a map of lines, depth or classes says where, the caption says what.

Lines are computed from the picture (data/extractors.py); depth and segmentation are used only
where the data source has true ones. Lines are white on black, near is white.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Final, final

import numpy as np
from numpy.typing import NDArray

from prw_flux.data.extractors import EXTRACTORS
from prw_flux.tasks.base import Example, Image, Task, TaskReject, Triple

CONDITIONS: Final = ("canny", "softedge", "lineart", "depth", "segmentation")
MIN_LIT: Final = 0.001


@final
@dataclass(frozen=True)
class Control(Task):
    """Draws a picture that follows a map.

    Metadata: "kind" and "condition" (canny, softedge, lineart, depth, segmentation), "method"
    (how the map was made; "true" for one that came with the example and names no method) and
    "map", the map as the source shows it (uint8 [H, W, 3]).

    An example may say which conditions it is for, in metadata["conditions"], and how its maps were
    made, in metadata["methods"], by condition.
    """

    name: ClassVar[str] = "control"
    sentence: ClassVar[str] = "Draw a picture that follows the map."

    conditions: tuple[str, ...] = CONDITIONS
    """Conditions to draw from, with equal chances; those an example cannot give are skipped."""

    def __post_init__(self) -> None:
        unknown = sorted(set(self.conditions) - set(CONDITIONS))
        if unknown or not self.conditions:
            raise ValueError(f"unknown conditions {unknown}; known: {', '.join(CONDITIONS)}")

    def missing(self, example: Example) -> str | None:
        """A condition: lines can always be computed, other maps must be given."""
        if self.available(example):
            return None
        return f"no {' or '.join(self.conditions)} map"

    def available(self, example: Example) -> list[str]:
        """The conditions that the example can give: true maps and those an extractor computes."""
        wanted = example.metadata.get("conditions", self.conditions)
        return [
            name
            for name in self.conditions
            if name in wanted and (name in example.maps or name in EXTRACTORS)
        ]

    def make(self, example: Example, rng: np.random.Generator) -> Triple:
        """The first map, in random order, that is not blank; the caption; the picture."""
        for name in rng.permutation(self.available(example)):
            condition = str(name)
            source, method = condition_map(example, condition)
            if (source.max(axis=-1) > 32).mean() < MIN_LIT:
                continue
            return self.triple(
                example,
                condition,
                source,
                example.concept,
                example.image,
                condition=condition,
                method=method,
                map=source,
            )
        raise TaskReject("every map is blank")


def condition_map(example: Example, condition: str) -> tuple[Image, str]:
    """The map of a condition as a picture, uint8 [H, W, 3], and how it was made.

    Raises:
        TaskReject: the condition needs a true map and the example has none.
    """
    if condition in example.maps:
        given = example.maps[condition]
        method = str(example.metadata.get("methods", {}).get(condition) or "true")
        if condition == "segmentation" and given.ndim == 2:
            return colour_classes(given), method
        return as_rgb(given), method
    if condition not in EXTRACTORS:
        raise TaskReject(f"no {condition} map")
    extractor = EXTRACTORS[condition]
    return as_rgb(extractor(example.image)), extractor.method


def as_rgb(values: NDArray[np.uint8]) -> Image:
    """uint8 [H, W] or [H, W, 3] -> uint8 [H, W, 3]."""
    return np.repeat(values[..., None], 3, axis=-1) if values.ndim == 2 else values


def colour_classes(indices: NDArray[np.uint8]) -> Image:
    """Class indices [H, W] -> colours [H, W, 3]: 0 is black, neighbours in number far apart.

    Bit k of the index sets bit 7 - k // 3 of channel k % 3 (the colour map of PASCAL VOC).
    """
    index = np.arange(256)
    palette = np.zeros((256, 3), np.uint8)
    for bit in range(8):
        palette[:, bit % 3] |= (((index >> bit) & 1) << (7 - bit // 3)).astype(np.uint8)
    return np.asarray(palette[indices], np.uint8)
