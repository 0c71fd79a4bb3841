"""What storing a source costs in quality: grounding from caches of several kinds.

    python -m benchmarks.stored_sources [--run RUN] [--items N] [--quick] [--json FILE]

Held-out grounding requests of ShapeWeave, the same noise for every variant, the router free:

``fresh``    the source is encoded in the call
``float32``, ``bfloat16``, ``float8``
             from a `SourceCache` of that dtype (float8: a scale per token and head)
``half``     from a float32 cache of a source of half the side (`source_size`)

Told are Acc@0.5, the share of the boxes right with ``fresh`` that the variant keeps, the PSNR of
its pictures to those of ``fresh`` (median and 20th percentile) and the size of one source.
``--run`` reads a run of yours; without it the demo's grounding stage is trained: CPU minutes.

Nothing is told unless the float32 cache gives the bits of ``fresh``.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from benchmarks._common import head, keep, machine, parser
from prw_flux.evaluation import EvaluationSample, draw_samples, score, unusable
from prw_flux.pipeline import CoLoGenPipeline
from prw_flux.recipes import demo
from prw_flux.rundir import RunFolder
from prw_flux.session import open_session
from prw_flux.shapeweave import ShapeWeave
from prw_flux.tasks import Image, load_task
from prw_flux.trainer import open_training_data, train

TASK: Final = "ground"
STORED: Final = {
    "float32": torch.float32, "bfloat16": torch.bfloat16, "float8": torch.float8_e4m3fn
}  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Generate, check, compare, print; 1 where a check fails."""
    given = parser("stored_sources", __doc__ or "")
    given.add_argument("--run", type=Path, help="a run that knows grounding")
    given.add_argument("--items", type=int, default=128, help="held-out requests")
    given.add_argument("--steps", type=int, default=12, help="of denoising")
    args = given.parse_args(arguments)
    if args.quick:
        args.items, args.steps = 4, 2
    where: AbstractContextManager[str] = tempfile.TemporaryDirectory()
    with nullcontext(args.run) if args.run else where as folder:
        run = args.run or trained(Path(folder) / "run", args.quick)
        pipe = CoLoGenPipeline.from_pretrained(run, dtype=torch.float32).to(args.device)
    pipe.set_progress_bar_config(disable=True)
    try:
        variants = compare(pipe, args.items, args.steps)
    except ArithmeticError as problem:
        print(f"no figures: {problem}", file=sys.stderr)
        return 1
    result = {
        "benchmark": "stored_sources", **machine(args.device), "run": args.run and args.run.name,
        "items": args.items, "steps": args.steps, "variants": variants,
    }  # fmt: skip
    head(result, "run", "items", "steps")
    for name, row in variants.items():
        print("  ".join([f"{name:>9}", *(f"{key} {value:g}" for key, value in row.items())]))
    keep(result, args.json)
    return 0


def trained(folder: Path, quick: bool) -> Path:
    """A run of the demo's grounding stage alone."""
    config = demo()
    stages = tuple(stage for stage in config.stages if stage.name == TASK)
    settings = ["stages.*.density=1", "stages.*.weight=0"]
    if quick:
        settings += ["data.samples=8", "stages.*.steps=2", "stages.*.batch_size=4", "remember=4",
                     "optimizer.warmup=1"]  # fmt: skip
    config = replace(config, stages=stages).with_settings(settings)
    session = open_session(config)
    train(RunFolder.create(folder, config), session, open_training_data(config, session))
    return folder


def compare(pipe: CoLoGenPipeline, count: int, steps: int) -> dict[str, dict[str, float]]:
    """The figures of every variant.

    Raises:
        ArithmeticError: the cache in full precision does not give the bits of a fresh source.
    """
    size = int(pipe.prw.config.resolution or 96)
    source = ShapeWeave(size=size, seed=0, split="heldout")
    samples = draw_samples(source, load_task(TASK), count, 0, unusable).samples
    fresh = pictures(pipe, samples, steps, image=[s.triple.source for s in samples])
    right = hits(samples, fresh)
    found = {"fresh": {"Acc@0.5": float(right.mean())}}
    whole = record(pipe, samples)
    caches = {name: whole.to(dtype=dtype) for name, dtype in STORED.items()}
    caches["half"] = record(pipe, samples, source_size=size // 2)
    for name, cache in caches.items():
        drawn = pictures(pipe, samples, steps, source_cache=cache)
        if name == "float32" and any(map(different, fresh, drawn)):
            raise ArithmeticError("a cache in float32 differs from a source that is encoded anew")
        found[name] = figures(right, hits(samples, drawn), fresh, drawn)
        found[name]["KiB"] = round(cache.nbytes / count / 1024, 1)
    return found


def record(pipe: CoLoGenPipeline, samples: Sequence[EvaluationSample], **options: Any) -> Any:
    """The sources of all samples in one cache."""
    side = samples[0].triple.target.shape[0]
    images = [s.triple.source for s in samples]
    return pipe.encode_source(images, task=TASK, height=side, width=side, **options)


def pictures(
    pipe: CoLoGenPipeline, samples: Sequence[EvaluationSample], steps: int, **source: Any
) -> list[Image]:
    """One per sample, each from the noise of its own seed."""
    side = samples[0].triple.target.shape[0]
    drawn = pipe(
        prompt=[s.triple.text for s in samples], task=TASK, height=side, width=side,
        num_inference_steps=steps, output_type="np", **source,
        generator=[torch.Generator().manual_seed(s.seed) for s in samples],
    ).images  # fmt: skip
    return list(np.rint(np.asarray(drawn, np.float32) * 255).astype(np.uint8))


def hits(samples: Sequence[EvaluationSample], drawn: Sequence[Image]) -> Any:
    """[N] whether each box is right."""
    scored = [score(s, image)["Acc@0.5"] for s, image in zip(samples, drawn, strict=True)]
    return np.array(scored, bool)


def different(a: Image, b: Image) -> bool:
    """Whether any byte is."""
    return not np.array_equal(a, b)


def figures(
    right: Any, found: Any, wanted: Sequence[Image], drawn: Sequence[Image]
) -> dict[str, float]:
    """Of one variant beside the fresh source."""
    apart = [psnr(a, b) for a, b in zip(wanted, drawn, strict=True)]
    return {
        "Acc@0.5": round(float(found.mean()), 3),
        "kept": round(float(found[right].mean()), 3) if right.any() else float("nan"),
        "PSNR": round(float(np.median(apart)), 1),
        "PSNR p20": round(float(np.percentile(apart, 20)), 1),
    }


def psnr(a: Image, b: Image) -> float:
    """In dB, of 8-bit pictures; 99 for the same bytes."""
    error = np.square(a.astype(float) - b.astype(float)).mean()
    return float(10 * np.log10(255**2 / error)) if error else 99.0


if __name__ == "__main__":
    sys.exit(main())
