"""The arms of the comparison: what the trained adapter has to beat, and what bounds it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Final, final

import cv2
import numpy as np
import torch

from prw_flux.adapter import PRWAdapter
from prw_flux.encode import decode_latents, encode_image, to_pixels
from prw_flux.evaluation.generate import Sampling, Tick, generate, silent
from prw_flux.evaluation.samples import EvaluationSample
from prw_flux.pipeline import CoLoGenPipeline
from prw_flux.tasks.base import Image


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Request:
    """Samples of one task that an arm is to answer.

    Args:
        pipe: with the trained adapter.
        samples: what is asked.
        sampling: how pictures are generated.
        stage: name of the stage that trained the task.
        tick: progress.
    """

    pipe: CoLoGenPipeline
    samples: Sequence[EvaluationSample]
    sampling: Sampling
    stage: str
    tick: Tick = silent


@final
@dataclass(frozen=True, kw_only=True)
class Arm:
    """A way to answer samples.

    Args:
        label: in words.
        heading: of a column.
        baseline: whether the trained adapter is compared with it.
        trained: whether it is the trained adapter, under some route.
        make: one picture per sample.
    """

    label: str
    heading: str
    baseline: bool = False
    trained: bool = False
    make: Callable[[Request], list[Image]]


def _own_stage(asked: Request) -> list[Image]:
    route = f"stage:{asked.stage}"
    return generate(asked.pipe, asked.samples, asked.sampling, route=route, tick=asked.tick)


def _free(asked: Request) -> list[Image]:
    return generate(asked.pipe, asked.samples, asked.sampling, tick=asked.tick)


def _text_only(asked: Request) -> list[Image]:
    return generate(asked.pipe, asked.samples, asked.sampling, with_source=False, tick=asked.tick)


def _zero_delta(asked: Request) -> list[Image]:
    fresh = CoLoGenPipeline.from_pipe(asked.pipe, prw=untrained(asked.pipe))
    sampling = replace(asked.sampling, representation=1.0)  # it has no feature stream
    return generate(fresh, asked.samples, sampling, tick=asked.tick)


def untrained(pipe: CoLoGenPipeline) -> PRWAdapter:
    """An adapter with the configuration of the pipeline's and one fresh expert, whose B is zero.

    The pipeline's own adapter takes its place again at its next call with a source.

    Raises:
        ValueError: the pipeline has no adapter.
    """
    if pipe.prw is None:
        raise ValueError("the pipeline has no adapter to make a fresh copy of")
    fresh = PRWAdapter.from_config(pipe.prw.config).to(pipe.prw.device)
    fresh.weave.fingerprint = dict(pipe.prw.weave.fingerprint)
    fresh.weave.unlock("fresh")
    fresh.weave.close()
    adapter: PRWAdapter = fresh.eval()
    return adapter


def _copy(asked: Request) -> list[Image]:
    return [resized(s.triple.source, s.triple.target.shape[0]) for s in asked.samples]


def resized(image: Image, side: int) -> Image:
    """The picture, resampled to a square of `side` pixels if it is not one already."""
    if image.shape[:2] == (side, side):
        return image
    return np.asarray(cv2.resize(image, (side, side), interpolation=cv2.INTER_AREA), np.uint8)


@torch.inference_mode()
def _ceiling(asked: Request) -> list[Image]:
    vae, device = asked.pipe.vae, asked.pipe._execution_device
    outputs: list[Image] = []
    for sample in asked.samples:
        latents = encode_image(vae, to_pixels(sample.triple.target), device=device)
        decoded = decode_latents(vae, latents, device=device)
        levels = (decoded[0].float().cpu() * 127.5 + 127.5).round().byte()
        outputs.append(np.ascontiguousarray(levels.permute(1, 2, 0).numpy()))
    return outputs


ARMS: Final[Mapping[str, Arm]] = MappingProxyType(
    {
        "stage": Arm(
            label="PRW at the task's own stage", heading="own stage", trained=True, make=_own_stage
        ),
        "prw": Arm(label="PRW, free router", heading="free router", trained=True, make=_free),
        "text": Arm(label="text only", heading="text only", baseline=True, make=_text_only),
        "zero": Arm(
            label="zero-delta experts", heading="zero-delta", baseline=True, make=_zero_delta
        ),
        "copy": Arm(label="copy of the source", heading="copy", baseline=True, make=_copy),
        "ceiling": Arm(
            label="true target through the autoencoder", heading="ceiling", make=_ceiling
        ),
    }
)
"""`stage` is the trained adapter pinned to the stage that trained the task, `prw` the same adapter
with its final router choosing freely, `text` the base without the source, `zero` the source
attached with untrained experts, `copy` the source unchanged, `ceiling` what the autoencoder leaves
of the true target: no arm that generates can be expected to score above it."""
