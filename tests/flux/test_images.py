"""Opening pictures of every kind, refusing the rest in one sentence, and fitting to a size."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from PIL import Image as PILImage

from prw_flux.data.images import Fit, ImageError, fit, open_image, open_map


@pytest.fixture
def pattern() -> np.ndarray:
    yy, xx = np.mgrid[:48, :64]
    return np.stack([yy * 4, xx * 3, 255 - yy * 2], -1).astype(np.uint8)


def test_plain_formats(tmp_path: Path, pattern: np.ndarray) -> None:
    for suffix in ("png", "bmp", "tiff", "ppm", "jpg", "webp"):
        path = tmp_path / f"a.{suffix}"
        PILImage.fromarray(pattern).save(
            path, **({"quality": 98} if suffix in ("jpg", "webp") else {})
        )
        image = open_image(path)
        assert image.shape == pattern.shape
        assert image.dtype == np.uint8
        assert image.flags["C_CONTIGUOUS"]
        assert image.flags["WRITEABLE"]
        assert np.abs(image.astype(int) - pattern).mean() < (
            3 if suffix in ("jpg", "webp") else 1e-9
        )


def test_exif_orientation(tmp_path: Path, pattern: np.ndarray) -> None:
    exif = PILImage.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise
    PILImage.fromarray(pattern).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(open_image(tmp_path / "a.png"), np.rot90(pattern, -1))


def test_sixteen_bits_are_scaled(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    PILImage.fromarray(ramp).save(tmp_path / "a.png")
    image = open_image(tmp_path / "a.png")
    assert image.shape == (64, 64, 3)
    np.testing.assert_array_equal(image[..., 1], np.rint(ramp / 257))
    np.testing.assert_array_equal(open_map(tmp_path / "a.png"), np.rint(ramp / 257))


def test_cmyk_palette_grey_and_transparency(tmp_path: Path, pattern: np.ndarray) -> None:
    rgb = PILImage.fromarray(pattern)
    rgb.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=98)
    assert np.abs(open_image(tmp_path / "cmyk.jpg").astype(int) - pattern).mean() < 4
    rgb.quantize(64).save(tmp_path / "palette.png")
    assert np.abs(open_image(tmp_path / "palette.png").astype(int) - pattern).mean() < 12
    rgb.convert("L").save(tmp_path / "grey.png")
    assert np.ptp(open_image(tmp_path / "grey.png"), axis=-1).max() == 0
    rgba = np.dstack([pattern, np.where(np.arange(64) < 32, 0, 255)[None].repeat(48, 0)])
    PILImage.fromarray(rgba.astype(np.uint8)).save(tmp_path / "rgba.png")
    image = open_image(tmp_path / "rgba.png")
    assert (image[:, :32] == 255).all()
    np.testing.assert_array_equal(image[:, 32:], pattern[:, 32:])


def reason(path: Path, **limits: int) -> str:
    with pytest.raises(ImageError) as caught:
        open_image(path, **limits)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    return caught.value.reason


def test_each_refusal_has_its_reason(tmp_path: Path, pattern: np.ndarray) -> None:
    picture = PILImage.fromarray(pattern)
    assert reason(tmp_path / "no.png") == "missing"
    (tmp_path / "text.png").write_text("not a picture")
    assert reason(tmp_path / "text.png") == "not an image"
    (tmp_path / "empty.jpg").touch()
    assert reason(tmp_path / "empty.jpg") == "not an image"
    PILImage.fromarray(pattern[:3, :3]).save(tmp_path / "tiny.png")
    assert reason(tmp_path / "tiny.png") == "too small"
    assert reason(tmp_path / "tiny.png", min_side=4) == "too small"
    assert open_image(tmp_path / "tiny.png", min_side=3).shape == (3, 3, 3)
    others = [PILImage.fromarray(np.roll(pattern, k, 1)) for k in (5, 10)]
    picture.save(tmp_path / "a.gif", save_all=True, append_images=others)
    picture.save(tmp_path / "a.webp", save_all=True, append_images=others)
    picture.save(tmp_path / "apng.png", save_all=True, append_images=others)
    picture.save(tmp_path / "pages.tiff", save_all=True, append_images=others)
    assert {reason(tmp_path / n) for n in ("a.gif", "a.webp", "apng.png")} == {"animated"}
    assert reason(tmp_path / "pages.tiff") == "several pages"
    picture.save(tmp_path / "still.gif")
    assert open_image(tmp_path / "still.gif").shape == (48, 64, 3)
    picture.convert("F").save(tmp_path / "float.tiff")
    assert reason(tmp_path / "float.tiff") == "unknown range"
    picture.save(tmp_path / "big.png")
    assert reason(tmp_path / "big.png", max_pixels=3000) == "too large"
    assert reason(tmp_path) in ("damaged", "missing")


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tiff", "bmp"])
def test_truncated_files(tmp_path: Path, suffix: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path = tmp_path / f"a.{suffix}"
    PILImage.fromarray(noise).save(path)
    whole = path.read_bytes()
    for share in (0.3, 0.6, 0.9):
        path.write_bytes(whole[: int(share * len(whole))])
        assert reason(path) in ("damaged", "not an image")


@given(st.integers(0, 2**32 - 1), st.integers(1, 30))
def test_corrupted_bytes_never_escape(
    tmp_path_factory: pytest.TempPathFactory, seed: int, count: int
) -> None:
    rng = np.random.default_rng(seed)
    path = tmp_path_factory.getbasetemp() / "corrupt"
    PILImage.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(
        path, format=str(rng.choice(["PNG", "JPEG", "GIF", "TIFF", "WEBP"]))
    )
    data = bytearray(path.read_bytes())
    for _ in range(count):
        data[int(rng.integers(len(data)))] = int(rng.integers(256))
    path.write_bytes(data)
    try:
        image = open_image(path)
    except ImageError:
        return
    assert image.ndim == 3
    assert image.dtype == np.uint8


def test_a_bomb_is_refused_unopened(tmp_path: Path) -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        crc = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + crc

    for side in (10_000, 60_000):
        header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
        data = chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")
        path = tmp_path / f"bomb{side}.png"
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + data)
        assert reason(path) == "too large"


def test_multi_picture_jpegs_of_phones_are_photos(tmp_path: Path, pattern: np.ndarray) -> None:
    picture = PILImage.fromarray(pattern)
    picture.save(tmp_path / "a.jpg", format="MPO", save_all=True, append_images=[picture])
    assert open_image(tmp_path / "a.jpg").shape == pattern.shape


sizes = st.integers(1, 12).map(lambda n: 16 * n)


@given(st.integers(8, 200), st.integers(8, 200), sizes, sizes)
def test_fit_reaches_the_size_and_keeps_the_proportions(h: int, w: int, th: int, tw: int) -> None:
    there = Fit(h, w, (th, tw))
    image = np.random.default_rng(0).integers(0, 256, (h, w, 3), dtype=np.uint8)
    assert there.image(image).shape == (th, tw, 3)
    assert there.mask(image[..., 0] > 127).shape == (th, tw)
    assert set(np.unique(there.labels(image[..., 0]))) <= set(np.unique(image[..., 0]))
    x0, y0, x1, y1 = there.window
    assert min(x0, y0) >= -1e-9
    assert x1 <= w + 1e-9
    assert y1 <= h + 1e-9
    assert (x1 - x0) / tw == pytest.approx((y1 - y0) / th)
    assert max((x1 - x0) / w, (y1 - y0) / h) == pytest.approx(1)


@given(st.data(), st.integers(96, 300), st.integers(96, 300))
def test_boxes_and_masks_move_together(data: st.DataObject, height: int, width: int) -> None:
    x, y = data.draw(st.integers(0, width - 30)), data.draw(st.integers(0, height - 30))
    mask = np.zeros((height, width), bool)
    mask[y : y + 30, x : x + 30] = True
    there = Fit(height, width, 96)
    moved = there.mask(mask)
    box = there.box((x, y, x + 30, y + 30))
    assume(box[2] - box[0] > 2 and box[3] - box[1] > 2)
    rows, columns = np.flatnonzero(moved.any(1)), np.flatnonzero(moved.any(0))
    extent = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
    np.testing.assert_allclose(extent, box, atol=1.0)


def test_sizes_are_multiples_of_sixteen() -> None:
    image = np.zeros((40, 40, 3), np.uint8)
    for wrong in (0, 8, 100, (96, 97)):
        with pytest.raises(ValueError, match="multiple of 16"):
            fit(image, wrong)
    with pytest.raises(ValueError, match="expected 40 x 40"):
        Fit(40, 40, 32).image(np.zeros((41, 40, 3), np.uint8))
    same = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    np.testing.assert_array_equal(fit(same, 32), same)
