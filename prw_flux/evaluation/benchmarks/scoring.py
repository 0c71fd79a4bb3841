"""A folder of pictures against the items of a benchmark: scores kept item by item."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, TypeAlias, final

from prw_flux.data.images import ImageError, open_image
from prw_flux.evaluation.benchmarks.base import (
    Benchmark,
    BenchmarkError,
    Encoders,
    Item,
    Line,
    Unscored,
)
from prw_flux.interrupt import Interrupted, Stop
from prw_flux.rundir import write_atomically

Progress: TypeAlias = Callable[[int, int], None]
PICTURES: Final = (".png", ".jpg", ".jpeg", ".webp")
VERSION: Final = 1
"""Of the file of scores, which reports read."""


@final
@dataclass(kw_only=True)
class Scores:
    """A scoring, as far as it came.

    Attributes:
        rows: one per scored item, in order, with its key.
        problems: one sentence per item without a score, and per file that no item expects.
        lines: means and protocols.
    """

    benchmark: str
    results: str
    rows: list[dict[str, Any]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    lines: list[Line] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """What the file holds: plain values."""
        lines = [{**vars(line), "metrics": dict(line.metrics), "protocol": dict(line.protocol)}
                 for line in self.lines]  # fmt: skip
        return {
            "version": VERSION, "benchmark": self.benchmark, "results": self.results,
            "lines": lines, "notes": self.notes, "problems": self.problems, "items": self.rows,
        }  # fmt: skip

    def save(self, path: Path) -> None:
        """Write everything as one JSON file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(self.to_json(), indent=1) + "\n")


def score_folder(
    benchmark: Benchmark[Any],
    results: Path,
    encoders: Encoders,
    out: Path,
    progress: Progress = lambda done, total: None,
    *,
    reasons: Mapping[str, str] = MappingProxyType({}),
) -> Scores:
    """Scores what a folder holds and writes `out`, also when it is stopped half-way.

    A picture that is missing, unreadable or misnamed is a problem of its own and does not stop the
    others. After Ctrl-C or SIGTERM the item at hand is finished; a second Ctrl-C does not wait.

    Args:
        benchmark: whose items are scored.
        results: the folder of pictures.
        encoders: the models.
        out: the file of scores.
        progress: told (items done, items in all) after each.
        reasons: why a picture could not be made, by its place, where that is known.

    Raises:
        BenchmarkError: the folder is not there, or holds no picture that the benchmark expects.
        Interrupted: on a signal; what was scored is in `out`.
    """
    scores = Scores(
        benchmark=benchmark.name, results=str(results.absolute()), notes=list(benchmark.notes)
    )
    scores.problems += unexpected(benchmark, results)
    with Stop() as stop:
        try:
            for index, item in enumerate(benchmark.items):
                if stop.number is not None:
                    told = f"stopped after {index} of {len(benchmark.items)} pictures"
                    raise Interrupted(stop.number, f"{told}, whose scores are in {out}")
                try:
                    scores.rows.append(_row(benchmark, item, results, encoders))
                except (ImageError, Unscored) as problem:
                    scores.problems.append(_reason(item, problem, reasons))
                progress(index + 1, len(benchmark.items))
        finally:
            scores.notes += benchmark.remarks
            if scores.rows:
                scores.lines += benchmark.lines(scores.rows, encoders)
            scores.save(out)
    if not scores.rows:
        raise BenchmarkError(
            f"{results}: none of the {len(benchmark.items)} pictures could be scored; the first "
            f"problem: {scores.problems[0]}."
        )
    return scores


def _row(
    benchmark: Benchmark[Any], item: Item, results: Path, encoders: Encoders
) -> dict[str, Any]:
    """The values of one item, and what a report shows of it."""
    output = open_image(results / item.output)
    shown = {"given": benchmark.given(item, results), "target": benchmark.target(item, results)}
    places = {role: str(path.absolute()) for role, path in shown.items() if path is not None}
    return {"key": item.key, "output": item.output, "text": item.text, **places,
            **benchmark.score(item, output, encoders)}  # fmt: skip


def _reason(item: Item, problem: Exception, reasons: Mapping[str, str]) -> str:
    missing = isinstance(problem, ImageError) and problem.reason == "missing"
    return reasons.get(item.output, str(problem)) if missing else str(problem)


def unexpected(benchmark: Benchmark[Any], results: Path) -> list[str]:
    """A sentence for every picture in the folder that no item expects.

    Raises:
        BenchmarkError: there is no such folder, or not one expected picture in it.
    """
    if not results.is_dir():
        raise BenchmarkError(f"There is no folder of results at {results}.")
    found = {
        path.relative_to(results).as_posix()
        for path in results.rglob("*")
        if path.suffix.lower() in PICTURES
    }
    wanted = {item.output for item in benchmark.items}
    if not found & wanted:
        seen = f"it holds {min(found)!r} and {len(found) - 1} others" if found else "it is empty"
        raise BenchmarkError(
            f"{results} holds no picture with a name that is expected, such as "
            f"{benchmark.items[0].output!r}: {seen}."
        )
    return [
        f"{results / name}: no item has this name{_near(name, wanted - found)}"
        for name in sorted(found - wanted - benchmark.allowed)
    ]


def _near(name: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, sorted(names), n=1, cutoff=0.6)
    return f"; {near[0]!r} is missing" if near else ""
