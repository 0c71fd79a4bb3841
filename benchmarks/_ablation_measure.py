"""What `benchmarks.ablation` reads from a trained arm: a row with a number per held-out item."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from benchmarks._ablation_base import base_folder
from benchmarks._ablation_plan import FINAL, ORDER, Arm, Phase, Protocol
from benchmarks._ablation_train import Course, Store
from benchmarks._squeezenet import features, weights
from prw_flux.encode import to_pixels
from prw_flux.evaluation import (
    ARMS,
    EvaluationSample,
    Request,
    count_experts,
    draw_samples,
    generate,
    score,
    unusable,
)
from prw_flux.evaluation.generate import Sampling
from prw_flux.pipeline import CoLoGenPipeline
from prw_flux.session import open_session
from prw_flux.shapeweave import ShapeWeave
from prw_flux.tasks import Image, load_task

FULL: Final = ("customise", "edit")
"""Tasks whose parts are kept per item; of the others the headline."""
REFERENCES: Final = ("copy", "text", "zero", "ceiling")
SHOWN: Final = 8


@dataclass(frozen=True, eq=False)
class Held:
    """The held-out items, the same for every arm and seed, and a pipeline of the bare base."""

    samples: Mapping[str, tuple[EvaluationSample, ...]]
    base: CoLoGenPipeline
    sampling: Sampling


def held_out(protocol: Protocol) -> Held:
    """Draw the items and load the base in fp32, as `prw-flux evaluate` does."""
    source = ShapeWeave(size=protocol.config(0).size, seed=protocol.held_seed, split="heldout")
    samples = {}
    for task, count in zip(ORDER, protocol.items, strict=True):
        drawn = draw_samples(source, load_task(task), count, protocol.held_seed, unusable)
        samples[task] = drawn.samples
    base = CoLoGenPipeline.from_pretrained(base_folder(protocol.base), dtype=torch.float32)
    return Held(samples, base, Sampling(steps=protocol.sampling, precision="bf16"))


class Meter:
    """Measures one arm while it trains.

    After a phase every task that was trained so far is answered with the router free; that is a
    row of the forgetting matrix. The last row is the trained adapter.
    """

    def __init__(self, held: Held, course: Course) -> None:
        self.held, self.course = held, course
        self.pipe = CoLoGenPipeline.from_pipe(held.base, prw=course.adapter)
        self.rows: list[str] = []
        self.matrix: list[dict[str, list[float]]] = []
        self.seen: list[str] = []
        self.last: dict[str, list[dict[str, float]]] = {}
        self.pictures: list[Image] = []

    def after(self, phase: Phase) -> None:
        """Fill a row of the matrix."""
        self.seen += [task for task in phase.tasks if task not in self.seen]
        self.rows.append(phase.stage.name)
        final = phase is self.course.arm.phases[-1]
        self.last = {}
        for task in self.seen:
            self.last[task] = self._answers(task, "free", keep=final and task == FINAL)
        self.matrix.append({task: headline(rows) for task, rows in self.last.items()})

    def own_stage(self) -> dict[str, list[float]]:
        """The headline of every task pinned to the end of the stage that trained it.

        Raises:
            ArithmeticError: an arm with frozen veterans does not give the bits of that time.
        """
        arm, found = self.course.arm, {}
        if any(len(phase.tasks) > 1 or not phase.opens for phase in arm.phases):
            return {}
        for number, phase in enumerate(arm.phases):
            task = phase.tasks[0]
            before = self.matrix[number][task]
            if arm.frozen and not arm.remember:
                found[task] = before
                count = self.held.sampling.batch_size
                if number == 0 and self._pinned(task, count) != before[:count]:
                    raise ArithmeticError(f"{task!r} pinned to its stage is not what it was then")
            else:
                found[task] = self._pinned(task, None)
        return found

    def routing(self) -> dict[str, Any]:
        """Chosen experts per task and block."""
        shown = {task: self.held.samples[task][:128] for task in self.seen}
        return count_experts(self.pipe, shown)

    def _pinned(self, task: str, count: int | None) -> list[float]:
        return headline(self._answers(task, f"stage:{task}", count))

    def _answers(
        self, task: str, route: str, count: int | None = None, keep: bool = False
    ) -> list[dict[str, float]]:
        samples = self.held.samples[task][:count]
        pictures = generate(self.pipe, samples, self.held.sampling, route=route)
        if keep:
            self.pictures = pictures[:SHOWN]
        return scored(samples, pictures)


def measure(
    arm: Arm, protocol: Protocol, seed: int, held: Held, store: Store | None
) -> tuple[dict[str, Any], list[Image], Store]:
    """Train an arm and read it."""
    began = time.perf_counter()
    course = Course(arm, protocol, seed, store)
    meter = Meter(held, course)
    phases = course.train(meter.after)
    row = {
        "phases": phases,
        "stages": meter.rows,
        "matrix": [{t: shortened(v) for t, v in cells.items()} for cells in meter.matrix],
        "at_stage": {task: shortened(v) for task, v in meter.own_stage().items()},
        "items": {task: parts_of(meter.last[task]) for task in FULL if task in meter.last},
        "routing": meter.routing(),
        "seconds": round(time.perf_counter() - began, 1),
    }
    return row, meter.pictures, course.store


def references(protocol: Protocol, held: Held) -> dict[str, Any]:
    """What the base, a copy and the autoencoder give without any training."""
    began = time.perf_counter()
    adapter = open_session(protocol.config(0)).adapter
    adapter.weave.unlock("none")
    adapter.weave.close()
    for task in ORDER:
        adapter.note_trained(task)
    pipe = CoLoGenPipeline.from_pipe(held.base, prw=adapter.eval())
    items: dict[str, Any] = {}
    for name in REFERENCES:
        items[name] = {}
        for task in FULL:
            samples = held.samples[task]
            asked = Request(pipe=pipe, samples=samples, sampling=held.sampling, stage="none")
            items[name][task] = parts_of(scored(samples, ARMS[name].make(asked)))
    return {"references": items, "seconds": round(time.perf_counter() - began, 1)}


def headline(rows: Sequence[Mapping[str, float]]) -> list[float]:
    """One number per item."""
    return [row["headline"] for row in rows]


def parts_of(rows: Sequence[Mapping[str, float]]) -> dict[str, list[float | None]]:
    """Every part, one number per item; None where it does not apply."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [_short(row.get(name)) for row in rows] for name in names}


def shortened(values: Sequence[float]) -> list[float | None]:
    """To three decimals."""
    return [_short(value) for value in values]


def _short(value: float | None) -> float | None:
    return None if value is None else round(float(value), 3)


def scored(
    samples: Sequence[EvaluationSample], pictures: Sequence[Image]
) -> list[dict[str, float]]:
    """The parts of each task's metric; S where the weights of SqueezeNet are at hand."""
    rows = [dict(score(s, image)) for s, image in zip(samples, pictures, strict=True)]
    file = weights()
    if file is not None and samples and samples[0].task in FULL:
        for start in range(0, len(samples), 64):
            chunk = slice(start, start + 64)
            truth = np.stack([s.triple.target for s in samples[chunk]])
            alike = likeness(file, np.stack(pictures[chunk]), truth)
            for row, value in zip(rows[chunk], alike, strict=True):
                row["S"] = value
    return rows


def likeness(file: Path, ours: Any, truth: Any) -> list[float]:
    """S: cosine between SqueezeNet's features, averaged over places, of two pictures."""
    state = squeezenet(file)
    with torch.inference_mode():
        a, b = (features(state, to_pixels(x), (6, 6)).mean((2, 3)) for x in (ours, truth))
        return [float(x) for x in F.cosine_similarity(a, b)]


@cache
def squeezenet(file: Path) -> dict[str, Tensor]:
    """Its weights in fp32."""
    return {name: value.float() for name, value in load_file(file).items()}
