"""ShapeWeave: held-out scenes whose right answer is known, so nothing but the picture is needed.

Results: `<task>/<index>.png`, and beside each what was given and what was asked for:
`<index>_source.png`, `<index>_target.png`. The metric of each task is exact (evaluation/shapes.py);
`headline` is its summary in [0, 1].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from prw_flux.evaluation.benchmarks.base import (
    Ask,
    Benchmark,
    BenchmarkError,
    Encoders,
    Item,
    Line,
    Unscored,
    means,
)
from prw_flux.evaluation.samples import EvaluationSample, draw_samples
from prw_flux.evaluation.shapes import METRICS, score, unusable
from prw_flux.shapeweave.source import ShapeWeave
from prw_flux.tasks import Image, load_task


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Drawn(Item):
    """One held-out sample."""

    sample: EvaluationSample


@final
class Shapes(Benchmark[Drawn]):
    """Held-out scenes, drawn again from their seed wherever they are needed.

    Args:
        tasks: names of tasks; those without an exact metric are left out.
        size: side in pixels, that of the run.
        per_task: samples of each task.
        seed: of the scenes.

    Raises:
        BenchmarkError: no task has an exact metric, or `per_task` is below 1.
    """

    name = "shapes"
    batch = 32

    def __init__(
        self, tasks: Sequence[str], *, size: int, per_task: int = 128, seed: int = 0
    ) -> None:
        known = [task for task in dict.fromkeys(tasks) if task in METRICS]
        if not known or per_task < 1:
            raise BenchmarkError(
                f"shapes needs a task with an exact metric ({', '.join(METRICS)}) and at least one "
                f"sample of it, got {', '.join(tasks) or 'no task'} and {per_task}."
            )
        source = ShapeWeave(size=size, seed=seed, split="heldout")
        self.items = tuple(
            Drawn(key=f"{task}/{sample.index}", output=f"{task}/{sample.index}.png",
                  text=sample.triple.text, sample=sample)
            for task in known
            for sample in draw_samples(source, load_task(task), per_task, seed, unusable).samples
        )  # fmt: skip
        self._of = {item.output: item.sample for item in self.items}
        self._facts = {"size": str(size), "per task": str(per_task), "seed": str(seed)}
        self.allowed = frozenset(
            name for item in self.items for name in (_beside(item.output, "source"),
                                                     _beside(item.output, "target"))
        )  # fmt: skip

    def asks(self) -> tuple[Ask, ...]:
        """Squares of the scenes' size."""
        return tuple(
            Ask(output=item.output, task=item.sample.task, prompt=item.text, square=True)
            for item in self.items
        )

    def source(self, ask: Ask) -> Image:
        """The sample's source."""
        return self._of[ask.output].triple.source

    def source_size(self, ask: Ask) -> tuple[int, int]:
        """(width, height) of the sample's source."""
        height, width = self.source(ask).shape[:2]
        return width, height

    def beside(self, ask: Ask, source: Image, output: Image) -> Mapping[str, Image]:
        """Source and target, for people."""
        target = self._of[ask.output].triple.target
        return {_beside(ask.output, "source"): source, _beside(ask.output, "target"): target}

    def given(self, item: Drawn, results: Path) -> Path:
        """The source that generation wrote."""
        return results / _beside(item.output, "source")

    def target(self, item: Drawn, results: Path) -> Path:
        """The target that generation wrote."""
        return results / _beside(item.output, "target")

    def score(self, item: Drawn, output: Image, encoders: Encoders) -> dict[str, Any]:
        """The parts of the task's metric, and its headline."""
        try:
            return {"task": item.sample.task, **score(item.sample, output)}
        except ValueError as problem:
            raise Unscored(f"{item.output}: {problem}") from None

    def lines(self, rows: Sequence[Mapping[str, Any]], encoders: Encoders) -> list[Line]:
        """One row per task."""
        out = []
        for task in dict.fromkeys(row["task"] for row in rows):
            chosen = [row for row in rows if row["task"] == task]
            total = sum(item.sample.task == task for item in self.items)
            names = {name: name for name in ("headline", *METRICS[task].parts)}
            protocol = {"bench": self.name, "task": task, "items": self.covered(chosen, total),
                        **self._facts}  # fmt: skip
            out.append(Line(label=f"{task} (headline: {METRICS[task].headline})",
                            metrics=means(chosen, names), protocol=protocol,
                            n=len(chosen)))  # fmt: skip
        return out


def _beside(output: str, role: str) -> str:
    return f"{output.removesuffix('.png')}_{role}.png"
