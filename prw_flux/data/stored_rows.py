"""The rows of a built data set by number: memory-mapped where it is local, else through a cache."""

from __future__ import annotations

from collections import OrderedDict
from contextlib import suppress
from pathlib import Path
from threading import Lock, Thread
from typing import Any, Final, Protocol, final

import numpy as np

from prw_flux.data.manifest import Manifest, read_manifest
from prw_flux.data.remote import Place, below
from prw_flux.data.rows import DataError, Row, features
from prw_flux.data.shard_cache import LIMIT, TRIES, ShardCache

WINDOW: Final = 4
"""Shards that a data set which is elsewhere is shuffled in at a time."""
OPEN: Final = 2 * WINDOW
BATCH: Final = 100


class StoredRows(Protocol):
    """Rows by number."""

    ahead: int
    """How many samples before a row is needed it should be asked for; 0 where there is no need."""

    def prepare(self, number: int) -> None:
        """Begin to fetch what row `number` needs, and return at once."""

    def __getitem__(self, number: int) -> Row:
        """The row; pictures as ``{"bytes", "path"}``."""


def manifest_at(folder: Place) -> Manifest:
    """The manifest of a data set, which must be finished.

    Raises:
        DataError: there is no data set, or it is not finished.
    """
    manifest = read_manifest(folder)
    if not manifest.done:
        raise DataError(f"{folder} is not finished; run the same `data build` again")
    return manifest


@final
class LocalRows:
    """All shards of a folder as one table that `datasets` keeps memory-mapped.

    Args:
        folder: of the data set.
        manifest: its content.
        cache: where `datasets` puts its Arrow copy; None is its own folder.

    Raises:
        DataError: a shard is missing, truncated or damaged.
    """

    ahead = 0

    def __init__(self, folder: Path, manifest: Manifest, cache: str | Path | None) -> None:
        features()
        from datasets import load_dataset

        files = [folder / shard["file"] for shard in manifest.shards]
        for file, shard in zip(files, manifest.shards, strict=True):
            size = file.stat().st_size if file.is_file() else 0
            if size != shard["bytes"]:
                raise DataError(
                    f"{file} has {size:,} bytes, not the {shard['bytes']:,} that were built: it is "
                    "missing or truncated; run the same `data build` again"
                )
        place = None if cache is None else str(cache)
        try:
            found = load_dataset(
                "parquet", data_files=[str(f) for f in files], split="train", cache_dir=place
            )
        except Exception as problem:  # datasets wraps whatever its readers raise
            told = " ".join(str(problem.__cause__ or problem).split())[:200]
            raise DataError(
                f"{folder} cannot be read ({told}); see `prw-flux data check`"
            ) from problem
        self._rows = found.with_format("arrow")

    def prepare(self, number: int) -> None:
        """Nothing: the rows are here."""

    def __getitem__(self, number: int) -> Row:
        row: Row = self._rows[number].to_pylist()[0]
        return row


@final
class RemoteRows:
    """Shards that are elsewhere, each copied before it is needed and compared with its sha256.

    Args:
        folder: URL of the data set.
        manifest: its content.
        cache: of the shards.
    """

    def __init__(self, folder: str, manifest: Manifest, cache: ShardCache) -> None:
        self._folder, self._shards, self._cache = folder, manifest.shards, cache
        sizes = [int(shard["rows"]) for shard in manifest.shards]
        self.ahead = max(sizes, default=0)
        self._ends = np.cumsum(sizes)
        self._open: OrderedDict[int, Any] = OrderedDict()
        self._fetching: dict[int, Thread] = {}
        self._one = Lock()

    def prepare(self, number: int) -> None:
        """Fetch the shard of a row in the background; what fails is tried again when needed."""
        shard = int(np.searchsorted(self._ends, number, side="right"))
        if shard not in self._open and shard not in self._fetching:
            # A daemon: a process that is told to stop does not wait for a copy.
            thread = Thread(target=self._try_fetch, args=(shard,), daemon=True)
            self._fetching[shard] = thread
            thread.start()

    def __getitem__(self, number: int) -> Row:
        shard = int(np.searchsorted(self._ends, number, side="right"))
        first = int(self._ends[shard]) - self._shards[shard]["rows"]
        row: Row = self._of(shard)[number - first].to_pylist()[0]
        return row

    def _of(self, shard: int) -> Any:
        if shard not in self._open:
            begun = self._fetching.pop(shard, None)
            if begun is not None:
                begun.join()
            self._open[shard] = self._mapped(shard)
            if len(self._open) > OPEN:
                self._open.popitem(last=False)
        self._open.move_to_end(shard)
        return self._open[shard]

    def _mapped(self, shard: int) -> Any:
        from datasets import Dataset

        for _ in range(TRIES):
            try:
                return Dataset.from_file(str(self._fetch(shard))).with_format("arrow")
            except FileNotFoundError:  # another process needed its place
                continue
        raise DataError(
            f"the shards of {self._folder} throw each other out of the cache; raise {LIMIT}"
        )

    def _try_fetch(self, shard: int) -> None:
        with self._one, suppress(DataError, OSError):
            self._fetch(shard)

    def _fetch(self, shard: int) -> Path:
        entry = self._shards[shard]
        place = below(self._folder, entry["file"])
        return self._cache.local(place, sha256=entry["sha256"], convert=_to_arrow)


def _to_arrow(source: Path, new: Path) -> None:
    """A parquet file as an Arrow stream, which can be memory-mapped."""
    import pyarrow
    import pyarrow.parquet as parquet

    with (
        parquet.ParquetFile(source) as file,
        new.open("wb") as sink,
        pyarrow.ipc.new_stream(sink, file.schema_arrow) as writer,
    ):
        for batch in file.iter_batches(BATCH):
            writer.write_batch(batch)
