"""How many old inputs change their expert when a new one joins, by where its column begins.

    python -m benchmarks.flip_rate [--device cpu|cuda] [--quick] [--json FILE]
                                   [--seeds N] [--steps N]

A small transformer learns scikit-learn's digits, is woven (token routing, a router each for q, k, v
together and for the MLP of two blocks), and learns the digits inverted, turned, mirrored and
shuffled, one stage each, with the veteran gate. Once as trained, and once with `consolidate`
between the stages. At each growth beyond the first expert every column is tried on the very same
weights, which were trained with zero columns:

``zero``      0, the default
``gaussian``  normal, with the standard deviation of the entries of the old columns
``copy``      the column of the last expert
``mean``      the mean of the old columns
``below``     ridge regression of the largest old logit, lowered by a fit of the constant 1 until
              it wins one in a hundred of the remembered inputs (64 per stage and router)

``flipped``   share of the old tasks' held-out tokens (all routers) that their router now sends to
              another expert, the router's input unchanged
``in_model``  the same with the inputs that the changed model gives: `prw.telemetry.flip_rate`
``p_old``, ``p_new``  mean probability of the new expert on held-out tokens of the old tasks and of
              the new one
``gradient``  mean norm of the gradient of task loss and veteran gate by the new column

At the last growth every column is then trained for some steps: ``flipped`` again, ``usage`` of the
new expert on its own task, ``accuracy`` of it and of the old tasks, all without noise, free route.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import prw
from benchmarks._common import head, keep, machine, parser
from prw.columns import Columns
from prw.growth import first_column
from prw.telemetry import flip_rate

TASKS: dict[str, Callable[[Tensor], Tensor]] = {
    "inverted": lambda x: 1 - x,
    "turned": lambda x: x.rot90(1, (1, 2)),
    "mirrored": lambda x: x.flip(2),
    "shuffled": lambda x: x[:, [5, 2, 7, 0, 3, 6, 1, 4]],
}
KINDS = ("zero", "gaussian", "copy", "mean", "below")


class Block(nn.Module):
    """Attention and MLP, pre-norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm_a, self.norm_m = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(self.norm_a(x)).chunk(3, -1)
        q, k, v = (part.unflatten(-1, (4, -1)).transpose(1, 2) for part in parts)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm_m(x))))


class Digits(nn.Module):
    """A transformer over the 16 patches of an 8 x 8 digit."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.patch, self.place = nn.Linear(4, width), nn.Parameter(torch.randn(16, width) * 0.02)
        self.blocks = nn.Sequential(Block(width), Block(width))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 10))

    def forward(self, x: Tensor) -> Tensor:
        patches = x.unfold(1, 2, 2).unfold(2, 2, 2).flatten(1, 2).flatten(2)
        return self.head(self.blocks(self.patch(patches) + self.place).mean(1))


class Run:
    """One base, its weave and its data."""

    def __init__(self, seed: int, device: str, steps: int) -> None:
        x, y = load_digits(return_X_y=True)
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
        self.x = (torch.tensor(x, dtype=torch.float32).view(-1, 8, 8) / 16)[order].to(device)
        self.y = torch.tensor(y)[order].to(device)
        self.steps, self.done = steps, list[str]()
        torch.manual_seed(seed)
        self.model = Digits().to(device)
        self.learn_base(2 * steps)
        config = prw.Config(target_modules=["qkv", "up"], rank=4)
        self.weave = prw.weave(self.model, config)

    def learn_base(self, steps: int) -> None:
        """The digits as they are."""
        optimizer = torch.optim.AdamW(self.model.parameters(), 3e-3)
        for _ in range(steps):
            rows = torch.randint(0, 1400, (64,))
            optimizer.zero_grad()
            F.cross_entropy(self.model(self.x[rows]), self.y[rows]).backward()
            optimizer.step()

    def learn(
        self, task: Callable[[Tensor], Tensor], optimizer: torch.optim.Optimizer, steps: int
    ) -> None:
        """Some steps of the open stage."""
        self.model.train()
        for _ in range(steps):
            loss = self.loss(task, torch.randint(0, 1400, (64,)))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    def loss(self, task: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
        """Cross-entropy, from the second stage on with the veteran gate."""
        with self.weave.record() as record:
            loss = F.cross_entropy(self.model(task(self.x[rows])), self.y[rows])
        weight = 0.5 if self.done else 0.0
        return loss + prw.veteran_gate_loss(record, density=0.8, weight=weight)

    def optimizer(self) -> torch.optim.Optimizer:
        """For the open stage."""
        return torch.optim.AdamW(self.weave.parameters(), 5e-3)

    def stage(self, name: str, *, consolidated: bool) -> None:
        """Train one stage and end it; every stage remembers some inputs."""
        self.weave.unlock(name)
        self.learn(TASKS[name], self.optimizer(), self.steps)
        self.weave.close()
        self.done.append(name)
        self.model.eval()
        with torch.no_grad(), self.weave.remember(name, rows=64):
            self.model(TASKS[name](self.x[:64]))
        if consolidated and len(self.done) > 1:
            self.weave.consolidate()

    @torch.no_grad()
    def seen(self, tasks: list[str]) -> prw.Record:
        """The routing of held-out digits of the given tasks, without noise."""
        self.model.eval()
        with self.weave.record(keep_inputs=True) as record:
            self.model(torch.cat([TASKS[name](self.x[1400:1528]) for name in tasks]))
        return record

    @torch.no_grad()
    def accuracy(self, tasks: list[str]) -> float:
        """Share of held-out digits that are right under the free route."""
        self.model.eval()
        x, y = self.x[1400:], self.y[1400:]
        right = [(self.model(TASKS[name](x)).argmax(-1) == y).double().mean() for name in tasks]
        return float(torch.stack(right).mean())

    def flipped(self, before: prw.Record) -> float:
        """Share of the inputs that `before` holds whose live router chooses another expert."""
        changed = []
        for name, group in before.tally.groups.items():
            pool = self.weave.pools[name]
            columns = tuple(column.detach() for column in pool.columns.signal)
            routing = pool.router.route(group.passes[0].h_TD, columns)
            changed.append(routing.expert != group.routings[0].expert.flatten())
        return float(torch.cat(changed).double().mean())

    def begin(self, name: str, kind: str) -> None:
        """Open a stage whose columns begin as `kind` says."""
        columns = {g: candidate(kind, pool) for g, pool in self.weave.pools.items()}
        self.weave.unlock(name)
        with torch.no_grad():
            for group, column in columns.items():
                self.weave.pools[group].columns.signal[-1].copy_(column)

    def gradient(self, name: str) -> float:
        """Mean norm of the gradient by the new column over the routers, of one batch."""
        self.model.train()
        self.loss(TASKS[name], torch.arange(256)).backward()
        grads = [pool.columns.signal[-1].grad for pool in self.weave.pools.values()]
        for parameter in self.weave.parameters():
            parameter.grad = None
        return sum(float(grad.norm()) for grad in grads if grad is not None) / len(grads)


def candidate(kind: str, pool: prw.Pool) -> Tensor:
    """The first value of a column of this kind."""
    signal_ED = pool.columns.state()[0]
    if kind == "gaussian":
        return torch.randn(signal_ED.shape[1]).to(signal_ED) * signal_ED.std()
    if kind == "copy":
        return signal_ED[-1]
    if kind == "below":
        return below(pool.columns, signal_ED.double())
    column = first_column(kind, signal_ED)
    return torch.zeros_like(signal_ED[0]) if column is None else column


def below(columns: Columns, signal_ED: Tensor) -> Tensor:
    """A column fitted just below the largest logit of remembered inputs."""
    h_MD = torch.cat([columns.memory(stage).double() for stage in range(len(signal_ED))])
    top_M = (h_MD @ signal_ED.T).amax(-1)
    gram_DD = h_MD.T @ h_MD
    gram_DD.diagonal().add_(1e-3 * gram_DD.diagonal().mean().clamp(min=1e-30))
    targets_M2 = torch.stack([top_M, torch.ones_like(top_M)], -1)
    fit_D, one_D = torch.linalg.solve(gram_DD, h_MD.T @ targets_M2).unbind(-1)
    needed_M = (h_MD @ fit_D - top_M) / (h_MD @ one_D).clamp(min=1e-3)
    return fit_D - needed_M.quantile(0.99).clamp(min=0) * one_D


def growth(run: Run, name: str, kind: str) -> dict[str, float]:
    """What this column does when the stage opens; the stage is left open."""
    before = run.seen(run.done)
    run.begin(name, kind)
    new, after = run.seen([name]), run.seen(run.done)
    return {
        "experts": len(run.done) + 1,
        "flipped": run.flipped(before),
        "in_model": flip_rate(before, after),
        "p_old": newest_probability(after),
        "p_new": newest_probability(new),
        "gradient": run.gradient(name),
    }


def newest_probability(record: prw.Record) -> float:
    """Mean over tokens and routers."""
    probs = [group.routings[0].probs[..., -1].double() for group in record.tally.groups.values()]
    return float(torch.stack([p.mean() for p in probs]).mean())


def trained(run: Run, name: str, before: prw.Record) -> dict[str, float]:
    """What the open stage comes to: after 10 steps, and after all."""
    optimizer = run.optimizer()
    run.learn(TASKS[name], optimizer, 10)
    early = run.flipped(before)
    run.learn(TASKS[name], optimizer, run.steps - 10)
    return {
        "flipped_10_steps": early,
        "flipped_end": run.flipped(before),
        "usage": run.seen([name]).usage(),
        "accuracy": run.accuracy([name]),
        "accuracy_old": run.accuracy(run.done),
    }


def history(seed: int, device: str, steps: int, *, consolidated: bool) -> list[dict[str, Any]]:
    """All growths of one run; a row per growth and column."""
    run = Run(seed, device, steps)
    rows: list[dict[str, Any]] = []
    for name in TASKS:
        last = name == list(TASKS)[-1]
        for kind in KINDS if run.done else ():
            torch.manual_seed(seed)  # the same expert, the same batches, the same noise
            before = run.seen(run.done)
            row = {"kind": kind, **growth(run, name, kind)}
            rows.append(row | (trained(run, name, before) if last else {}))
            run.weave.rollback(run.done[-1])
        if not last:
            run.stage(name, consolidated=consolidated)
    return rows


def summary(rows: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """Means by column and number of experts."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for kind in KINDS:
        for count in sorted({row["experts"] for row in rows}):
            same = [r for r in rows if (r["kind"], r["experts"]) == (kind, count)]
            names = [name for name in same[0] if name not in ("kind", "experts")]
            means = {name: round(sum(r[name] for r in same) / len(same), 4) for name in names}
            found.setdefault(kind, {})[f"{count} experts"] = means
    return found


def wrong(device: str) -> str:
    """What an unchanged weave must not report; "" for none."""
    run = Run(0, device, 5)
    run.stage("inverted", consolidated=False)
    run.stage("turned", consolidated=False)
    before = run.seen(run.done)
    if run.flipped(before) != 0 or flip_rate(before, run.seen(run.done)) != 0:
        return "inputs flip where nothing has changed"
    run.begin("mirrored", "mean")
    return "a mean column re-routes inputs" if run.flipped(before) > 1e-3 else ""  # ties


def main(arguments: list[str] | None = None) -> int:
    """Check, measure, print; 1 where a check fails."""
    given = parser("flip_rate", __doc__ or "")
    given.add_argument("--seeds", type=int, default=3, help="runs that are averaged")
    given.add_argument("--steps", type=int, default=150, help="of training per stage")
    args = given.parse_args(arguments)
    problem = wrong(args.device)
    if problem:
        print(f"no figures: {problem}", file=sys.stderr)
        return 1
    started = time.perf_counter()
    seeds, steps = (range(1), 20) if args.quick else (range(args.seeds), args.steps)
    variants = {}
    for setting in ("as trained", "consolidated"):
        rows = [
            row
            for seed in seeds
            for row in history(seed, args.device, steps, consolidated=setting == "consolidated")
        ]
        variants |= {f"{kind}, {setting}": found for kind, found in summary(rows).items()}
    result = {
        "benchmark": "flip_rate",
        **machine(args.device),
        "seeds": len(seeds),
        "steps": steps,
        "seconds": round(time.perf_counter() - started),
        "variants": variants,
    }
    tell(result)
    keep(result, args.json)
    return 0


def tell(result: dict[str, Any]) -> None:
    """For people: one line per column and growth."""
    head(result, "seeds", "steps")
    for kind, growths in result["variants"].items():
        for count, row in growths.items():
            figures = "  ".join(f"{name} {value:.3f}" for name, value in row.items())
            print(f"{kind:>24}  {count}  {figures}")


if __name__ == "__main__":
    sys.exit(main())
