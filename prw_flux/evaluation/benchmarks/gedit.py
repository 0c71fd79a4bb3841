"""GEdit-Bench (Step1X-Edit, arXiv 2504.17761): edits of real users, graded by a language model.

The benchmark's folder holds `gedit.json`, exported from stepfun-ai/GEdit-Bench:

    {"version": 1, "items": [
      {"key": "...", "task_type": "color_alter", "instruction": "...", "language": "en",
       "image": "images/0.png", "intersection": true}, ...]}

Results, as the public script reads them: `fullset/<task_type>/<language>/<key>.png`, and the source
beside it as `<key>_SRCIMG.png`. Outputs are brought to the size of the source before they are
judged. A language's row is over the full set, a second one over the part that all published models
answered ("intersection"). The grading is VIEScore's (metrics/judge.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, final

from prw_flux.data.images import open_image
from prw_flux.evaluation.benchmarks.base import (
    Ask,
    Benchmark,
    BenchmarkError,
    Encoders,
    Item,
    Line,
    Unscored,
    inside,
    read_index,
    read_json,
)
from prw_flux.evaluation.metrics import EditItem, Grade, Grading, Judge, resized_like
from prw_flux.evaluation.metrics.judge import QUESTIONS
from prw_flux.tasks.base import Image

FILE: Final = "gedit.json"
VERSION: Final = 1
SIZE: Final = 606
"""Items per language of the published set."""
LANGUAGES: Final = ("en", "cn")
GIVE_UP: Final = 10
"""Items in a row without a usable answer after which the judge is taken to be gone."""


@final
@dataclass(frozen=True, kw_only=True)
class Graded(Item):
    """One edit: its kind, its language, and whether it belongs to the intersection."""

    given: Path
    group: str
    language: str
    intersection: bool


@final
@dataclass(frozen=True, kw_only=True)
class Asking:
    """How the judge is asked.

    Args:
        judge: answers questions.
        name: of the judge, part of the protocol.
        questions: texts for "SC" and "PQ".
        wording: whose texts they are, part of the protocol.
        tries: per question.
        pause: seconds before the second try; doubled before each further one.
    """

    judge: Judge
    name: str
    questions: Mapping[str, str] = field(default_factory=lambda: QUESTIONS)
    wording: str = "prw-questions"
    tries: int = 3
    pause: float = 2.0


@final
class GEdit(Benchmark[Graded]):
    """The benchmark's folder.

    Args:
        folder: as above.
        asking: the judge; None where nothing is scored.
        language: "en" or "cn"; None takes both.

    Raises:
        BenchmarkError: gedit.json is not there, of another version, or an item is unusable.
    """

    name = "gedit"

    def __init__(
        self, folder: Path, asking: Asking | None = None, *, language: str | None = None
    ) -> None:
        _, items = read_index(folder / FILE, "the edits", VERSION, _graded)
        self.items = tuple(item for item in items if language in (None, item.language))
        if not self.items:
            raise BenchmarkError(f"{folder / FILE} has no item of language {language!r}.")
        self.asking, self._language = asking, language
        self.allowed = frozenset(_source_name(item.output) for item in self.items)
        counts = {one: sum(item.language == one for item in self.items) for one in LANGUAGES}
        self.notes = tuple(
            f"{folder} holds {count} items of language {one}, the published set {SIZE}: not the "
            "same set" for one, count in counts.items() if count not in (0, SIZE)
        )  # fmt: skip
        self._failed = self._retried = 0

    @property
    def folder_name(self) -> str:
        """The benchmark and its language."""
        return f"{self.name}-{self._language}" if self._language else self.name

    def beside(self, ask: Ask, source: Image, output: Image) -> Mapping[str, Image]:
        """The source, where the public script looks for it."""
        return {_source_name(ask.output): source}

    def score(self, item: Graded, output: Image, encoders: Encoders) -> dict[str, Any]:
        """SC, PQ and O.

        Raises:
            Unscored: the judge gave no usable answer.
            BenchmarkError: nor did it for many items before.
        """
        if self.asking is None:
            raise BenchmarkError("gedit is graded by a judge: name one.")
        asking, grading = self.asking, Grading()
        source = open_image(item.given)
        one = EditItem(key=item.key, group=item.group, instruction=item.text, source=source,
                       output=resized_like(output, source))  # fmt: skip
        grading.add(
            one, asking.judge, tries=asking.tries, questions=asking.questions, pause=asking.pause
        )
        self._remark(grading.retried)
        if grading.failed:
            self._failed += 1
            told = f"{item.output}: the judge gave no usable answer ({'; '.join(grading.failed)})"
            if self._failed >= GIVE_UP:
                raise BenchmarkError(f"{told}; nor for the {GIVE_UP - 1} items before it.")
            raise Unscored(told)
        self._failed = 0
        grade = grading.grades[item.group][item.key]
        return {"group": item.group, "language": item.language, "intersection": item.intersection,
                "SC": grade.sc, "PQ": grade.pq, "O": grade.overall}  # fmt: skip

    def lines(self, rows: Sequence[Mapping[str, Any]], encoders: Encoders) -> list[Line]:
        """Per language, the full set and the intersection."""
        asking, out = self.asking, []
        assert asking is not None
        for language in LANGUAGES:
            for part in ("full", "intersection"):
                wanted = [i for i in self.items if i.language == language
                          and (part == "full" or i.intersection)]  # fmt: skip
                keys = {item.key for item in wanted}
                chosen = [row for row in rows if row["key"] in keys]
                if not chosen:
                    continue
                protocol = {"bench": self.name, "set": part, "language": language,
                            "items": self.covered(chosen, len(wanted)), "judge": asking.name,
                            "questions": asking.wording}  # fmt: skip
                out.append(Line(label=f"{language}, {part} set", metrics=_means(chosen),
                                protocol=protocol, n=len(chosen)))  # fmt: skip
        return out

    def _remark(self, retried: int) -> None:
        self._retried += retried
        if self._retried:
            self.remarks = (f"the judge was asked again {self._retried} times",)


def questions_from(path: Path) -> tuple[Mapping[str, str], str]:
    """Texts of one's own and whose they are: {"name": "viescore", "SC": "...", "PQ": "..."}.

    `<instruction>` in a text is replaced.

    Raises:
        BenchmarkError: the file is not there, or of another form.
    """
    found = read_json(path, "the questions")
    try:
        return {part: str(found[part]) for part in ("SC", "PQ")}, str(found["name"])
    except (KeyError, TypeError):
        raise BenchmarkError(f"{path} needs name, SC and PQ.") from None


def _means(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    grading = Grading()
    for row in rows:
        grading.grades[row["group"]][row["key"]] = Grade(sc=row["SC"], pq=row["PQ"])
    return grading.means()


def _source_name(output: str) -> str:
    return f"{output.removesuffix('.png')}_SRCIMG.png"


def _graded(folder: Path, row: Any, where: str) -> Graded:
    try:
        names = [str(row[name]) for name in ("task_type", "language", "key")]
        image, text = str(row["image"]), str(row["instruction"])
        intersection = bool(row.get("intersection", False))
    except (AttributeError, KeyError, TypeError) as problem:
        raise BenchmarkError(
            f"{where} needs key, task_type, instruction, language and image ({problem!r})."
        ) from None
    group, language, _ = names
    if language not in LANGUAGES:
        raise BenchmarkError(f"{where}: the language is en or cn, got {language!r}.")
    key = "/".join(names)
    inside(where, f"{key}.png", image)
    return Graded(key=key, output=f"fullset/{key}.png", text=text, given=folder / image,
                  group=group, language=language, intersection=intersection)  # fmt: skip
