"""The pictures of a report: PNG files and one samples.json that says what they are."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, final

import numpy as np
from PIL import Image as PILImage

from prw import ConfigError
from prw.atomic import replace_folder
from prw_flux.config import RunConfig
from prw_flux.data.annotations import PhotoError
from prw_flux.data.choose import open_held_out, open_run_data
from prw_flux.data.folder_copy import local_folder
from prw_flux.data.on_disk import PREFIX
from prw_flux.data.photos import PhotoFolder
from prw_flux.data.rows import DataError
from prw_flux.evaluation.samples import EvaluationSample, draw_samples
from prw_flux.locate import EMBEDDED
from prw_flux.rundir import RunFolder
from prw_flux.tasks import DataSource, Image, load_task

log = logging.getLogger(__name__)

VERSION: Final = 1
OUTSIDE: Final = "outside the base's training domain"


@final
class Photos(dict[str, list[EvaluationSample]]):
    """Samples of photos by task, with a sentence part that says where they come from.

    Args:
        samples: by task.
        told: of which data, whether these were trained on, and whether the base knows their kind.
    """

    def __init__(
        self, samples: Mapping[str, list[EvaluationSample]] = MappingProxyType({}), told: str = ""
    ) -> None:
        super().__init__(samples)
        self.told = told


def photo_samples(folder: RunFolder, tasks: Sequence[str], count: int, seed: int) -> Photos:
    """Samples of the run's own pictures for the tasks that they allow, each picture once.

    They are of the held-out side of what the run trains on; of all photos of ``data.photos`` (by
    default those of scikit-image) where these are not what it trains on. Data that cannot be used
    give no samples, and a warning.
    """
    if count == 0:
        return Photos()
    try:
        data, told = _pictures(folder.config)
        fed, most = data.tasks(), min(count, len(data))
        drawn = {t: draw_samples(data, load_task(t), most, seed) for t in tasks if t in fed}
    except Exception as problem:  # any that a data source of the user's may raise
        log.warning("no photos in the report: %s", problem)
        return Photos()
    outside = f"; {OUTSIDE}" if folder.config.base.path == EMBEDDED else ""
    return Photos(
        {t: list(draw.samples) for t, draw in drawn.items() if draw.samples}, told + outside
    )


def _pictures(config: RunConfig) -> tuple[DataSource, str]:
    """What photo samples are drawn from, and words for it."""
    source, photos = config.data.source, config.data.photos
    if source == "shapeweave" or (source != "photos" and photos is not None):
        place = None if photos is None else local_folder(photos)
        shown = PhotoFolder(place, size=config.size, split="all")
        return shown, f"{shown.name}, not the data of this run"
    try:
        if source == "photos" or source.startswith(PREFIX):
            held = open_run_data(config, "heldout")
        else:
            held = open_held_out(config, open_run_data(config))
    except (ConfigError, PhotoError, DataError) as problem:
        data = open_run_data(config)
        log.warning("the photos in the report were trained on: %s", problem)
        return data, f"{data.name}, trained on: nothing of it is held out"
    return held, f"{held.name}, held out"


def write_sheets(
    folder: Path,
    shown: Mapping[str, Sequence[tuple[EvaluationSample, Image, float]]],
    photos: Photos,
    outputs: Sequence[Image],
    worst: Mapping[str, Sequence[tuple[EvaluationSample, Image, float]]] = MappingProxyType({}),
) -> None:
    """Replace the contents of samples/ by these pictures and their index, samples.json.

    Args:
        folder: samples/ of a run.
        shown: scenes by task: sample, output, headline.
        photos: photo samples by task.
        outputs: one picture per photo sample, in the same order.
        worst: the scenes with the lowest headline by task, worst first.
    """
    with replace_folder(folder) as new:
        entries = [
            _entry(new, f"{task}-{name}-{i}", sample, output, domain, value)
            for domain, name, chosen in (("scenes", "scene", shown), ("worst", "worst", worst))
            for task, rows in chosen.items()
            for i, (sample, output, value) in enumerate(rows)
        ]
        of_photos = (sample for part in photos.values() for sample in part)
        for i, (sample, output) in enumerate(zip(of_photos, outputs, strict=True)):
            entries.append(_entry(new, f"{sample.task}-photo-{i}", sample, output, "photos", None))
        index = {"version": VERSION, "photos": photos.told, "samples": entries}
        (new / "samples.json").write_text(json.dumps(index, indent=1) + "\n", "utf-8")


def _entry(
    folder: Path,
    name: str,
    sample: EvaluationSample,
    output: Image,
    domain: str,
    value: float | None,
) -> dict[str, Any]:
    pictures = {
        "source": sample.triple.source,
        "output": output,
        "target": sample.triple.target,
    }
    files = {}
    for role, picture in pictures.items():
        files[role] = f"{name}-{role}.png"
        PILImage.fromarray(np.ascontiguousarray(picture)).save(folder / files[role])
    return {
        "task": sample.task,
        "kind": str(sample.triple.metadata["kind"]),
        "key": str(sample.triple.metadata["key"]),
        "domain": domain,
        "prompt": sample.triple.text,
        "headline": value,
        **files,
    }
