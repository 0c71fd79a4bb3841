"""Opening pictures that strangers made, and bringing them to the size that a model takes.

Shapes: H, W pixels; pictures are uint8 [H, W, 3] RGB.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, Final, TypeAlias, final

import numpy as np
from numpy.typing import NDArray
from PIL import Image as PILImage
from PIL import ImageOps, UnidentifiedImageError

Image: TypeAlias = NDArray[np.uint8]
Box: TypeAlias = tuple[float, float, float, float]

MIN_SIDE: Final = 32
MAX_PIXELS: Final = 64_000_000
MAX_SHAPE: Final = 10
"""Largest ratio of the sides: of a longer strip, a square crop shows next to nothing."""
FORMATS: Final = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM")
"""What is decoded at all: PIL also knows formats that start other programs (EPS)."""


class ImageError(Exception):
    """A picture cannot be used: `path`, `reason` (one of few, to count by) and a full sentence."""

    def __init__(self, path: str | Path, reason: str, detail: str) -> None:
        super().__init__(f"{path}: {detail}")
        self.path = str(path)
        self.reason = reason


def open_image(
    path: str | Path,
    *,
    data: bytes | None = None,
    min_side: int = MIN_SIDE,
    max_pixels: int = MAX_PIXELS,
) -> Image:
    """Reads one picture as uint8 [H, W, 3] RGB, turned upright as its EXIF tag says.

    16-bit values are scaled to 8, CMYK is converted, transparency is laid on white. Of a
    multi-picture JPEG (as phones write) the first is taken. With `data`, the bytes of the file,
    `path` is only its name.

    Raises:
        ImageError: with a `reason` among "missing", "not an image", "damaged", "animated",
            "several pages", "too small", "too large", "extreme shape", "unknown range".
    """
    with _decoding(path), _opened(path, max_pixels, data) as picture:
        if min(picture.size) < min_side:
            size = f"{picture.width} x {picture.height}"
            raise ImageError(path, "too small", f"{size} pixels, below the minimum of {min_side}")
        if max(picture.size) > MAX_SHAPE * min(picture.size):
            size = f"{picture.width} x {picture.height}"
            raise ImageError(path, "extreme shape", f"{size} pixels, longer than 1 : {MAX_SHAPE}")
        if getattr(picture, "n_frames", 1) > 1 and picture.format != "MPO":
            if picture.format == "TIFF":
                raise ImageError(path, "several pages", "a document of several pages, not a photo")
            raise ImageError(path, "animated", "an animation, not a single picture")
        return _to_rgb(ImageOps.exif_transpose(picture), path)


def open_map(
    path: str | Path, *, data: bytes | None = None, max_pixels: int = MAX_PIXELS
) -> NDArray[np.uint8]:
    """Reads a mask or a map: uint8 [H, W] where it has one channel or a palette, else [H, W, 3].

    A palette's indices are returned, not its colours (segmentations are stored so); 16-bit values
    are scaled to 8. With `data`, the bytes of the file, `path` is only its name.

    Raises:
        ImageError: as `open_image`.
    """
    with _decoding(path), _opened(path, max_pixels, data) as picture:
        if picture.mode.startswith("I;16"):
            return _from_16_bit(picture)
        if picture.mode == "1":
            return np.array(picture.convert("L"), np.uint8)
        if picture.mode in ("L", "P"):
            return np.array(picture, np.uint8)
        if picture.mode == "LA":
            return np.array(picture, np.uint8)[..., 0]
        return _to_rgb(picture, path)


@contextmanager
def _decoding(path: str | Path) -> Iterator[None]:
    """Turns whatever PIL raises into an ImageError, and its warnings into nothing.

    Given corrupt bytes, decoders raise OSError, SyntaxError, TypeError, IndexError and more.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except (ImageError, MemoryError):
        raise
    except FileNotFoundError:
        raise ImageError(path, "missing", "no such file") from None
    except UnidentifiedImageError:
        raise ImageError(path, "not an image", "not a picture in a known format") from None
    except PILImage.DecompressionBombError:
        raise ImageError(path, "too large", "far more pixels than any photo has") from None
    except Exception as problem:
        detail = " ".join(f"truncated or damaged ({problem})".split())
        raise ImageError(path, "damaged", detail) from problem


def _opened(path: str | Path, max_pixels: int, data: bytes | None) -> PILImage.Image:
    PILImage.init()  # all plugins: `formats` names must be registered
    picture = PILImage.open(path if data is None else BytesIO(data), formats=FORMATS)
    if picture.width * picture.height > max_pixels:
        size = f"{picture.width} x {picture.height}"
        picture.close()
        raise ImageError(path, "too large", f"{size} pixels, above the limit of {max_pixels:,}")
    return picture


def _to_rgb(picture: PILImage.Image, path: str | Path) -> Image:
    if picture.mode in ("I", "F"):
        detail = f"pixels of mode {picture.mode} have no known range; save it with 8 or 16 bits"
        raise ImageError(path, "unknown range", detail)
    if picture.mode.startswith("I;16"):
        grey = _from_16_bit(picture)
        return np.repeat(grey[..., None], 3, axis=-1)
    if picture.has_transparency_data:
        rgba = picture.convert("RGBA")
        white = PILImage.new("RGBA", rgba.size, (255, 255, 255, 255))
        picture = PILImage.alpha_composite(white, rgba)
    return np.array(picture.convert("RGB"), np.uint8)


def _from_16_bit(picture: PILImage.Image) -> NDArray[np.uint8]:
    """0 .. 65535 -> 0 .. 255, rounded."""
    values = np.asarray(picture).astype(np.float32)
    return np.asarray(np.rint(values / 257), np.uint8)


@final
@dataclass(frozen=True)
class Fit:
    """Scales the short side to the target and crops the centre; knows where everything goes.

    One Fit serves a picture together with its masks, maps and boxes, so they stay aligned.

    Args:
        height, width: of the picture, pixels.
        size: target side (a square) or (height, width); multiples of 16, the pixels of a token.

    Raises:
        ValueError: a side is not a positive multiple of 16.
    """

    height: int
    width: int
    size: int | tuple[int, int]

    def __post_init__(self) -> None:
        for side in self.target:
            if side < 16 or side % 16:
                raise ValueError(f"size {self.size}: {side} is not a positive multiple of 16")

    @property
    def target(self) -> tuple[int, int]:
        """(height, width) of the result."""
        return (self.size, self.size) if isinstance(self.size, int) else self.size

    @property
    def window(self) -> Box:
        """The part of the picture that is kept, in its own pixels."""
        height, width = self.target
        scale = max(height / self.height, width / self.width)
        w, h = min(width / scale, self.width), min(height / scale, self.height)
        x, y = (self.width - w) / 2, (self.height - h) / 2
        return x, y, self.width - x, self.height - y

    def image(self, image: Image) -> Image:
        """uint8 [H, W] or [H, W, 3] -> the target size, bicubic with anti-aliasing."""
        return self._resize(image, PILImage.Resampling.BICUBIC)

    def labels(self, labels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Class indices or class colours: nearest neighbour, no new values."""
        return self._resize(labels, PILImage.Resampling.NEAREST)

    def mask(self, mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """bool [H, W]: a target pixel is set where at least half of it was."""
        grey = self._resize(np.where(mask, 255, 0).astype(np.uint8), PILImage.Resampling.BOX)
        return np.asarray(grey >= 128)

    def box(self, box: Box) -> Box:
        """The box in the target's pixels, clipped to it; may come out empty."""
        x, y, x_end, y_end = self.window
        height, width = self.target
        scale_x, scale_y = width / (x_end - x), height / (y_end - y)
        x0, x1 = (float(np.clip((v - x) * scale_x, 0, width)) for v in (box[0], box[2]))
        y0, y1 = (float(np.clip((v - y) * scale_y, 0, height)) for v in (box[1], box[3]))
        return x0, y0, x1, y1

    def _resize(self, values: NDArray[Any], how: PILImage.Resampling) -> NDArray[np.uint8]:
        if values.shape[:2] != (self.height, self.width):
            raise ValueError(
                f"expected {self.height} x {self.width} pixels, got {values.shape[:2]}"
            )
        height, width = self.target
        if values.shape[:2] == (height, width):
            return np.array(values, np.uint8)
        picture = PILImage.fromarray(values).resize((width, height), how, box=self.window)
        return np.array(picture, np.uint8)


def fit(image: Image, size: int | tuple[int, int]) -> Image:
    """`Fit` for a picture alone: uint8 [H, W, 3] -> uint8 of the target size."""
    return Fit(image.shape[0], image.shape[1], size).image(image)
