"""The rows of `benchmarks.ablation` as numbers: paired differences, hypotheses, verdicts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import numpy as np

from benchmarks._ablation_plan import FINAL, Protocol
from prw_flux.evaluation.statistics import Interval, bootstrap

Row: TypeAlias = dict[str, Any]
NONE: Final = "no difference shown"
UNMEASURED: Final = "not measured"


def own(rows: Sequence[Row], protocol: Protocol) -> list[Row]:
    """The rows of a protocol."""
    return [row for row in rows if row["protocol"] == protocol.digest]


@dataclass(frozen=True)
class Rows:
    """Finished rows by arm and seed."""

    rows: Sequence[Row]

    def of(self, arm: str) -> dict[int, Row]:
        """Rows of an arm by seed."""
        return {row["seed"]: row for row in self.rows if row["arm"] == arm}

    def per_seed(self, arm: str, task: str, part: str) -> dict[int, list[float | None]]:
        """Items of a part, by seed; empty where the part was not measured."""
        found = {seed: row.get("items", {}).get(task, {}) for seed, row in self.of(arm).items()}
        return {seed: items[part] for seed, items in found.items() if part in items}

    def mean(self, arm: str, task: str, part: str) -> tuple[float, list[float]] | None:
        """Mean over seeds and items, and the means of the seeds."""
        seeds = [average(items) for _, items in sorted(self.per_seed(arm, task, part).items())]
        return (float(np.mean(seeds)), seeds) if seeds else None

    def difference(self, plus: Terms, minus: Terms) -> Difference | None:
        """Of sums of per-item values, over the seeds that all of them have.

        Args:
            plus, minus: (arm, task, part) whose items are added and subtracted.
        """
        terms = [(1.0, self.per_seed(*t)) for t in plus] + [(-1.0, self.per_seed(*t))
                                                           for t in minus]  # fmt: skip
        shared = sorted(set.intersection(*(set(found) for _, found in terms)))
        if not shared:
            return None
        by_seed = []
        for seed in shared:
            values = [sign * as_numbers(found[seed]) for sign, found in terms]
            by_seed.append(np.sum(values, axis=0))
        return paired(by_seed, shared)


Terms: TypeAlias = Sequence[tuple[str, str, str]]


@dataclass(frozen=True)
class Difference:
    """A paired difference: the interval over items, and the means of single seeds."""

    interval: Interval
    seeds: Mapping[int, float]

    @property
    def verdict(self) -> str:
        """Whether the interval says anything."""
        if self.interval.low <= 0.0 <= self.interval.high:
            return NONE
        return "higher" if self.interval.mean > 0 else "lower"

    def __str__(self) -> str:
        told = f"{self.interval.mean:+.3f} [{self.interval.low:+.3f}, {self.interval.high:+.3f}]"
        return told if self.verdict != NONE else f"{told}, {NONE}"

    @property
    def single(self) -> str:
        """The seeds one by one."""
        return ", ".join(f"{value:+.3f}" for value in self.seeds.values())


def paired(by_seed: Sequence[Any], seeds: Sequence[int]) -> Difference:
    """Items averaged over seeds, then bootstrapped; items that one seed lacks are left out."""
    items = np.mean(by_seed, axis=0)
    kept = items[np.isfinite(items)]
    singles = {s: float(np.nanmean(x)) for s, x in zip(seeds, by_seed, strict=True)}
    return Difference(bootstrap(kept.tolist()), singles)


def as_numbers(items: Iterable[float | None]) -> Any:
    """Items as an array, NaN where a part does not apply."""
    return np.array([np.nan if value is None else value for value in items], float)


def average(items: Iterable[float | None]) -> float:
    """Mean of the items that there are."""
    return float(np.nanmean(as_numbers(items)))


# Hypotheses ----------------------------------------------------------------------------------


def hypotheses(rows: Rows) -> list[tuple[str, str, Difference | None, str]]:
    """(name, what is measured, the difference, verdict) of H1 to H4."""
    found = []
    for other in ("cotrain", "joint-finetune"):
        for part in ("C", "L"):
            d = rows.difference([("cologen", FINAL, part)], [(other, FINAL, part)])
            found.append(("H1", f"{part}: `cologen` minus `{other}`", d, judged(d)))
    for name, arm, up, down in (("H2", "rl-only", "L", "C"), ("H3", "rc-only", "C", "L")):
        d = rows.difference([(arm, FINAL, up), ("baseline", FINAL, down)],
                            [("baseline", FINAL, up), (arm, FINAL, down)])  # fmt: skip
        what = f"`{arm}` over `baseline`: {up} gained minus {down} gained"
        found.append((name, what, d, judged(d)))
    d = kept(rows, "cologen", "ground")
    verdict = UNMEASURED
    if d is not None:
        low, high = d.interval.low, d.interval.high
        verdict = "supported" if low > -0.05 else "contradicted" if high < -0.05 else "undecided"
    found.append(("H4", "Acc@0.5 of grounding, after stage 4 minus after stage 1", d, verdict))
    return found


def judged(difference: Difference | None) -> str:
    """What a hypothesis that expects a positive difference gets."""
    if difference is None:
        return UNMEASURED
    return {"higher": "supported", "lower": "contradicted"}.get(difference.verdict, NONE)


def kept(rows: Rows, arm: str, task: str) -> Difference | None:
    """Headline of a task under the final router, minus what it was when its stage ended."""
    by_seed, seeds = [], []
    for seed, row in sorted(rows.of(arm).items()):
        if task in row.get("stages", []):
            before = as_numbers(row["matrix"][row["stages"].index(task)][task])
            by_seed.append(as_numbers(row["matrix"][-1][task]) - before)
            seeds.append(seed)
    return paired(by_seed, seeds) if by_seed else None
