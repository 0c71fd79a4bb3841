"""From images and prompts to what the transformer reads, and back.

Shapes: B samples, C latent channels, H x W latent grid, S = H/2 * W/2 packed tokens, h x w pixels.
Pixels are float in [-1, 1], channels first.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny
from einops import rearrange
from PIL import Image
from torch import Tensor

ImageInput = Image.Image | np.ndarray[Any, Any] | Tensor
"""PIL image; uint8 [h, w, 3] or [B, h, w, 3] (or float in [0, 1]); tensor [3, h, w] or
[B, 3, h, w], uint8 or float in [0, 1]."""


def pack(latents_BCHW: Tensor) -> Tensor:
    """2x2 neighbours become one token: [B, C, H, W] -> [B, H/2 * W/2, 4 C], channel slowest."""
    height, width = latents_BCHW.shape[-2:]
    if height % 2 or width % 2:
        raise ValueError(f"A latent grid must be even to be packed, got {height} x {width}.")
    return rearrange(latents_BCHW, "b c (h i) (w j) -> b (h w) (c i j)", i=2, j=2)


def unpack(tokens_BSC: Tensor, height: int, width: int) -> Tensor:
    """Inverse of `pack` for a latent grid of height x width: [B, S, 4 C] -> [B, C, H, W]."""
    if tokens_BSC.shape[1] * 4 != height * width:
        raise ValueError(f"{tokens_BSC.shape[1]} tokens do not fill a {height} x {width} grid.")
    return rearrange(tokens_BSC, "b (h w) (c i j) -> b c (h i) (w j)", h=height // 2, i=2, j=2)


def position_ids(
    rows: int,
    columns: int,
    *,
    offset: tuple[int, int] = (0, 0),
    stretch: tuple[float, float] = (1.0, 1.0),
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """[rows * columns, 3] rotary positions of packed tokens.

    Row i lies at (i + 1/2) s - 1/2 + offset, so that a source of half the size, stretched by
    s = 2, covers the image that is generated; columns likewise. Offset (0, 0) shares the positions
    of that image (aligned tasks), (0, -columns) lies beside it (customised generation).
    """
    ids = torch.zeros(rows, columns, 3)
    ids[..., 1] = ((torch.arange(rows) + 0.5) * stretch[0] - 0.5 + offset[0])[:, None]
    ids[..., 2] = ((torch.arange(columns) + 0.5) * stretch[1] - 0.5 + offset[1])[None, :]
    return ids.reshape(-1, 3).to(device=device, dtype=dtype)


def source_offset(aligned: bool, columns: int) -> tuple[int, int]:
    """Shift of the source's positions: none for an aligned task, else one source width left."""
    return (0, 0) if aligned else (0, -columns)


def whole_size(pixels: float, step: int) -> int:
    """The nearest multiple of `step`, and at least one."""
    return max(step, round(pixels / step) * step)


def fitted_size(height: int, width: int, resolution: float | None, step: int) -> tuple[int, int]:
    """The shape height x width at an area of resolution^2 pixels, in multiples of `step`.

    Without a resolution the size stays, unless it is above a megapixel.
    """
    scale = (resolution or 1024) / math.sqrt(height * width)
    if resolution is None:
        scale = min(scale, 1.0)
    return whole_size(height * scale, step), whole_size(width * scale, step)


def to_pixels(
    image: ImageInput | Sequence[ImageInput], size: tuple[int, int] | None = None
) -> Tensor:
    """Any image input as pixels.

    Args:
        image: One image or a batch; a list is a batch, its images of one size unless `size` is set.
        size: (height, width) to resize to, without cropping; None keeps the size.

    Returns:
        [B, 3, h, w] float32 in [-1, 1].
    """
    if isinstance(image, (list, tuple)):
        if not image:
            raise ValueError("The list of images is empty: leave it out, or give an image.")
        parts = [to_pixels(one, size) for one in image]
        sizes = {f"{one.shape[-1]} x {one.shape[-2]}" for one in parts}
        if len(sizes) > 1:
            raise ValueError(
                f"The images of a batch differ in size ({', '.join(sorted(sizes))}): resize them "
                "to one size, or give each a call of its own."
            )
        return torch.cat(parts)
    pixels = 2.0 * _unit_range(image) - 1.0
    return pixels if size is None else resize(pixels, size)


def resize(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """[B, 3, h, w] in [-1, 1] to (height, width), bicubic, without aliasing or cropping."""
    if tuple(pixels.shape[-2:]) == tuple(size):
        return pixels
    resized = F.interpolate(pixels, size=size, mode="bicubic", antialias=True)
    return resized.clamp(-1.0, 1.0)


def _unit_range(image: Any) -> Tensor:
    """[B, 3, h, w] float32 in [0, 1]."""
    if isinstance(image, Image.Image):
        if image.mode in ("I", "F") or image.mode.startswith("I;16"):
            raise ValueError(
                f"An image of mode {image.mode!r} has no agreed brightness range: convert it to 8 "
                "bits per channel first."
            )
        return _channels_first(np.array(image.convert("RGB")))
    if isinstance(image, np.ndarray):
        return _channels_first(image)
    if not isinstance(image, Tensor):
        how = ": open it first, diffusers.utils.load_image(...)" if _is_path(image) else ""
        raise TypeError(
            f"An image must be PIL, numpy or a tensor, got {type(image).__name__}{how}."
        )
    tensor = image if image.ndim == 4 else image[None]
    if tensor.ndim != 4 or tensor.shape[1] != 3:
        raise ValueError(
            f"An image tensor must be [3, h, w] or [B, 3, h, w], or latents [B, C, H, W] that are "
            f"not packed, got {list(image.shape)}."
        )
    return _scaled(tensor.detach())


def _is_path(image: Any) -> bool:
    return isinstance(image, (str, os.PathLike))


def _channels_first(array: np.ndarray[Any, Any]) -> Tensor:
    batch = array if array.ndim == 4 else array[None]
    if batch.ndim != 4 or batch.shape[-1] != 3:
        raise ValueError(
            f"An image array must be [h, w, 3] or [B, h, w, 3], got {list(array.shape)}."
        )
    return _scaled(torch.from_numpy(np.ascontiguousarray(batch)).permute(0, 3, 1, 2))


def _scaled(tensor: Tensor) -> Tensor:
    if not tensor.numel():
        raise ValueError(f"An image has no pixels: its shape is {list(tensor.shape)}.")
    if tensor.dtype == torch.uint8:
        return tensor.to(torch.float32).contiguous() / 255.0
    if not tensor.is_floating_point():
        raise TypeError(f"Pixels must be uint8 or float in [0, 1], got {tensor.dtype}.")
    low, high = float(tensor.min()), float(tensor.max())
    if not (low >= 0.0 and high <= 1.0):
        raise ValueError(f"Float pixels must be in [0, 1], got values from {low:g} to {high:g}.")
    return tensor.to(torch.float32).contiguous()  # the memory format chooses the convolution


@torch.no_grad()
def encode_image(vae: Any, pixels: Tensor, *, device: torch.device | str | None = None) -> Tensor:
    """Latents z = (encoding - shift) * scale: [B, 3, h, w] in [-1, 1] -> [B, C, h/8, w/8].

    Deterministic: the mode of AutoencoderKL's posterior, or AutoencoderTiny's latents. `device` is
    where it runs, for an autoencoder that is offloaded between its calls.
    """
    encoded = vae.encode(pixels.to(device=device or vae.device, dtype=vae.dtype))
    latents: Tensor = (
        encoded.latents if isinstance(vae, AutoencoderTiny) else encoded.latent_dist.mode()
    )
    return (latents - _shift(vae)) * float(vae.config.scaling_factor)


@torch.no_grad()
def decode_latents(
    vae: Any, latents_BCHW: Tensor, *, device: torch.device | str | None = None
) -> Tensor:
    """Inverse of `encode_image`, clamped: [B, C, H, W] -> [B, 3, 8 H, 8 W] in [-1, 1]."""
    latents = latents_BCHW / vae.config.scaling_factor + _shift(vae)
    placed = latents.to(device=device or vae.device, dtype=vae.dtype)
    image: Tensor = vae.decode(placed, return_dict=False)[0]
    return image.clamp(-1.0, 1.0)


def _shift(vae: Any) -> float:
    return float(vae.config.shift_factor or 0.0)


def sequence_length(tokenizer_2: Any) -> int:
    """Text tokens of a prompt: the second tokenizer's limit, at most FLUX.1's 512."""
    return min(512, int(tokenizer_2.model_max_length)) if tokenizer_2 is not None else 512


@torch.no_grad()
def encode_prompts(
    prompts: Sequence[str],
    *,
    tokenizer: Any,
    text_encoder: Any,
    tokenizer_2: Any,
    text_encoder_2: Any,
    max_sequence_length: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Embed prompts as FLUX.1 does: no attention mask, padding included.

    Args:
        prompts: B texts.
        tokenizer, text_encoder: CLIP, whose pooled output modulates the transformer.
        tokenizer_2, text_encoder_2: T5, whose tokens it attends to.
        max_sequence_length: Tokens L of the second; None takes `sequence_length(tokenizer_2)`.

    Returns:
        text [B, L, T5 width] and pooled [B, CLIP width].
    """
    length = max_sequence_length or sequence_length(tokenizer_2)
    ids = _token_ids(tokenizer_2, prompts, length).to(text_encoder_2.device)
    text: Tensor = text_encoder_2(ids, output_hidden_states=False)[0]
    return text, encode_pooled(prompts, tokenizer=tokenizer, text_encoder=text_encoder)


@torch.no_grad()
def encode_pooled(prompts: Sequence[str], *, tokenizer: Any, text_encoder: Any) -> Tensor:
    """[B, CLIP width] pooled embedding of each prompt."""
    ids = _token_ids(tokenizer, prompts, tokenizer.model_max_length).to(text_encoder.device)
    pooled: Tensor = text_encoder(ids, output_hidden_states=False).pooler_output
    return pooled


def _token_ids(tokenizer: Any, prompts: Sequence[str], length: int) -> Tensor:
    ids: Tensor = tokenizer(
        list(prompts),
        padding="max_length",
        max_length=length,
        truncation=True,
        return_tensors="pt",
    ).input_ids
    return ids
