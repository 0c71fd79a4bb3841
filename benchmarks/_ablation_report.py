"""What the rows of `benchmarks.ablation` say: tables, paired intervals, verdicts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import numpy as np

from benchmarks._ablation_plan import FINAL, ORDER, Arm, Protocol
from prw_flux.evaluation.statistics import Interval, bootstrap

Row: TypeAlias = dict[str, Any]
EDITS: Final = ("C", "L", "S", "K", "changed", "headline")
CUSTOM: Final = {"bits": "glyph bits", "subject L": "its L", "S": "S", "other C": "C of the other"}
NONE: Final = "no difference shown"
UNMEASURED: Final = "not measured"
PAPER: Final = {
    "baseline": (0.260, 0.889, 0.901, 0.300, 0.808, 0.683),
    "rl-only": (0.279, 0.922, 0.927, 0.310, 0.829, 0.707),
    "rc-only": (0.302, 0.881, 0.905, 0.301, 0.813, 0.702),
    "cotrain": (0.269, 0.918, 0.922, 0.308, 0.795, 0.679),
    "cologen": (0.301, 0.931, 0.932, 0.315, 0.825, 0.714),
}
"""CoLoGen, Table 5: CLIP-T, CLIP-I, DINO on MagicBrush, then on DreamBench."""


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


# Tables --------------------------------------------------------------------------------------


def table(head: Sequence[str], body: Iterable[Sequence[str]], right: int = 1) -> list[str]:
    """Markdown; columns from `right` on are aligned to the right."""
    rule = ["---"] * right + ["---:"] * (len(head) - right)
    return [f"| {' | '.join(line)} |" for line in (head, rule, *body)]


def cell(found: tuple[float, list[float]] | None) -> str:
    """Mean and, of several seeds, their standard deviation."""
    if found is None:
        return "-"
    mean, seeds = found
    return f"{mean:.3f}" + (f" ± {np.std(seeds, ddof=1):.3f}" if len(seeds) > 1 else "")


def arms_table(rows: Rows, known: Mapping[str, Arm], group: str) -> list[str]:
    """C, L, S and the rest on the held-out edits."""
    body = []
    for name, arm in known.items():
        if arm.group != group or not arm.phases:
            continue
        count = len(rows.of(name))
        cells = [cell(rows.mean(name, FINAL, part)) for part in EDITS]
        marks = cells if count else [UNMEASURED, *["-"] * (len(EDITS) - 1)]
        body.append([f"`{name}`", arm.label, f"{arm.steps:,}", str(count), *marks])
    return table(["arm", "what it is", "steps", "seeds", *EDITS], body, 2)


def references_table(rows: Rows) -> list[str]:
    """What needs no training."""
    found = rows.of("references")
    if not found:
        return [f"The references (copy, text, zero-delta, ceiling) are {UNMEASURED}."]
    items = next(iter(found.values()))["references"]
    words = {"copy": "the source, unchanged", "text": "the base and the text, no source",
             "zero": "the source attached, untrained experts",
             "ceiling": "the true after-image through the autoencoder"}  # fmt: skip
    body = [
        [f"`{name}`", words[name]]
        + [f"{average(parts[FINAL][p]):.3f}" if p in parts[FINAL] else "-" for p in EDITS]
        for name, parts in items.items()
    ]
    return table(["reference", "what it is", *EDITS], body, 2)


def pairs_table(rows: Rows, known: Mapping[str, Arm]) -> list[str]:
    """CoLoGen minus every other arm."""
    body = []
    for name in known:
        found = [rows.difference([("cologen", FINAL, p)], [(name, FINAL, p)])
                 for p in ("C", "L", "S", "headline")]  # fmt: skip
        if name == "cologen" or found[0] is None:
            continue
        body.append([f"`{name}`", str(len(found[0].seeds)), *(str(d or "-") for d in found)])
    return table(["`cologen` minus", "seeds", "C", "L", "S", "headline"], body, 1)


def custom_table(rows: Rows, known: Mapping[str, Arm]) -> list[str]:
    """The customised task under the final router, and at its own stage."""
    body = []
    for name, arm in known.items():
        cells = [cell(rows.mean(name, "customise", part)) for part in CUSTOM]
        if arm.phases and rows.of(name):
            own = [average(r["at_stage"]["customise"]) for r in rows.of(name).values()
                   if "customise" in r["at_stage"]]  # fmt: skip
            pinned = f"{np.mean(own):.3f}" if own else "-"
            body.append([f"`{name}`", *cells, pinned])
    return table(["arm", *CUSTOM.values(), "glyph bits, own stage"], body)


def forgetting(rows: Rows, arm: str) -> list[str]:
    """The matrix of an arm, averaged over its seeds, and the row of `at_stage`."""
    found = list(rows.of(arm).values())
    if not found or len(found[0].get("stages", [])) < 2:
        return []
    tasks = [task for task in ORDER if task in found[0]["matrix"][-1]]
    body = []
    for number, stage in enumerate(found[0]["stages"]):
        cells = [[average(r["matrix"][number][t]) for r in found] if t in r0 else None
                 for r0 in [found[0]["matrix"][number]] for t in tasks]  # fmt: skip
        body.append([stage, *("" if c is None else f"{np.mean(c):.2f}" for c in cells)])
    pinned = found[0]["at_stage"]
    if pinned:
        body.append(["each at its own stage",
                     *(f"{np.mean([average(r['at_stage'][t]) for r in found]):.2f}"
                       for t in tasks)])  # fmt: skip
    return table(["after", *tasks], body)


def routes_table(rows: Rows, arm: str) -> list[str]:
    """Where the final router sends each task: share of blocks and items, per expert."""
    found = list(rows.of(arm).values())
    if not found:
        return []
    experts = found[0]["routing"]["stages"]
    body = []
    for task in found[0]["routing"]["tasks"]:
        share = np.mean([shares(row, task).mean(0) for row in found], axis=0)
        body.append([task, *(f"{value:.2f}" for value in share)])
    return table(["task", *experts], body)


def shares(row: Row, task: str) -> Any:
    """[block, expert] share of items."""
    counts = np.array(row["routing"]["tasks"][task]["counts"], float)
    return counts / counts.sum(1, keepdims=True)


def usage_table(rows: Rows, known: Mapping[str, Arm]) -> list[str]:
    """Usage of the newest expert at the end of every stage in training, beside its density."""
    body = []
    for name, arm in known.items():
        found = list(rows.of(name).values())
        stages = [p for p in arm.phases if len(p.tasks) == 1 and p.opens]
        if not found or len(stages) < 2:
            continue
        ends = {
            phase["phase"]: np.mean([r["phases"][k]["curve"][-1]["usage"] for r in found])
            for k, phase in enumerate(found[0]["phases"])
        }
        told = [f"{ends[task]:.2f}" if task in ends else "" for task in ORDER]
        body.append([f"`{name}`", f"{stages[-1].stage.density:g}",
                     f"{stages[-1].stage.weight:g}", *told])  # fmt: skip
    return table(["arm", "density", "weight", *ORDER], body)


def hypotheses_table(rows: Rows) -> list[str]:
    """H1 to H4."""
    body = []
    for name, what, d, verdict in hypotheses(rows):
        interval = "-"
        if d is not None:
            i = d.interval
            interval = f"{i.mean:+.3f} [{i.low:+.3f}, {i.high:+.3f}]"
        seeds = "-" if d is None else d.single
        count = "-" if d is None else str(d.interval.n)
        body.append([name, what, interval, count, seeds, verdict])
    head = ["", "measured", "difference", "items", "single seeds", "verdict"]
    return table(head, body, 2)


def paper_table() -> list[str]:
    """What the paper says."""
    body = [[f"`{arm}`", *(f"{value:.3f}" for value in values)] for arm, values in PAPER.items()]
    marks = ["CLIP-T", "CLIP-I", "DINO"]
    return table(["arm", *(f"MagicBrush {m}" for m in marks),
                  *(f"DreamBench {m}" for m in marks)], body)  # fmt: skip


# Both forms ----------------------------------------------------------------------------------


def summary(rows: Sequence[Row], known: Mapping[str, Arm]) -> dict[str, Any]:
    """Per arm: seeds and means, for --json."""
    found = Rows(rows)
    return {
        name: {
            "seeds": sorted(found.of(name)),
            "steps": arm.steps,
            "edit": {p: m[0] for p in EDITS if (m := found.mean(name, FINAL, p))},
        }
        for name, arm in known.items()
        if found.of(name)
    }


def origins(rows: Sequence[Row], protocol: Protocol) -> str:
    """Where the rows come from, in a sentence."""
    if not rows:
        return f"Protocol `{protocol.digest}`: nothing is measured yet."
    commits = ", ".join(sorted({row["commit"] for row in rows}))
    devices = ", ".join(sorted({f"{row['device']}, {row['threads']} thread(s)" for row in rows}))
    hours = sum(row["seconds"] for row in rows) / 3600
    return (
        f"Protocol `{protocol.digest}`, {len(rows)} trainings and readings ({hours:.1f} hours), "
        f"commit {commits}, torch {rows[0]['torch']}, {devices}, beside other programs."
    )


def text(rows: Sequence[Row], known: Mapping[str, Arm], protocol: Protocol) -> str:
    """All tables, as they stand on the findings page."""
    found = Rows(rows)
    seen = [name for name in known if found.of(name)]
    parts: list[list[str]] = [
        [origins(rows, protocol)],
        ["### Hypotheses"], hypotheses_table(found),
        ["### Held-out edits, final router: the main arms"], arms_table(found, known, "main"),
        references_table(found),
        ["### Controls"], arms_table(found, known, "controls"),
        ["### Sweeps of `cologen`"], arms_table(found, known, "sweeps"),
        ["### Paired differences"], pairs_table(found, known),
        ["### The customised task, final router"], custom_table(found, known),
        ["### Usage of the newest expert at the end of each stage, in training"],
        usage_table(found, known),
    ]  # fmt: skip
    for name in seen:
        matrix = forgetting(found, name)
        if matrix:
            parts += [[f"### Forgetting: `{name}`"], matrix]
    for name in seen:
        if known[name].phases:
            parts += [[f"### Final routes: `{name}`"], routes_table(found, name)]
    parts += [["### The paper beside it (Table 5)"], paper_table()]
    return "\n\n".join("\n".join(part) for part in parts if part)
