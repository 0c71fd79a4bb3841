"""Packing, positions, pixels and latents."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, FluxPipeline
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.testing import assert_close

from prw_flux.encode import (
    decode_latents,
    encode_image,
    fitted_size,
    pack,
    position_ids,
    sequence_length,
    source_offset,
    to_pixels,
    unpack,
)

even = st.integers(1, 5).map(lambda n: 2 * n)


@given(st.integers(1, 3), st.integers(1, 4), even, even)
def test_packing_is_fluxes(batch: int, channels: int, height: int, width: int) -> None:
    latents = torch.randn(batch, channels, height, width)
    tokens = pack(latents)
    assert torch.equal(tokens, FluxPipeline._pack_latents(latents, batch, channels, height, width))
    assert torch.equal(unpack(tokens, height, width), latents)


def test_odd_grids_do_not_pack() -> None:
    with pytest.raises(ValueError, match="must be even .* 4 x 3"):
        pack(torch.zeros(1, 16, 4, 3))
    with pytest.raises(ValueError, match="5 tokens do not fill a 4 x 4 grid"):
        unpack(torch.zeros(1, 5, 64), 4, 4)


def test_positions_are_fluxes() -> None:
    wanted = FluxPipeline._prepare_latent_image_ids(1, 3, 5, "cpu", torch.float32)
    assert torch.equal(position_ids(3, 5), wanted)
    beside = position_ids(3, 5, offset=source_offset(False, 5))
    assert torch.equal(beside - wanted, torch.tensor([0.0, 0.0, -5.0]).expand(15, 3))
    assert source_offset(True, 5) == (0, 0)


def test_every_kind_of_image_is_the_same_pixels() -> None:
    array = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    wanted = to_pixels(Image.fromarray(array))
    assert wanted.shape == (1, 3, 6, 8) and wanted.min() >= -1.0 and wanted.max() <= 1.0
    for image in (array, array[None], tensor, tensor[None], tensor / 255, [array], (tensor,)):
        assert torch.equal(to_pixels(image), wanted)
    assert torch.equal(to_pixels([array, array]), wanted.expand(2, -1, -1, -1))
    assert_close(to_pixels(array.astype(np.float64) / 255), wanted)


def test_other_modes_become_rgb() -> None:
    for mode in ("L", "RGBA", "P", "CMYK", "1"):
        assert to_pixels(Image.new(mode, (4, 4))).shape == (1, 3, 4, 4)


@given(st.integers(1, 5000), st.integers(1, 5000), st.none() | st.integers(16, 512))
def test_sizes_are_whole_and_near_the_area(height: int, width: int, resolution: int | None) -> None:
    rows, columns = fitted_size(height, width, resolution, 16)
    assert rows % 16 == columns % 16 == 0 and min(rows, columns) >= 16
    if resolution is None and height * width <= 1024**2:
        assert abs(rows - max(height, 16)) <= 8 and abs(columns - max(width, 16)) <= 8
    elif min(rows, columns) > 16:
        side = resolution or 1024
        assert abs(rows - side * (height / width) ** 0.5) <= 8.001


def test_resizing_keeps_the_range_and_flat_colour() -> None:
    flat = np.full((10, 20, 3), 200, dtype=np.uint8)
    resized = to_pixels(flat, (16, 32))
    assert_close(resized, to_pixels(flat)[:, :, :1, :1].expand(1, 3, 16, 32))
    edges = np.zeros((8, 8, 3), dtype=np.uint8)
    edges[:, 4:] = 255
    assert to_pixels(edges, (32, 32)).abs().max() <= 1.0


@pytest.mark.parametrize(
    ("image", "words"),
    [
        ([], "list of images is empty"),
        ("photo.png", "must be PIL, numpy or a tensor, got str"),
        (np.zeros((4, 4), dtype=np.uint8), r"\[h, w, 3\]"),
        (np.zeros((4, 4, 4), dtype=np.uint8), r"\[h, w, 3\]"),
        (torch.zeros(4, 4, 3), r"\[3, h, w\]"),
        (np.full((4, 4, 3), 255.0), r"in \[0, 1\], got values from 255 to 255"),
        (torch.full((3, 4, 4), torch.nan), r"in \[0, 1\]"),
        (np.zeros((4, 4, 3), dtype=np.int64), "uint8 or float"),
        (Image.new("I;16", (4, 4)), "convert it to 8 bits"),
    ],
)
def test_what_is_no_image(image: Any, words: str) -> None:
    with pytest.raises((TypeError, ValueError), match=words):
        to_pixels(image)


@pytest.mark.parametrize("kind", ["kl", "tiny"])
def test_latents_are_scaled_and_shifted(kind: str) -> None:
    if kind == "kl":
        vae = AutoencoderKL(
            block_out_channels=(4, 4),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=2,
            latent_channels=16,
            scaling_factor=0.5,
            shift_factor=0.25,
        )
        raw = vae.encode(torch.zeros(1, 3, 8, 8)).latent_dist.mode()
    else:
        vae = AutoencoderTiny(
            encoder_block_out_channels=(4, 4),
            decoder_block_out_channels=(4, 4),
            num_encoder_blocks=(1, 1),
            num_decoder_blocks=(1, 1),
            latent_channels=16,
            scaling_factor=0.5,
            shift_factor=0.25,
        )
        raw = vae.encode(torch.zeros(1, 3, 8, 8)).latents
    latents = encode_image(vae, torch.zeros(1, 3, 8, 8))
    assert_close(latents, (raw - 0.25) * 0.5)
    assert_close(decode_latents(vae, latents), vae.decode(raw).sample.clamp(-1.0, 1.0))


def test_text_length_follows_the_tokenizer() -> None:
    class Tokenizer:
        model_max_length = 64

    class Endless:
        model_max_length = int(1e30)

    assert [sequence_length(t) for t in (Tokenizer(), Endless(), None)] == [64, 512, 512]
