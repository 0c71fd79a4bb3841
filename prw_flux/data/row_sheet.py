"""A contact sheet of rows: source, target, mask and conditions side by side, boxes drawn in."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Final

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
    stored += [entry["image"] for entry in row["conditions"]]
    pictures = [_thumbnail(one["bytes"]) for one in stored if one is not None]
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
    while text and pen.textlength(text) > cell.width:
        text = text[:-1]
    pen.text((0, SIDE + 1), text, fill="black")
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


def _thumbnail(data: bytes) -> PILImage.Image:
    with PILImage.open(BytesIO(data)) as picture:
        small = picture.convert("RGB")
    scale = SIDE / max(small.size)
    return small.resize((max(1, round(small.width * scale)), max(1, round(small.height * scale))))
