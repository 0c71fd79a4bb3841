"""What the benchmarks share: the folder of results against the items, scores kept item by item."""

from __future__ import annotations

import difflib
import json
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Generic, TypeAlias, TypeVar, final

import numpy as np

from prw_flux.data.images import ImageError, open_image
from prw_flux.evaluation.encoders import Encoder, Vectors
from prw_flux.evaluation.metrics import cosine
from prw_flux.evaluation.published import Protocol
from prw_flux.rundir import write_atomically
from prw_flux.tasks.base import Image

Values: TypeAlias = Mapping[str, float]
Progress: TypeAlias = Callable[[int, int], None]
PICTURES: Final = (".png", ".jpg", ".jpeg", ".webp")


class BenchmarkError(ValueError):
    """A folder that cannot be scored: not this benchmark, another version, or no results in it."""


@final
@dataclass(frozen=True, kw_only=True)
class Encoders:
    """The models of a scoring; what is None leaves its metrics out.

    Args:
        clip: gives CLIP-I and CLIP-T.
        dino: gives DINO.
        own: gives a similarity that is named after it.
    """

    clip: Encoder | None = None
    dino: Encoder | None = None
    own: Encoder | None = None

    def named(self) -> dict[str, Encoder]:
        """The encoders there are, by the name of their similarity of two pictures."""
        own = f"cosine[{self.own.name}]" if self.own else ""
        pairs = {"CLIP-I": self.clip, "DINO": self.dino, own: self.own}
        return {name: encoder for name, encoder in pairs.items() if encoder is not None}

    def protocol(self) -> Protocol:
        """clip= and dino=, with kind and name."""
        pairs = {"clip": self.clip, "dino": self.dino}
        return {key: f"{e.kind}:{e.name}" for key, e in pairs.items() if e is not None}

    def similarities(self, images: Sequence[Image]) -> dict[str, list[float]]:
        """Cosine of the first picture with each other one, per encoder."""
        found = {}
        for name, encoder in self.named().items():
            vectors = encoder.images(images)
            first = np.repeat(vectors[:1], len(images) - 1, axis=0)
            found[name] = [float(value) for value in cosine(first, vectors[1:])]
        return found

    def caption_score(self, images: Sequence[Image], text: str) -> list[float]:
        """CLIP-T of each picture; nothing without a CLIP."""
        if self.clip is None:
            return []
        words: Vectors = np.repeat(self.clip.texts([text]), len(images), axis=0)
        return [float(value) for value in cosine(self.clip.images(images), words)]


@final
@dataclass(frozen=True, kw_only=True)
class Line:
    """A row of the result: means over `n` items, under the protocol that they were obtained by."""

    label: str
    metrics: Values
    protocol: Protocol
    n: int


@dataclass(frozen=True, kw_only=True)
class Item:
    """One picture that is expected: its place below the results, and a unique key."""

    key: str
    output: str


ItemT = TypeVar("ItemT", bound=Item)


class Benchmark(ABC, Generic[ItemT]):
    """A benchmark's folder, read and checked.

    Attributes:
        name: as in the published protocols.
        items: every picture that a complete result holds.
        allowed: pictures that may lie among the results and are not scored.
        notes: what differs from the published version, for people.
    """

    name: str
    items: tuple[ItemT, ...]
    allowed: frozenset[str] = frozenset()
    notes: tuple[str, ...] = ()

    @abstractmethod
    def score(self, item: ItemT, output: Image, encoders: Encoders) -> dict[str, Any]:
        """The values of one item.

        Raises:
            ImageError: a picture of the benchmark cannot be read.
        """

    @abstractmethod
    def lines(self, rows: Sequence[Mapping[str, Any]], encoders: Encoders) -> list[Line]:
        """Means of the rows that `score` gave, with their protocols."""

    def covered(self, rows: Iterable[Any], total: int | None = None) -> str:
        """The protocol's `items`: "all", or "k of n"."""
        count, all_ = len(list(rows)), len(self.items) if total is None else total
        return "all" if count == all_ and not self.notes else f"{count} of {all_}"


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
            "version": 1, "benchmark": self.benchmark, "results": self.results, "lines": lines,
            "notes": self.notes, "problems": self.problems, "items": self.rows,
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
) -> Scores:
    """Scores what a folder holds and writes `out`, also when it is stopped half-way.

    A picture that is missing, unreadable or misnamed is a problem of its own and does not stop the
    others.

    Raises:
        BenchmarkError: the folder is not there, or holds no picture that the benchmark expects.
    """
    scores = Scores(benchmark=benchmark.name, results=str(results), notes=list(benchmark.notes))
    scores.problems += unexpected(benchmark, results)
    try:
        for index, item in enumerate(benchmark.items):
            try:
                output = open_image(results / item.output)
                values = benchmark.score(item, output, encoders)
                scores.rows.append({"key": item.key, **values})
            except ImageError as problem:
                scores.problems.append(str(problem))
            progress(index + 1, len(benchmark.items))
    finally:
        if scores.rows:
            scores.lines += benchmark.lines(scores.rows, encoders)
        scores.save(out)
    if not scores.rows:
        raise BenchmarkError(
            f"{results}: none of the {len(benchmark.items)} pictures could be scored; the first "
            f"problem: {scores.problems[0]}."
        )
    return scores


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


def means(rows: Sequence[Mapping[str, Any]], names: Mapping[str, str]) -> dict[str, float]:
    """Mean of each key of `names` over the rows that have it, under its public name."""
    out = {}
    for key, public in names.items():
        values = [float(row[key]) for row in rows if row.get(key) is not None]
        if values:
            out[public] = float(np.mean(values))
    return out


def read_json(path: Path, what: str) -> Any:
    """The content of a JSON file.

    Raises:
        BenchmarkError: it is not there, or no JSON.
    """
    try:
        return json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise BenchmarkError(f"There is no {path}, which holds {what}.") from None
    except (OSError, ValueError) as problem:
        raise BenchmarkError(f"{path} cannot be read: {problem}.") from None


def read_index(
    path: Path, what: str, version: int, read: Callable[[Path, Any, str], ItemT]
) -> tuple[dict[str, Any], tuple[ItemT, ...]]:
    """A benchmark's own JSON file, {"version": ..., "items": [...], ...}, and its items.

    Args:
        path: the file; names in it are relative to its folder.
        what: what it holds, for messages.
        version: the one that is read.
        read: makes an item of (folder, row, "where it stands"); raises BenchmarkError.

    Raises:
        BenchmarkError: the file is not there, of another version or empty, an item of it is
            unusable, or two have the same key.
    """
    data = read_json(path, what)
    found = data.get("version") if isinstance(data, dict) else None
    if found != version or not isinstance(data.get("items"), list) or not data["items"]:
        raise BenchmarkError(
            f"{path} is of another version: expected version {version} and items, got version "
            f"{found!r}."
        )
    items = tuple(
        read(path.parent, row, f"{path}, item {index}") for index, row in enumerate(data["items"])
    )
    key, times = Counter(item.key for item in items).most_common(1)[0]
    if times > 1:
        raise BenchmarkError(f"{path} has the id {key!r} {times} times.")
    return data, items


def inside(where: str, *names: str) -> None:
    """Raise BenchmarkError for a name that leads out of its folder; `where` says what holds it."""
    for name in names:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise BenchmarkError(f"{where}: {name!r} leaves the folder.")


def _near(name: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, sorted(names), n=1, cutoff=0.6)
    return f"; {near[0]!r} is missing" if near else ""
