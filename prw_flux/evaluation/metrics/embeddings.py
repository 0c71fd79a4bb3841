"""What is computed from the embeddings of pictures and texts, whichever model made them.

CLIP-I, CLIP-T and the DINO score are all `cosine`; only the encoder differs (encoders.py). Means
over pairs, subjects or turns belong to the protocol.

Shapes: N, M vectors; D width of the embedding.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Vectors: TypeAlias = NDArray[np.floating[Any]]


def unit(x_ND: Vectors) -> NDArray[np.float64]:
    """Every vector divided by its length, in float64.

    Raises:
        ValueError: a vector is zero or not finite: it has no direction.
    """
    x = np.asarray(x_ND, np.float64)
    length = np.linalg.norm(x, axis=-1, keepdims=True)
    if not (np.isfinite(length).all() and (length > 0).all()):
        raise ValueError("an embedding is zero or not finite, so it has no direction: " + _bad(x))
    return np.asarray(x / length)


def cosine(a_ND: Vectors, b_ND: Vectors) -> NDArray[np.float64]:
    """Cosine of every pair (a_n, b_n): float64 [N].

        cos(a, b) = <a, b> / (|a| |b|)

    CLIP-I and the DINO score are this of two pictures, CLIP-T of a picture and a text.

    Raises:
        ValueError: the shapes differ, or a vector has no direction.
    """
    if a_ND.shape != b_ND.shape or a_ND.ndim != 2:
        raise ValueError(f"pairs need two equal [N, D], got {a_ND.shape} and {b_ND.shape}")
    return np.asarray((unit(a_ND) * unit(b_ND)).sum(axis=-1))


def mean_cosine(a_ND: Vectors, b_MD: Vectors) -> float:
    """Mean of the cosines of all N M pairs.

    DreamBench compares every generated picture with every real one of the subject in this way
    (DreamBooth, arXiv 2208.12242, section 4.1).

    Raises:
        ValueError: a set is empty, or the widths differ.
    """
    if a_ND.ndim != 2 or b_MD.ndim != 2 or not (len(a_ND) and len(b_MD)):
        raise ValueError(f"need [N, D] and [M, D], got {a_ND.shape} and {b_MD.shape}")
    if a_ND.shape[1] != b_MD.shape[1]:
        raise ValueError(f"embeddings of widths {a_ND.shape[1]} and {b_MD.shape[1]} do not compare")
    return float((unit(a_ND) @ unit(b_MD).T).mean())


def directional_similarity(
    source_ND: Vectors, output_ND: Vectors, before_ND: Vectors, after_ND: Vectors
) -> NDArray[np.float64]:
    """Does the picture change as the caption does? float64 [N], CLIP_dir.

        cos(unit(I_output) - unit(I_source), unit(T_after) - unit(T_before))

    Features are normalised before they are subtracted, as in InstructPix2Pix
    (metrics/clip_similarity.py; the idea is StyleGAN-NADA's, arXiv 2108.00946). Where the picture
    or the caption does not change there is no direction and the value is 0: torch's
    `cosine_similarity` gives the same.
    """
    moved = unit(output_ND) - unit(source_ND)
    asked = unit(after_ND) - unit(before_ND)
    lengths = np.linalg.norm(moved, axis=-1) * np.linalg.norm(asked, axis=-1)
    return np.asarray((moved * asked).sum(axis=-1) / np.maximum(lengths, 1e-8))


def _bad(x: NDArray[np.float64]) -> str:
    rows = x.reshape(-1, x.shape[-1])
    length = np.linalg.norm(rows, axis=-1)
    first = int(np.argmax(~(np.isfinite(length) & (length > 0))))
    return f"number {first} of {len(rows)}."
