"""VIEScore: a language model that sees pictures grades an edit (GEdit-Bench's G_SC, G_PQ, G_O).

Two questions per item. About source and output: was the instruction followed (first number), and
was nothing else changed (second)? About the output alone: does it look natural (first), and free of
artifacts (second)? Numbers are 0 to 10.

    SC = min(first two),  PQ = min(last two),  O = sqrt(SC PQ)
    G_* = mean over groups of the mean over the group's items

so G_O is not sqrt(G_SC G_PQ). Sources: VIEScore, arXiv 2312.14867; GEdit-Bench of
stepfun-ai/Step1X-Edit at 570eba6. The words of the questions are ours and not theirs: scores are
named "prw-questions", unless the texts are given.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias, final

import numpy as np

from prw_flux.tasks.base import Image

FORM: Final = (
    'Answer with one JSON object and nothing else: {"score": [a, b], "reasoning": "one sentence"}, '
    "a and b numbers from 0 to 10."
)
QUESTIONS: Final[Mapping[str, str]] = {
    "SC": (
        "The first picture was edited into the second by this instruction: <instruction>\n"
        "Grade a: how completely the instruction was carried out (0 not at all, 10 perfectly). "
        "Grade b: how well everything that the instruction does not mention was kept (0 another "
        "picture, 10 untouched).\n" + FORM
    ),
    "PQ": (
        "Grade this generated picture. a: how natural it looks as a whole: light, shadows, "
        "distances, perspective (0 not at all, 10 as a photo). b: how free it is of artifacts: "
        "distortion, blur, broken faces or limbs, seams (0 ruined, 10 none).\n" + FORM
    ),
}
"""Our wording; `<instruction>` is replaced."""


@final
@dataclass(frozen=True, kw_only=True)
class Question:
    """What a judge is asked: `key` of the item, `part` ("SC" or "PQ"), text and pictures."""

    key: str
    part: str
    text: str
    images: tuple[Image, ...]


Judge: TypeAlias = Callable[[Question], str]
"""Returns the answer's text. Raises OSError (timeouts are among them) where none came."""


@final
@dataclass(frozen=True, kw_only=True)
class EditItem:
    """One edit to be graded.

    Args:
        key: names it in the answers.
        group: kind of edit; groups weigh the same.
        instruction: what was asked.
        source, output: uint8 [H, W, 3].
    """

    key: str
    group: str
    instruction: str
    source: Image
    output: Image


@final
@dataclass(frozen=True, kw_only=True)
class Grade:
    """SC, PQ and O of one item, each in [0, 10]."""

    sc: float
    pq: float

    @property
    def overall(self) -> float:
        """O = sqrt(SC PQ)."""
        return math.sqrt(self.sc * self.pq)


@final
@dataclass
class Grading:
    """Grades so far, and every question that went wrong.

    Attributes:
        grades: of the items with two usable answers, by group and key.
        failed: "key part: reason" of the questions without a usable answer after all tries.
        retried: answers that were unusable and asked for again.
    """

    grades: dict[str, dict[str, Grade]] = field(default_factory=lambda: defaultdict(dict))
    failed: list[str] = field(default_factory=list)
    retried: int = 0

    def add(
        self,
        item: EditItem,
        judge: Judge,
        *,
        tries: int = 3,
        questions: Mapping[str, str] = QUESTIONS,
        pause: float = 0.0,
    ) -> None:
        """Asks both questions about one item, each at most `tries` times.

        Args:
            item: what is graded.
            judge: answers.
            tries: per question.
            questions: texts for "SC" and "PQ".
            pause: seconds before the second try; doubled before each further one.

        Raises:
            ValueError: `tries` is below 1, or the item was graded before.
        """
        if tries < 1 or item.key in self.grades[item.group]:
            raise ValueError(f"{item.key}: graded before, or tries={tries} is below 1")
        pictures = {"SC": (item.source, item.output), "PQ": (item.output,)}
        found = {}
        for part, images in pictures.items():
            text = questions[part].replace("<instruction>", item.instruction)
            question = Question(key=item.key, part=part, text=text, images=images)
            found[part] = self._ask(question, judge, tries, pause)
        sc, pq = found["SC"], found["PQ"]
        if sc is not None and pq is not None:
            self.grades[item.group][item.key] = Grade(sc=min(sc), pq=min(pq))

    def _ask(
        self, question: Question, judge: Judge, tries: int, pause: float
    ) -> tuple[float, float] | None:
        reason = ""
        for attempt in range(tries):
            if attempt > 0:
                self.retried += 1
                time.sleep(pause * 2 ** (attempt - 1))
            try:
                return read_scores(judge(question))
            except (OSError, ValueError) as problem:
                reason = " ".join(str(problem).split()) or type(problem).__name__
        self.failed.append(f"{question.key} {question.part}: {reason}")
        return None

    def means(self) -> dict[str, float]:
        """G_SC, G_PQ and G_O: the unweighted mean of the groups' means.

        Raises:
            ValueError: nothing was graded.
        """
        groups = [list(group.values()) for group in self.grades.values() if group]
        if not groups:
            raise ValueError(f"no item was graded; {len(self.failed)} questions failed")
        return {
            "G_SC": _mean([_mean([g.sc for g in group]) for group in groups]),
            "G_PQ": _mean([_mean([g.pq for g in group]) for group in groups]),
            "G_O": _mean([_mean([g.overall for g in group]) for group in groups]),
        }


def read_scores(answer: str) -> tuple[float, float]:
    """The two numbers of `{"score": [a, b], ...}`, or of a bare `[a, b]`, among other words.

    Braces and line breaks inside a text of the answer do no harm; the first object with a score
    counts, and a bare list only where there is no object, as in VIEScore's own reader.

    Raises:
        ValueError: there is no such thing, or not two numbers from 0 to 10.
    """
    found = [value["score"] for value in _decoded(answer, "{") if "score" in value]
    found = found or [value for value in _decoded(answer, "[") if len(value) == 2]
    if not found:
        raise ValueError(f"no score in the answer {answer[:60]!r}")
    score = found[0]
    if not (isinstance(score, list) and len(score) == 2 and all(map(_grade, score))):
        raise ValueError(f"expected two numbers from 0 to 10, got {str(score)[:60]}")
    return float(score[0]), float(score[1])


def _decoded(answer: str, opening: str) -> Iterator[Any]:
    """Every JSON object ("{") or list ("[") that begins somewhere in the answer, in order."""
    decoder = json.JSONDecoder(strict=False)
    for match in re.finditer(re.escape(opening), answer):
        try:
            yield decoder.raw_decode(answer, match.start())[0]
        except (ValueError, RecursionError):
            continue


def _grade(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 10


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))
