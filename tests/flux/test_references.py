"""Where a source lies, how large it is, and what a mask does to it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from prw_flux.adapter import TaskSpec
from prw_flux.encode import position_ids, resize, to_pixels
from prw_flux.references import HOLE, Reference, Sizes, hole_mask, references

EXACT = {"rtol": 0.0, "atol": 0.0}
ALIGNED = TaskSpec("inpaint", "Fill.", True)
BESIDE = TaskSpec("customise", "Show.", False)
CPU = torch.device("cpu")


def fitted(images: list[Any], spec: TaskSpec, mask: Any = None, **sizes: Any) -> Any:
    return references(images, spec, Sizes(**sizes), 16, mask)


@pytest.mark.parametrize(
    "sizes, result, source",
    [
        ({}, (64, 32), (64, 32)),
        ({"resolution": 32}, (48, 16), (48, 16)),
        ({"height": 128, "width": 96}, (128, 96), (128, 96)),
        ({"height": 128, "width": 96, "source_size": (64, 48)}, (128, 96), (64, 48)),
        ({"height": 128, "width": 128, "source_size": 64}, (128, 128), (64, 64)),
        ({"resolution": 32, "auto_resize": False}, (64, 32), (64, 32)),
    ],
)
def test_an_aligned_source_covers_the_result(
    photo: Any, sizes: dict[str, Any], result: tuple[int, int], source: tuple[int, int]
) -> None:
    (one,) = fitted([photo(64, 32)], ALIGNED, **sizes)
    assert one.result == result and one.size == source and one.place == 0
    ids = one.ids(CPU).reshape(source[0] // 16, source[1] // 16, 3)
    if source == result:
        assert_close(one.ids(CPU), position_ids(result[0] // 16, result[1] // 16), **EXACT)
    # the middle of the source's positions is the middle of the result's
    middle = ids.mean(dim=(0, 1))
    assert_close(middle, torch.tensor([0.0, result[0] / 32 - 0.5, result[1] / 32 - 0.5]), **EXACT)
    assert_close(ids[0, 0, 1], torch.tensor(result[0] / source[0] / 2 - 0.5), **EXACT)


def test_sources_beside_lie_left_of_each_other(photo: Any) -> None:
    one, two = fitted([photo(16, 64), photo(32, 16)], BESIDE, height=32, width=32)
    assert one.size == (16, 64) and two.size == (32, 16) and one.result == two.result == (32, 32)
    assert one.ids(CPU)[:, 2].tolist() == [-4.0, -3.0, -2.0, -1.0]
    assert two.ids(CPU)[:, 2].tolist() == [-5.0, -5.0]
    assert one.digest() != two.digest()
    (small,) = fitted([photo(64, 64)], BESIDE, source_size=32, height=64, width=64)
    assert small.size == (32, 32) and small.ids(CPU)[:, 2].tolist() == [-2.0, -1.0] * 2


def test_latents_are_taken_as_they_are(photo: Any) -> None:
    latents = torch.randn(2, 16, 4, 8)
    (one,) = fitted([latents], ALIGNED)
    assert one.latents is latents and one.size == one.result == (32, 64) and one.batch == 2
    assert one.picture() is None
    assert one.tokens(None, CPU, torch.float32).shape == (2, 8, 64)
    with pytest.raises(ValueError, match="of 32 x 64 pixels cannot be a source of 64 x 64"):
        fitted([latents], ALIGNED, height=64, width=64)
    with pytest.raises(ValueError, match=r"even height and width.*encode an image"):
        fitted([torch.randn(1, 16, 3, 4)], ALIGNED)
    with pytest.raises(ValueError, match="paints into pixels"):
        fitted([latents], ALIGNED, mask=np.ones((32, 64), bool))


def masks() -> list[Any]:
    array = np.zeros((32, 32), np.uint8)
    array[8:24, 16:] = 255
    tensor = torch.from_numpy(array)
    return [
        array, array > 0, Image.fromarray(array), tensor, tensor[None], tensor[None, None] / 255.0,
        [Image.fromarray(array)],
    ]  # fmt: skip


@pytest.mark.parametrize("index", range(7))
def test_the_hole_is_grey_and_sharp(photo: Any, index: int) -> None:
    mask = masks()[index]
    plain = to_pixels(photo())
    (one,) = fitted([photo()], ALIGNED, mask)
    hole = torch.zeros(32, 32, dtype=torch.bool)
    hole[8:24, 16:] = True
    assert one.pixels is not None
    assert (one.pixels[..., hole] == HOLE).all()
    assert_close(one.pixels[..., ~hole], plain[..., ~hole], **EXACT)
    picture = one.picture()
    assert picture is not None and (picture[..., hole] == 127).all()
    (large,) = fitted([photo()], ALIGNED, mask, height=64, width=64)
    assert (large.pixels[..., 16:48, 32:] == HOLE).all()
    assert_close(large.pixels[..., :16, :], resize(plain, (64, 64))[..., :16, :], **EXACT)


def test_masks_that_cannot_be(photo: Any) -> None:
    def refused(match: str, mask: Any, batch: int = 1) -> None:
        with pytest.raises((ValueError, TypeError), match=match):
            hole_mask(mask, (32, 32), batch)

    refused("has no hole: paint white", np.zeros((32, 32), bool))
    refused("1 x 32 x 16 .*the source 1 x 32 x 32: give one mask", np.ones((16, 32), bool))
    refused("2 x 32 x 32", [np.ones((32, 32), bool)] * 2, batch=3)
    refused(r"got str: open a file first, diffusers\.utils\.load_image", "mask.png")
    refused(r"got \[0, 32, 32\]", torch.ones(0, 32, 32))
    refused("got list", [])
    refused(r"\[h, w\].*got \[1, 3, 32, 32\]", torch.ones(1, 3, 32, 32))
    refused("bool, uint8, or float in", torch.full((32, 32), 2.0))
    refused("bool, uint8, or float in", torch.full((32, 32), float("nan")))
    assert len(hole_mask([np.ones((32, 32), bool)] * 3, (32, 32), 3)) == 3
    assert hole_mask(np.ones((32, 32, 1), bool), (32, 32), 1).shape == (1, 1, 32, 32)


def test_a_batch_has_one_size(photo: Any) -> None:
    (both,) = fitted([[photo(), photo(seed=1)]], ALIGNED)
    assert isinstance(both, Reference) and both.batch == 2
    with pytest.raises(ValueError, match=r"differ in size \(32 x 16, 32 x 32\): resize"):
        fitted([[photo(), photo(16, 32)]], ALIGNED)


def test_images_that_cannot_be(photo: Any) -> None:
    def refused(match: str, image: Any) -> None:
        with pytest.raises((ValueError, TypeError), match=match):
            fitted([image], ALIGNED)

    refused(r"got str: open it first, diffusers\.utils\.load_image", "photo.png")
    refused("got dict", {})
    refused("mode 'F' .* convert it", photo().convert("F"))
    refused(r"\[h, w, 3\].*got \[32, 32\]", np.zeros((32, 32), np.uint8))
    refused(r"\[3, h, w\].*got \[4, 32, 32\]", torch.zeros(4, 32, 32))
    refused("values from 0 to 255", np.linspace(0, 255, 3072, dtype="f4").reshape(32, 32, 3))
    refused("uint8 or float in", np.zeros((32, 32, 3), np.int64))
    refused("no pixels", np.zeros((0, 32, 3), np.uint8))
    refused("list of images is empty", [])
    refused(r"latents \[B, C, H, W\] that are not packed, got \[1, 4, 64\]", torch.zeros(1, 4, 64))
    refused("Latents must be finite", torch.full((1, 16, 4, 4), float("nan")))
