"""Built data sets as a data source: pictures by random access, in the order of `SampleOrder`.

Named "disk:DIR" or, to mix several of one task or another, "disk:DIR*3,OTHER*1". Of every data set
the last hundredth, at least one row and at most 1,000, is the held-out side. The shards are opened
by `datasets`, which keeps one memory-mapped Arrow copy of them in its cache folder.

DIR may be a URL (``disk:s3://bucket/edit``, ``disk:hf://datasets/me/edit``). Its shards are copied
as they are needed into a cache of bounded size (shard_cache.py), and so that this is rare, they are
shuffled, and then the rows inside every four of them.

Index i of a task is position i of its mixture: the epoch, the part and the row follow from the
seed and i alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple, final

import numpy as np

from prw import ConfigError
from prw_flux.data.images import Fit, open_image, open_map
from prw_flux.data.photos import MIN_SIDE, MIN_VISIBLE, NO_CAPTION, visible
from prw_flux.data.remote import Place, is_url, name_of
from prw_flux.data.rows import DataError, Row
from prw_flux.data.sample_order import Part, SampleOrder
from prw_flux.data.shard_cache import ShardCache
from prw_flux.data.stored_rows import WINDOW, LocalRows, RemoteRows, StoredRows, manifest_at
from prw_flux.tasks.base import Example, Pair, Thing, digest_of

PREFIX: Final = "disk:"
HELDOUT: Final = 100
MOST_HELDOUT: Final = 1000


class Opened(NamedTuple):
    """The rows of one data set that belong to a side of the split."""

    part: Part
    rows: StoredRows
    first: int
    shards: tuple[str, ...]


@final
class OnDisk:
    """A DataSource over built data sets.

    Args:
        folders: "DIR" or "DIR*WEIGHT", with commas between several.
        size: side of the (square) result, or (height, width); multiples of 16.
        seed: of the shuffles.
        split: "train", "heldout" or "all".
        cache: folder of the copies; None is that of `datasets` (HF_DATASETS_CACHE), and of shards
            that are elsewhere that of `ShardCache`.

    Raises:
        DataError: a folder is no data set, or not finished.
        ConfigError: a weight is not a number, or a folder is named twice.
        ValueError: the size or the split is wrong.
    """

    def __init__(
        self,
        folders: str,
        size: int | tuple[int, int] = 96,
        *,
        seed: int = 0,
        split: str = "train",
        cache: str | Path | None = None,
    ) -> None:
        Fit(16, 16, size)
        if split not in ("train", "heldout", "all"):
            raise ValueError(f"unknown split {split!r}; known: train, heldout, all")
        self.size, self.name = size, PREFIX + folders
        self._of: dict[str, list[Opened]] = {}
        for folder, weight in _named(folders):
            task, opened = _open(folder, weight, split, cache)
            self._of.setdefault(task, []).append(opened)
        self._order = {
            task: SampleOrder([one.part for one in found], seed=seed)
            for task, found in self._of.items()
        }

    def __len__(self) -> int:
        return sum(one.part.size for found in self._of.values() for one in found)

    def tasks(self) -> frozenset[str]:
        """The tasks of the data sets."""
        return frozenset(self._of)

    def fingerprint(self) -> str:
        """Of the order, the size of the pictures and the sha256 of every shard.

        The shards are not read: the hashes are those of build.json, which `data check` compares.
        """
        parts = [
            (task, self._order[task].fingerprint, [(one.first, *one.shards) for one in found])
            for task, found in sorted(self._of.items())
        ]
        return digest_of(self.size, parts)

    def summary(self) -> str:
        """One sentence: rows by task."""
        counts = {task: sum(one.part.size for one in found) for task, found in self._of.items()}
        return ", ".join(f"{task} {count:,} rows" for task, count in counts.items())

    def example(self, task: str, index: int) -> Example:
        """Position `index` of the mixture of a task; in later epochs with another key.

        Raises:
            ImageError: a picture of the row is damaged, though it was whole when it was built.
            ValueError: no data set is for the task.
            IndexError: the index is negative.
        """
        if task not in self._of:
            raise ValueError(f"{self.name} feeds {', '.join(sorted(self._of))}, not {task!r}")
        picks = self._order[task].at([index])
        number, sample, epoch = (int(x[0]) for x in (picks.part_N, picks.sample_N, picks.epoch_N))
        opened = self._of[task][number]
        self._prepare(task, index)
        row = opened.rows[opened.first + sample]
        key = f"{opened.part.name}:{row['key']}" + (f"#{epoch}" if epoch else "")
        return _example(row, key, self.size)

    def _prepare(self, task: str, index: int) -> None:
        """Begin to fetch the shard that will be needed as many samples later as a shard has."""
        ahead = max(one.rows.ahead for one in self._of[task])
        if ahead:
            picks = self._order[task].at([index + ahead])
            opened = self._of[task][int(picks.part_N[0])]
            opened.rows.prepare(opened.first + int(picks.sample_N[0]))


def _named(folders: str) -> Iterator[tuple[Place, float]]:
    for text in folders.split(","):
        folder, star, weight = text.strip().rpartition("*")
        if not star:
            folder, weight = weight, "1"
        try:
            yield (folder if is_url(folder) else Path(folder)), float(weight)
        except ValueError:
            raise ConfigError(f"{text!r}: the weight {weight!r} is not a number") from None


def _open(folder: Place, weight: float, split: str, cache: str | Path | None) -> tuple[str, Opened]:
    manifest = manifest_at(folder)
    sizes = [int(shard["rows"]) for shard in manifest.shards]
    total = sum(sizes)
    held = min(MOST_HELDOUT, max(1, total // HELDOUT))
    first = {"train": 0, "heldout": total - held, "all": 0}[split]
    count = {"train": total - held, "heldout": held, "all": total}[split]
    if not count:
        raise DataError(
            f"{folder} has one row, so there is none for split {split!r}: one is always held out; "
            "build it from two records or more"
        )
    rows: StoredRows
    blocks: tuple[int, ...] = ()
    if isinstance(folder, Path):
        rows = LocalRows(folder, manifest, cache)
    else:
        rows = RemoteRows(folder, manifest, ShardCache(None if cache is None else Path(cache)))
        starts = np.cumsum([0, *sizes[:-1]])
        inside = [
            min(int(start) + size, first + count) - max(int(start), first)
            for start, size in zip(starts, sizes, strict=True)
        ]
        blocks = tuple(size for size in inside if size > 0)
    part = Part(name=name_of(folder), size=count, weight=weight, blocks=blocks, window=WINDOW)
    hashes = tuple(str(shard["sha256"]) for shard in manifest.shards)
    return manifest.task, Opened(part, rows, first, hashes)


def _example(row: Row, key: str, size: int | tuple[int, int]) -> Example:
    """What a row says, fitted to the size."""
    task, text = row["task"], row["text"] or NO_CAPTION
    stored = {name: row[name] for name in ("source", "target") if row[name] is not None}
    opened = {name: open_image(key, data=one["bytes"]) for name, one in stored.items()}
    fits = {name: Fit(one.shape[0], one.shape[1], size) for name, one in opened.items()}
    pictures = {name: fits[name].image(one) for name, one in opened.items()}
    main = "source" if task in ("ground", "edit") else "target"
    fit = fits[main]
    metadata: dict[str, Any] = {}
    if row["mask"] is not None:
        metadata["mask"] = fit.mask(open_map(key, data=row["mask"]["bytes"]) >= 128)
    pair = None
    if task in ("edit", "customise"):
        facts = {"edit": "pair", "exact": False, **metadata} if task == "edit" else {}
        pair = Pair(source=pictures["source"], text=text, target=pictures["target"], metadata=facts)
    return Example(
        key=key,
        image=pictures[main],
        caption=text,
        things=tuple(_things(row, fit)),
        maps={entry["name"]: _map(entry, fit) for entry in row["conditions"]},
        edit=pair if task == "edit" else None,
        subject=pair if task == "customise" else None,
        metadata={
            "licence": row["licence"],
            "conditions": tuple(entry["name"] for entry in row["conditions"]),
            "methods": {entry["name"]: entry["method"] for entry in row["conditions"]},
        },
    )


def _map(entry: Row, fit: Fit) -> np.ndarray[Any, np.dtype[np.uint8]]:
    values = open_map(entry["name"], data=entry["image"]["bytes"])
    return fit.labels(values) if entry["name"] == "segmentation" else fit.image(values)


def _things(row: Row, fit: Fit) -> Iterator[Thing]:
    """The things of which the crop shows at least half."""
    for thing in row["boxes"]:
        x0, y0, x1, y1 = thing["box"]
        box = fit.box((x0, y0, x1, y1))
        mask = None
        if thing["mask"] is not None:
            mask = fit.mask(open_map("mask", data=thing["mask"]["bytes"]) >= 128)
        seen = min(box[2] - box[0], box[3] - box[1]) >= MIN_SIDE
        seen = seen and visible((x0, y0, x1, y1), fit) >= MIN_VISIBLE
        if seen and (mask is None or mask.any()):
            yield Thing(phrase=thing["phrase"], label=thing["label"], box=box, mask=mask)
