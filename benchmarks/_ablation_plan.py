"""What `benchmarks.ablation` trains: the protocol, the arms and the samples of every step.

A phase opens experts and trains for some steps on one task, or on several mixed. An arm is a list
of phases and a few settings of the adapter. Sample p of a task is the same in every arm of a seed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Final, Literal

import numpy as np

from benchmarks._ablation_base import base_folder
from prw_flux.batch_order import stable_hash
from prw_flux.config import RunConfig
from prw_flux.curriculum import Stage
from prw_flux.recipes import demo

ORDER: Final = ("inpaint", "ground", "control", "customise", "edit")
FINAL: Final = "edit"
PICK = tuple[str, int]
"""A sample: its task, and its place in the order of the task's samples."""


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """Everything that all arms share; rows of another protocol are never mixed.

    Attributes:
        version: raised by a change of the code that changes results.
        steps: of the stage of each task, in the order of `ORDER`.
        rank: of an expert; its alpha is twice the rank.
        balance: weight of the load balance loss where experts train together.
        samples: encoded per task; a longer stage sees them again, in another order.
        items: held-out items of each task, in the same order.
        sampling: denoising steps.
        held_seed: of the held-out items and of their noise; the same for all training seeds.
        base: share of its pretraining that the base has had.
    """

    version: int = 1
    steps: tuple[int, ...] = (180, 180, 180, 180, 180)
    batch_size: int = 16
    lr: float = 7e-3
    rank: int = 16
    density: float = 0.8
    weight: float = 0.5
    balance: float = 0.01
    samples: int = 1000
    items: tuple[int, ...] = (64, 128, 64, 128, 512)
    sampling: int = 12
    held_seed: int = 0
    base: float = 1.0

    @property
    def digest(self) -> str:
        """Eight letters that say which protocol a row belongs to."""
        told = asdict(self)
        if self.base == 1.0:
            del told["base"]  # as the first rows were written
        text = json.dumps(told, sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=4).hexdigest()

    def varied(
        self, *, length: float = 1.0, rank: int | None = None, base: float = 1.0
    ) -> Protocol:
        """The same with stages of another length, experts of another rank or another base."""
        steps = tuple(max(1, round(n * length)) for n in self.steps)
        return replace(self, steps=steps, rank=rank or self.rank, base=base)

    def length(self, task: str) -> int:
        """Steps of the stage of a task."""
        return self.steps[ORDER.index(task)]

    def config(self, seed: int, **adapter: object) -> RunConfig:
        """The demo's configuration at this protocol's sizes: base, data, optimizer, times."""
        settings = {"rank": self.rank, **adapter}
        settings.setdefault("alpha", 2 * int(str(settings["rank"])))
        words = [f"adapter.{name}={value}" for name, value in settings.items()]
        words += [f"seed={seed}", f"data.samples={self.samples}"]
        if self.base != 1.0:
            words.append(f"base.path={base_folder(self.base)}")
        if self.batch_size < 8:
            words.append("optimizer.warmup=0")
        return demo().with_settings(words)


VARIED: Final[Mapping[str, Mapping[str, Any]]] = {
    "nothing": {},
    "stages twice as long": {"length": 2},
    "stages four times as long": {"length": 4},
    "rank 4": {"rank": 4},
    "rank 64": {"rank": 64},
    "a tenth of the base's pretraining": {"base": 0.1},
}
"""What the diagnosis of H1 changes, one thing at a time."""

QUICK: Final = Protocol(
    steps=(1, 1, 1, 1, 2), batch_size=5, samples=8, items=(2, 2, 2, 2, 4), sampling=2, rank=4
)


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A stretch of training with one schedule of the learning rate.

    Attributes:
        stage: its name, steps, batch size, rate, density and weight.
        tasks: one, or those whose samples are mixed.
        opens: stages unlocked before it; none goes on with the open one.
        learns: the newest expert, or all.
        balance: weight of the load balance loss.
    """

    stage: Stage
    tasks: tuple[str, ...]
    opens: tuple[str, ...]
    learns: Literal["newest", "all"] = "newest"
    balance: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to train.

    Attributes:
        label: in words.
        group: "main", "controls" or "sweeps".
        phases: in order; none where nothing is trained.
        adapter: settings of the adapter that differ from the protocol's.
        remember: as `RunConfig.remember`; 0, the paper's way, everywhere else.
    """

    label: str
    group: str
    phases: tuple[Phase, ...]
    adapter: Mapping[str, object]
    remember: int = 0

    @property
    def steps(self) -> int:
        """Of all phases."""
        return sum(phase.stage.steps for phase in self.phases)

    @property
    def frozen(self) -> bool:
        """Whether no finished stage can change, so that `at_stage` is what it was."""
        return all(phase.learns == "newest" for phase in self.phases)


def progressive(
    protocol: Protocol,
    order: tuple[str, ...] = ORDER,
    *,
    learns: Literal["newest", "all"] = "newest",
    density: float | None = None,
    weight: float | None = None,
) -> tuple[Phase, ...]:
    """One stage and one new expert per task."""
    rho = protocol.density if density is None else density
    alpha = protocol.weight if weight is None else weight
    return tuple(
        Phase(
            stage=Stage(
                task=task, steps=protocol.length(task), batch_size=protocol.batch_size,
                lr=protocol.lr, density=rho if place else 1.0, weight=alpha if place else 0.0,
            ),
            tasks=(task,), opens=(task,), learns=learns,
        )
        for place, task in enumerate(order)
    )  # fmt: skip


def mixed(protocol: Protocol, tasks: tuple[str, ...], experts: int) -> Phase:
    """The stages of several tasks at once: all their samples shuffled, all experts learning."""
    return Phase(
        stage=Stage(
            task=tasks[0], name="mixed", steps=sum(map(protocol.length, tasks)),
            batch_size=protocol.batch_size, lr=protocol.lr, density=1.0, weight=0.0,
        ),
        tasks=tasks, opens=tuple(f"expert-{k}" for k in range(experts)), learns="all",
        balance=protocol.balance if experts > 1 else 0.0,
    )  # fmt: skip


def arms(protocol: Protocol) -> dict[str, Arm]:
    """All arms by name, in the order in which they are run."""
    last, experts = protocol.length(FINAL), len(ORDER)
    together = mixed(protocol, ORDER, experts)
    earlier = mixed(protocol, ORDER[:-1], experts)
    alone = Stage(task=FINAL, steps=last, batch_size=protocol.batch_size, lr=protocol.lr,
                  density=1.0, weight=0.0)  # fmt: skip
    finetuned = Phase(stage=alone, tasks=(FINAL,), opens=(), learns="all", balance=earlier.balance)

    found: dict[str, Arm] = {}

    def add(
        name: str, label: str, group: str, phases: tuple[Phase, ...], remember: int = 0,
        **adapter: object,
    ) -> None:  # fmt: skip
        found[name] = Arm(
            label=label, group=group, phases=phases, adapter=adapter, remember=remember
        )

    add("cologen", "CoLoGen: 0, 1, 2, 3, 4", "main", progressive(protocol))
    add("cotrain", "co-training on the same samples", "main", (together,))
    add("baseline", "baseline: 3, 4", "main", progressive(protocol, ORDER[3:]))
    add("rl-only", "R_l only: 1, 2, 3, 4", "main", progressive(protocol, ORDER[1:]))
    add("rc-only", "R_c only: 0, 2, 3, 4", "main", progressive(protocol, (ORDER[0], *ORDER[2:])))
    add("joint-finetune", "co-training on 0 to 3, then 4", "main", (earlier, finetuned))

    add("references", "no training: copy, text, zero-delta, ceiling", "controls", ())
    add("no-freeze", "CoLoGen, veterans train on", "controls", progressive(protocol, learns="all"))
    add("no-veteran-loss", "CoLoGen, weight 0", "controls", progressive(protocol, weight=0.0))
    add("one-lora", "one LoRA of five times the rank, mixed", "controls",
        (mixed(protocol, ORDER, 1),), rank=experts * protocol.rank)  # fmt: skip
    add("swapped", "1, 0, 2, 3, 4", "controls",
        progressive(protocol, (ORDER[1], ORDER[0], *ORDER[2:])))  # fmt: skip
    add("with-control", "2, 3, 4", "controls", progressive(protocol, ORDER[2:]))
    add(
        "no-noise", "CoLoGen, routers without noise", "controls", progressive(protocol), noise=False
    )
    add("consolidated", "CoLoGen, routers consolidated", "controls", progressive(protocol), 128)

    for density in (0.5, 1.0):
        add(f"density-{density}", f"density {density}", "sweeps",
            progressive(protocol, density=density))  # fmt: skip
    add("weight-2.0", "weight 2", "sweeps", progressive(protocol, weight=2.0))
    add("tokens", "routed per token", "sweeps", progressive(protocol), granularity="token")
    add("current", "source at the current time", "sweeps", progressive(protocol),
        source_timestep="current")  # fmt: skip
    add("new-column", "only the new router column trains", "sweeps", progressive(protocol),
        router_train="new")  # fmt: skip
    return found


def picks(phase: Phase, protocol: Protocol, seed: int) -> list[list[PICK]] | None:
    """Which samples make up every step of a mixed phase; None for one task, in its own order.

    All together they are exactly the samples of the tasks' own stages, each as often as there.
    """
    if len(phase.tasks) == 1:
        return None
    size = phase.stage.batch_size
    numbers = [protocol.length(task) * size for task in phase.tasks]
    flat = [(task, p) for task, n in zip(phase.tasks, numbers, strict=True) for p in range(n)]
    rng = np.random.default_rng(stable_hash(seed, "ablation", phase.stage.name, *phase.tasks))
    order = rng.permutation(len(flat))
    return [[flat[i] for i in order[k : k + size]] for k in range(0, len(flat), size)]
