"""From a record to a row: every picture decoded, converted where it must be, or refused by reason.

Reasons: those of `open_image`; "empty caption", "missing picture", "no boxes", "no conditions",
"zero-area box", "box outside", "mask of another size", "map of another size", "empty mask",
"empty phrase", "damaged text".
"""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from typing import Any, Final, NamedTuple, final

import numpy as np
from PIL import Image as PILImage

from prw_flux.data.extractors import Extractor
from prw_flux.data.images import Image, ImageError, open_image, open_map
from prw_flux.data.rows import REQUIRED, Picture, Record, Reject, Row, ThingBox, is_text

KEPT_FORMATS: Final = ("JPEG", "PNG", "WEBP")
KEPT_MODES: Final = ("RGB", "L")
ORIENTATION: Final = 0x0112
MODES: Final = {"CMYK": "CMYK", "P": "palette", "1": "1 bit", "LA": "transparent"}


class Photo(NamedTuple):
    """A picture as it is stored, and its pixels."""

    row: Row
    pixels: Image

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.pixels.shape[0], self.pixels.shape[1]


@final
class RowMaker:
    """Makes one row.

    Args:
        task: name of the task.
        extractors: make conditions of the target; a map that came with the record stays.

    Attributes:
        converted: what was done to pictures and boxes.
    """

    def __init__(self, task: str, extractors: Sequence[Extractor] = ()) -> None:
        self.task, self.extractors = task, extractors
        self.converted: list[str] = []

    def __call__(self, record: Record) -> Row:
        """The row of a record: pictures as ``{"bytes", "path"}``.

        Raises:
            Reject: with the reason.
        """
        try:
            return self._checked(record)
        except ImageError as problem:
            raise _placed(record, problem.reason, str(problem)) from None
        except Reject as problem:
            raise _placed(record, problem.reason, str(problem)) from None

    def _checked(self, record: Record) -> Row:
        if record.refused is not None:
            raise Reject(*record.refused)
        words = [record.key, record.text, record.licence, *record.conditions]
        words += [word for thing in record.boxes for word in (thing.phrase, thing.label)]
        for word in words:
            if not is_text(word):
                raise Reject("damaged text", f"{record.where}: {word!a} is not valid Unicode")
        return self._row(record)

    def _row(self, record: Record) -> Row:
        text = " ".join(record.text.split())
        self.converted += record.changed
        self._require(record, text)
        source, target = self._photo(record.source), self._photo(record.target)
        main = target or source
        assert main is not None
        size = main.size
        if self.task == "edit" and source is not None and source.size != size:
            raise Reject("target of another size", _sizes(record.where, size, source.size))
        return {
            "key": record.key,
            "task": self.task,
            "source": None if source is None else source.row,
            "target": None if target is None else target.row,
            "mask": self._map(record.mask, size, mask=True),
            "conditions": self._conditions(record, target, size),
            "boxes": self._things(record, size),
            "text": text,
            "licence": record.licence,
        }

    def _require(self, record: Record, text: str) -> None:
        for column in REQUIRED[self.task]:
            if column == "text" and not text:
                raise Reject("empty caption", f"{record.where} has no text")
            if column in ("source", "target") and getattr(record, column) is None:
                raise Reject("missing picture", f"{record.where} has no {column}")
            if column == "conditions" and self.extractors:
                continue
            if column in ("boxes", "conditions") and not getattr(record, column):
                raise Reject(f"no {column}", f"{record.where} has no {column}")

    def _photo(self, picture: Picture | None) -> Photo | None:
        if picture is None:
            return None
        data = picture.read()
        assert data is not None, "photos come as files or bytes"
        pixels = open_image(picture.name, data=data)
        change = conversion(data)
        if picture.half is not None or picture.border:
            pixels, change = _part(pixels, picture), "cut out"
        if change is not None:
            self.converted.append(change)
            data = encode(pixels)
        return Photo({"bytes": data, "path": None}, pixels)

    def _map(
        self, picture: Picture | None, size: tuple[int, int], *, mask: bool = False
    ) -> Row | None:
        """A mask or a condition as PNG."""
        if picture is None:
            return None
        data = picture.read()
        values = picture.pixels if data is None else open_map(picture.name, data=data)
        assert values is not None
        if values.shape[:2] != size:
            what = "mask" if mask else "map"
            raise Reject(f"{what} of another size", _sizes(picture.name, values.shape[:2], size))
        if mask:
            values = _black_white(values, painted=picture.painted)
            if not values.any():
                raise Reject("empty mask", f"{picture.name} has no white pixel")
        return {"bytes": encode(values), "path": None}

    def _conditions(self, record: Record, target: Photo | None, size: tuple[int, int]) -> list[Row]:
        """The maps that came, then those that extractors make; blank ones are left out."""
        rows: list[Row] = [
            {"name": name, "method": "", "image": self._map(picture, size)}
            for name, picture in record.conditions.items()
        ]
        for extractor in self.extractors:
            if target is None or extractor.condition in record.conditions:
                continue
            values = extractor(target.pixels)
            if not values.any():
                self.converted.append(f"left out a blank {extractor.condition}")
                continue
            image = {"bytes": encode(values), "path": None}
            made = {"name": extractor.condition, "method": extractor.method, "image": image}
            rows.append(made)
        if not rows and "conditions" in REQUIRED[self.task]:
            raise Reject("no conditions", f"{record.where}: every map is blank")
        return rows

    def _things(self, record: Record, size: tuple[int, int]) -> list[Row]:
        """The boxes that can be used; where a task cannot do without, at least one must be."""
        rows, refusal = [], None
        for thing in record.boxes:
            try:
                if self.task == "ground" and not thing.phrase.strip():
                    raise Reject("empty phrase", f"{record.where}: no words for {thing.box}")
                rows.append(_boxed(thing, size))
            except Reject as problem:
                refusal = problem
                self.converted.append(f"left out a {problem.reason}")
        if refusal is not None and not rows and "boxes" in REQUIRED[self.task]:
            raise refusal
        return rows


def _placed(record: Record, reason: str, told: str) -> Reject:
    """A refusal that names the place in the input as well as the file."""
    return Reject(reason, told if record.where in told else f"{record.where}: {told}")


def conversion(data: bytes) -> str | None:
    """What `open_image` changes of a picture, or None if its bytes can be stored as they are."""
    with PILImage.open(BytesIO(data)) as picture:
        if picture.mode.startswith("I;16"):
            return "16 bit"
        if picture.has_transparency_data:
            return "transparent"
        if picture.mode not in KEPT_MODES:
            return MODES.get(picture.mode, picture.mode)
        if picture.getexif().get(ORIENTATION, 1) != 1:
            return "turned upright"
        return None if picture.format in KEPT_FORMATS else str(picture.format)


def encode(pixels: Image) -> bytes:
    """uint8 [H, W] or [H, W, 3] as PNG."""
    file = BytesIO()
    PILImage.fromarray(pixels).save(file, "PNG", compress_level=3)
    return file.getvalue()


def _part(pixels: Image, picture: Picture) -> Image:
    width, edge = pixels.shape[1], picture.border
    if picture.half is not None:
        middle = width // 2
        pixels = pixels[:, :middle] if picture.half == "left" else pixels[:, width - middle :]
    kept = pixels[edge : pixels.shape[0] - edge, edge : pixels.shape[1] - edge]
    if min(kept.shape[:2]) < 32:
        raise Reject("too small", f"{picture.name}: {pixels.shape[:2]} pixels before cutting")
    return np.ascontiguousarray(kept)


def _boxed(thing: ThingBox, size: tuple[int, int]) -> Row:
    """The row of a thing; a box that leaves the picture by less than a pixel is clipped."""
    height, width = size
    x0, y0, x1, y1 = thing.box
    if not (x1 > x0 and y1 > y0):
        raise Reject("zero-area box", f"{thing.phrase!r}: box {thing.box} has no area")
    if x0 < -1 or y0 < -1 or x1 > width + 1 or y1 > height + 1:
        raise Reject("box outside", f"{thing.phrase!r}: box {thing.box} leaves {width} x {height}")
    mask: Any = None
    if thing.mask is not None:
        drawn = thing.mask.draw(height, width)
        if not drawn.any():
            raise Reject("empty mask", f"{thing.phrase!r}: the mask is empty")
        mask = {"bytes": encode(drawn), "path": None}
    box = [max(x0, 0.0), max(y0, 0.0), min(x1, float(width)), min(y1, float(height))]
    if box[0] >= box[2] or box[1] >= box[3]:
        raise Reject("zero-area box", f"{thing.phrase!r}: box {thing.box} has no area inside")
    return {"box": box, "phrase": thing.phrase, "label": thing.label, "mask": mask}


def _black_white(values: Image, *, painted: bool) -> Image:
    if values.ndim == 3:
        grey = values.min(axis=-1) if painted else values.max(axis=-1)
    else:
        grey = values
    if grey.max(initial=0) == 1:  # saved as 0 and 1
        grey = grey * 255
    return np.where(grey >= (250 if painted else 128), 255, 0).astype(np.uint8)


def _sizes(name: str, have: tuple[int, ...], wanted: tuple[int, ...]) -> str:
    told = [f"{size[1]} x {size[0]}" for size in (have, wanted)]
    return f"{name} has {told[0]} pixels, its picture {told[1]}"
