"""Many pictures from a pipeline: in batches, each from its own seed, quickly on a CPU.

Shapes: B pictures of a batch, H, W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias, final

import numpy as np
import torch

from prw_flux.arithmetic import arithmetic
from prw_flux.evaluation.samples import EvaluationSample
from prw_flux.pipeline import CoLoGenPipeline
from prw_flux.tasks.base import Image

Tick: TypeAlias = Callable[[int], None]
"""Told after each batch how many pictures of the call are done; may raise to stop."""


def silent(done: int) -> None:
    """A tick that tells nobody."""


@final
@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How pictures are generated.

    Args:
        steps: denoising steps.
        batch_size: pictures per call of the pipeline.
        guidance: guidance embedding, where the base has one.
        precision: "fp32", or "bf16" autocast, which halves the time on CPUs with bf16 arithmetic.
        representation: of the features that are denoised beside the image where the run has a
            stream: 1 is as trained, 0 is without, anything else is representation guidance.

    Raises:
        ValueError: a value that cannot work.
    """

    steps: int = 28
    batch_size: int = 32
    guidance: float = 3.5
    precision: str = "fp32"
    representation: float = 1.0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch_size < 1:
            raise ValueError(
                f"steps and batch_size must be at least 1: {self.steps}, {self.batch_size}"
            )
        if self.precision not in ("fp32", "bf16"):
            raise ValueError(f'precision must be "fp32" or "bf16", got {self.precision!r}')


def generate(
    pipe: CoLoGenPipeline,
    samples: Sequence[EvaluationSample],
    sampling: Sampling,
    *,
    route: str = "free",
    with_source: bool = True,
    tick: Tick = silent,
) -> list[Image]:
    """One picture per sample, of the size of its target, in the order of the samples.

    Each starts from the noise of its own seed, so that neither the batch size nor the company in a
    batch changes what is drawn (beyond rounding). A pipeline that has a feature stream denoises
    features beside every picture that has a source.

    Args:
        pipe: with an adapter, unless `with_source` is False.
        samples: of any tasks and sizes; batches hold one task and one size.
        route: which experts act.
        with_source: False gives the text alone.
        tick: progress.
    """
    outputs: dict[int, Image] = {}
    with quick(pipe, sampling):
        for batch in _batches(samples, sampling.batch_size):
            images = _call(pipe, [samples[i] for i in batch], sampling, route, with_source)
            outputs |= zip(batch, images, strict=True)
            tick(len(outputs))
    return [outputs[i] for i in range(len(samples))]


def _call(
    pipe: CoLoGenPipeline,
    samples: Sequence[EvaluationSample],
    sampling: Sampling,
    route: str,
    with_source: bool,
) -> list[Image]:
    height, width = samples[0].triple.target.shape[:2]
    source: dict[str, Any] = {}
    if with_source:
        images = [sample.triple.source for sample in samples]
        source = {
            "image": images,
            "task": samples[0].task,
            "route": route,
            "representation_scale": sampling.representation,
        }
    pictures = pipe(
        prompt=[sample.triple.text for sample in samples],
        height=height,
        width=width,
        num_inference_steps=sampling.steps,
        guidance_scale=sampling.guidance,
        generator=[torch.Generator().manual_seed(sample.seed) for sample in samples],
        output_type="np",
        **source,
    ).images
    return list(np.rint(np.asarray(pictures, np.float32) * 255).astype(np.uint8))


def _batches(samples: Sequence[EvaluationSample], size: int) -> Iterator[list[int]]:
    """Indices of samples that may share a call."""
    alike: dict[tuple[object, ...], list[int]] = {}
    for i, sample in enumerate(samples):
        kind = (sample.task, sample.triple.source.shape, sample.triple.target.shape)
        alike.setdefault(kind, []).append(i)
    for indices in alike.values():
        for start in range(0, len(indices), size):
            yield indices[start : start + size]


@contextmanager
def quick(pipe: CoLoGenPipeline, sampling: Sampling) -> Iterator[None]:
    """No gradients, no progress bars, the precision that was asked for."""
    shown = dict(getattr(pipe, "_progress_bar_config", None) or {})
    pipe.set_progress_bar_config(disable=True)
    try:
        with torch.inference_mode(), arithmetic(pipe._execution_device.type, sampling.precision):
            yield
    finally:
        pipe.set_progress_bar_config(**shown)
