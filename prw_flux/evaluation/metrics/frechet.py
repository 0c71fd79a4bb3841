"""The Fréchet distance between two sets of feature vectors: FID, whichever network made them.

Shapes: N, M vectors; D width.
"""

from __future__ import annotations

import numpy as np

from prw_flux.evaluation.metrics.embeddings import Vectors


def frechet_distance(a_ND: Vectors, b_MD: Vectors) -> float:
    """Distance of the Gaussians fitted to both sets (Heusel et al., arXiv 1706.08500, eq. 6).

        |mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^{1/2})

    with unbiased covariances, in float64. The trace of the root is the sum of the singular values
    of X_a X_b^T, where X are the centred sets divided by sqrt(n - 1): for centred data
    S_a S_b = X_a^T (X_a X_b^T) X_b, whose non-zero eigenvalues are the squares of those singular
    values. So no matrix root is taken, and a set smaller than D needs no jitter.

    It is called FID only of Inception-v3's 2048 pool features with the resizing of the protocol.
    Of a set below a few thousand pictures it is biased upwards.

    Raises:
        ValueError: a set has fewer than two vectors, widths differ, or a value is not finite.
    """
    a, b = (np.asarray(x, np.float64) for x in (a_ND, b_MD))
    if a.ndim != 2 or b.ndim != 2 or min(len(a), len(b)) < 2 or a.shape[1] != b.shape[1]:
        raise ValueError(
            f"need two or more vectors of one width on each side: {a.shape} and {b.shape}"
        )
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError("a feature is not finite")
    apart = a.mean(0) - b.mean(0)
    xa, xb = ((x - x.mean(0)) / np.sqrt(len(x) - 1) for x in (a, b))
    root = np.linalg.svd(_reduced(xa) @ _reduced(xb).T, compute_uv=False).sum()
    distance = float(apart @ apart + (xa**2).sum() + (xb**2).sum() - 2 * root)
    return max(distance, 0.0)


def _reduced(x_ND: Vectors) -> Vectors:
    """A factor R with R^T R = X^T X and at most D rows: keeps the product small for many pictures.

    X = Q R gives it, and Q, being orthonormal, does not change the singular values.
    """
    if len(x_ND) <= x_ND.shape[1]:
        return x_ND
    return np.asarray(np.linalg.qr(x_ND, mode="r"))
