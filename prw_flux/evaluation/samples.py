"""Held-out samples: a triple together with the example and the scene that it was made from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

from prw_flux.shapeweave.change import Change
from prw_flux.shapeweave.scene import Scene
from prw_flux.tasks.base import DataSource, Example, Task, TaskReject, Triple, keyed_rng

TRIES_PER_SAMPLE = 20


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class EvaluationSample:
    """One held-out sample.

    Args:
        task: the task's name.
        index: position of the example in its data source.
        seed: of the starting noise, the same for every arm that is compared.
        example: what is known about the picture.
        triple: (source, text, target) that the task made of it.
    """

    task: str
    index: int
    seed: int
    example: Example
    triple: Triple

    @property
    def change(self) -> Change | None:
        """The change that leads from source to target, where the target is an edited scene."""
        found = self._entry("change")
        return found if isinstance(found, Change) else None

    @property
    def scene(self) -> Scene | None:
        """The scene that the *target* shows; None for a photo."""
        if self.change is not None:
            return self.change.after
        found = self._entry("scene")
        return found if isinstance(found, Scene) else None

    def _entry(self, name: str) -> Any:
        return self.triple.metadata.get(name, self.example.metadata.get(name))


@final
@dataclass(frozen=True, kw_only=True)
class Draw:
    """Samples of one task, and how many were refused on the way, by reason."""

    samples: tuple[EvaluationSample, ...]
    rejected: dict[str, int]


def draw_samples(
    source: DataSource,
    task: Task,
    count: int,
    seed: int = 0,
    usable: Callable[[EvaluationSample], str | None] | None = None,
) -> Draw:
    """The first `count` usable samples of a task, in the order of the data source.

    Args:
        source: of held-out examples.
        task: makes the triples.
        count: samples wanted; fewer come back if 20 tries per sample do not give them.
        seed: of the task's choices and of the noise.
        usable: why a sample cannot be scored, or None if it can.
    """
    rejected: Counter[str] = Counter()
    samples: list[EvaluationSample] = []
    for index in range(TRIES_PER_SAMPLE * count):
        if len(samples) == count:
            break
        try:
            example = source.example(task.name, index)
            triple = task(example, seed)
        except TaskReject as reject:
            rejected[reject.reason] += 1
            continue
        sample = EvaluationSample(
            task=task.name,
            index=index,
            seed=noise_seed(seed, task.name, index),
            example=example,
            triple=triple,
        )
        reason = usable(sample) if usable is not None else None
        if reason is None:
            samples.append(sample)
        else:
            rejected[reason] += 1
    return Draw(samples=tuple(samples), rejected=dict(rejected))


def noise_seed(seed: int, task: str, index: int) -> int:
    """A 63-bit seed that depends on the three arguments alone."""
    return int(keyed_rng(seed, "evaluation noise", task, str(index)).integers(2**63 - 1))
