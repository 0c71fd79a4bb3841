"""DreamBench (DreamBooth, arXiv 2208.12242): a subject from its photos in 25 new settings.

The benchmark's folder is `dataset/` of google/dreambooth: `prompts_and_classes.txt` and
`<subject>/<nn>.jpg`. `dreambench_singleip.json` of bytedance/UNO may lie beside them: it fixes the
one photo that a zero-shot model is given. Results: `<i>_<k>.png`, i = 25 x (number of the subject
in the file) + (number of the prompt), k the sample, as UNO's public script reads.

Similarities are means over all pairs of a result with the real photos of its subject; then over
results, then over subjects. CLIP-T takes the prompt without the unique token. With the reference
file there is a second row, against the reference alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, final

import numpy as np

from prw_flux.data.images import open_image
from prw_flux.evaluation.benchmarks.base import (
    Ask,
    Benchmark,
    BenchmarkError,
    Encoders,
    Item,
    Line,
    means,
    read_json,
)
from prw_flux.evaluation.encoders import Encoder, Vectors
from prw_flux.evaluation.metrics import mean_cosine
from prw_flux.tasks.base import Image

FILE: Final = "prompts_and_classes.txt"
REFERENCES: Final = "dreambench_singleip.json"
SUBJECTS: Final = 30
PROMPTS: Final = 25
LIVE: Final = ("cat", "dog")
"""Classes that take the prompts of live subjects; the file does not say it."""
AGAINST: Final = ("all photos", "the reference")


@final
@dataclass(frozen=True, kw_only=True)
class Scene(Item):
    """One result: subject, real photos, the one of them that UNO's file names.

    `text` is the prompt without the unique token.
    """

    subject: str
    photos: tuple[Path, ...]
    reference: Path | None


@final
class DreamBench(Benchmark[Scene]):
    """The benchmark's folder.

    Args:
        folder: as above.
        samples: results per prompt; the paper counts 750, that is 1.

    Raises:
        BenchmarkError: the folder is not there, or the file is of another version.
    """

    name = "dreambench"
    task = "customise"

    def __init__(self, folder: Path, *, samples: int = 1) -> None:
        if samples < 1:
            raise BenchmarkError(f"samples must be at least 1, got {samples}")
        classes, objects, live = read_prompts(folder / FILE)
        given = _references(folder)
        items, present = [], 0
        for number, (subject, label) in enumerate(classes.items()):
            photos = tuple(sorted((folder / subject).glob("*.jpg")))
            present += bool(photos)
            reference = folder / subject / given[subject] if subject in given else None
            prompts = (live if label in LIVE else objects) if photos else []
            for index, prompt in enumerate(prompts):
                place = PROMPTS * number + index
                items += [
                    Scene(key=f"{subject}/{index}/{k}", output=f"{place}_{k}.png", subject=subject,
                          text=prompt.replace("{1}", label), photos=photos,
                          reference=reference, given=reference or photos[0])
                    for k in range(samples)
                ]  # fmt: skip
        if not items:
            raise BenchmarkError(f"{folder} holds no photos of a subject of {FILE}.")
        self.items, self.samples = tuple(items), samples
        self._photos: dict[tuple[str, Path], Vectors] = {}
        if present != SUBJECTS:
            self.notes = (f"{folder} holds photos of {present} of the {SUBJECTS} subjects",)

    def asks(self) -> tuple[Ask, ...]:
        """Squares, from the reference, or the first photo where no file names one."""
        return tuple(replace(ask, square=True) for ask in super().asks())

    def score(self, item: Scene, output: Image, encoders: Encoders) -> dict[str, Any]:
        """Similarities to all photos and to the reference; CLIP-T."""
        row: dict[str, Any] = {"subject": item.subject}
        for name, encoder in encoders.named().items():
            own = encoder.images([output])
            real = np.concatenate([self._photo(encoder, path) for path in item.photos])
            row[f"{name} {AGAINST[0]}"] = mean_cosine(own, real)
            if item.reference is not None:
                one = self._photo(encoder, item.reference)
                row[f"{name} {AGAINST[1]}"] = mean_cosine(own, one)
        for value in encoders.caption_score([output], item.text):
            row["CLIP-T"] = value
        return row

    def lines(self, rows: Sequence[Mapping[str, Any]], encoders: Encoders) -> list[Line]:
        """One row against all photos, and one against the reference where it is known."""
        subjects = dict.fromkeys(row["subject"] for row in rows)
        out = []
        for against in AGAINST:
            names = {f"{name} {against}": name for name in encoders.named()} | {"CLIP-T": "CLIP-T"}
            each = [
                means([row for row in rows if row["subject"] == subject], names)
                for subject in subjects
            ]
            if against == AGAINST[1] and not any(
                f"{n} {against}" in rows[0] for n in encoders.named()
            ):
                continue
            protocol = {"bench": self.name, "items": self.covered(rows), "against": against,
                        "samples": str(self.samples), **encoders.protocol()}  # fmt: skip
            metrics = means(each, {name: name for name in names.values()})
            out.append(
                Line(label=f"against {against}", metrics=metrics, protocol=protocol, n=len(rows))
            )
        return out

    def _photo(self, encoder: Encoder, path: Path) -> Vectors:
        """float32 [1, D], computed once per photo."""
        key = encoder.name, path
        if key not in self._photos:
            self._photos[key] = encoder.images([open_image(path)])
        return self._photos[key]


def read_prompts(path: Path) -> tuple[dict[str, str], list[str], list[str]]:
    """Class by subject, prompts of objects and of live subjects, without the unique token.

    "{1}" stands for the class.

    Raises:
        BenchmarkError: there is no such file, or it is of another version.
    """
    try:
        text = path.read_text("utf-8")
    except OSError:
        raise BenchmarkError(
            f"There is no {path}: expected the folder dataset/ of google/dreambooth."
        ) from None
    classes = dict(re.findall(r"^(\w+),([\w ]+)$", text, flags=re.M))
    classes.pop("subject_name", None)
    parts = text.partition("Live Subject Prompts")
    lists = [
        [p.replace("{0} ", "") for p in re.findall(r"^'(.*)'\.format\(", part, flags=re.M)]
        for part in (parts[0], parts[2])
    ]
    if not classes or any(len(prompts) != PROMPTS for prompts in lists):
        raise BenchmarkError(
            f"{path} is of another version: {len(classes)} subjects with {len(lists[0])} and "
            f"{len(lists[1])} prompts, expected {SUBJECTS} with {PROMPTS} each."
        )
    return classes, lists[0], lists[1]


def _references(folder: Path) -> dict[str, str]:
    """The file name of the given photo by subject; empty where the file is not there."""
    path = folder / REFERENCES
    if not path.exists():
        return {}
    try:
        names = [str(row.get("image_path") or row["image_paths"][0]) for row in read_json(path, "")]
    except (AttributeError, KeyError, IndexError, TypeError):
        raise BenchmarkError(
            f"{path} is of another version: expected a list of rows with image_path."
        ) from None
    return {Path(name).parent.name: Path(name).name for name in names}
