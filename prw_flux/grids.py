"""What the adapter draws while it trains: fixed held-out samples, as one PNG per look."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Final, final

import numpy as np
from PIL import Image as PILImage

from prw.atomic import replace_file
from prw_flux.config import RunConfig
from prw_flux.evaluation.generate import Sampling, generate
from prw_flux.evaluation.samples import draw_samples
from prw_flux.pipeline import CoLoGenPipeline
from prw_flux.session import Session
from prw_flux.tasks import DataSource, Image, Task

COLUMNS: Final = 4
GAP: Final = 4
"""White pixels between pictures."""


@final
class Grids:
    """Pictures of one stage's task: a column per sample, rows source, drawn now, wanted.

    Args:
        config: of the run; its `evaluation.steps` are taken.
        session: base and adapter.
        data: the held-out side.
        task: of the stage.
        folder: where the files go.
    """

    def __init__(
        self, config: RunConfig, session: Session, data: DataSource, task: Task, folder: Path
    ) -> None:
        self.session, self.folder = session, folder
        self.samples = draw_samples(data, task, COLUMNS, config.seed).samples
        self.sampling = Sampling(
            steps=config.evaluation.steps, batch_size=COLUMNS, precision=config.precision
        )
        self.pipe = CoLoGenPipeline.from_pipe(session.pipe)
        # attached already, to a transformer that may have been sharded since: nothing to compare
        self.pipe.register_modules(prw=session.adapter)
        self.pipe.coredi = session.coredi

    def draw(self) -> Image:
        """The grid, from the same noise every time; uint8 [H, W, 3]."""
        with self.session.awake():
            made = generate(self.pipe, self.samples, self.sampling)
        triples = [sample.triple for sample in self.samples]
        return tiled([[t.source for t in triples], made, [t.target for t in triples]])

    def write(self, picture: Image, stage: str, step: int) -> Path:
        """Save a grid as ``STAGE-STEP.png``."""
        path = self.folder / f"{stage}-{step:07d}.png"
        with replace_file(path) as new:
            PILImage.fromarray(picture).save(new, format="PNG")
        return path


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
