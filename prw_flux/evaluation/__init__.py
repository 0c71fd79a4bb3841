"""Exact evaluation on held-out ShapeWeave scenes: metrics, baselines, intervals, forgetting."""

from prw_flux.evaluation.arms import ARMS, Request
from prw_flux.evaluation.generate import Sampling, generate
from prw_flux.evaluation.routing import count_experts
from prw_flux.evaluation.runner import NothingToMeasure, Settings, evaluate_run
from prw_flux.evaluation.samples import EvaluationSample, draw_samples
from prw_flux.evaluation.shapes import METRICS, score, unusable
from prw_flux.evaluation.statistics import Interval, bootstrap, paired_bootstrap
from prw_flux.evaluation.tables import beats, markdown, rich_table

__all__ = [
    "ARMS",
    "METRICS",
    "EvaluationSample",
    "Interval",
    "NothingToMeasure",
    "Request",
    "Sampling",
    "Settings",
    "beats",
    "bootstrap",
    "count_experts",
    "draw_samples",
    "evaluate_run",
    "generate",
    "markdown",
    "paired_bootstrap",
    "rich_table",
    "score",
    "unusable",
]
