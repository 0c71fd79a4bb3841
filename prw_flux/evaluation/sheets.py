"""The pictures of a report: PNG files and one samples.json that says what they are."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import numpy as np
from PIL import Image as PILImage

from prw.atomic import replace_folder
from prw_flux.data.annotations import PhotoError
from prw_flux.data.folder_copy import local_folder
from prw_flux.data.photos import PhotoFolder
from prw_flux.data.rows import DataError
from prw_flux.evaluation.samples import EvaluationSample, draw_samples
from prw_flux.rundir import RunFolder
from prw_flux.tasks import Image, load_task

log = logging.getLogger(__name__)

VERSION: Final = 1
OUTSIDE: Final = "outside the base's training domain"


def photo_samples(
    folder: RunFolder, tasks: Sequence[str], count: int, seed: int
) -> dict[str, list[EvaluationSample]]:
    """Samples of real photos, for the tasks that they allow; empty where there are no photos."""
    if count == 0:
        return {}
    where = folder.config.data.photos
    try:
        place = None if where is None else local_folder(where)
        photos = PhotoFolder(place, size=folder.config.size, split="all")
    except (PhotoError, DataError) as problem:
        log.warning("no photos in the report: %s", problem)
        return {}
    possible = [task for task in tasks if task in photos.tasks()]
    return {t: list(draw_samples(photos, load_task(t), count, seed).samples) for t in possible}


def write_sheets(
    folder: Path,
    shown: Mapping[str, Sequence[tuple[EvaluationSample, Image, float]]],
    photos: Mapping[str, Sequence[EvaluationSample]],
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
        index = {"version": VERSION, "photos": OUTSIDE, "samples": entries}
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
