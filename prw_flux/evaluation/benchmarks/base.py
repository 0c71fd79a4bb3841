"""What the benchmarks share: items, what a model is asked for, rows of means, index files."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeAlias, TypeVar, final

import numpy as np
from PIL import Image as PILImage

from prw_flux.data.images import open_image
from prw_flux.evaluation.encoders import Encoder, Vectors
from prw_flux.evaluation.metrics import cosine
from prw_flux.evaluation.published import Protocol
from prw_flux.tasks.base import Image

Values: TypeAlias = Mapping[str, float]


class BenchmarkError(ValueError):
    """A folder that cannot be used: not this benchmark, another version, or no results in it."""


class Unscored(Exception):
    """One item cannot be scored; the sentence says why, and the other items are."""


@final
@dataclass(frozen=True, kw_only=True)
class Encoders:
    """The models of a scoring; what is None leaves its metrics out.

    Args:
        clip: gives CLIP-I and CLIP-T.
        dino: gives DINO.
        own: gives a similarity that is named after it, and a distance of two sets of pictures.
        inception: gives FID.
    """

    clip: Encoder | None = None
    dino: Encoder | None = None
    own: Encoder | None = None
    inception: Encoder | None = None

    def distances(self) -> dict[str, Encoder]:
        """The encoders that compare sets of pictures, by the name of the distance.

        Only Inception-v3's is called FID.
        """
        pairs = {"FID": self.inception}
        if self.own is not None:
            pairs[f"frechet[{self.own.name}]"] = self.own
        return {name: encoder for name, encoder in pairs.items() if encoder is not None}

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
    """One picture that is expected.

    Args:
        key: unique in the benchmark.
        output: its place below the results.
        text: what was asked for; "" where the benchmark's folder does not say it.
        given: the picture that a model is given, where there is one.
    """

    key: str
    output: str
    text: str = ""
    given: Path | None = None


@final
@dataclass(frozen=True, kw_only=True)
class Ask:
    """One picture to be generated.

    Args:
        output: its place below the results; it also seeds its noise.
        task: of the adapter.
        prompt: the text.
        source: the picture that is given, where `Benchmark.source` opens it.
        after: another output that is the source instead.
        chain: asks of one chain are answered in order, in one process; "" is a chain of its own.
        square: a square of the trained side, whatever the shape of the source.
    """

    output: str
    task: str
    prompt: str
    source: Path | None = None
    after: str | None = None
    chain: str = ""
    square: bool = False


ItemT = TypeVar("ItemT", bound=Item)


class Benchmark(ABC, Generic[ItemT]):
    """A benchmark's folder, read and checked.

    Attributes:
        name: as in the published protocols.
        task: what its pictures are generated with.
        items: every picture that a complete result holds.
        allowed: pictures that may lie among the results and are not scored.
        notes: what differs from the published version, for people.
        remarks: what happened while scoring, for people.
        batch: pictures per call of the pipeline where nothing else was asked for.
    """

    name: str
    task: str = "edit"
    items: tuple[ItemT, ...]
    allowed: frozenset[str] = frozenset()
    notes: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()
    batch: int = 1

    @property
    def folder_name(self) -> str:
        """A name for the results of this benchmark among those of a run."""
        return self.name

    @abstractmethod
    def score(self, item: ItemT, output: Image, encoders: Encoders) -> dict[str, Any]:
        """The values of one item.

        Raises:
            ImageError: a picture of the benchmark cannot be read.
            Unscored: the item cannot be scored for another reason.
        """

    def asks(self) -> tuple[Ask, ...]:
        """What has to be generated, chains in order.

        Raises:
            BenchmarkError: the folder does not say what is asked for.
        """
        for item in self.items:
            if not item.text or item.given is None:
                raise BenchmarkError(
                    f"{self.name}: item {item.key!r} has no instruction, so nothing can be "
                    "generated for it; pictures that exist are scored with --results and no RUN."
                )
        return tuple(
            Ask(output=item.output, task=self.task, prompt=item.text, source=item.given)
            for item in self.items
        )

    def given(self, item: ItemT, results: Path) -> Path | None:
        """The file of what a model was given for an item, for reports."""
        return item.given

    def target(self, item: ItemT, results: Path) -> Path | None:
        """The file of the true answer to an item, for reports; None where there is none."""
        return None

    def source(self, ask: Ask) -> Image:
        """What the model is given, uint8 [H, W, 3].

        Raises:
            ImageError: the picture cannot be read.
        """
        assert ask.source is not None
        return open_image(ask.source)

    def source_size(self, ask: Ask) -> tuple[int, int] | None:
        """(width, height) of the source, without decoding it; None where it cannot be opened."""
        try:
            with PILImage.open(str(ask.source)) as picture:
                return picture.size
        except Exception:  # decoders raise all kinds; `source` says what is wrong
            return None

    def beside(self, ask: Ask, source: Image, output: Image) -> Mapping[str, Image]:
        """More pictures that public scripts expect among the results, by place; grey or RGB."""
        return {}

    @abstractmethod
    def lines(self, rows: Sequence[Mapping[str, Any]], encoders: Encoders) -> list[Line]:
        """Means of the rows that `score` gave, with their protocols."""

    def covered(self, rows: Iterable[Any], total: int | None = None) -> str:
        """The protocol's `items`: "all", or "k of n"."""
        count, all_ = len(list(rows)), len(self.items) if total is None else total
        return "all" if count == all_ and not self.notes else f"{count} of {all_}"


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
