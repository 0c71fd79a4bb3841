"""Line maps: white lines on black where the edges are, the same at every size."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prw_flux.data.extractors import EXTRACTORS, canny
from prw_flux.data.images import open_image


def square(size: int) -> np.ndarray:
    image = np.full((size, size, 3), 220, np.uint8)
    image[size // 4 : 3 * size // 4, size // 4 : 3 * size // 4] = (200, 40, 40)
    return image


@pytest.mark.parametrize("name", list(EXTRACTORS))
@pytest.mark.parametrize("size", [64, 96, 512])
def test_lines_lie_on_the_edges(name: str, size: int) -> None:
    lines = EXTRACTORS[name](square(size))
    assert lines.shape == (size, size)
    assert lines.dtype == np.uint8
    bright = lines > 127
    assert bright.any()
    yy, xx = np.nonzero(bright)
    low, high = size // 4, 3 * size // 4
    near = np.minimum.reduce([abs(yy - low), abs(yy - high), abs(xx - low), abs(xx - high)])
    assert near.max() <= max(2, size // 48)
    middle = lines[size // 2 - 4 : size // 2 + 4, size // 2 - 4 : size // 2 + 4]
    assert middle.max() == 0


@pytest.mark.parametrize("name", list(EXTRACTORS))
@given(level=st.integers(0, 255), seed=st.integers(0, 1000))
def test_flat_pictures_and_sensor_noise_stay_black(name: str, level: int, seed: int) -> None:
    flat = np.full((64, 64, 3), level, np.uint8)
    assert not EXTRACTORS[name](flat).any()
    noise = np.random.default_rng(seed).normal(0, 1, flat.shape)
    noisy = np.clip(flat + noise, 0, 255).astype(np.uint8)
    assert (EXTRACTORS[name](noisy) > 127).mean() < 0.01


@pytest.mark.parametrize("name", list(EXTRACTORS))
def test_wrong_arrays_are_named(name: str) -> None:
    for wrong in (np.zeros((8, 8), np.uint8), np.zeros((8, 8, 3), np.float32)):
        with pytest.raises(ValueError, match=f"{name} needs uint8"):
            EXTRACTORS[name](wrong)


def test_colour_edges_of_equal_luma_are_seen() -> None:
    image = np.zeros((64, 64, 3), np.uint8)
    image[:, :32], image[:, 32:] = (200, 50, 50), (50, 126, 50)
    assert np.ptp(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)) <= 3
    for extractor in EXTRACTORS.values():
        assert (extractor(image)[:, 28:36] > 127).any(axis=1).all()


def test_real_photos_give_lines(assets: Path) -> None:
    for path in sorted((assets / "kodak").glob("*.jpg")):
        image = open_image(path)
        shares = {name: (ex(image) > 127).mean() for name, ex in EXTRACTORS.items()}
        assert all(0.005 < share < 0.4 for share in shares.values()), (path.name, shares)
        np.testing.assert_array_equal(canny(image), cv2.Canny(image, 100, 200))
