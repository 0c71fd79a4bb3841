"""COCO- and LVIS-style annotations: grounding by class, inpainting with captions and objects.

instances.json: {"images": [{id, file_name | coco_url}], "annotations": [{id, image_id, bbox,
category_id, segmentation, iscrowd}], "categories": [{id, name}]}; captions.json: annotations with
image_id and caption. Boxes are [x, y, width, height].

    ground   one record per picture with all its objects, their classes as phrases; the task marks
             one whose phrase is alone, or any instance of a class
    inpaint  one record per caption (of the file of captions), with all objects of the picture
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, final

from prw_flux.data.input_files import (
    are_numbers,
    entries,
    optional_of,
    picture_in,
    read_json,
    short,
    value_of,
)
from prw_flux.data.object_masks import read_mask
from prw_flux.data.rows import DataError, Picture, Record, ThingBox


@final
class Instances:
    """An instances.json, checked and indexed.

    Args:
        path: the file.
        images: the folder of its pictures.

    Raises:
        DataError: it has another form, naming the entry and the field.
    """

    def __init__(self, path: Path, images: Path) -> None:
        raw = read_json(path)
        if not isinstance(raw, dict):
            raise DataError(f"{path.name}: expected an object, got {short(raw)}")
        self.path, self.root = path, images
        images_of = _part(raw, "images", path)
        self.files = dict(self._pictures(images_of))
        self.places = {entry["id"]: f"{where}, id {entry['id']}" for entry, where in images_of}
        self.names = {
            entry["id"]: str(value_of(entry, ("name",), str, where)).replace("_", " ")
            for entry, where in _part(raw, "categories", path)
        }
        objects = _part(raw, "annotations", path)
        self.objects = {entry["id"]: (entry, where) for entry, where in objects}
        self.by_image: dict[Any, list[Any]] = defaultdict(list)
        for number, (entry, where) in self.objects.items():
            self._check(entry, where)
            self.by_image[entry["image_id"]].append(number)

    def picture(self, image: Any, where: str) -> Picture:
        """The picture of an image id."""
        if image not in self.files:
            raise DataError(f"{where}: there is no image {image!r} in {self.path.name}")
        return picture_in(self.root, self.files[image], where)

    def thing(self, number: Any, phrase: str = "") -> ThingBox:
        """The object of an annotation id; its class where no phrase is given."""
        entry, where = self.objects[number]
        x, y, width, height = map(float, entry["bbox"])
        label = self.names[entry["category_id"]]
        return ThingBox(
            box=(x, y, x + width, y + height),
            phrase=phrase or label,
            label=label,
            mask=read_mask(entry.get("segmentation"), where),
        )

    def things(self, image: Any) -> tuple[ThingBox, ...]:
        """The objects of a picture, without annotations that cover many at once (crowds)."""
        numbers = self.by_image.get(image, [])
        return tuple(self.thing(n) for n in numbers if not self.objects[n][0].get("iscrowd"))

    def _pictures(self, images: Any) -> Iterator[tuple[Any, str]]:
        for entry, where in images:
            name = optional_of(entry, ("file_name",), str, where)
            if name is None:  # LVIS
                name = "/".join(value_of(entry, ("coco_url",), str, where).split("/")[-2:])
            yield entry["id"], name

    def _check(self, entry: Mapping[str, Any], where: str) -> None:
        box = value_of(entry, ("bbox",), list, where)
        if not are_numbers(box, 4):
            raise DataError(f"{where}: bbox must be [x, y, width, height], got {short(box)}")
        for field, known in (("image_id", self.files), ("category_id", self.names)):
            if value_of(entry, (field,), (int, str), where) not in known:
                raise DataError(f"{where}: there is no {field} {entry[field]!r}")


@final
class CocoGround:
    """One record per picture with objects; crowds are left out.

    Args:
        path, images: as of `Instances`.
        licence: of all pictures.
    """

    def __init__(self, path: Path, images: Path, *, licence: str = "") -> None:
        self.inputs: tuple[Path | str, ...] = (path,)
        self.listed = ""
        self._found, self._licence = Instances(path, images), licence
        self._images = list(self._found.by_image)

    def __len__(self) -> int:
        return len(self._images)

    def records(self, start: int = 0) -> Iterator[Record]:
        """The records from number `start` on."""
        for image in self._images[start:]:
            where = self._found.places[image]
            yield Record(
                where=where,
                key=str(image),
                source=self._found.picture(image, where),
                boxes=self._found.things(image),
                licence=self._licence,
            )


@final
class CocoInpaint:
    """One record per caption, with the objects of its picture; for inpainting and control.

    Args:
        path, images: as of `Instances`.
        captions: the file of captions.
        licence: of all pictures.
    """

    def __init__(self, path: Path, images: Path, captions: Path, *, licence: str = "") -> None:
        self.inputs: tuple[Path | str, ...] = (path, captions)
        self.listed = ""
        self._found, self._licence = Instances(path, images), licence
        raw = read_json(captions)
        if not isinstance(raw, dict):
            raise DataError(f"{captions.name}: expected an object, got {short(raw)}")
        self._captions = _part(raw, "annotations", captions)
        for entry, where in self._captions:
            value_of(entry, ("image_id",), (int, str), where)
            value_of(entry, ("caption",), str, where)

    def __len__(self) -> int:
        return len(self._captions)

    def records(self, start: int = 0) -> Iterator[Record]:
        """The records from number `start` on."""
        for entry, where in self._captions[start:]:
            image = entry["image_id"]
            yield Record(
                where=f"{where}, image {image}",
                key=f"{image}/{entry['id']}",
                text=entry["caption"],
                target=self._found.picture(image, where),
                boxes=self._found.things(image),
                licence=self._licence,
            )


def _part(raw: Mapping[str, Any], name: str, path: Path) -> list[tuple[Mapping[str, Any], str]]:
    """The objects of a list with the place of each; every one has an id of its own."""
    where = f"{path.name}: {name}"
    found = [(e, f"{where}[{i}]") for i, e in enumerate(entries(raw.get(name), where))]
    seen = set()
    for entry, place in found:
        number = value_of(entry, ("id",), (int, str), place)
        if number in seen:
            raise DataError(f"{place}: the id {number!r} was there before")
        seen.add(number)
    return found
