"""Inputs by name: what `prw-flux data build TASK --from KIND PATH` can read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, final

from prw import ConfigError
from prw_flux.data.coco import CocoGround, CocoInpaint
from prw_flux.data.column_map import KNOWN, column_map
from prw_flux.data.edit_pairs import EditPairs
from prw_flux.data.folder_copy import local_folder
from prw_flux.data.input_files import near
from prw_flux.data.parquet_rows import ParquetRows
from prw_flux.data.photo_rows import PhotoRows
from prw_flux.data.refcoco import References
from prw_flux.data.rows import Reader
from prw_flux.data.tar_rows import TarRows

FEEDS: Final[dict[str, tuple[str, ...]]] = {
    "photos": ("inpaint", "ground", "control", "customise", "edit"),
    "pairs": ("edit", "customise"),
    "coco": ("ground", "inpaint", "control"),
    "refcoco": ("ground",),
    "webdataset": ("inpaint", "ground", "control", "customise", "edit"),
    "parquet": ("inpaint", "control", "customise", "edit"),
    **{name: (task,) for name, (task, _) in KNOWN.items()},
}
"""The tasks that each kind of input can feed."""


@final
@dataclass(frozen=True, kw_only=True)
class Origin:
    """What a data set is built from.

    Args:
        kind: a key of `FEEDS`.
        path: a folder (photos, pairs), a json file (coco, refcoco), or shards (webdataset, parquet
            and published data): a file, a folder of them, names with {000..007} or *. It and the
            three below may be URLs; of a URL, folders of pictures are copied first.
        images: folder of the pictures that json files name.
        instances: the instances.json of refcoco.
        captions: the captions.json of coco for inpainting.
        split: of refcoco.
        columns: of parquet and webdataset, "source=before".
        conditions: extractors that will make conditions ("canny", "depth:WEIGHTS"), so that the
            input need not have any.
        licence: of samples that name none.
    """

    kind: str
    path: str
    images: str | None = None
    instances: str | None = None
    captions: str | None = None
    split: str | None = None
    columns: tuple[str, ...] = ()
    conditions: tuple[str, ...] = ()
    licence: str = ""

    def told(self) -> dict[str, Any]:
        """What to note of it in the data set: the options that are set."""
        return {name: value for name, value in vars(self).items() if value}


def open_reader(origin: Origin, task: str) -> Reader:
    """Open an input.

    Raises:
        ConfigError: there is no such kind, it does not feed the task, or an option is missing.
        DataError: the input cannot be read.
        PhotoError: a folder of photos has none, or its annotations are wrong.
    """
    if origin.kind not in FEEDS:
        raise ConfigError(f"cannot build from {origin.kind!r}{near(origin.kind, FEEDS)}")
    if task not in FEEDS[origin.kind]:
        fed = ", ".join(FEEDS[origin.kind])
        raise ConfigError(f"{origin.kind} feeds {fed}, not {task!r}")
    if origin.conditions and task != "control":
        raise ConfigError(f"--conditions belong to the task 'control', not {task!r}")
    licence, made = origin.licence, bool(origin.conditions)
    if origin.kind == "webdataset":
        columns = column_map(origin.columns) if origin.columns else None
        return TarRows(origin.path, task, columns, licence=licence, conditions_made=made)
    if origin.kind == "parquet" or origin.kind in KNOWN:
        known = KNOWN.get(origin.kind)
        columns = column_map(origin.columns) if known is None else known[1]
        return ParquetRows(origin.path, task, columns, licence=licence, conditions_made=made)
    path = local_folder(origin.path)
    if origin.kind == "photos":
        photos = path if origin.path else None
        return PhotoRows(photos, task, licence=licence, conditions_made=made)
    if origin.kind == "pairs":
        return EditPairs(path, licence=licence)
    images = local_folder(_need(origin, "images", "the folder of the pictures"))
    if origin.kind == "refcoco":
        instances = local_folder(_need(origin, "instances", "the instances.json"))
        return References(path, instances, images, split=origin.split, licence=licence)
    if task == "ground":
        return CocoGround(path, images, licence=licence)
    if task == "control" and not made:
        raise ConfigError("coco has no maps: name what makes them, for example --conditions canny")
    captions = local_folder(_need(origin, "captions", "the captions.json"))
    return CocoInpaint(path, images, captions, licence=licence)


def _need(origin: Origin, option: str, what: str) -> str:
    value = getattr(origin, option)
    if value is None:
        raise ConfigError(f"building from {origin.kind} needs --{option}, {what}")
    return str(value)
