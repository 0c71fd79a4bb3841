"""What the time of the source changes: short trainings with either `source_timestep`.

    python -m benchmarks.timestep [--quick] [--json FILE] [--seeds N] [--steps N]

The recipe `demo` on the embedded base, its stages inpainting and control, with the same seeds,
data, noise and times under "zero" and under "current". On held-out samples, without router noise:

``loss``      flow matching at five times, for the adapter of each mode, read as either mode: read
              as the other one, a source has a time that it was not trained with
``keys``, ``values``, ``velocity``
              |x(t) - x(0)| / |x(0)| of an adapter's source (mean over blocks) and of the velocity
              that it gives, if the source is modulated by t instead of 0
``experts``   share of blocks and samples whose router then chooses another expert

Nothing is told unless the passes of this file give the bits of the module that trains, and a source
at time 0 differs from itself by 0.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

import prw
from benchmarks._common import head, keep, machine, parser
from prw_flux.arithmetic import arithmetic
from prw_flux.config import RunConfig
from prw_flux.data.choose import open_data
from prw_flux.encoded import Batch
from prw_flux.flow import flow_loss, interpolate
from prw_flux.passes import main_pass, source_pass
from prw_flux.recipes import demo
from prw_flux.rundir import RunFolder
from prw_flux.samples import Samples
from prw_flux.session import Session, open_session
from prw_flux.source_cache import SourceCache
from prw_flux.trainer import open_training_data, train

MODES: Final = ("zero", "current")
TIMES: Final = (0.1, 0.3, 0.5, 0.7, 0.9)


@dataclass(frozen=True, eq=False)
class Held:
    """Held-out samples of one task, with the noise and the pooled text that they are read with."""

    batch: Batch
    noise: Tensor
    pooled_BP: Tensor


def config_of(mode: str, seed: int, steps: int, quick: bool) -> RunConfig:
    """The demo's first stage and its third, shortened."""
    base = demo()
    stages = tuple(stage for stage in base.stages if stage.name in ("inpaint", "control"))
    settings = [f"adapter.source_timestep={mode}", f"seed={seed}", f"stages.*.steps={steps}",
                f"data.samples={8 if quick else 600}"]  # fmt: skip
    if quick:
        settings += ["stages.*.batch_size=4", "remember=4", "optimizer.warmup=1"]
    return replace(base, stages=stages).with_settings(settings)


def trained(config: RunConfig) -> Session:
    """Base and adapter at the end of a run that is not kept."""
    session = open_session(config)
    with tempfile.TemporaryDirectory() as folder:
        run = RunFolder.create(Path(folder) / "run", config)
        train(run, session, open_training_data(config, session))
    session.passes.eval()
    return session


def held_out(session: Session, config: RunConfig, count: int) -> dict[str, Held]:
    """Samples of every task that training never saw."""
    data = open_data(config.data.source, size=config.size, seed=config.seed, split="heldout")
    found = {}
    for task in session.tasks:
        samples = Samples(data, task, session.pipe, stage=f"{task.name}/heldout", seed=config.seed,
                          batch_size=count, count=count)  # fmt: skip
        samples.prepare()
        batch = samples.batch(0)
        draw = torch.Generator().manual_seed(config.seed)
        noise = torch.randn(batch.target_BTC.shape, generator=draw)
        pooled = samples.texts.gather(samples.texts.rows([task.sentence]))[1]
        found[task.name] = Held(_on(session.device, batch), noise.to(session.device),
                                pooled.to(session.device))  # fmt: skip
    return found


def _on(device: torch.device, batch: Batch) -> Batch:
    given = {name: value for name, value in vars(batch).items() if value is not None}
    return replace(batch, **{name: value.to(device) for name, value in given.items()})


def source(session: Session, held: Held, t: float, record: prw.Record | None = None) -> SourceCache:
    """The source of every sample, modulated by t, routed freely and without noise."""
    with record or prw.Record() as call:
        return source_pass(
            session.passes.transformer, held.batch.source_BSC, held.batch.source_ids_S3,
            held.pooled_BP, torch.tensor([t], device=held.noise.device), call=call,
        )  # fmt: skip


def velocity(session: Session, held: Held, t: float, cache: SourceCache) -> Tensor:
    """Of the noisy samples at t."""
    batch = held.batch
    time_B = torch.full((len(held.noise),), t, device=held.noise.device)
    return main_pass(
        session.passes.transformer, interpolate(batch.target_BTC, held.noise, time_B),
        batch.target_ids_T3, batch.text_BLE, None, batch.pooled_BP, time_B, cache=cache,
    )  # fmt: skip


def wrong(session: Session, held: Held) -> str:
    """What is wrong with the measurement; "" for nothing."""
    mode, batch, t = session.adapter.config.source_timestep, held.batch, 0.5
    time_B = torch.full((len(held.noise),), t, device=held.noise.device)
    wanted = session.passes(
        interpolate(batch.target_BTC, held.noise, time_B), batch.target_ids_T3, batch.text_BLE,
        batch.pooled_BP, time_B, batch.source_BSC, batch.source_ids_S3, held.pooled_BP,
        call=prw.Record(),
    )  # fmt: skip
    found = velocity(session, held, t, source(session, held, t if mode == "current" else 0.0))
    if not torch.equal(found, wanted):
        return "the passes differ from the module that trains"
    return "time 0 differs from itself" if any(changes(session, held, 0.0).values()) else ""


def changes(session: Session, held: Held, t: float) -> dict[str, float]:
    """What changes if the source is modulated by t instead of 0."""
    records = prw.Record(), prw.Record()
    still, moved = (
        source(session, held, time, record) for time, record in zip((0.0, t), records, strict=True)
    )
    chosen = [
        torch.stack([group["expert"] for group in record.by_group().values()]) for record in records
    ]
    pairs = [(a, b) for a, b in zip(still, moved, strict=True)]
    return {
        "keys": statistics.fmean(_apart(a.key_BSHD, b.key_BSHD) for a, b in pairs),
        "values": statistics.fmean(_apart(a.value_BSHD, b.value_BSHD) for a, b in pairs),
        "experts": float((chosen[0] != chosen[1]).double().mean()),
        "velocity": _apart(
            velocity(session, held, max(t, 1e-6), still),
            velocity(session, held, max(t, 1e-6), moved),
        ),
    }


def _apart(still: Tensor | None, moved: Tensor | None) -> float:
    assert still is not None and moved is not None
    return float((moved - still).norm() / still.norm())


def losses(session: Session, held: Held) -> dict[str, float]:
    """Mean loss over `TIMES`, the adapter read as either mode."""
    found = {}
    for mode in MODES:
        each = []
        for t in TIMES:
            cache = source(session, held, t if mode == "current" else 0.0)
            out = velocity(session, held, t, cache)
            each.append(float(flow_loss(out, held.batch.target_BTC, held.noise)))
        found[mode] = statistics.fmean(each)
    return found


def measure(mode: str, seed: int, steps: int, quick: bool) -> dict[str, Any]:
    """One training and what is read of it.

    Raises:
        ArithmeticError: the measurement does not measure what it should.
    """
    config = config_of(mode, seed, steps, quick)
    started = time.perf_counter()
    session = trained(config)
    seconds = time.perf_counter() - started
    found: dict[str, Any] = {"seconds": seconds, "loss": {}, "changes": {}}
    with torch.inference_mode(), arithmetic(session.device.type, config.precision):
        for task, held in held_out(session, config, 4 if quick else 64).items():
            problem = wrong(session, held)
            if problem:
                raise ArithmeticError(problem)
            found["loss"][task] = losses(session, held)
            found["changes"][task] = {str(t): changes(session, held, t) for t in TIMES}
    return found


def averaged(rows: list[Any]) -> Any:
    """Nested dictionaries of numbers: their mean and the values, rounded."""
    if isinstance(rows[0], dict):
        return {key: averaged([row[key] for row in rows]) for key in rows[0]}
    return {"mean": round(statistics.fmean(rows), 5), "seeds": [round(row, 5) for row in rows]}


def main(arguments: list[str] | None = None) -> int:
    """Train, check, measure, print; 1 where a check fails."""
    given = parser("timestep", __doc__ or "")
    given.add_argument("--seeds", type=int, default=2, help="trainings of each mode")
    given.add_argument("--steps", type=int, default=120, help="of training per stage")
    args = given.parse_args(arguments)
    seeds, steps = (1, 2) if args.quick else (args.seeds, args.steps)
    rows: dict[str, list[Any]] = defaultdict(list)
    try:
        for seed in range(seeds):
            for mode in MODES:
                rows[mode].append(measure(mode, seed, steps, args.quick))
    except ArithmeticError as problem:
        print(f"no figures: {problem}", file=sys.stderr)
        return 1
    result = {
        "benchmark": "timestep",
        **machine(args.device),
        "seeds": seeds,
        "steps": steps,
        "variants": {mode: averaged(found) for mode, found in rows.items()},
    }
    tell(result)
    keep(result, args.json)
    return 0


def tell(result: dict[str, Any]) -> None:
    """For people."""
    head(result, "seeds", "steps")
    for trained_with, found in result["variants"].items():
        for task, loss in found["loss"].items():
            for read_as, value in loss.items():
                print(f"loss of {task:>8}, trained {trained_with:>7}, read as {read_as:>7}  "
                      f"{value['mean']:.4f}  {value['seeds']}")  # fmt: skip
    for trained_with, found in result["variants"].items():
        for task, rows in found["changes"].items():
            for t, row in rows.items():
                told = "  ".join(f"{name} {value['mean']:.3f}" for name, value in row.items())
                print(f"{task:>8}, trained {trained_with:>7}, t {t} instead of 0  {told}")


if __name__ == "__main__":
    sys.exit(main())
