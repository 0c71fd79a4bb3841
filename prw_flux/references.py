"""The source images of a call: fitted to a size, placed beside or under the result, encoded.

Shapes: B images of a batch, h x w pixels, C latent channels, H x W latent grid.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from prw_flux.adapter import TaskSpec
from prw_flux.digests import tensor_digest
from prw_flux.encode import (
    ImageInput,
    encode_image,
    fitted_size,
    pack,
    position_ids,
    resize,
    to_pixels,
    whole_size,
)
from prw_flux.tasks.inpainting import GREY

HOLE: Final = 2.0 * GREY / 255.0 - 1.0
"""Grey in [-1, 1]."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What a call says about sizes, in pixels; None leaves it to the source.

    Attributes:
        height, width: of the result.
        source_size: (height, width) of the source, or the side of a square of its area.
        resolution: side of a square of the result's area, where height and width are None.
        auto_resize: whether the source is brought to that area at all.
        step: side of a token.
    """

    height: int | None = None
    width: int | None = None
    source_size: int | tuple[int, int] | None = None
    resolution: float | None = None
    auto_resize: bool = True
    step: int = 16

    def fit(self, rows: int, columns: int) -> tuple[int, int]:
        """(height, width) that suits a source of this shape."""
        if self.auto_resize:
            return fitted_size(rows, columns, self.resolution, self.step)
        return self.whole(rows, columns)

    def whole(self, height: float, width: float) -> tuple[int, int]:
        """The nearest size of whole tokens."""
        return whole_size(height, self.step), whole_size(width, self.step)

    def result(self, fitted: tuple[int, int]) -> tuple[int, int]:
        """(height, width) of the result beside a source that fits `fitted`."""
        return self.whole(self.height or fitted[0], self.width or fitted[1])

    def source(self, wanted: tuple[int, int]) -> tuple[int, int]:
        """(height, width) of a source that would have the size `wanted` if nothing was said."""
        if self.source_size is None:
            return wanted
        if isinstance(self.source_size, int):
            return fitted_size(*wanted, self.source_size, self.step)
        return self.whole(*self.source_size)


@dataclass(frozen=True, kw_only=True, eq=False)
class Reference:
    """One source, or a batch of them, of one size.

    Attributes:
        pixels: [B, 3, h, w] in [-1, 1]; None where latents were given.
        latents: [B, C, H, W]; None where pixels were given.
        size: (height, width) in pixels.
        result: (height, width) of the image to be generated.
        place: token columns by which it lies left of that; 0 shares its positions.
        aligned: whether it shares its places.
        step: side of a token in pixels.
    """

    pixels: Tensor | None
    latents: Tensor | None
    size: tuple[int, int]
    result: tuple[int, int]
    place: int
    aligned: bool
    step: int

    @property
    def batch(self) -> int:
        """B."""
        given = self.pixels if self.pixels is not None else self.latents
        assert given is not None
        return int(given.shape[0])

    def digest(self) -> str:
        """Of what is encoded."""
        given = self.pixels if self.pixels is not None else self.latents
        assert given is not None
        return tensor_digest(given)

    def picture(self) -> Tensor | None:
        """uint8 [B, 3, h, w], if it is known."""
        if self.pixels is None:
            return None
        return ((self.pixels + 1.0) * 127.5).round().to("cpu", torch.uint8)

    def ids(self, device: torch.device) -> Tensor:
        """[S, 3] rotary positions; those of the result where it is aligned."""
        rows, columns = self.size[0] // self.step, self.size[1] // self.step
        stretch = (self.result[0] / self.size[0], self.result[1] / self.size[1])
        return position_ids(
            rows,
            columns,
            offset=(0, -self.place),
            stretch=stretch if self.aligned else (1.0, 1.0),
            device=device,
        )

    def tokens(self, vae: Any, device: torch.device, dtype: torch.dtype) -> Tensor:
        """[B, S, 4 C] packed latents."""
        latents = self.latents
        if latents is None:
            assert self.pixels is not None
            latents = encode_image(vae, self.pixels, device=device)
        return pack(latents).to(device=device, dtype=dtype)


def references(
    images: Sequence[ImageInput | Sequence[ImageInput]],
    spec: TaskSpec,
    sizes: Sizes,
    channels: int,
    mask: Any = None,
) -> tuple[Reference, ...]:
    """Fit and place the sources of a call; the first decides the size of the result.

    Aligned ones are resized to the result (or `sizes.source_size`) and share its positions. Others
    keep their shape and lie left of the result, the second left of the first and so on.

    Args:
        images: one entry per reference, itself an image or a batch.
        spec: of the task.
        sizes: what the call says.
        channels: of latents; a tensor [B, channels, H, W] is latents.
        mask: see `with_hole`.

    Raises:
        ValueError, TypeError: for an image or a mask that cannot be used.
    """
    found: list[Reference] = []
    for image in images:
        latents = pixels = None
        if isinstance(image, Tensor) and image.ndim == 4 and image.shape[1] == channels:
            latents = image
            own = fitted = _latent_size(image, sizes)
        else:
            pixels = to_pixels(image)
            own = (pixels.shape[-2], pixels.shape[-1])
            fitted = sizes.fit(*own)
        result = found[0].result if found else sizes.result(fitted)
        size = sizes.source(result if spec.aligned else fitted)
        if pixels is None:
            _require_latents_fit(own, size, mask)
        else:
            hole = None if mask is None else hole_mask(mask, own, pixels.shape[0])
            pixels = resize(pixels, size)
            pixels = pixels if hole is None else with_hole(pixels, hole)
        columns = sum(other.size[1] for other in found) + size[1]
        found.append(
            Reference(
                pixels=pixels,
                latents=latents,
                size=size,
                result=result,
                place=0 if spec.aligned else columns // sizes.step,
                aligned=spec.aligned,
                step=sizes.step,
            )
        )
    return tuple(found)


def _latent_size(latents: Tensor, sizes: Sizes) -> tuple[int, int]:
    height, width = latents.shape[-2:]
    if height % 2 or width % 2 or not latents.is_floating_point():
        raise ValueError(
            f"Latents must be float and of even height and width, got {latents.dtype} "
            f"{list(latents.shape)}: encode an image whose sides are multiples of {sizes.step}."
        )
    if not bool(latents.isfinite().all()):
        raise ValueError(
            "Latents must be finite, and these are not: half precision overflows in some "
            "autoencoders, encode in float32 or bfloat16."
        )
    return height * sizes.step // 2, width * sizes.step // 2


def _require_latents_fit(own: tuple[int, int], size: tuple[int, int], mask: Any) -> None:
    if mask is not None:
        raise ValueError(
            "mask_image= paints into pixels, and the source is latents: pass an image."
        )
    if own != size:
        raise ValueError(
            f"Latents of {own[0]} x {own[1]} pixels cannot be a source of {size[0]} x {size[1]}: "
            "pass the image, or that size."
        )


def with_hole(pixels: Tensor, hole: Tensor) -> Tensor:
    """Paint the hole grey, as the `inpaint` task does in training.

    Args:
        pixels: [B, 3, h, w] in [-1, 1].
        hole: float [1 or B, 1, any size]; from 0.5 on, a pixel is painted.
    """
    resized = F.interpolate(hole, size=pixels.shape[-2:], mode="area")
    return torch.where(resized >= 0.5, torch.full_like(pixels[:1, :1, :1, :1], HOLE), pixels)


def hole_mask(mask: Any, size: tuple[int, int], batch: int) -> Tensor:
    """A mask of any kind as float [1 or B, 1, h, w], 1 (white) in the hole.

    Raises:
        ValueError, TypeError: a kind, a size or a number that cannot be, or a mask without hole.
    """
    if isinstance(mask, (list, tuple)) and mask:
        found = torch.cat([hole_mask(one, size, 1) for one in mask])
    else:
        found = _mask_planes(mask)
    if tuple(found.shape[-2:]) != size or found.shape[0] not in (1, batch):
        raise ValueError(
            f"mask_image is {found.shape[0]} x {found.shape[-1]} x {found.shape[-2]} (number, "
            f"width, height), the source {batch} x {size[1]} x {size[0]}: give one mask of that "
            "size, or one per image."
        )
    if not bool((found >= 0.5).flatten(1).any(dim=1).all()):
        raise ValueError("mask_image has no hole: paint white what is to be filled.")
    return found


def _mask_planes(mask: Any) -> Tensor:
    """[B, 1, h, w] float32 in [0, 1]."""
    if isinstance(mask, Image.Image):
        mask = np.array(mask.convert("L"))
    if isinstance(mask, np.ndarray):
        if mask.ndim == 3 and mask.shape[-1] == 1:
            mask = mask[..., 0]
        mask = torch.from_numpy(np.ascontiguousarray(mask))
    if not isinstance(mask, Tensor):
        raise TypeError(
            f"mask_image must be PIL, numpy or a tensor, got {type(mask).__name__}: open a file "
            "first, diffusers.utils.load_image(...)."
        )
    if mask.ndim not in (2, 3, 4) or (mask.ndim == 4 and mask.shape[1] != 1) or not mask.numel():
        raise ValueError(
            f"mask_image must be [h, w], [B, h, w] or [B, 1, h, w], got {list(mask.shape)}."
        )
    planes = mask.reshape(-1, 1, *mask.shape[-2:]).to("cpu", torch.float32)
    planes = planes / 255.0 if mask.dtype == torch.uint8 else planes
    if not (math.isfinite(float(planes.sum())) and 0 <= planes.min() and planes.max() <= 1):
        raise ValueError("mask_image must be bool, uint8, or float in [0, 1].")
    return planes
