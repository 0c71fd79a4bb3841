"""The arithmetic of the published benchmarks: pure functions of arrays, no files and no models.

Encoders (encoders.py) and what is averaged over what (benchmarks/) are kept apart from it.
"""

from prw_flux.evaluation.metrics.embeddings import (
    cosine,
    directional_similarity,
    mean_cosine,
    unit,
)
from prw_flux.evaluation.metrics.frechet import frechet_distance
from prw_flux.evaluation.metrics.grounding import (
    box_accuracy,
    cumulative_iou,
    mask_overlap,
    mean_iou,
)
from prw_flux.evaluation.metrics.judge import (
    EditItem,
    Grade,
    Grading,
    Judge,
    Question,
    read_scores,
)
from prw_flux.evaluation.metrics.pixels import l1, l2, resized_like
from prw_flux.evaluation.metrics.structure import Confusion, depth_rmse, edge_f1, ms_ssim

__all__ = [
    "Confusion",
    "EditItem",
    "Grade",
    "Grading",
    "Judge",
    "Question",
    "box_accuracy",
    "cosine",
    "cumulative_iou",
    "depth_rmse",
    "directional_similarity",
    "edge_f1",
    "frechet_distance",
    "l1",
    "l2",
    "mask_overlap",
    "mean_cosine",
    "mean_iou",
    "ms_ssim",
    "read_scores",
    "resized_like",
    "unit",
]
