"""What the rows of `benchmarks.ablation` say, as tables of the findings page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from benchmarks._ablation_plan import FINAL, ORDER, VARIED, Arm, Protocol
from benchmarks._ablation_statistics import (
    NONE,
    UNMEASURED,
    Row,
    Rows,
    average,
    hypotheses,
    kept,
    own,
)
from benchmarks._page import table, write_between

EDITS: Final = ("C", "L", "S", "K", "changed", "headline")
CUSTOM: Final = {"bits": "glyph bits", "subject L": "its L", "S": "S", "other C": "C of the other"}
WHOLE: Final = ("cologen", "no-freeze", "consolidated")
KEPT: Final = (
    "Headline of every task when its own stage ended, then under the final router; * where the "
    "interval of the paired difference does not contain zero."
)
COMPARED: Final = ("cologen", "cotrain", "joint-finetune", "baseline")
NOT_VARIED: Final = f"Other lengths, ranks and bases are {UNMEASURED}."
USAGE: Final = (
    "In training, with router noise, at the end of each stage; last, on held-out edits as pictures "
    "are made, without noise."
)
BESIDE: Final = (
    "Other data, other metrics, another base: the paper's columns play the role of C, S and L, no "
    "number of one table can be compared with one of the other. The paper gives neither seeds nor "
    "intervals."
)
PAPER: Final = {
    "baseline": (0.260, 0.889, 0.901, 0.300, 0.808, 0.683),
    "rl-only": (0.279, 0.922, 0.927, 0.310, 0.829, 0.707),
    "rc-only": (0.302, 0.881, 0.905, 0.301, 0.813, 0.702),
    "cotrain": (0.269, 0.918, 0.922, 0.308, 0.795, 0.679),
    "cologen": (0.301, 0.931, 0.932, 0.315, 0.825, 0.714),
}
"""CoLoGen, Table 5: CLIP-T, CLIP-I, DINO on MagicBrush, then on DreamBench."""


# Tables --------------------------------------------------------------------------------------


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


def varied_table(varied: Mapping[str, Rows]) -> list[str]:
    """CoLoGen beside the others with one thing of the protocol changed: what decides H1?"""
    parts = ("C", "L", "headline")
    body = []
    for what, rows in varied.items():
        for name in COMPARED:
            means = [cell(rows.mean(name, FINAL, part)) for part in parts]
            differences = [
                rows.difference([("cologen", FINAL, part)], [(name, FINAL, part)])
                if name != "cologen" else None
                for part in parts
            ]  # fmt: skip
            if rows.of(name):
                told = [str(d or "") for d in differences]
                body.append([what, f"`{name}`", str(len(rows.of(name))), *means, *told])
    minus = [f"`cologen` minus it, {part}" for part in parts]
    head = ["changed", "arm", "seeds", *parts, *minus]
    return table(head, body, 2) if len(varied) > 1 else [NOT_VARIED]


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

    def line(name: str, cells: Sequence[Mapping[str, Any]]) -> list[str]:
        return [name, *(f"{np.mean([average(c[t]) for c in cells]):.2f}" if t in cells[0] else ""
                        for t in tasks)]  # fmt: skip

    body = [line(stage, [row["matrix"][number] for row in found])
            for number, stage in enumerate(found[0]["stages"])]  # fmt: skip
    if found[0]["at_stage"]:
        body.append(line("each at its own stage", [row["at_stage"] for row in found]))
    return table(["after", *tasks], body)


def kept_table(rows: Rows, known: Mapping[str, Arm]) -> list[str]:
    """Per arm and task: the headline when its stage ended, and under the final router."""
    body = []
    for name in known:
        found = list(rows.of(name).values())
        if not found or "matrix" not in found[0]:
            continue
        cells = []
        for task in ORDER:
            last = [average(row["matrix"][-1][task]) for row in found if task in row["matrix"][-1]]
            change = kept(rows, name, task)
            told = f"{np.mean(last):.2f}" if last else ""
            if change is not None and task != FINAL:
                told = f"{np.mean(last) - change.interval.mean:.2f} to {told}"
                told += "" if change.verdict == NONE else " *"
            cells.append(told)
        body.append([f"`{name}`", *cells])
    return table(["arm", *ORDER], body)


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
    """Usage of the newest expert at the end of every stage in training, beside its density.

    The last column is the share of blocks and edits that it gets when pictures are made.
    """
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
        drawn = np.mean([shares(row, FINAL)[:, -1].mean() for row in found])
        last = stages[-1].stage
        body.append([f"`{name}`", f"{last.density:g}", f"{last.weight:g}", *told, f"{drawn:.2f}"])
    return table(["arm", "density", "weight", *ORDER, "edits, without noise"], body)


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


def text(every: Sequence[Row], known: Mapping[str, Arm], protocol: Protocol) -> str:
    """All tables, as they stand on the findings page.

    Args:
        every: rows of this protocol, and of the same with one thing changed.
        known: the arms.
        protocol: whose rows all tables show but the one of what was varied.
    """
    rows = own(every, protocol)
    found = Rows(rows)
    chosen = {what: own(every, protocol.varied(**change)) for what, change in VARIED.items()}
    varied = {what: Rows(those) for what, those in chosen.items() if those}
    parts: list[list[str]] = [
        [origins(rows, protocol)],
        ["### Hypotheses"], hypotheses_table(found),
        ["### Held-out edits, final router: the main arms"], arms_table(found, known, "main"),
        references_table(found),
        ["### Controls"], arms_table(found, known, "controls"),
        ["### Sweeps of `cologen`"], arms_table(found, known, "sweeps"),
        ["### Paired differences"], pairs_table(found, known),
        ["### Another length, rank or base"], varied_table(varied),
        ["### The customised task, final router"], custom_table(found, known),
        ["### Usage of the newest expert"], [USAGE],
        usage_table(found, known),
    ]  # fmt: skip
    for name in WHOLE:
        matrix = forgetting(found, name)
        if matrix:
            parts += [[f"### After every stage: `{name}`"], matrix,
                      ["Where its final router sends each task, share of blocks and items:"],
                      routes_table(found, name)]  # fmt: skip
    parts += [
        ["### What later stages cost the earlier ones"], [KEPT], kept_table(found, known),
        ["### The paper beside it (Table 5)"], [BESIDE], paper_table(),
    ]  # fmt: skip
    return "\n\n".join("\n".join(part) for part in parts if part)


def write(page: Path, tables: str, figures: Sequence[tuple[str, str]]) -> None:
    """Put tables and figures between the marks of the findings page."""
    shown = "\n\n".join(f"![{words}](assets/{name})" for name, words in figures)
    write_between(page, "ablation", f"{tables}\n\n{shown}")
