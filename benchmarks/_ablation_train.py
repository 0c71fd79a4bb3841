"""How `benchmarks.ablation` trains an arm: one loop for all of them.

`prw_flux.train` trains one expert on one task at a time. Arms that mix tasks or let veterans learn
cannot be said in a `RunConfig`, so this loop repeats its step on batches of several tasks. On a
curriculum it gives the same bits as `prw_flux.train`, which a test checks.

Shapes: B samples of a step, as in `prw_flux.samples`.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import prw
from benchmarks._ablation_plan import PICK, Arm, Phase, Protocol, picks
from prw_flux.arithmetic import arithmetic
from prw_flux.batch_order import stable_hash
from prw_flux.config import RunConfig
from prw_flux.data.choose import open_data
from prw_flux.encoded import Batch
from prw_flux.flow import flow_loss, interpolate, sample_times
from prw_flux.optimization import learning_rate, new_optimizer
from prw_flux.passes import source_pass
from prw_flux.samples import Samples
from prw_flux.session import Session, open_session

EVERY = 20
"""Steps between points of the curves."""


@dataclass(frozen=True, eq=False)
class Part:
    """The samples of a step that share their rotary positions."""

    batch: Batch
    pooled_BP: Tensor
    rows: list[int]


class Store:
    """The encoded samples of one seed, shared by all arms."""

    def __init__(self, config: RunConfig, session: Session) -> None:
        data = open_data(config.data.source, size=config.size, seed=config.seed)
        self.samples: dict[str, Samples] = {}
        self.pooled: dict[str, Tensor] = {}
        for stage, task in zip(config.stages, session.tasks, strict=True):
            samples = Samples(
                data, task, session.pipe, stage=task.name, seed=config.seed,
                batch_size=stage.batch_size, count=config.data.samples,
            )  # fmt: skip
            samples.prepare()
            self.samples[task.name] = samples
            with arithmetic(session.device.type, config.precision):
                row = samples.texts.rows([task.sentence])
            self.pooled[task.name] = samples.texts.gather(row)[1]

    def one_task(self, task: str, step: int, size: int, dropped: list[bool]) -> list[Part]:
        """The batch of a step of the task's own stage."""
        samples = copy.copy(self.samples[task])
        samples.batch_size = size
        batch = samples.batch(step, dropped)
        return [Part(batch, self.pooled[task], list(range(size)))]

    def several(self, chosen: list[PICK], dropped: list[bool]) -> list[Part]:
        """The given samples, those with one layout of the source together."""
        layouts: dict[bool, list[int]] = {}
        for row, (task, _) in enumerate(chosen):
            layouts.setdefault(self.samples[task].task.aligned, []).append(row)
        parts = []
        for rows in layouts.values():
            singles = [self._single(chosen[row], dropped[row]) for row in rows]
            tensors = {
                name: torch.cat([getattr(one, name) for one in singles])
                for name in ("target_BTC", "source_BSC", "text_BLE", "pooled_BP")
            }
            pooled = torch.cat([self.pooled[chosen[row][0]] for row in rows])
            parts.append(Part(replace(singles[0], **tensors), pooled, rows))
        return parts

    def _single(self, chosen: PICK, dropped: bool) -> Batch:
        task, place = chosen
        samples = copy.copy(self.samples[task])
        samples.batch_size = 1
        return samples.batch(place, [dropped])


AfterPhase = Callable[[Phase], None]


class Course:
    """One arm in training.

    Args:
        arm, protocol, seed: what is trained.
        store: encoded samples of the seed; None encodes them.
    """

    def __init__(self, arm: Arm, protocol: Protocol, seed: int, store: Store | None = None) -> None:
        self.arm, self.protocol = arm, protocol
        self.config = protocol.config(seed, **arm.adapter)
        self.session = open_session(self.config)
        self.adapter = self.session.adapter
        for task in self.session.tasks:
            self.adapter.note_trained(task.name)
        self.store = store or Store(self.config, self.session)
        self.optimizer: torch.optim.AdamW | None = None

    def train(self, after: AfterPhase) -> list[dict[str, Any]]:
        """All phases, `after` each of which is called; what was seen on the way."""
        told = []
        for number, phase in enumerate(self.arm.phases):
            began = time.perf_counter()
            curve = self._phase(phase)
            goes_on = any(not later.opens for later in self.arm.phases[number + 1 :])
            if not goes_on:
                self.adapter.weave.close()
            if self.arm.remember:
                self._consolidate(phase)
            told.append({
                "phase": phase.stage.name, "tasks": list(phase.tasks), "steps": phase.stage.steps,
                "seconds": round(time.perf_counter() - began, 1), "curve": curve,
            })  # fmt: skip
            self.session.passes.eval()
            after(phase)
            self.session.passes.train()
            self.session.passes.transformer.eval()
        return told

    def _phase(self, phase: Phase) -> list[dict[str, float]]:
        for name in phase.opens:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(stable_hash(self.config.seed, name, "initialisation"))
                self.adapter.weave.unlock(name)
        if phase.learns == "all":
            for stage in self.adapter.weave.stages:
                if not stage.learns:
                    self.adapter.weave.thaw(stage.name)
        if self.optimizer is None:
            self.optimizer = new_optimizer(self.adapter, self.config.optimizer)
        else:
            self.adapter.weave.sync(self.optimizer)
        plan = picks(phase, self.protocol, self.config.seed)
        curve: list[dict[str, float]] = []
        recent: list[tuple[float, float]] = []
        for step in range(phase.stage.steps):
            recent.append(self._step(phase, step, None if plan is None else plan[step]))
            if (step + 1) % EVERY == 0 or step + 1 == phase.stage.steps:
                losses, usages = zip(*recent, strict=True)
                curve.append({"step": step + 1, "loss": round(sum(losses) / len(losses), 5),
                              "usage": round(sum(usages) / len(usages), 4)})  # fmt: skip
                recent = []
        return curve

    def _step(self, phase: Phase, step: int, chosen: list[PICK] | None) -> tuple[float, float]:
        """One descent; its flow loss and the usage of the newest expert."""
        config, stage, adapter = self.config, phase.stage, self.adapter
        assert self.optimizer is not None
        draw = torch.Generator().manual_seed(stable_hash(config.seed, stage.name, "step", step))
        dropped = (torch.rand(stage.batch_size, generator=draw) < config.caption_dropout).tolist()
        if chosen is None:
            parts = self.store.one_task(phase.tasks[0], step, stage.batch_size, dropped)
        else:
            parts = self.store.several(chosen, dropped)
        shift = config.time_shift or 1.0
        times_B = sample_times(stage.batch_size, draw, shift=shift)
        shape = (stage.batch_size, *parts[0].batch.target_BTC.shape[1:])
        noise_BTC = torch.randn(shape, generator=draw)
        key = stable_hash(config.seed, stage.name, "router", step)
        flow = torch.zeros(())
        with adapter.weave.record(key=key, keep_inputs=phase.balance > 0.0) as record:
            for part in parts:
                share = len(part.rows) / stage.batch_size
                loss = self._flow(part, times_B[part.rows], noise_BTC[part.rows], record)
                flow = flow + (loss if share == 1.0 else share * loss)
        total = flow + prw.veteran_gate_loss(record, stage.density, stage.weight)
        if phase.balance:
            total = total + prw.load_balance_loss(record, phase.balance)
        with self._arithmetic():
            total.backward()
        norm = torch.nn.utils.clip_grad_norm_(list(adapter.weave.parameters()),
                                              config.optimizer.clip)  # fmt: skip
        if not math.isfinite(float(total.detach() + norm)):
            raise ArithmeticError(f"the loss is not finite at step {step + 1} of {stage.name!r}")
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(config.optimizer, stage, step) * group["factor"]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(flow.detach()), record.usage()

    def _flow(self, part: Part, times_B: Tensor, noise_BTC: Tensor, record: prw.Record) -> Tensor:
        batch = part.batch
        with self._arithmetic():
            velocity = self.session.passes(
                interpolate(batch.target_BTC, noise_BTC, times_B), batch.target_ids_T3,
                batch.text_BLE, batch.pooled_BP, times_B, batch.source_BSC, batch.source_ids_S3,
                part.pooled_BP, torch.full((len(times_B),), self.config.guidance), record,
            )  # fmt: skip
        return flow_loss(velocity, batch.target_BTC, noise_BTC)

    def _arithmetic(self) -> Any:
        return arithmetic(self.session.device.type, self.config.precision)

    @torch.no_grad()
    def _consolidate(self, phase: Phase) -> None:
        """As `RunConfig.remember` does at the end of a stage."""
        rows, size, stage = self.arm.remember, phase.stage.batch_size, phase.stage
        draw = torch.Generator().manual_seed(stable_hash(self.config.seed, stage.name, "memory"))
        with self.adapter.weave.remember(stage.name, rows) as recall:
            for step in range(-(-rows // size)):
                (part,) = self.store.one_task(phase.tasks[0], step, size, [])
                times_B = sample_times(size, draw, shift=self.config.time_shift or 1.0)
                with self._arithmetic():
                    source_pass(
                        self.session.passes.transformer, part.batch.source_BSC,
                        part.batch.source_ids_S3, part.pooled_BP,
                        self.adapter.source_time(times_B), None, recall,
                    )  # fmt: skip
        self.adapter.weave.consolidate()
