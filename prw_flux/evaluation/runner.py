"""The evaluation of a run: the comparison with the baselines, and what later stages forgot.

Everything is computed after training: `at_stage` gives back, bit for bit, the model as it was at
the end of every stage, so nothing has to be measured while the run is going.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, TypeAlias, final

import torch

from prw_flux.evaluation.arms import ARMS, Request
from prw_flux.evaluation.generate import Sampling, Tick, generate
from prw_flux.evaluation.routing import count_experts
from prw_flux.evaluation.samples import Draw, EvaluationSample, draw_samples
from prw_flux.evaluation.shapes import METRICS, means, score, unusable
from prw_flux.evaluation.sheets import photo_samples, write_sheets
from prw_flux.evaluation.statistics import bootstrap, paired_bootstrap
from prw_flux.evaluation.tables import markdown
from prw_flux.pipeline import CoLoGenPipeline
from prw_flux.quantisation import loading, place, usable
from prw_flux.rundir import EVALUATION_VERSION, RunFolder, write_atomically
from prw_flux.shapeweave.source import ShapeWeave
from prw_flux.tasks import DataSource, Image, load_task

FILE: Final = "evaluation.json"
WORST: Final = 10
"""Samples per task in the gallery of failures."""
Progress: TypeAlias = Callable[[str, int, int], None]
"""Told (what, pictures done, pictures in all) after every batch; may raise to stop."""


class NothingToMeasure(ValueError):
    """No finished stage of a run has a task with an exact metric."""


@final
@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is measured, and how.

    Args:
        n: held-out samples per task of the comparison.
        history: samples per task and stage of the forgetting matrix, at most n; 0 leaves it out.
        shown: samples per task in the report's grids.
        photos: real photos per task in the grids; 0 leaves them out.
        seed: of the held-out scenes, their tasks and the starting noise.
        arms: names from `ARMS`.
        sampling: how pictures are generated.

    Raises:
        ValueError: a value that cannot work.
    """

    n: int = 128
    history: int = 64
    shown: int = 8
    photos: int = 3
    seed: int = 0
    arms: tuple[str, ...] = tuple(ARMS)
    sampling: Sampling = field(default_factory=Sampling)

    def __post_init__(self) -> None:
        if self.n < 1 or not 0 <= self.history <= self.n or min(self.shown, self.photos) < 0:
            raise ValueError(
                f"n must be at least 1, history between 0 and n, shown and photos at least 0; got "
                f"{self.n}, {self.history}, {self.shown}, {self.photos}"
            )
        unknown = [arm for arm in self.arms if arm not in ARMS]
        if unknown or "stage" not in self.arms:
            raise ValueError(
                f"arms {unknown} are unknown, or stage is left out; known: {list(ARMS)}"
            )

    @classmethod
    def quick(cls, n: int = 32, steps: int = 12) -> Settings:
        """For the end of a demo: small n, few steps, bf16; about a minute on two CPU cores."""
        sampling = Sampling(steps=steps, precision="bf16")
        return cls(n=n, history=min(n, 16), shown=min(n, 6), photos=3, sampling=sampling)


def evaluate_run(
    run: str | Path,
    settings: Settings | None = None,
    *,
    pipe: CoLoGenPipeline | None = None,
    source: DataSource | None = None,
    progress: Progress = lambda what, done, total: None,
) -> dict[str, Any]:
    """Measure a run; write evaluation.json and .md, routing.json and samples/ into it.

    Args:
        run: the run folder; the stages that are finished are evaluated.
        settings: None takes the defaults, at the run's precision.
        pipe: the run's pipeline, where it is loaded already.
        source: held-out examples; None takes ShapeWeave's at the run's size.
        progress: for a progress bar.

    Returns:
        What evaluation.json holds (docs: Results): "tasks" with means, intervals and paired
        differences of every arm, and "forgetting".

    Raises:
        RunError: the folder is not a run.
        ValueError: no stage is finished.
        NothingToMeasure: no finished stage has a task with an exact metric.
    """
    started = time.perf_counter()
    folder = RunFolder.open(run)
    settings = settings or Settings(sampling=Sampling(precision=folder.config.precision))
    stages = finished_stages(folder)
    if pipe is None:
        pipe = load_pipeline(folder)
    if source is None:
        source = ShapeWeave(size=folder.config.size, seed=settings.seed, split="heldout")
    tasks = [t for t in dict.fromkeys(stages.values()) if t in METRICS and t in source.tasks()]
    if not tasks:
        raise NothingToMeasure(
            f"no task of {folder.path} has an exact metric: {', '.join(stages.values())}"
        )
    bench = _Bench(pipe, settings, _draw(source, tasks, settings), progress, stages)
    result = {
        "version": EVALUATION_VERSION,
        "source": source.name,
        "size": folder.config.size,
        "stages": list(stages),
        "settings": asdict(settings),
        "tasks": {task: bench.compare(task) for task in tasks},
        "forgetting": bench.history(stages) if settings.history else None,
    }
    write_json(folder.path / "routing.json", bench.routing())
    shown = {task: bench.shown(task) for task in tasks}
    photos = photo_samples(folder, tasks, settings.photos, settings.seed)
    outputs = bench.of_photos(photos)
    worst = {task: bench.worst(task) for task in tasks}
    write_sheets(folder.path / "samples", shown, photos, outputs, worst)
    result["seconds"] = round(time.perf_counter() - started, 1)
    write_json(folder.path / FILE, result)
    write_atomically((folder.path / FILE).with_suffix(".md"), markdown(result))
    return result


def load_pipeline(folder: RunFolder, *, base: str | None = None, local: int = 0) -> CoLoGenPipeline:
    """The trained pipeline, on a GPU if there is one; on a CPU in float32.

    A base that was quantised in training is so again, and its models go to the GPU one at a time.

    Args:
        folder: the run.
        base: another place for its base.
        local: number of the GPU.
    """
    device = f"cuda:{local}" if torch.cuda.is_available() else "cpu"
    half = device != "cpu" and folder.config.precision == "bf16"
    dtype = torch.bfloat16 if half else torch.float32
    kind = usable(folder.config.base.quantisation)
    pipe: CoLoGenPipeline = CoLoGenPipeline.from_pretrained(
        folder.path, base=base, dtype=dtype, **loading(kind, dtype)
    )
    place(pipe, kind, dtype, device)
    return pipe


def finished_stages(folder: RunFolder) -> dict[str, str]:
    """Stage name -> task name, of the finished stages, oldest first.

    Raises:
        ValueError: there is none.
    """
    stages = {
        stage.name: load_task(stage.task).name for stage in folder.config.stages[: folder.done]
    }
    if not stages:
        raise ValueError(f"{folder.path} has no finished stage yet: there is nothing to evaluate")
    return stages


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Replace a JSON file in one step."""
    write_atomically(path, json.dumps(value, indent=1) + "\n")


def _draw(source: DataSource, tasks: Sequence[str], settings: Settings) -> dict[str, Draw]:
    draws = {
        task: draw_samples(source, load_task(task), settings.n, settings.seed, unusable)
        for task in tasks
    }
    short = [task for task, draw in draws.items() if not draw.samples]
    if short:
        raise ValueError(f"{source.name} gives no sample that can be scored for {short}")
    return draws


class _Bench:
    """Generates and scores, each (task, arm or route) once."""

    def __init__(
        self,
        pipe: CoLoGenPipeline,
        settings: Settings,
        draws: Mapping[str, Draw],
        progress: Progress,
        stages: Mapping[str, str],
    ) -> None:
        self.pipe, self.settings, self.draws, self.progress = pipe, settings, draws, progress
        self.own = {task: stage for stage, task in stages.items()}
        self._scores: dict[tuple[str, str], list[dict[str, float]]] = {}
        self._pictures: dict[str, list[Image]] = {}

    def compare(self, task: str) -> dict[str, Any]:
        """Means and intervals of every arm on one task, and the paired differences to PRW."""
        draw, metric = self.draws[task], METRICS[task]
        arms: dict[str, Any] = {}
        for name in self.settings.arms:
            rows = self._arm(task, name)
            headline = [row["headline"] for row in rows]
            arms[name] = {
                "label": ARMS[name].label,
                "heading": ARMS[name].heading,
                "trained": ARMS[name].trained,
                "headline": bootstrap(headline).to_json(),
                "parts": {k: v for k, v in means(rows).items() if k != "headline"},
            }
        baselines = [name for name in self.settings.arms if ARMS[name].baseline]
        differences = {
            ours: {name: self._difference(task, ours, name) for name in baselines}
            for ours in self.settings.arms
            if ARMS[ours].trained
        }
        return {
            "n": len(draw.samples),
            "rejected": draw.rejected,
            "headline": metric.headline,
            "parts": dict(metric.parts),
            "arms": arms,
            "differences": differences,
        }

    def _difference(self, task: str, ours: str, theirs: str) -> dict[str, Any]:
        a, b = ([row["headline"] for row in self._arm(task, name)] for name in (ours, theirs))
        return paired_bootstrap(a, b).to_json()

    def _arm(self, task: str, name: str) -> list[dict[str, float]]:
        if (task, name) not in self._scores:
            samples = self.draws[task].samples
            tick = self._tick(f"{task}: {ARMS[name].label}", len(samples))
            asked = Request(
                pipe=self.pipe,
                samples=samples,
                sampling=self.settings.sampling,
                stage=self.own[task],
                tick=tick,
            )
            pictures = ARMS[name].make(asked)
            rows = [score(s, image) for s, image in zip(samples, pictures, strict=True)]
            self._scores[task, name] = rows
            if name == "stage":
                self._pictures[task] = pictures
        return self._scores[task, name]

    def history(self, stages: Mapping[str, str]) -> dict[str, Any]:
        """The forgetting matrix: the headline of each task seen so far, after each stage.

        "router" has the router as it was at the end of the row's stage; its last row is the
        trained adapter. "at_stage" pins each task to the end of the last stage that trained it:
        by construction a later stage cannot change that model, so a column repeats its first value.
        """
        count, names = self.settings.history, list(stages)
        tasks = [t for t in dict.fromkeys(stages.values()) if t in self.draws]
        router: list[list[float | None]] = []
        pinned: list[list[float | None]] = []
        for row, stage in enumerate(names):
            own = {stages[s]: s for s in names[: row + 1]}
            last = row == len(names) - 1
            router.append([self._cell(t, "free" if last else f"stage:{stage}", count)
                           if t in own else None for t in tasks])  # fmt: skip
            pinned.append([self._cell(t, f"stage:{own[t]}", count) if t in own else None
                           for t in tasks])  # fmt: skip
        return {"n": count, "stages": names, "tasks": tasks, "router": router, "at_stage": pinned}

    def _cell(self, task: str, route: str, count: int) -> float:
        """Mean headline of the first `count` samples of a task under a route."""
        if route == "free" and "prw" in self.settings.arms:
            rows = self._arm(task, "prw")[:count]
        elif route == f"stage:{self.own[task]}" and "stage" in self.settings.arms:
            rows = self._arm(task, "stage")[:count]
        elif (task, route) in self._scores:
            rows = self._scores[task, route]
        else:
            samples = self.draws[task].samples[:count]
            pictures = self.generate(f"{task} at {route}", samples, route)
            rows = [score(s, image) for s, image in zip(samples, pictures, strict=True)]
            self._scores[task, route] = rows
        return sum(row["headline"] for row in rows) / len(rows)

    def generate(
        self, what: str, samples: Sequence[EvaluationSample], route: str = "free"
    ) -> list[Image]:
        """Pictures of the trained adapter."""
        tick = self._tick(what, len(samples))
        return generate(self.pipe, samples, self.settings.sampling, route=route, tick=tick)

    def of_photos(self, photos: Mapping[str, Sequence[EvaluationSample]]) -> list[Image]:
        """Pictures for photo samples, each task at its own stage."""
        return [
            picture
            for task, samples in photos.items()
            for picture in self.generate(f"{task}: photos", samples, f"stage:{self.own[task]}")
        ]

    def routing(self) -> dict[str, Any]:
        """Chosen experts on the samples of the comparison."""
        samples = {task: draw.samples for task, draw in self.draws.items()}
        return count_experts(self.pipe, samples, batch_size=self.settings.sampling.batch_size)

    def shown(self, task: str) -> list[tuple[EvaluationSample, Image, float]]:
        """Samples for the grid: what was asked, what came out, its headline."""
        return self._scored(task)[: self.settings.shown]

    def worst(self, task: str) -> list[tuple[EvaluationSample, Image, float]]:
        """The samples with the lowest headline, worst first."""
        return sorted(self._scored(task), key=lambda one: one[2])[:WORST]

    def _scored(self, task: str) -> list[tuple[EvaluationSample, Image, float]]:
        rows = self._arm(task, "stage")
        return [
            (sample, image, row["headline"])
            for sample, image, row in zip(
                self.draws[task].samples, self._pictures[task], rows, strict=True
            )
        ]

    def _tick(self, what: str, total: int) -> Tick:
        return lambda done: self.progress(what, done, total)
