"""What `evaluate --bench` opens before anything is generated or scored: folder, encoders, judge."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from prw_flux.cli.bench_presets import B16, B32, DINO, preset

if TYPE_CHECKING:
    from prw_flux.evaluation.benchmarks import Asking, Benchmark, Encoders
    from prw_flux.rundir import RunFolder

NAMES: Final = (
    "shapes", "magicbrush", "emu_edit", "multigen", "dreambench", "refcoco", "gedit"
)  # fmt: skip
USES: Final = {
    "magicbrush": ("clip", "dino", "own"), "emu_edit": ("clip", "dino", "own"),
    "dreambench": ("clip", "dino", "own"), "multigen": ("clip", "own", "inception"),
}  # fmt: skip


ONLY: Final = {
    "per_task": ("shapes",), "samples": ("multigen", "dreambench"), "captions": ("emu_edit",),
    "maps": ("multigen",), "fid": ("multigen",), "language": ("gedit",), "judge": ("gedit",),
    "answers": ("gedit",), "questions": ("gedit",), "judge_model": ("gedit",),
    "judge_key": ("gedit",),
    "data": tuple(name for name in NAMES if name != "shapes"),
}  # fmt: skip
"""Arguments that some benchmarks alone read; encoders are in USES."""
ENCODERS: Final = {"clip": "clip", "dino": "dino", "encoder": "own"}
"""Arguments by what they are in USES."""


def require_read(args: argparse.Namespace) -> None:
    """Raise BenchmarkError for an argument that the benchmark would not read."""
    from prw_flux.evaluation.benchmarks import BenchmarkError

    readers = {
        name: tuple(bench for bench, roles in USES.items() if role in roles)
        for name, role in ENCODERS.items()
    }
    for name, those in {**ONLY, **readers}.items():
        value = getattr(args, name)
        if value not in (None, "none") and args.bench not in those:
            raise BenchmarkError(
                f"--{name.replace('_', '-')} {value} means nothing to --bench {args.bench}: leave "
                f"it out, it is for {', '.join(those)}."
            )


def require_bench(args: argparse.Namespace, usual: Mapping[str, Any]) -> None:
    """Raise BenchmarkError for an argument that is read with --bench alone, which is not there.

    Args:
        args: what was given.
        usual: those arguments when nothing is given.
    """
    from prw_flux.evaluation.benchmarks import BenchmarkError

    for name, value in usual.items():
        if getattr(args, name) != value:
            raise BenchmarkError(
                f"--{name.replace('_', '-')} {getattr(args, name)} means nothing without --bench: "
                "leave it out, or name the benchmark."
            )


def open_encoders(args: argparse.Namespace) -> Encoders:
    """The models that the benchmark uses and the arguments name.

    Raises:
        EncoderError: one of them is not there, or is another model.
    """
    from prw_flux.evaluation.benchmarks import Encoders
    from prw_flux.evaluation.encoders import ClipEncoder, DinoEncoder, OwnEncoder
    from prw_flux.evaluation.inception import InceptionEncoder

    kinds: dict[str, tuple[Callable[..., Any], str | None]] = {
        "clip": (ClipEncoder, args.clip),
        "dino": (DinoEncoder, args.dino),
        "own": (lambda spec, device: OwnEncoder(spec), args.encoder),
        "inception": (InceptionEncoder, args.fid),
    }
    return Encoders(**{
        role: kind(where, args.device)
        for role, (kind, where) in kinds.items()
        if role in USES.get(args.bench, ()) and where not in (None, "none")
    })  # fmt: skip


def settled(args: argparse.Namespace) -> argparse.Namespace:
    """The arguments, with what was not given from the preset, then from the public scripts.

    Raises:
        ValueError: the benchmark has no such preset.
    """
    stated = preset(args.bench, args.preset).stated() if args.preset else {}
    usual = {"clip": B16 if args.bench == "multigen" else B32, "dino": DINO, "captions": "all"}
    given = {name: value for name, value in vars(args).items() if value is not None}
    return argparse.Namespace(**{**vars(args), **usual, **stated, **given})


def open_benchmark(args: argparse.Namespace, run: RunFolder | None) -> Benchmark[Any]:
    """The benchmark's folder, read and checked.

    Raises:
        BenchmarkError: the folder, or what is needed beside it, is not there or does not fit.
    """
    from prw_flux.evaluation.benchmarks import (
        BenchmarkError,
        DreamBench,
        EmuEdit,
        GEdit,
        MagicBrush,
        MultiGen,
        RefCoco,
    )
    from prw_flux.evaluation.benchmarks.multigen_index import condition_of
    from prw_flux.evaluation.map_models import map_model

    if args.bench == "shapes":
        return _shapes(args, run)
    if args.data is None:
        raise BenchmarkError(f"--bench {args.bench} needs --data DIR, the benchmark's own folder.")
    folder = Path(args.data)
    if args.bench == "magicbrush":
        return MagicBrush(folder, captions=args.clip != "none")
    if args.bench == "emu_edit":
        return EmuEdit(folder, captions=args.captions)
    if args.bench == "refcoco":
        return RefCoco(folder)
    if args.bench == "gedit":
        return GEdit(folder, language=args.language)
    if args.bench == "multigen":
        maps = map_model(condition_of(folder), args.maps, args.device)
        return MultiGen(folder, maps, groups=4 if args.samples is None else args.samples)
    if (args.clip, args.dino, args.encoder) == ("none", "none", None):
        raise BenchmarkError("dreambench measures nothing without --clip, --dino or --encoder.")
    return DreamBench(folder, samples=1 if args.samples is None else args.samples)


def _shapes(args: argparse.Namespace, run: RunFolder | None) -> Benchmark[Any]:
    from prw_flux.evaluation.benchmarks import BenchmarkError, Shapes
    from prw_flux.evaluation.runner import finished_stages

    if run is None:
        raise BenchmarkError("--bench shapes needs a RUN, which says the size and the tasks.")
    if args.size not in (None, run.config.size):
        raise BenchmarkError(f"--bench shapes is drawn at the run's {run.config.size} pixels.")
    count = run.config.evaluation.per_task if args.per_task is None else args.per_task
    return Shapes(list(finished_stages(run).values()), size=run.config.size, per_task=count)


def open_judge(args: argparse.Namespace, answers: Path) -> Asking:
    """The judge of gedit, which records its answers; or answers that were recorded.

    Raises:
        ValueError: neither an endpoint nor answers are named, or they cannot be used.
    """
    from prw_flux.evaluation.benchmarks import Asking, BenchmarkError
    from prw_flux.evaluation.benchmarks.gedit import questions_from
    from prw_flux.evaluation.judges import EndpointJudge, RecordedJudge, Recorder
    from prw_flux.evaluation.metrics import Judge

    texts: dict[str, Any] = {}
    if args.questions:
        texts["questions"], texts["wording"] = questions_from(Path(args.questions))
    if args.judge_tries < 1 or args.judge_timeout <= 0:
        raise BenchmarkError(
            f"--judge-tries must be at least 1 and --judge-timeout above 0, got "
            f"{args.judge_tries} and {args.judge_timeout}."
        )
    if args.judge is None:
        if args.answers is None:
            raise BenchmarkError(
                "gedit needs --judge URL and --judge-model NAME, or --answers FILE with recorded "
                "answers."
            )
        replayed = RecordedJudge(args.answers)
        return Asking(judge=replayed, name=args.judge_model or "recorded", tries=1, **texts)
    if args.judge_model is None:
        raise BenchmarkError("--judge needs --judge-model, the model's name at the endpoint.")
    endpoint = EndpointJudge(
        args.judge, args.judge_model, key_variable=args.judge_key, timeout=args.judge_timeout
    )
    judge: Judge = Recorder(endpoint, Path(args.answers) if args.answers else answers)
    return Asking(judge=judge, name=args.judge_model, tries=args.judge_tries,
                  pause=args.judge_pause, **texts)  # fmt: skip
