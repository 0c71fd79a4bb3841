"""What the adapter draws while it trains: fixed held-out samples, as one PNG per look.

Shapes: B samples of a batch, S source tokens, C packed latent channels, L text tokens, E and P
widths of the text and pooled embeddings.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, final

import numpy as np
import torch
from PIL import Image as PILImage

from prw.atomic import replace_file
from prw_flux.config import RunConfig
from prw_flux.encode import unpack
from prw_flux.encoded import Encoded
from prw_flux.evaluation.generate import Sampling, quick
from prw_flux.evaluation.samples import noise_seed
from prw_flux.objective import Objective
from prw_flux.pipeline import CoLoGenPipeline
from prw_flux.sample_cache.wanted import DRAWN
from prw_flux.samples import Samples
from prw_flux.session import Session
from prw_flux.tasks import Image

GAP: Final = 4
"""White pixels between pictures."""
TOKEN: Final = 16
"""Pixels of a token's side."""


@final
class Grids:
    """Pictures of one stage's task: a column per sample, rows source, drawn now, wanted.

    They are drawn from the conditions that training itself would read, encoded here or before, so a
    look needs the autoencoder's decoder and no encoder.

    Args:
        config: of the run; its `evaluation.steps` are taken.
        objective: of the run.
        samples: of the held-out side; the first are drawn.
        folder: where the files go.

    Raises:
        SampleError: no usable sample.
    """

    def __init__(
        self, config: RunConfig, objective: Objective, samples: Samples, folder: Path
    ) -> None:
        self.session, self.samples, self.folder = objective.session, samples, folder
        self.seed = config.seed
        self.sampling = Sampling(steps=config.evaluation.steps, precision=config.precision)
        with self.session.awake():
            self.parts = samples.first(DRAWN)
            self.pooled = objective.source_pooled(samples)
        self.triples = [samples.triple(number) for number in range(DRAWN)]
        self.pipe = _decoding(self.session)

    def draw(self) -> Image:
        """The grid, from the same noise every time; uint8 [H, W, 3]."""
        made: dict[int, Image] = {}
        with self.session.awake("vae"), quick(self.pipe, self.sampling):
            for numbers, encoded in self.parts:
                made |= zip(numbers, self._drawn(numbers, encoded), strict=True)
        return tiled(
            [
                [triple.source for triple in self.triples],
                [made[number] for number in range(DRAWN)],
                [triple.target for triple in self.triples],
            ]
        )

    def _drawn(self, numbers: Sequence[int], encoded: Encoded) -> list[Image]:
        """Samples of one size, each from noise of its own; uint8 [H, W, 3]."""
        device, task = self.session.device, self.samples.task.name
        text_BLE, pooled_BP = self.samples.texts.gather(encoded.rows)
        rows, columns = encoded.source_grid
        height, width = (TOKEN * side for side in encoded.target_grid)
        seeds = [noise_seed(self.seed, task, number) for number in numbers]
        pictures: Any = self.pipe(
            image=unpack(encoded.source_NSC.float(), 2 * rows, 2 * columns).to(device),
            source_size=(TOKEN * rows, TOKEN * columns),
            source_pooled_embeds=self.pooled,
            prompt_embeds=text_BLE.to(device),
            pooled_prompt_embeds=pooled_BP.to(device),
            task=task,
            height=height,
            width=width,
            num_inference_steps=self.sampling.steps,
            guidance_scale=self.sampling.guidance,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            output_type="np",
        ).images
        return list(np.rint(np.asarray(pictures, np.float32) * 255).astype(np.uint8))

    def write(self, picture: Image, stage: str, step: int) -> Path:
        """Save a grid as ``STAGE-STEP.png``."""
        path = self.folder / f"{stage}-{step:07d}.png"
        with replace_file(path) as new:
            PILImage.fromarray(picture).save(new, format="PNG")
        return path


def _decoding(session: Session) -> CoLoGenPipeline:
    """The run's pipeline with its adapter, for calls that give embeddings and latents."""
    parts = {name: getattr(session.pipe, name) for name in ("scheduler", "vae", "transformer")}
    texts = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    pipe = CoLoGenPipeline(**parts, **texts)
    # attached already, to a transformer that may have been sharded since: nothing to compare
    pipe.register_modules(prw=session.adapter)
    pipe.coredi = session.coredi
    return pipe


def tiled(rows: Sequence[Sequence[Image]]) -> Image:
    """Pictures of any sizes in rows, on white."""
    pictures = list(itertools.chain(*rows))
    height = max(p.shape[0] for p in pictures) + GAP
    width = max(p.shape[1] for p in pictures) + GAP
    shape = (len(rows) * height - GAP, max(map(len, rows)) * width - GAP, 3)
    grid = np.full(shape, 255, np.uint8)
    for i, row in enumerate(rows):
        for j, picture in enumerate(row):
            y, x = i * height, j * width
            grid[y : y + picture.shape[0], x : x + picture.shape[1]] = picture
    return grid
