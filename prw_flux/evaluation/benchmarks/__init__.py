"""Published benchmarks: a folder of generated pictures against a benchmark's folder."""

from prw_flux.evaluation.benchmarks.base import (
    Ask,
    Benchmark,
    BenchmarkError,
    Encoders,
    Item,
    Line,
    Unscored,
)
from prw_flux.evaluation.benchmarks.dreambench import DreamBench
from prw_flux.evaluation.benchmarks.emu_edit import EmuEdit
from prw_flux.evaluation.benchmarks.gedit import Asking, GEdit
from prw_flux.evaluation.benchmarks.magicbrush import MagicBrush
from prw_flux.evaluation.benchmarks.making import Making, produce
from prw_flux.evaluation.benchmarks.multigen import MultiGen
from prw_flux.evaluation.benchmarks.refcoco import RefCoco
from prw_flux.evaluation.benchmarks.scoring import Scores, score_folder
from prw_flux.evaluation.benchmarks.shapes import Shapes

__all__ = [
    "Ask",
    "Asking",
    "Benchmark",
    "BenchmarkError",
    "DreamBench",
    "EmuEdit",
    "Encoders",
    "GEdit",
    "Item",
    "Line",
    "MagicBrush",
    "Making",
    "MultiGen",
    "RefCoco",
    "Scores",
    "Shapes",
    "Unscored",
    "produce",
    "score_folder",
]
