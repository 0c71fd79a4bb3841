"""WebDataset tars: consecutive members `KEY.FIELD` are one sample.

    000001.src.jpg  000001.tgt.jpg  000001.mask.png  000001.depth.png  000001.json

FIELD is everything after the first dot of the file name. Which field is what comes from a column
map ("target=tgt.jpg", "text=json.caption"), or else from the names below; of "tgt.png;tgt.jpg" each
sample gives the first that it has. Nothing is unpacked to disk, so no name in a tar can lead
anywhere, and only what the map names is read.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO, Final, NamedTuple, TypeAlias, final

from prw_flux.data.annotations import MAPS
from prw_flux.data.column_map import ColumnMap, require
from prw_flux.data.input_files import are_numbers, entries, near, optional_of, short, value_of
from prw_flux.data.remote import Place, found_files, name_of
from prw_flux.data.rows import DataError, Picture, Record, ThingBox
from prw_flux.data.shard_cache import ShardCache

Members: TypeAlias = dict[str, tarfile.TarInfo]

SUFFIXES: Final = ("jpg", "jpeg", "png", "webp")
WORDS: Final[Mapping[str, tuple[str, ...]]] = {
    "source": ("src", "source", "before", "input"),
    "target": ("tgt", "target", "after", "output", "edited", ""),
    "mask": ("mask",),
    **{name: (name, f"cond.{name}") for name in (*MAPS, "canny")},
}
"""What fields of pictures are called, before their suffix; "" is `KEY.jpg`."""
TEXTS: Final = ("txt", "caption", "json.text", "json.caption", "json.instruction", "json.prompt")
LICENCES: Final = ("json.licence", "json.license")
MAX_BYTES: Final = 256 * 2**20


class Sample(NamedTuple):
    """Members of a tar with one key, by field; `fault` where the tar is cut off within them."""

    key: str
    members: Members
    fault: bool


class Content(NamedTuple):
    """What can be read of a sample."""

    where: str
    members: Members
    facts: Mapping[str, Any]
    file: BinaryIO

    def picture(self, field: str | None) -> Picture | None:
        """The picture of a field, of several names the first that is there."""
        field = next((one for one in _names(field) if one in self.members), None)
        if field is None:
            return None
        return Picture(name=f"{self.where}.{field}", data=_bytes(self.members[field], self.file))

    def text(self, field: str | None) -> str:
        """A text: a field, or "json.NAME" of the json; of several names the first with words.

        Raises:
            DataError: the entry is no text or number.
        """
        return next(filter(str.strip, map(self._one_text, _names(field))), "")

    def _one_text(self, field: str) -> str:
        name, _, entry = field.partition(".")
        if name == "json":
            value = self.facts.get(entry)
            if not isinstance(value, str | int | float | None):
                raise DataError(f"{self.where}: {field} must be a text, got {short(value)}")
            return "" if value is None else str(value)
        member = self.members.get(field)
        return "" if member is None else _bytes(member, self.file).decode("utf-8", "replace")


@final
class TarRows:
    """The samples of tars.

    Args:
        path: a tar, a folder of tars, names with ``{000..007}`` or ``*``, or a URL of them; tars
            that are elsewhere are copied into a cache one after the other.
        task: what the records are for. The things of ground and inpaint are read from the list
            "boxes" of the sample's json: {"box": [x0, y0, x1, y1], "phrase", "label"}.
        columns: the map; None goes by the names of the fields, and of the entries of the first
            sample's json.
        licence: of samples that name none.
        conditions_made: conditions will be made of the targets, so no field needs to have any.
        cache: of tars that are elsewhere.

    Raises:
        DataError: there are no tars, one is no tar at all, or no sample has a field.
        ConfigError: the map lacks what the task needs.
    """

    def __init__(
        self,
        path: Place,
        task: str,
        columns: ColumnMap | None = None,
        *,
        licence: str = "",
        conditions_made: bool = False,
        cache: ShardCache | None = None,
    ) -> None:
        self.inputs = found_files(path, ".tar")
        self.listed = ""
        self._cache, self._licence, self._task = cache or ShardCache(), licence, task
        fields: dict[str, None] = {}
        self._rows = [self._walked(file, fields) for file in self.inputs]
        self._map = columns or guessed([*fields, *(f"json.{name}" for name in self._first())])
        if task != "ground":
            require(task, self._map, conditions_made)
        elif not self._map.source:  # a picture without a name of its own
            self._map = replace(self._map, source=self._map.target, target=None)
        for column in self._map.columns:
            needs = ("json" if one.startswith("json.") else one for one in _names(column))
            if not any(need in fields for need in needs):
                raise DataError(f"{path}: no sample has the field {column!r}{near(column, fields)}")

    def __len__(self) -> int:
        return sum(self._rows)

    def records(self, start: int = 0) -> Iterator[Record]:
        """The records from number `start` on; whole tars before it are not read."""
        for file, rows in zip(self.inputs, self._rows, strict=True):
            if start >= rows:
                start -= rows
                continue
            local = self._cache.local(file)
            with local.open("rb") as bytes_of:
                for number, sample in enumerate(_samples(local)):
                    if number >= start:
                        yield self._record(file, sample, bytes_of)
            start = 0

    def _walked(self, file: Place, fields: dict[str, None]) -> int:
        """The number of samples of a tar; their fields are added."""
        count = 0
        for sample in _samples(self._cache.local(file)):
            fields.update(dict.fromkeys(sample.members))
            count += 1
        return count

    def _first(self) -> Mapping[str, Any]:
        """The content of the first sample's json."""
        for file, rows in zip(self.inputs, self._rows, strict=True):
            if rows:
                local = self._cache.local(file)
                with local.open("rb") as bytes_of:
                    return _facts(next(_samples(local)), bytes_of) or {}
        raise DataError(f"{name_of(self.inputs[0])} has no samples")

    def _record(self, file: Place, sample: Sample, bytes_of: BinaryIO) -> Record:
        where = f"{name_of(file)}: {sample.key}"
        refused = _refused(where, sample)
        facts = {} if refused else _facts(sample, bytes_of)
        if facts is None:
            refused = "damaged json", f"{where}.json is not a JSON object"
        if refused or facts is None:
            return Record(where=where, key=sample.key, refused=refused)
        content, columns = Content(where, sample.members, facts, bytes_of), self._map
        conditions = {name: content.picture(field) for name, field in columns.conditions.items()}
        things = self._task in ("ground", "inpaint")
        return Record(
            where=where,
            key="/".join(content.text(one) for one in columns.key) or sample.key,
            text=content.text(columns.text),
            source=content.picture(columns.source),
            target=content.picture(columns.target),
            mask=content.picture(columns.mask),
            conditions={name: found for name, found in conditions.items() if found is not None},
            boxes=_boxes(facts.get("boxes"), where) if things else (),
            licence=content.text(columns.licence) or self._licence,
        )


def guessed(fields: Sequence[str]) -> ColumnMap:
    """The map of some fields by their usual names; entries of the json are "json.NAME".

    Samples differ (one has `tgt.png`, the next `tgt.jpg`), so every name that is there is taken.
    """

    def among(usual: Sequence[str]) -> str | None:
        return ";".join(one for one in usual if one in fields) or None

    found: dict[str, str] = {}
    for name, words in WORDS.items():
        field = among([f"{word}.{suffix}".lstrip(".") for word in words for suffix in SUFFIXES])
        if field is not None:
            found[name] = field
    return ColumnMap(
        source=found.get("source"),
        target=found.get("target"),
        mask=found.get("mask"),
        text=among(TEXTS),
        licence=among(LICENCES),
        conditions={name: found[name] for name in (*MAPS, "canny") if name in found},
    )


def _names(field: str | None) -> list[str]:
    """The names that a map gives for one thing, the preferred one first."""
    return field.split(";") if field else []


def _samples(path: Path) -> Iterator[Sample]:
    """Every sample; the one in which a tar is cut off has a fault.

    Raises:
        DataError: it is no tar.
    """
    size = path.stat().st_size
    key, members, fault, sound = "", Members(), False, False
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                sound = True
                if not member.isfile():
                    continue
                name, field = _split(member.name)
                if key != name and members:
                    yield Sample(key, members, fault)
                    members = Members()
                key, fault = name, member.offset_data + member.size > size
                members[field] = member
            cut = tar.offset + tarfile.BLOCKSIZE > size  # no block of zeros at the end
    except tarfile.TarError as problem:
        if not sound:
            raise DataError(f"{path} is not a tar, or is damaged ({problem})") from None
        cut = True
    if members or cut:
        yield Sample(key, members, fault or cut)


def _split(name: str) -> tuple[str, str]:
    folder, slash, file = name.rpartition("/")
    key, _, field = file.partition(".")
    return folder + slash + key, field.lower()


def _bytes(member: tarfile.TarInfo, file: BinaryIO) -> bytes:
    file.seek(member.offset_data)
    return file.read(member.size)


def _refused(where: str, sample: Sample) -> tuple[str, str] | None:
    if sample.fault:
        return "damaged shard", f"{where}: the tar is cut off within this sample"
    for field, member in sample.members.items():
        if member.size > MAX_BYTES:
            return "too large", f"{where}.{field} has {member.size:,} bytes"
    return None


def _facts(sample: Sample, file: BinaryIO) -> Mapping[str, Any] | None:
    """The content of the sample's json; None where it cannot be read."""
    if "json" not in sample.members:
        return {}
    try:
        found = json.loads(_bytes(sample.members["json"], file))
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _boxes(raw: Any, where: str) -> tuple[ThingBox, ...]:
    """The things of a json.

    Raises:
        DataError: naming the sample and the entry that has another form.
    """
    found = []
    for number, entry in enumerate(entries(raw or [], f"{where}, json.boxes")):
        place = f"{where}, json.boxes[{number}]"
        box = value_of(entry, ("box", "bbox"), list, place)
        if not are_numbers(box, 4):
            raise DataError(f"{place}: box must be [x0, y0, x1, y1], got {short(box)}")
        label = optional_of(entry, ("label",), str, place) or ""
        phrase = optional_of(entry, ("phrase",), str, place) or label
        x0, y0, x1, y1 = map(float, box)
        found.append(ThingBox(box=(x0, y0, x1, y1), phrase=phrase, label=label))
    return tuple(found)
