"""A contact sheet of rows: source, target, mask and conditions side by side, boxes drawn in."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Final

import numpy as np
from PIL import Image as PILImage
from PIL import ImageDraw

from prw_flux.data.rows import Row

SIDE: Final = 160
GAP: Final = 6
LINE: Final = 14
COLUMNS: Final = 3


def write_row_sheet(path: Path, rows: Sequence[Row]) -> None:
    """Write the sheet as a picture file; three rows of the data side by side, text below each."""
    cells = [_cell(row) for row in rows]
    width = max((cell.width for cell in cells), default=SIDE) + 2 * GAP
    columns = min(COLUMNS, max(1, len(cells)))
    lines = -(-len(cells) // columns)
    height = SIDE + LINE + 2 * GAP
    sheet = PILImage.new("RGB", (columns * width, max(1, lines) * height), "white")
    for number, cell in enumerate(cells):
        sheet.paste(cell, (number % columns * width + GAP, number // columns * height + GAP))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def _cell(row: Row) -> PILImage.Image:
    stored = [row["source"], row["target"], row["mask"]]
    pictures = [_thumbnail(one["bytes"]) for one in stored if one is not None]
    for entry in row["conditions"]:
        labels = entry["name"] == "segmentation"
        pictures.append(_thumbnail(entry["image"]["bytes"], labels=labels))
    boxed = pictures[0]
    full = _size((row["source"] or row["target"])["bytes"])
    _draw_boxes(boxed, row, boxed.width / full[0])
    cell = PILImage.new("RGB", (sum(p.width + GAP for p in pictures), SIDE + LINE), "white")
    x = 0
    for picture in pictures:
        cell.paste(picture, (x, 0))
        x += picture.width + GAP
    pen = ImageDraw.Draw(cell)
    text = row["text"].encode("ascii", "replace").decode()
    if pen.textlength(text) > cell.width:
        while text and pen.textlength(f"{text}...") > cell.width:
            text = text[:-1]
        text += "..."
    pen.text((0, max(picture.height for picture in pictures) + 1), text, fill="black")
    return cell


def _draw_boxes(picture: PILImage.Image, row: Row, scale: float) -> None:
    pen = ImageDraw.Draw(picture)
    for thing in row["boxes"]:
        if thing["mask"] is not None:
            mask = _thumbnail(thing["mask"]["bytes"]).convert("L").resize(picture.size)
            tint = PILImage.new("RGB", picture.size, "magenta")
            picture.paste(tint, mask=mask.point(lambda value: value // 3))
        pen.rectangle([value * scale for value in thing["box"]], outline="magenta", width=2)


def _size(data: bytes) -> tuple[int, int]:
    with PILImage.open(BytesIO(data)) as picture:
        return picture.size


def _thumbnail(data: bytes, *, labels: bool = False) -> PILImage.Image:
    """A small picture; class indices, which are nearly black, get a colour each."""
    with PILImage.open(BytesIO(data)) as picture:
        if labels and picture.mode in ("L", "P"):
            index = np.array(picture).astype(np.int64)
            colours = [(index * step % 256).astype(np.uint8) for step in (67, 151, 199)]
            small = PILImage.fromarray(np.stack(colours, axis=-1))
        else:
            small = picture.convert("RGB")
    scale = SIDE / max(small.size)
    how = PILImage.Resampling.NEAREST if labels else PILImage.Resampling.BICUBIC
    size = max(1, round(small.width * scale)), max(1, round(small.height * scale))
    return small.resize(size, how)
