"""The comparison as a table: for a terminal and for the documentation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table
from rich.text import Text


def rich_table(evaluation: Mapping[str, Any]) -> Table:
    """The headline of every arm per task, and the margin to the best baseline."""
    arms = arms_of(evaluation)
    table = Table(title=caption(evaluation), title_justify="left", title_style="dim")
    table.add_column("task")
    table.add_column("metric", style="dim")
    for arm in arms.values():
        table.add_column(arm["heading"], justify="right", style="bold" if arm["trained"] else "")
    ours = [name for name, arm in arms.items() if arm["trained"]]
    for name in ours:
        table.add_column(f"margin of {arms[name]['heading']}", justify="right")
    table.add_column("n", justify="right")
    for task, row in evaluation["tasks"].items():
        cells = [value(row, name) for name in arms]
        margins = [
            Text(margin_text(row, name), style="green" if beats(row, name) else "red")
            for name in ours
        ]
        table.add_row(task, row["headline"], *cells, *margins, str(row["n"]))
    return table


def markdown(evaluation: Mapping[str, Any]) -> str:
    """The same table in Markdown, then the parts of every metric."""
    arms = arms_of(evaluation)
    titles = [arm["heading"] for arm in arms.values()]
    ours = [name for name, arm in arms.items() if arm["trained"]]
    margins = " | ".join(f"margin of {arms[name]['heading']}" for name in ours)
    lines = [
        f"{caption(evaluation)}.",
        "",
        f"| task | metric | {' | '.join(titles)} | {margins} | n |",
        f"|---|---|{'---:|' * (len(arms) + len(ours) + 1)}",
    ]
    for task, row in evaluation["tasks"].items():
        cells = " | ".join(value(row, name) for name in arms)
        gains = " | ".join(margin_text(row, name) for name in ours)
        lines.append(f"| {task} | {row['headline']} | {cells} | {gains} | {row['n']} |")
    lines += ["", f"| task | part | {' | '.join(titles)} |", f"|---|---|{'---:|' * len(arms)}"]
    for task, row in evaluation["tasks"].items():
        for part, meaning in row["parts"].items():
            cells = " | ".join(part_text(row, name, part) for name in arms)
            lines.append(f"| {task} | {part}: {meaning} | {cells} |")
    return "\n".join(lines) + "\n"


def caption(evaluation: Mapping[str, Any]) -> str:
    """What was measured, in one line."""
    settings = evaluation["settings"]
    return (
        f"held-out {evaluation['source']} at {evaluation['size']} px, "
        f"{settings['sampling']['steps']} steps, {settings['sampling']['precision']}, "
        f"seed {settings['seed']}"
    )


def arms_of(evaluation: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Every arm that was measured on some task, in the order of measuring."""
    return {name: arm for row in evaluation["tasks"].values() for name, arm in row["arms"].items()}


def value(row: Mapping[str, Any], name: str) -> str:
    """The mean headline of an arm."""
    arm = row["arms"].get(name)
    return "" if arm is None else f"{arm['headline']['mean']:.2f}"


def part_text(row: Mapping[str, Any], name: str, part: str) -> str:
    """The mean of a part of the metric; nothing where it was not measured."""
    found = row["arms"].get(name, {"parts": {}})["parts"].get(part)
    return "" if found is None else f"{found:.2f}"


def margin(row: Mapping[str, Any], ours: str) -> Mapping[str, Any] | None:
    """The paired difference to the strongest baseline: the smallest of the means."""
    differences = row["differences"].get(ours, {}).values()
    return min(differences, key=lambda d: float(d["mean"])) if differences else None


def margin_text(row: Mapping[str, Any], ours: str) -> str:
    """+0.25 [+0.18, +0.31]."""
    least = margin(row, ours)
    if least is None:
        return ""
    return f"{signed(least['mean'])} [{signed(least['low'])}, {signed(least['high'])}]"


def signed(number: float) -> str:
    """+0.25; zero has no minus."""
    return f"{round(number, 2) + 0.0:+.2f}"


def beats(row: Mapping[str, Any], ours: str) -> bool:
    """Whether an arm is ahead of every baseline by 0.1 in the mean, and surely ahead at all."""
    return all(d["mean"] >= 0.1 and d["low"] > 0 for d in row["differences"][ours].values())
