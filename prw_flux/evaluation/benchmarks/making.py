"""Generating the pictures of a benchmark: resumable, shared by ranks, each from its own seed.

What belongs to which call of the pipeline is decided from the benchmark alone, before anything is
looked up on disk. So a picture has the same company, and with it the same rounding, in a first run,
in one that goes on after a kill, and on any number of ranks.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeAlias, final

import numpy as np
import torch
from PIL import Image as PILImage

from prw.atomic import replace_file
from prw_flux.data.images import ImageError, open_image
from prw_flux.evaluation.benchmarks.base import Ask, Benchmark, BenchmarkError
from prw_flux.evaluation.generate import Sampling, quick
from prw_flux.interrupt import Interrupted, Stop
from prw_flux.pipeline import CoLoGenPipeline
from prw_flux.rundir import write_atomically
from prw_flux.share import Share
from prw_flux.tasks.base import Image, keyed_rng

RECORD: Final = "generation.json"
VERSION: Final = 1
Chain: TypeAlias = list[Ask]
Told: TypeAlias = Callable[[int, int], None]
"""Told how many of this rank's pictures are there, and how many it has."""


@final
@dataclass(frozen=True, kw_only=True)
class Making:
    """How the pictures are made.

    Args:
        sampling: steps, guidance, precision; its batch_size is pictures per call.
        seed: with the place of a picture, seeds its noise.
        route: which experts act.
        side: of squares, and the root of the area of other pictures; None is what the adapter was
            trained at.

    Raises:
        ValueError: `side` is not a positive multiple of 16.
    """

    sampling: Sampling
    seed: int = 0
    route: str = "free"
    side: int | None = None

    def __post_init__(self) -> None:
        if self.side is not None and (self.side < 16 or self.side % 16):
            raise ValueError(f"the side must be a positive multiple of 16, got {self.side}")

    def to_json(self) -> dict[str, Any]:
        """What decides how a picture looks, beside the weights and the features' strength."""
        s = self.sampling
        return {"steps": s.steps, "guidance": s.guidance, "precision": s.precision,
                "batch": s.batch_size, "seed": self.seed, "route": self.route,
                "side": self.side}  # fmt: skip


def produce(
    pipe: CoLoGenPipeline,
    benchmark: Benchmark[Any],
    results: Path,
    making: Making,
    *,
    adapter: str,
    features: str | None = None,
    share: Share | None = None,
    told: Told = lambda done, total: None,
) -> dict[str, str]:
    """Makes every picture of the benchmark that is not there yet, or this rank's share of them.

    A picture that is there and can be decoded is kept, so a run that was killed goes on where it
    was. Pictures are written under another name and renamed, so none is ever half.

    Args:
        pipe: with an adapter.
        results: the folder; `generation.json` in it says how its pictures were made.
        adapter: what the pictures are made with, a digest.
        features: likewise of the feature stream, where there is one.
        share: None is one process, which also removes what a killed one left in the folder; of
            several, `tidy` is for when all of them are done.

    Returns:
        Why a picture could not be made, by its place.

    Raises:
        BenchmarkError: the folder holds pictures that were made otherwise.
        Interrupted: on a signal, after the call at hand.
    """
    share = share or Share()
    asks = benchmark.asks()
    require_able(pipe, asks, making)
    facts = {"benchmark": benchmark.name, "adapter": adapter, **making.to_json()}
    if features is not None:
        facts |= {"features": features, "representation": making.sampling.representation}
    record(results, facts)
    if share.count == 1:
        tidy(results)
    units = list(calls(benchmark, asks, making.sampling.batch_size))[share.rank :: share.count]
    total, done = sum(len(chain) for unit in units for chain in unit), 0
    problems: dict[str, str] = {}
    with Stop() as stop, quick(pipe, making.sampling):
        for unit in units:
            for together in zip(*unit, strict=True):
                problems |= _make(pipe, benchmark, results, making, together)
                done += len(together)
                told(done, total)
            if stop.number is not None:
                raise Interrupted(
                    stop.number,
                    f"stopped after {done} of {total} pictures; the same command goes on",
                )
    return problems


def require_able(pipe: CoLoGenPipeline, asks: Sequence[Ask], making: Making) -> None:
    """Raise where the adapter cannot make these pictures.

    Raises:
        ValueError: it has no task of that name, or no such route.
        BenchmarkError: squares are asked for, and nobody says how large.
    """
    for task in dict.fromkeys(ask.task for ask in asks):
        pipe.prw.task(task)
    pipe.prw.route(making.route)
    if any(ask.square for ask in asks) and not (making.side or pipe.prw.config.resolution):
        raise BenchmarkError("The adapter does not say at what size it was trained: use --size.")


def record(results: Path, facts: Mapping[str, Any]) -> None:
    """Write how the pictures of a folder are made, or check that the ones there are made so.

    Raises:
        BenchmarkError: they are not.
    """
    path = results / RECORD
    facts = {"version": VERSION, **facts}
    if not path.is_file():
        write_atomically(path, json.dumps(facts, indent=1) + "\n")
        return
    try:
        found = dict(json.loads(path.read_text("utf-8")))
    except (OSError, ValueError, TypeError) as problem:
        raise BenchmarkError(f"{path} cannot be read ({problem}): remove {results}.") from None
    differing = [f"{key} {found.get(key)!r} and not {facts.get(key)!r}"
                 for key in {**found, **facts} if found.get(key) != facts.get(key)]  # fmt: skip
    if differing:
        raise BenchmarkError(
            f"{results} holds pictures that were made with {', '.join(differing)}: name another "
            "folder with --results, or remove this one."
        )


def calls(benchmark: Benchmark[Any], asks: Sequence[Ask], size: int) -> Iterator[list[Chain]]:
    """Chains that go through the pipeline side by side, at most `size` of them.

    Chains of one length whose sources have the same sizes belong together, in the benchmark's
    order.
    """
    chains: dict[str, Chain] = {}
    for ask in asks:
        chains.setdefault(f"chain {ask.chain}" if ask.chain else ask.output, []).append(ask)
    alike: dict[tuple[object, ...], list[Chain]] = {}
    for name, chain in chains.items():
        kinds = tuple(_kind(benchmark, ask) for ask in chain)
        alone = name if None in kinds else ""
        alike.setdefault((alone, *kinds), []).append(chain)
    for group in alike.values():
        for start in range(0, len(group), size):
            yield group[start : start + size]


def whole(path: Path) -> bool:
    """Whether a picture is there and can be decoded to its end."""
    try:
        open_image(path, min_side=1)
    except ImageError:
        return False
    return True


def _kind(benchmark: Benchmark[Any], ask: Ask) -> tuple[object, ...] | None:
    """What asks that share a call have in common; None for a source that cannot be opened."""
    if ask.after is not None:
        return ask.task, "own", ask.square
    size = benchmark.source_size(ask)
    return None if size is None else (ask.task, size, ask.square)


def _make(
    pipe: CoLoGenPipeline,
    benchmark: Benchmark[Any],
    results: Path,
    making: Making,
    asks: Sequence[Ask],
) -> dict[str, str]:
    """One call of the pipeline, unless all of its pictures are there."""
    wanted = [ask for ask in asks if not whole(results / ask.output)]
    if not wanted:
        return {}
    problems, sources = {}, {}
    for ask in asks:
        try:
            sources[ask] = (
                benchmark.source(ask) if ask.after is None else open_image(results / ask.after)
            )
        except ImageError as problem:
            problems[ask.output] = f"{ask.output} was not made: {problem}"
    if not set(wanted) & set(sources):
        return problems
    pictures = _call(pipe, list(sources), list(sources.values()), making, benchmark.name)
    for (ask, source), values in zip(sources.items(), pictures, strict=True):
        if not np.isfinite(values).all():
            problems[ask.output] = f"{ask.output} was not made: the model's picture is not finite"
        elif ask in wanted:
            picture = np.rint(values * 255).astype(np.uint8)
            for name, extra in benchmark.beside(ask, source, picture).items():
                save(results / name, extra)
            save(results / ask.output, picture)
    return problems


def save(path: Path, picture: Image) -> None:
    """Write a PNG in one step; another rank may be writing the same one.

    Raises:
        BenchmarkError: the disk does not take it.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replace_file(path) as new:
            PILImage.fromarray(picture).save(new, "PNG")
    except OSError as problem:
        raise BenchmarkError(
            f"{path} cannot be written ({problem.strerror or problem}): the pictures before it are "
            "kept, and the same command goes on."
        ) from problem


def tidy(results: Path) -> None:
    """Remove what killed writers left in the folder; nobody may be writing to it.

    Public scripts read every file of a folder (`annotations/`), the hidden ones too.
    """
    for left in results.rglob(".*.png.*.new"):
        left.unlink(missing_ok=True)


def _call(
    pipe: CoLoGenPipeline,
    asks: Sequence[Ask],
    sources: Sequence[Image],
    making: Making,
    name: str,
) -> Any:
    """[B, H, W, 3] in [0, 1]."""
    size: dict[str, Any] = {}
    if asks[0].square:
        side = making.side or pipe.prw.config.resolution
        size = {"height": side, "width": side}
    elif making.side is not None:
        size = {"max_area": making.side**2}
    seeds = [seed_of(making.seed, name, ask.output) for ask in asks]
    return pipe(
        image=list(sources),
        prompt=[ask.prompt for ask in asks],
        task=asks[0].task,
        route=making.route,
        representation_scale=making.sampling.representation,
        num_inference_steps=making.sampling.steps,
        guidance_scale=making.sampling.guidance,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        output_type="np",
        **size,
    ).images


def seed_of(seed: int, benchmark: str, output: str) -> int:
    """A 63-bit seed that depends on the three arguments alone."""
    return int(keyed_rng(seed, "benchmark noise", benchmark, output).integers(2**63 - 1))
