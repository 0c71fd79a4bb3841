"""What the trainer costs beside a bare loop, and how long its steps wait for data.

    python -m benchmarks.training [--quick] [--json FILE] [--pairs N]

The recipe `demo` on the embedded base: its second stage, so that there is a veteran. After every
step of `prw_flux.trainer.train` a bare loop does its forward and backward on the same batch, in
another copy of the model: both passes, flow matching, the veteran gate, and nothing else. The time
of a trainer's step is all that happens between two bare ones: drawing, losses, the check for what
is not finite, clipping, the optimizer, the log.

``overhead``    median over pairs of (trainer's step / bare step) - 1
``with_log``    the same of the sums, so with the steps that write a line of the log
``waiting``     share of the trainer's time that is spent in getting its batches, where all samples
                were encoded before, where each batch is encoded between two steps, and where
                another thread does so during the steps; the last two take turns
``steps``       the median step of each of these three; the bound of waiting ahead follows from what
                a batch takes, max(0, batch - step) / step

Pairs are timed by the processor's time on a CPU, which other programs do not take part in, and by
the clock on CUDA; waiting and the steps it is part of by the clock in either case.

Nothing is told unless the bare loop's first loss is the first one of the log, bit for bit.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

import prw
from benchmarks._common import head, keep, machine, parser, spread, synchronise
from prw_flux.arithmetic import arithmetic
from prw_flux.batch_order import stable_hash
from prw_flux.config import RunConfig
from prw_flux.curriculum import Stage
from prw_flux.flow import flow_loss, interpolate, resolution_shift, sample_times
from prw_flux.progress import Quiet
from prw_flux.recipes import demo
from prw_flux.rundir import RunFolder
from prw_flux.samples import Samples
from prw_flux.session import Session, open_session
from prw_flux.trainer import open_training_data, train

BETWEEN: Final = "encoded between steps"
AHEAD: Final = "encoded ahead"


def config_of(steps: int, quick: bool, samples: str, prefetch: int = 2) -> RunConfig:
    """The demo's first two stages; the first is only there to make a veteran."""
    settings = [f"data.samples={samples}", "stages.inpaint.steps=1", f"stages.ground.steps={steps}",
                "remember=0", "held_out.samples=0", f"data.prefetch={prefetch}"]  # fmt: skip
    settings += ["stages.*.batch_size=4", "adapter.rank=8", "adapter.alpha=16"] if quick else []
    base = demo()
    return replace(base, stages=base.stages[:2]).with_settings(settings)


@dataclass(eq=False)
class Bare:
    """A loop of one's own: what a step trains on is ready, only forward and backward are left."""

    config: RunConfig
    session: Session
    samples: Samples

    @classmethod
    def of(cls, config: RunConfig, stage: Stage) -> Bare:
        """With weights and samples of its own, the trainer's at its second stage's beginning."""
        session = open_session(config)
        data = open_training_data(config, session)
        samples = Samples(data, session.tasks[1], session.pipe, stage=stage.name, seed=config.seed,
                          batch_size=stage.batch_size, count=config.data.samples)  # fmt: skip
        samples.prepare()
        return cls(config, session, samples)

    def adopt(self, run: RunFolder, stage: Stage) -> None:
        """Begin the stage as the trainer did."""
        weave = self.session.adapter.weave
        weave.load_state(run.adapter)
        torch.manual_seed(stable_hash(self.config.seed, stage.name, "initialisation"))
        weave.unlock(stage.name)

    def ready(self, stage: Stage, step: int) -> Callable[[], Tensor]:
        """The step, on the trainer's batch, times and noise."""
        config, device = self.config, self.session.device
        draw = torch.Generator().manual_seed(stable_hash(config.seed, stage.name, "step", step))
        dropped = torch.rand(stage.batch_size, generator=draw) < config.caption_dropout
        batch = self.samples.batch(step, dropped.tolist())
        clean = batch.target_BTC
        shift = config.time_shift or resolution_shift(clean.shape[1])
        times = sample_times(len(clean), draw, shift=shift).to(device)
        noise = torch.randn(clean.shape, generator=draw).to(device)
        clean = clean.to(device)
        texts = self.samples.texts
        with arithmetic(device.type, config.precision):  # where the trainer first asks for it
            pooled = texts.gather(texts.rows([self.samples.task.sentence]))[1].to(device)
        guidance = torch.full((len(clean),), config.guidance, device=device)
        given = [x.to(device) for x in (batch.target_ids_T3, batch.text_BLE, batch.pooled_BP)]
        source = [x.to(device) for x in (batch.source_BSC, batch.source_ids_S3)]
        weave = self.session.adapter.weave
        key = stable_hash(config.seed, stage.name, "router", step)

        def run() -> Tensor:
            with arithmetic(device.type, config.precision), weave.record(key=key) as record:
                velocity = self.session.passes(
                    interpolate(clean, noise, times), *given, times, *source, pooled, guidance,
                    record,
                )  # fmt: skip
            loss = flow_loss(velocity, clean, noise)
            total = loss + prw.veteran_gate_loss(record, stage.density, stage.weight)
            with arithmetic(device.type, config.precision):
                total.backward()
            for parameter in weave.parameters():
                parameter.grad = None
            return loss.detach()

        return run


class Pairs(Quiet):
    """After each of the trainer's steps, times it and a bare one."""

    def __init__(self, bare: Bare | None, run: RunFolder, warmup: int) -> None:
        self.bare, self.run, self.warmup = bare, run, warmup
        self.trainer: list[float] = []
        self.alone: list[float] = []
        self.wall: list[float] = []
        self.first: float | None = None
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._clock = time.process_time if self._device == "cpu" else time.perf_counter
        self._stage: Stage | None = None
        self._since: tuple[float, float] | None = None

    def begin(self, number: int, total: int, stage: Stage) -> None:
        self._stage = stage if number == 1 else None
        if number == 1 and self.bare is not None:
            self.bare.adopt(self.run, stage)

    def stepped(self, done: int) -> None:
        if self._stage is None:
            return
        synchronise(self._device)
        now = self._now()
        if self._since is not None and done > self.warmup:
            self.trainer.append(now[0] - self._since[0])
            self.wall.append(now[1] - self._since[1])
        if self.bare is not None:
            step = self.bare.ready(self._stage, done - 1)
            synchronise(self._device)
            started = self._clock()
            loss = step()
            synchronise(self._device)
            if done > self.warmup:
                self.alone.append(self._clock() - started)
            if self.first is None:
                self.first = float(loss)
        self._since = self._now()

    def _now(self) -> tuple[float, float]:
        return self._clock(), time.perf_counter()


@dataclass(eq=False)
class Waits:
    """Steps of several trainings, and what of them was waiting."""

    steps: list[float] = field(default_factory=list)
    seconds: float = 0.0

    def add(self, pairs: Pairs, seconds: float) -> None:
        """Those of one more."""
        self.steps += pairs.wall
        self.seconds += seconds


def measure(
    pairs: int, quick: bool, samples: str, *, beside: bool, prefetch: int = 2
) -> tuple[Pairs, float, float]:
    """The pairs of one training, the seconds it waited for batches, and its first loss.

    Args:
        pairs: how many, after a warm-up.
        quick: a smaller adapter and batch.
        samples: ``data.samples``.
        beside: whether a bare loop runs beside it.
        prefetch: ``data.prefetch``.
    """
    warmup = 1 if quick else 3
    config = config_of(pairs + warmup, quick, samples, prefetch)
    waited: list[float] = []
    original = Samples.batch

    def timed(self: Samples, step: int, *args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        batch = original(self, step, *args, **kwargs)
        if self in mine and step >= warmup:
            waited.append(time.perf_counter() - started)
        return batch

    mine: list[Samples] = []
    bare = Bare.of(config, config.stages[1]) if beside else None
    session = open_session(config)
    data = open_training_data(config, session)
    with tempfile.TemporaryDirectory() as folder:
        run = RunFolder.create(Path(folder) / "run", config)
        watched = Pairs(bare, run, warmup)
        made = Samples.prepare

        def prepared(self: Samples, *args: Any) -> None:
            made(self, *args)
            mine[:] = [self]
            waited.clear()

        Samples.batch, Samples.prepare = timed, prepared  # type: ignore[method-assign]
        try:
            train(run, session, data, progress=watched)
        finally:
            Samples.batch, Samples.prepare = original, made  # type: ignore[method-assign]
        second = [line for line in run.read_log() if line["stage"] == config.stages[1].name]
    return watched, sum(waited), second[0]["loss"]


def main(arguments: list[str] | None = None) -> int:
    """Train, check, measure, print; 1 where the check fails."""
    given = parser("training", __doc__ or "")
    given.add_argument("--pairs", type=int, default=30, help="of steps that are compared")
    args = given.parse_args(arguments)
    pairs = 3 if args.quick else args.pairs
    count = "8" if args.quick else "256"
    found, waited, logged = measure(pairs, args.quick, count, beside=True)
    if found.first != logged:
        print(f"no times: the bare loop's first loss is {found.first}, the trainer's {logged}",
              file=sys.stderr)  # fmt: skip
        return 1
    needed = {BETWEEN: Waits(), AHEAD: Waits()}
    rounds = 1 if args.quick else 3
    for _ in range(rounds):
        for prefetch, waits in zip((0, 2), needed.values(), strict=True):
            waits.add(*measure(max(3, pairs // 6), args.quick, "none", beside=False,
                               prefetch=prefetch)[:2])  # fmt: skip
    ratios = [ours / bare for ours, bare in zip(found.trainer, found.alone, strict=True)]
    result = {
        "benchmark": "training",
        **machine(args.device),
        "pairs": len(ratios),
        "variants": {"bare": spread(found.alone), "trainer": spread(found.trainer)},
        "overhead": round(statistics.median(ratios) - 1, 4),
        "with_log": round(sum(found.trainer) / sum(found.alone) - 1, 4),
        "waiting": {
            "encoded before": round(waited / sum(found.wall), 4),
            **{name: round(waits.seconds / sum(waits.steps), 4) for name, waits in needed.items()},
        },
        "steps": {
            "encoded before": spread(found.wall),
            **{name: spread(waits.steps) for name, waits in needed.items()},
        },
        "load": os.getloadavg()[0],
    }
    tell(result)
    keep(result, args.json)
    return 0


def tell(result: dict[str, Any]) -> None:
    """For people."""
    head(result, "pairs")
    for name, row in result["variants"].items():
        print(f"{name:>8}  {row['median_ms']:.1f} ms  ({row['p20_ms']:.1f} to {row['p80_ms']:.1f})")
    print(f"overhead {result['overhead']:.1%}, with the log {result['with_log']:.1%}")
    for name, share in result["waiting"].items():
        step = result["steps"][name]["median_ms"]
        print(f"waiting for batches that are {name}: {share:.1%}, a step {step:.1f} ms")
    print(f"load average {result['load']:.1f}")


if __name__ == "__main__":
    sys.exit(main())
