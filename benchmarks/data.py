"""What training waits for: rows and encoded samples, in order and at random, and resuming.

    python -m benchmarks.data [--quick] [--json FILE]

``rows in order``, ``rows at random``     a chunk of rows of a built data set, pictures not decoded
``cache in order``, ``cache at random``   as many samples of a cache, latents and texts
``batch``                                 one batch of a run that trains from the cache
``step``                                  one training step of that run on tiny-flux, batch included

Before anything is timed, a batch from the cache must have the bits of one that was encoded in the
run. Seconds are those of the process, so that a machine with other work does not count against
anybody. A fresh process resumes at sample 10,000,000 of an index of 20,000,000.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks._common import head, interleaved, keep, machine, parser, spread
from benchmarks._reading import opened, resumed, shuffled, written
from prw_flux.config import RunConfig
from prw_flux.data.choose import open_run_data
from prw_flux.progress import Quiet
from prw_flux.recipes import demo
from prw_flux.rundir import RunFolder
from prw_flux.sample_cache.build import Share, build, encoders
from prw_flux.samples import Samples
from prw_flux.session import open_session
from prw_flux.tasks import load_task
from prw_flux.trainer import open_training_data, train

CHUNK = 64


def main(arguments: list[str] | None = None) -> int:
    """Build, check, time, print; 1 where a result is wrong."""
    args = parser("data", __doc__ or "").parse_args(arguments)
    count, size, rounds = (192, 64, 5) if args.quick else (2048, 256, 40)
    with tempfile.TemporaryDirectory(prefix="prw-data-") as place:
        folder = Path(place)
        config = run_config(folder, count)
        built = time.process_time()
        fill(config)
        built = time.process_time() - built
        variants, problem = prepared(config, folder, count, size)
        if problem:
            print(f"no times: {problem}", file=sys.stderr)
            return 1
        seconds = interleaved(
            variants, rounds=rounds, warmup=2, device="cpu", clock=time.process_time
        )
        seconds["step"] = step_seconds(config, folder, rounds + 2)
    result = {
        "benchmark": "data",
        **machine("cpu"),
        "rows": count,
        "size": size,
        "chunk": CHUNK,
        "clock": "process_time",
        "rounds": rounds,
        "variants": {name: spread(values) for name, values in seconds.items()},
        "cache_build_samples_per_s": round(count / built, 1),
        "resume": resumed(),
    }
    tell(result)
    keep(result, args.json)
    return 0


def run_config(folder: Path, count: int) -> RunConfig:
    """The demo's editing stage alone, with a cache."""
    config = demo().with_settings(
        [f"data.samples={count}", f"data.cache={folder / 'cache'}", "held_out.samples=0"]
    )
    stages = tuple(stage for stage in config.stages if stage.name == "edit")
    return RunConfig(**{**vars(config), "stages": stages})


def fill(config: RunConfig) -> None:
    """Encode the samples of a run."""
    assert config.data.cache is not None
    data = open_run_data(config)
    tasks = [load_task(stage.task) for stage in config.stages]
    build(Path(config.data.cache), config, data, tasks, lambda: encoders(config, Share()))


def prepared(
    config: RunConfig, folder: Path, count: int, size: int
) -> tuple[dict[str, Callable[[], object]], str]:
    """What is timed, and what is wrong with it."""
    rows = opened(written(folder / "rows", count, size))
    samples = samples_of(config)
    problem = wrong(config, samples)
    table = samples.cache
    orders = {"in order": Walk(list(range(count))), "at random": Walk(shuffled(count))}
    variants: dict[str, Callable[[], object]] = {}
    for name, walk in orders.items():
        variants[f"rows {name}"] = lambda walk=walk: [rows[i].to_pylist() for i in walk()]
    for name, walk in orders.items():
        variants[f"cache {name}"] = lambda walk=walk: read(table, walk())
    turn = iter(range(10**9))
    variants["batch"] = lambda: samples.batch(next(turn))
    return variants, problem


def samples_of(config: RunConfig) -> Samples:
    """The samples of a run's only stage, ready."""
    (stage,), session = config.stages, open_session(config)
    data = open_training_data(config, session)
    samples = Samples(
        data, session.tasks[0], session.pipe, stage=stage.name, seed=config.seed,
        batch_size=stage.batch_size, count=config.data.samples,
        cache=session.tables.get(stage.name),
    )  # fmt: skip
    samples.prepare()
    return samples


def wrong(config: RunConfig, cached: Samples) -> str:
    """In which part a batch from the cache differs from one that is encoded now, or nothing."""
    one, other = samples_of(config.with_settings(["data.cache=none"])).batch(3), cached.batch(3)
    for name, value in vars(one).items():
        if isinstance(value, torch.Tensor) and not torch.equal(value, getattr(other, name)):
            return f"{name} of a batch from the cache differs"
    return ""


class Watch(Quiet):
    """The time after every step."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def stepped(self, done: int) -> None:
        """A step is done."""
        self.times.append(time.process_time())


def step_seconds(config: RunConfig, folder: Path, steps: int) -> list[float]:
    """Of a training run from the cache, batches included."""
    config = config.with_settings([f"stages.*.steps={steps}", f"log_every={steps}", "remember=0"])
    session, watch = open_session(config), Watch()
    data = open_training_data(config, session)
    train(RunFolder.create(folder / "run", config), session, data, progress=watch)
    return [b - a for a, b in zip(watch.times, watch.times[1:], strict=False)][1:]


def read(table: Any, indices: list[int]) -> None:
    """Latents and texts of some samples."""
    (part,) = table.parts(indices)
    table.texts.gather(part.rows)


class Walk:
    """The next chunk of a list of indices, round and round."""

    def __init__(self, indices: list[int]) -> None:
        self.indices, self.place = indices, 0

    def __call__(self) -> list[int]:
        chunk = self.indices[self.place : self.place + CHUNK]
        self.place = (self.place + CHUNK) % (len(self.indices) - CHUNK + 1)
        return chunk


def tell(result: dict[str, Any]) -> None:
    """For people: rates, ratios, and what resuming takes."""
    head(result, "rows", "size")
    times = result["variants"]
    for name, value in times.items():
        told = ""
        if name in ("batch", "step"):
            told = f"{value['median_ms'] / times['step']['median_ms']:.1%} of a step"
        else:
            rate = CHUNK / value["median_ms"] * 1e3
            order = times[name.replace("at random", "in order")]["median_ms"]
            told = f"{rate:,.0f} per second  {value['median_ms'] / order:.2f} x in order"
        print(f"{name:>16}  {value['median_ms']:8.2f} ms  [{value['p20_ms']:.2f}, "
              f"{value['p80_ms']:.2f}]  {told}")  # fmt: skip
    print(f"cache build: {result['cache_build_samples_per_s']} samples per second")
    print(f"resume at sample 10,000,000 of 20,000,000: {result['resume']}")


if __name__ == "__main__":
    sys.exit(main())
