"""Every metric against an implementation that is not ours, or a case worked out by hand."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy.spatial.distance import cosine as scipy_cosine_distance
from skimage.metrics import mean_squared_error
from sklearn.metrics import f1_score, jaccard_score
from torch.nn import functional as F

from prw_flux.evaluation.metrics import (
    Confusion,
    box_accuracy,
    cosine,
    cumulative_iou,
    depth_rmse,
    directional_similarity,
    edge_f1,
    frechet_distance,
    l1,
    l2,
    mask_overlap,
    mean_cosine,
    mean_iou,
    ms_ssim,
    resized_like,
    unit,
)

TIGHT = {"rtol": 1e-9, "atol": 1e-12}


def picture(seed: int, height: int = 40, width: int = 30) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def vectors(seed: int, count: int, width: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, width)).astype(np.float32)


# Pixels -----------------------------------------------------------------------------------------


def test_l1_and_l2_are_those_of_torch_and_skimage() -> None:
    a, b = picture(0), picture(1)
    ta, tb = (torch.from_numpy(x).double() / 255 for x in (a, b))
    np.testing.assert_allclose(l1(a, b), float(F.l1_loss(ta, tb)), **TIGHT)
    np.testing.assert_allclose(l2(a, b), mean_squared_error(a / 255, b / 255), **TIGHT)
    assert l1(a, a) == l2(a, a) == 0.0
    black, white = np.zeros_like(a), np.full_like(a, 255)
    assert l1(black, white) == l2(black, white) == 1.0


def test_an_output_of_another_size_is_brought_to_the_reference_as_pil_does() -> None:
    a, b = picture(0, 64, 48), picture(1)
    expected = np.asarray(Image.fromarray(a).resize((30, 40)))  # PIL's default filter
    np.testing.assert_array_equal(resized_like(a, b), expected)
    assert l1(a, b) == l1(expected, b)


@pytest.mark.parametrize("wrong", [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3), np.float32)])
def test_pictures_are_uint8_rgb(wrong: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"output must be uint8 \[H, W, 3\]"):
        l1(wrong, picture(0))


# Embeddings -------------------------------------------------------------------------------------


@given(st.integers(0, 1000), st.floats(0.01, 100))
def test_cosine_is_scipys_and_ignores_lengths(seed: int, scale: float) -> None:
    a, b = vectors(seed, 5, 7), vectors(seed + 1, 5, 7)
    expected = [
        1 - scipy_cosine_distance(x, y)
        for x, y in zip(a.astype(float), b.astype(float), strict=True)
    ]
    np.testing.assert_allclose(cosine(a, b), expected, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(cosine(a * np.float32(scale), b), expected, rtol=1e-5, atol=1e-5)


def test_mean_cosine_is_over_all_pairs() -> None:
    a, b = vectors(0, 4, 6), vectors(1, 3, 6)
    each = F.cosine_similarity(torch.from_numpy(a)[:, None], torch.from_numpy(b)[None], dim=-1)
    np.testing.assert_allclose(mean_cosine(a, b), float(each.mean()), rtol=1e-5)


def test_directional_similarity_is_the_one_of_instruct_pix2pix() -> None:
    source, output, before, after = (vectors(seed, 5, 8) for seed in range(4))
    a, b, c, d = (F.normalize(torch.from_numpy(x).double(), dim=-1)
                  for x in (source, output, before, after))  # fmt: skip
    expected = F.cosine_similarity(b - a, d - c, dim=-1).numpy()
    actual = directional_similarity(source, output, before, after)
    np.testing.assert_allclose(actual, expected, **TIGHT)
    np.testing.assert_array_equal(directional_similarity(source, source, before, after), 0.0)


def test_a_vector_without_direction_is_named() -> None:
    broken = vectors(0, 3, 4)
    broken[1] = 0
    with pytest.raises(ValueError, match="number 1 of 3"):
        unit(broken)
    with pytest.raises(ValueError, match="widths 4 and 5"):
        mean_cosine(vectors(0, 3, 4), vectors(0, 3, 5))
    with pytest.raises(ValueError, match="two equal"):
        cosine(vectors(0, 3, 4), vectors(0, 2, 4))


# Structure --------------------------------------------------------------------------------------


def test_edge_f1_is_sklearns_and_torchmetrics_over_the_stack() -> None:
    from torchmetrics.classification import BinaryF1Score

    rng = np.random.default_rng(0)
    a, b = (rng.random((4, 16, 16)) < share for share in (0.2, 0.3))
    np.testing.assert_allclose(edge_f1(a, b), f1_score(b.ravel(), a.ravel()), **TIGHT)
    theirs = BinaryF1Score()(
        torch.from_numpy(a).int().flatten(), torch.from_numpy(b).int().flatten()
    )
    np.testing.assert_allclose(edge_f1(a, b), float(theirs), rtol=1e-6)
    blank = np.zeros((2, 2), bool)
    assert edge_f1(blank, blank) == 0.0 and edge_f1(~blank, blank) == 0.0
    assert edge_f1(~blank, ~blank) == 1.0


def test_depth_rmse_by_hand() -> None:
    # estimate 1/2, 1 -> 127 (cut), 255; label 10, 20 -> 0, 255
    found, wanted = np.array([[1.0, 2.0]]), np.array([[10.0, 20.0]])
    np.testing.assert_allclose(depth_rmse(found, wanted), np.sqrt(127**2 / 2), **TIGHT)
    assert depth_rmse(np.array([[0.0, 3.0]]), wanted) == 0.0
    large = np.kron(np.array([[0.0, 1.0], [0.5, 0.25]]), np.ones((8, 8)))
    assert depth_rmse(large, large[::2, ::2]) < 20.0 < depth_rmse(large[::-1], large)
    with pytest.raises(ValueError, match="nowhere positive"):
        depth_rmse(np.zeros((2, 2)), np.ones((2, 2)))


def test_ms_ssim_equals_its_definition_from_skimages_parts() -> None:
    """Wang et al. 2003: contrast-structure of five scales, luminance of the last, their weights."""
    rng = np.random.default_rng(1)
    a = np.clip(
        np.kron(rng.random((23, 23)), np.ones((8, 8))) + 0.05 * rng.random((184, 184)), 0, 1
    )
    b = np.clip(0.8 * a + 0.2 * rng.random(a.shape), 0, 1)
    np.testing.assert_allclose(ms_ssim(a, b), _ms_ssim_by_hand(a, b), atol=1e-4)
    assert ms_ssim(a, a) == pytest.approx(1.0, abs=1e-6)
    with pytest.raises(ValueError, match="161"):
        ms_ssim(a[:100], b[:100])
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        ms_ssim(a * 255, b)


def _ms_ssim_by_hand(a: np.ndarray, b: np.ndarray) -> float:
    from scipy.ndimage import correlate1d

    ramp = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    ramp /= ramp.sum()

    def mean(x: np.ndarray) -> np.ndarray:
        return correlate1d(correlate1d(x, ramp, 0), ramp, 1)[5:-5, 5:-5]

    value = 1.0
    for scale, weight in enumerate((0.0448, 0.2856, 0.3001, 0.2363, 0.1333)):
        ma, mb = mean(a), mean(b)
        va, vb, vab = mean(a * a) - ma**2, mean(b * b) - mb**2, mean(a * b) - ma * mb
        structure = (2 * vab + 0.03**2) / (va + vb + 0.03**2)
        light = (2 * ma * mb + 0.01**2) / (ma**2 + mb**2 + 0.01**2)
        value *= float((structure * light if scale == 4 else structure).mean()) ** weight
        a, b = (x[: len(x) // 2 * 2, : x.shape[1] // 2 * 2] for x in (a, b))
        a, b = (x.reshape(len(x) // 2, 2, -1, 2).mean((1, 3)) for x in (a, b))
    return value


def test_miou_is_that_of_all_pictures_together() -> None:
    rng = np.random.default_rng(2)
    found, wanted = rng.integers(0, 4, (3, 9, 9)), rng.integers(0, 4, (3, 9, 9))
    matrix = Confusion(6)  # classes 4 and 5 never occur and do not count
    for a, b in zip(found, wanted, strict=True):
        matrix.add(a, b)
    expected = jaccard_score(wanted.ravel(), found.ravel(), average="macro")
    np.testing.assert_allclose(matrix.miou(), expected, **TIGHT)


def test_ignored_pixels_do_not_count_and_unknown_classes_are_refused() -> None:
    matrix = Confusion(3, ignore=0)
    matrix.add(np.array([1, 2, 2]), np.array([1, 2, 0]))
    assert matrix.miou() == 1.0
    with pytest.raises(ValueError, match="found has class 7, known are 0 .. 2"):
        matrix.add(np.array([7]), np.array([1]))
    with pytest.raises(ValueError, match="no pixels"):
        Confusion(2).miou()


# Fréchet distance -------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [9, 200])  # fewer and more vectors than the width
def test_frechet_distance_is_that_of_the_matrix_root(count: int) -> None:
    a, b = vectors(0, count, 16), vectors(1, count + 3, 16) * 1.5 + 0.5
    x, y = a.astype(float), b.astype(float)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scipy warns of the singular product
        root = scipy.linalg.sqrtm(np.cov(x.T) @ np.cov(y.T))
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(
        np.cov(x.T) + np.cov(y.T) - 2 * np.real(root)
    )
    np.testing.assert_allclose(frechet_distance(a, b), expected, rtol=1e-4)
    assert frechet_distance(a, a) < 1e-9


def test_frechet_distance_is_torchmetrics_fid_on_the_same_features() -> None:
    from torchmetrics.image.fid import FrechetInceptionDistance

    class Pooled(torch.nn.Module):
        """Stands in for Inception: mean and deviation of the channels."""

        num_features = 6

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x.double() / 255
            return torch.cat([x.mean((2, 3)), x.std((2, 3))], 1)

    real, fake = (torch.from_numpy(np.stack([picture(100 * k + i) for i in range(30)]))
                  .permute(0, 3, 1, 2) // (k + 1) for k in range(2))  # fmt: skip
    theirs = FrechetInceptionDistance(feature=Pooled(), input_img_size=(3, 40, 30))
    theirs.set_dtype(torch.float64)
    theirs.update(real, real=True)
    theirs.update(fake, real=False)
    ours = frechet_distance(Pooled()(real).numpy(), Pooled()(fake).numpy())
    np.testing.assert_allclose(ours, float(theirs.compute()), rtol=1e-4)


def test_frechet_distance_refuses_what_has_no_covariance() -> None:
    with pytest.raises(ValueError, match="two or more vectors"):
        frechet_distance(vectors(0, 1, 4), vectors(0, 5, 4))


# Grounding --------------------------------------------------------------------------------------


def test_grounding_scores_by_hand() -> None:
    truth = [(0.0, 0.0, 10.0, 10.0)] * 4
    found = [(0.0, 0.0, 10.0, 10.0), (0.0, 0.0, 10.0, 5.0), (0.0, 0.0, 10.0, 4.0), None]
    assert box_accuracy(found, truth) == 0.5  # IoU 1, 0.5, 0.4, none
    large, small = np.zeros((10, 10), bool), np.zeros((10, 10), bool)
    large[:, :8], small[0, 0] = True, True
    half = large.copy()
    half[5:] = False
    overlaps = [mask_overlap(half, large), mask_overlap(small, small)]
    assert cumulative_iou(overlaps) == 41 / 81
    assert mean_iou(overlaps) == (0.5 + 1) / 2
    with pytest.raises(ValueError, match="3 answers for 4 expressions"):
        box_accuracy(found[:3], truth)
    with pytest.raises(ValueError, match="0 answers"):
        mean_iou([])
    with pytest.raises(ValueError, match="do not compare"):
        mask_overlap(large, large[:5])


@given(st.integers(0, 10_000))
def test_cumulative_iou_is_the_iou_of_all_pixels_at_once(seed: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = rng.random((2, 3, 8, 8)) < 0.4
    overlaps = [mask_overlap(x, y) for x, y in zip(a, b, strict=True)]
    np.testing.assert_allclose(
        cumulative_iou(overlaps), jaccard_score(b.ravel(), a.ravel()), **TIGHT
    )
    each = [jaccard_score(y.ravel(), x.ravel()) for x, y in zip(a, b, strict=True)]
    np.testing.assert_allclose(mean_iou(overlaps), np.mean(each), **TIGHT)
