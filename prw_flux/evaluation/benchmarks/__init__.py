"""Published benchmarks: a folder of generated pictures against a benchmark's folder."""

from prw_flux.evaluation.benchmarks.base import (
    Benchmark,
    BenchmarkError,
    Encoders,
    Item,
    Line,
    Scores,
    score_folder,
)
from prw_flux.evaluation.benchmarks.dreambench import DreamBench
from prw_flux.evaluation.benchmarks.emu_edit import EmuEdit
from prw_flux.evaluation.benchmarks.magicbrush import MagicBrush
from prw_flux.evaluation.benchmarks.refcoco import RefCoco

__all__ = [
    "Benchmark",
    "BenchmarkError",
    "DreamBench",
    "EmuEdit",
    "Encoders",
    "Item",
    "Line",
    "MagicBrush",
    "RefCoco",
    "Scores",
    "score_folder",
]
