"""What a model still knows of earlier tasks: three groups of digits, one after the other.

    python -m benchmarks.continual [--device cpu|cuda] [--seeds 3] [--quick] [--json FILE]

A small transformer learns by how many quarter turns scikit-learn's digits were rotated; it is
frozen, and learns to name 0 1 2, then 3 4 5, then 6 7 8, each group from a scanner of its own
(`_digits.LOOKS`), always with the same three outputs.

``at stage``       PRW, every task answered by `at_stage` of its own stage (task known)
``free``           PRW, the router of the last stage chooses
``consolidated``   the same with `remember` and `consolidate` at the end of every stage
``tokens``         as consolidated, with one choice per token instead of one per image
``sequential``     one PEFT LoRA trained on the tasks one after the other
``wide``           the same with three times the rank: as many parameters as three experts
``replay``         as sequential, half of every later batch from 64 kept images per earlier task
``per task``       one PEFT LoRA for each task (task known)

All share base, data, order of tasks, batch size, steps and AdamW. The learning rate of each arm is
the one of three with the best mean accuracy over the tasks after the last stage, on images kept for
that choice, with a seed of its own; test images are touched once.
Forgetting is the accuracy on a task after its own stage minus that after the last stage, mean over
all tasks but the last.

No figure is printed unless `at_stage` gives, after the last stage, the very bits of each earlier
stage, and the optimizer of every stage holds one expert and the routers only.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import prw
from benchmarks._common import head, keep, machine, parser
from benchmarks._digits import TASKS, Reader, Split, pretrain, splits

LINEARS = ("q", "k", "v", "out", "up", "down")
RANK = 4
BATCH = 32
KEPT = 64
DENSITY, WEIGHT = 0.8, 0.5
RATES = (2e-3, 5e-3, 1e-2)
CHOICE_SEED = 1000
ARMS = ("at stage", "free", "consolidated", "tokens", "sequential", "wide", "replay", "per task")


class Wrong(Exception):
    """A promise that does not hold, so that nothing else is worth printing."""


@dataclass(frozen=True)
class Size:
    """How long everything trains."""

    pretraining: int
    steps: int
    rates: tuple[float, ...]


@dataclass
class Course:
    """What one run through the three tasks leaves: a matrix of accuracies, stage by task.

    Attributes:
        matrix: row i is after stage i; tasks that were not trained yet are included.
        learning: numbers that learn in each stage, by kind.
        state: bytes that the optimizer holds at the end of each stage.
        agreement: what the last `consolidate` returned.
    """

    matrix: list[list[float]] = field(default_factory=list)
    learning: list[dict[str, int]] = field(default_factory=list)
    state: list[int] = field(default_factory=list)
    agreement: float | None = None

    @property
    def final(self) -> float:
        """Mean accuracy over the tasks after the last stage."""
        return sum(self.matrix[-1]) / len(self.matrix[-1])

    @property
    def forgetting(self) -> float:
        """Mean drop of the earlier tasks."""
        last = len(self.matrix) - 1
        return sum(self.matrix[i][i] - self.matrix[last][i] for i in range(last)) / last


@dataclass(frozen=True)
class School:
    """One seed: the frozen base, what is learnt, and what is asked."""

    base: Reader
    train: list[Split]
    ask: list[Split]
    seed: int
    steps: int
    device: str


def main(arguments: list[str] | None = None) -> int:
    """Choose rates, run every arm, print; 1 where a promise is broken."""
    found = parser("continual", __doc__ or "")
    found.add_argument("--seeds", type=int, default=3)
    args = found.parse_args(arguments)
    size = Size(300, 100, RATES) if not args.quick else Size(60, 30, RATES[-1:])
    seeds = range(1 if args.quick else args.seeds)
    try:
        rates = {arm: choose(arm, size, args.device) for arm in ARMS}
        courses = {
            arm: [course(arm, seed, rates[arm], size, args.device, "test") for seed in seeds]
            for arm in ARMS
        }
    except Wrong as problem:
        print(f"no figures: {problem}", file=sys.stderr)
        return 1
    result = {
        "benchmark": "continual",
        **machine(args.device),
        "seeds": len(seeds),
        "steps": size.steps,
        "pretraining_steps": size.pretraining,
        "rank": RANK,
        "rates": list(size.rates),
        "base_parameters": sum(p.numel() for p in Reader().parameters()),
        "tasks": list(TASKS),
        "variants": {arm: summary(courses[arm], rates[arm]) for arm in ARMS},
    }
    tell(result)
    keep(result, args.json)
    return 0


def choose(arm: str, size: Size, device: str) -> float:
    """The learning rate that ends best on the images kept for this choice."""
    if len(size.rates) == 1:
        return size.rates[0]
    return max(
        size.rates, key=lambda rate: course(arm, CHOICE_SEED, rate, size, device, "choose").final
    )


@cache
def school(seed: int, size: Size, device: str, asked: str) -> School:
    """Everything the arms of one seed share."""
    data = splits(seed)
    parts = {
        name: [data[name].task(task).to(device) for task in TASKS] for name in ("train", asked)
    }
    base = pretrain(data["train"].to(device), steps=size.pretraining, seed=seed)
    return School(base, parts["train"], parts[asked], seed, size.steps, device)


def course(arm: str, seed: int, rate: float, size: Size, device: str, asked: str) -> Course:
    """One arm on one seed."""
    if arm in ("at stage", "free", "consolidated", "tokens"):
        granularity = "token" if arm == "tokens" else "sample"
        consolidate = arm in ("consolidated", "tokens")
        pinned, free = woven(seed, rate, size, device, asked, consolidate, granularity)
        return pinned if arm == "at stage" else free
    given = school(seed, size, device, asked)
    if arm == "per task":
        return per_task(given, rate)
    return sequential(given, rate, 3 * RANK if arm == "wide" else RANK, arm == "replay")


@cache
def woven(
    seed: int,
    rate: float,
    size: Size,
    device: str,
    asked: str,
    consolidate: bool,
    granularity: Literal["sample", "token"],
) -> tuple[Course, Course]:
    """PRW: the course with stages pinned, and the one with the router free."""
    given = school(seed, size, device, asked)
    model = copy.deepcopy(given.base)
    targets = [f"blocks.*.{name}" for name in LINEARS]
    weave = prw.weave(
        model,
        prw.Config(
            target_modules=targets,
            rank=RANK,
            granularity=granularity,
            share_router="parent",
        ),
    )
    pinned, free, kept = Course(), Course(), {}
    names = list(TASKS)
    torch.manual_seed(seed)
    optimizer: torch.optim.Optimizer | None = None
    for stage, name in enumerate(names):
        weave.unlock(name)
        if optimizer is None:
            optimizer = torch.optim.AdamW(weave.parameters(), lr=rate)
        weave.sync(optimizer)

        def loss(x: Tensor, y: Tensor, stage: int = stage) -> Tensor:
            with weave.record() as routing:
                value = error(model, x, y)
            if stage == 0:
                return value
            return value + prw.veteran_gate_loss(routing, density=DENSITY, weight=WEIGHT)

        fit(model, optimizer, batches(given.train[stage], given.steps), loss)
        for found in (pinned, free):
            found.learning.append(learning(weave))
            found.state.append(held(optimizer))
        check_memory(weave, optimizer)
        weave.close()
        if consolidate:
            with weave.remember(name, rows=KEPT):
                model(given.train[stage].x_BHH[:KEPT])
            free.agreement = pinned.agreement = weave.consolidate()
        free.matrix.append([accuracy(model, part) for part in given.ask])
        with weave.at_stage(name):
            kept[name] = answers(model, given.ask[stage])
        pinned.matrix.append(pinned_row(weave, model, given.ask, names[: stage + 1]))
    for index, name in enumerate(names):
        with weave.at_stage(name):
            if not torch.equal(answers(model, given.ask[index]), kept[name]):
                raise Wrong(f"at_stage({name!r}) no longer gives the bits of the end of its stage")
    return pinned, free


def pinned_row(
    weave: prw.Weave, model: nn.Module, ask: list[Split], names: list[str]
) -> list[float]:
    """Each task at its own stage; one that has none yet, at the latest."""
    row = []
    for index, part in enumerate(ask):
        with weave.at_stage(names[min(index, len(names) - 1)]):
            row.append(accuracy(model, part))
    return row


def sequential(given: School, rate: float, rank: int, replay: bool) -> Course:
    """One PEFT LoRA, trained on the tasks in turn."""
    torch.manual_seed(given.seed)
    model = plain_lora(given.base, rank)
    optimizer = torch.optim.AdamW(trainable(model), lr=rate)
    found = Course()
    for stage, part in enumerate(given.train):
        old = [Split(p.x_BHH[:KEPT], p.y_B[:KEPT]) for p in given.train[:stage]]
        memory = joined(old) if replay and old else None
        fit(model, optimizer, batches(part, given.steps, memory), lambda x, y: error(model, x, y))
        found.matrix.append([accuracy(model, part) for part in given.ask])
        found.learning.append({"lora": sum(p.numel() for p in trainable(model))})
        found.state.append(held(optimizer))
    return found


def per_task(given: School, rate: float) -> Course:
    """A PEFT LoRA of its own for each task; one that has none yet is asked of the latest."""
    torch.manual_seed(given.seed)
    models: list[nn.Module] = []
    found = Course()
    for part in given.train:
        model = plain_lora(given.base, RANK)
        optimizer = torch.optim.AdamW(trainable(model), lr=rate)
        fit(model, optimizer, batches(part, given.steps), lambda x, y, m=model: error(m, x, y))
        models.append(model)
        row = [models[min(i, len(models) - 1)] for i in range(len(given.ask))]
        found.matrix.append([accuracy(m, p) for m, p in zip(row, given.ask, strict=True)])
        found.learning.append({"lora": sum(p.numel() for p in trainable(model))})
        found.state.append(held(optimizer))
    return found


def plain_lora(base: nn.Module, rank: int) -> nn.Module:
    """PEFT's LoRA on the layers that PRW adapts, with the same scaling."""
    settings = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(LINEARS))
    return get_peft_model(copy.deepcopy(base), settings)


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """What an optimizer is given."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def error(model: nn.Module, x_BHH: Tensor, y_B: Tensor) -> Tensor:
    """Cross-entropy of the three outputs that name digits."""
    return F.cross_entropy(model(x_BHH)[:, :3], y_B)


def fit(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: Iterator[tuple[Tensor, Tensor]],
    loss: Callable[[Tensor, Tensor], Tensor],
) -> None:
    """The loop that every arm trains with."""
    model.train()
    for x_BHH, y_B in data:
        value = loss(x_BHH, y_B)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    model.eval()


def batches(
    part: Split, steps: int, memory: Split | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Random batches of one size; with a memory, half of each comes from there."""
    for _ in range(steps):
        drawn = [part.draw(BATCH)] if memory is None else []
        if memory is not None:
            drawn = [part.draw(BATCH // 2), memory.draw(BATCH // 2)]
        both = joined(drawn)
        yield both.x_BHH, both.y_B


def joined(parts: list[Split]) -> Split:
    """All images of the parts."""
    return Split(torch.cat([p.x_BHH for p in parts]), torch.cat([p.y_B for p in parts]))


@torch.no_grad()
def answers(model: nn.Module, part: Split) -> Tensor:
    """Logits ``[B, 3]``."""
    logits: Tensor = model(part.x_BHH)[:, :3]
    return logits


def accuracy(model: nn.Module, part: Split) -> float:
    """Share of images named rightly."""
    return float((answers(model, part).argmax(-1) == part.y_B).double().mean())


def learning(weave: prw.Weave) -> dict[str, int]:
    """Numbers that learn now, of experts and of routers."""
    counts = {"expert": 0, "routers": 0}
    for pool in weave.pools.values():
        for name, parameter in pool.learners():
            counts["expert" if name.startswith("experts") else "routers"] += parameter.numel()
    return counts


def held(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the moments that an optimizer holds."""
    return sum(
        value.numel() * value.element_size()
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, Tensor) and value.dim()
    )


def check_memory(weave: prw.Weave, optimizer: torch.optim.Optimizer) -> None:
    """The optimizer holds two moments of the newest expert and of the routers, and no more."""
    newest = len(weave.stages) - 1
    one = sum(p.numel() for pool in weave.pools.values() for p in pool.expert(newest).parameters())
    routers = sum(p.numel() for pool in weave.pools.values() for p in pool.columns.parameters())
    if held(optimizer) > 2 * 4 * (one + routers):
        raise Wrong(f"the optimizer holds {held(optimizer)} bytes for {one} + {routers} numbers")


def summary(courses: list[Course], rate: float) -> dict[str, Any]:
    """Mean and spread over seeds; accuracies in percent, forgetting in points."""
    stacked = torch.tensor([c.matrix for c in courses], dtype=torch.float64) * 100
    told: dict[str, Any] = {
        "rate": rate,
        "matrix": [[round(v, 2) for v in row] for row in stacked.mean(0).tolist()],
        "final": mean_and_range([100 * c.final for c in courses]),
        "forgetting": mean_and_range([100 * c.forgetting for c in courses]),
        "learning": courses[0].learning,
        "optimizer_bytes": courses[0].state,
    }
    shares = [c.agreement for c in courses if c.agreement is not None]
    return told | ({"agreement": mean_and_range([100 * s for s in shares])} if shares else {})


def mean_and_range(values: list[float]) -> dict[str, float]:
    """Mean, lowest and highest."""
    found = {"mean": sum(values) / len(values), "low": min(values), "high": max(values)}
    return {name: round(value, 2) for name, value in found.items()}


def tell(result: dict[str, Any]) -> None:
    """For people."""
    head(result, "seeds", "steps", "rank", "base_parameters")
    print("accuracy in percent after each stage, by task; mean over seeds")
    for arm, told in result["variants"].items():
        end, lost = told["final"], told["forgetting"]
        print(f"\n{arm}  (learning rate {told['rate']:g})")
        for task, row in zip(result["tasks"], told["matrix"], strict=True):
            print(f"  after {task:<16}" + "".join(f"{value:8.1f}" for value in row))
        print(f"  final {end['mean']:.1f} [{end['low']:.1f}, {end['high']:.1f}]   forgetting "
              f"{lost['mean']:.1f} [{lost['low']:.1f}, {lost['high']:.1f}]")  # fmt: skip
        print(f"  learning per stage {told['learning']}, optimizer bytes {told['optimizer_bytes']}")


if __name__ == "__main__":
    sys.exit(main())
