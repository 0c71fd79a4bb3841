"""A data source by name: "shapeweave", "photos", "disk:DIR", or ``package.module:object``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from prw import ConfigError
from prw.named_object import named_object
from prw_flux.config import RunConfig
from prw_flux.data.folder_copy import local_folder
from prw_flux.data.on_disk import PREFIX, OnDisk
from prw_flux.data.photos import PhotoFolder
from prw_flux.shapeweave.source import ShapeWeave
from prw_flux.tasks.base import DataSource, Task

NAMED: Final = ("shapeweave", "photos")
MEMBERS: Final = ("name", "tasks", "example", "__len__", "fingerprint")
"""What a DataSource has."""


def open_data(
    source: str,
    *,
    size: int,
    seed: int = 0,
    split: str = "train",
    photos: str | None = None,
    conditions: Sequence[str] = (),
) -> DataSource:
    """Open a data source.

    Args:
        source: one of `NAMED`; ``disk:DIR``, built data (see `OnDisk` for mixtures); or
            ``package.module:object``: a DataSource, or a callable that makes one from ``size=``,
            ``seed=`` and ``split=``.
        size: side of its pictures in pixels.
        seed: of generated pictures.
        split: "train" or "heldout".
        photos: folder of "photos"; None is the public-domain photos of scikit-image.
        conditions: what makes the maps of control (`prw_flux.data.conditions`); nothing leaves it
            to the source.

    Raises:
        ConfigError: there is no such source, or no such condition.
        PhotoError: the photos cannot be used.
        DataError: there is no built data in the folder.
    """
    data = _open(source, size=size, seed=seed, split=split, photos=photos)
    if not conditions:
        return data
    from prw_flux.data.conditions import open_extractors
    from prw_flux.data.with_maps import WithMaps

    return WithMaps(data, open_extractors(conditions))


def open_run_data(config: RunConfig, split: str = "train") -> DataSource:
    """The data of a run, as it is configured; raises as `open_data`."""
    data = config.data
    return open_data(
        data.source,
        size=config.size,
        seed=config.seed,
        split=split,
        photos=data.photos,
        conditions=data.conditions,
    )


def open_held_out(config: RunConfig, data: DataSource) -> DataSource:
    """The side of a run's data that is never trained on.

    Which samples are on it depends on their keys and names alone: ShapeWeave holds combinations
    out, photos go by a hash of their names, of built data it is the last rows.

    Raises:
        ConfigError: the source has no such side, because it is an object of the user's.
        PhotoError: a single photo cannot be on both sides.
    """
    found = open_run_data(config, "heldout")
    if _plain(found) is _plain(data):
        raise ConfigError(
            f"data source {config.data.source!r} is one object, so nothing of it is held out: name "
            "a function or class that takes split=, or set held_out.samples=0 and sample_every=0"
        )
    return found


def _plain(data: DataSource) -> DataSource:
    """A source without the maps that a run makes of its pictures."""
    from prw_flux.data.with_maps import WithMaps

    return data.data if isinstance(data, WithMaps) else data


def _open(source: str, *, size: int, seed: int, split: str, photos: str | None) -> DataSource:
    if source == "shapeweave":
        return ShapeWeave(size=size, seed=seed, split=split)
    if source == "photos":
        folder = None if photos is None else local_folder(photos)
        return PhotoFolder(folder, size=size, split=split)
    if source.startswith(PREFIX):
        return OnDisk(source.removeprefix(PREFIX), size, seed=seed, split=split)
    if ":" not in source:
        raise ConfigError(
            f"there is no data source {source!r}; there are {' and '.join(NAMED)}, built data is "
            "disk:DIR, and one of your own is package.module:object"
        )
    found = named_object(source, "data source")
    if callable(found) and not isinstance(found, DataSource) or isinstance(found, type):
        found = found(size=size, seed=seed, split=split)
    if not isinstance(found, DataSource):
        absent = ", ".join(need for need in MEMBERS if need not in dir(found))
        raise ConfigError(
            f"data source {source!r} is a {type(found).__name__} without {absent}, not a "
            "prw_flux.tasks.DataSource"
        )
    return found


def feeds(data: DataSource, task: Task, builtin: frozenset[str]) -> bool:
    """Whether `data` has examples for `task`; arguments as of `require_feeds`."""
    return task.name not in builtin or task.name in data.tasks()


def require_feeds(data: DataSource, task: Task, builtin: frozenset[str]) -> None:
    """Raise unless `data` has examples for `task`; a task of the user's own is given any.

    Args:
        builtin: names of the project's own tasks, of which `data.tasks()` knows.
    """
    if not feeds(data, task, builtin):
        fed = ", ".join(sorted(data.tasks()))
        raise ConfigError(
            f"{data.name} cannot feed the task {task.name!r}, only {fed}; leave the stage out, or "
            "annotate the photos (docs: Tasks, Photos)"
        )
