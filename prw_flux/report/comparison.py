"""The trained adapter against its baselines."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any, TypeAlias

from prw_flux.report.charts import Dot, dot_plot, marker
from prw_flux.report.facts import Facts
from prw_flux.report.layout import section, title_of

Arms: TypeAlias = dict[str, Mapping[str, Any]]
"""By name: label, heading, whether it is the trained adapter."""


def comparison(facts: Facts) -> str:
    """The trained adapter against the baselines, task by task."""
    if not facts.evaluation:
        return ""
    tasks: Mapping[str, Any] = facts.evaluation["tasks"]
    arms = {name: arm for task in tasks.values() for name, arm in task["arms"].items()}
    keys = "".join(f"<span>{marker(a)}{escape(arm['label'])}</span>" for a, arm in arms.items())
    head = _headings(arms)
    margins = "".join(
        f'<th class="num">margin,<br>{escape(arm["heading"])}</th>'
        for arm in arms.values()
        if arm["trained"]
    )
    rows = "".join(_comparison_row(task, row, arms) for task, row in tasks.items())
    settings = facts.evaluation["settings"]
    steps = settings["sampling"]["steps"]
    return section(
        "Comparison",
        "comparison",
        f"Every arm answers the same held-out {escape(str(facts.evaluation['source']))} samples "
        f"from the same noise, in {steps} steps. All values lie between 0 and 1, higher is better. "
        "A margin is the mean paired difference to the best of the three baselines, with its "
        "95 % bootstrap interval: of the adapter pinned to the stage that trained the task, and of "
        "the final router choosing freely.",
        f'<div class="legend">{keys}</div><div class="scroll"><table class="wide"><thead><tr>'
        f"<th>task and metric</th><th>0 to 1</th>{head}{margins}"
        f'<th class="num">n</th></tr></thead><tbody>{rows}</tbody></table></div>'
        f"<details><summary>Parts of every metric</summary>{_parts(tasks, arms)}</details>",
    )


def _headings(arms: Arms) -> str:
    return "".join(f'<th class="num">{escape(arm["heading"])}</th>' for arm in arms.values())


def _comparison_row(task: str, row: Mapping[str, Any], arms: Arms) -> str:
    measured = row["arms"]
    dots = [
        Dot(**_interval(measured[a]["headline"]), style=a, name=arms[a]["label"])
        for a in reversed(arms)
        if a in measured
    ]
    cells = "".join(
        f'<td class="num{" strong" if arm["trained"] else ""}">'
        + (f"{measured[a]['headline']['mean']:.2f}" if a in measured else "")
        + "</td>"
        for a, arm in arms.items()
    )
    gains = "".join(
        f'<td class="num">{_margin(row, a)}</td>' for a, arm in arms.items() if arm["trained"]
    )
    return (
        f'<tr><td>{escape(title_of(task))}<span class="what">{escape(row["headline"])}</span></td>'
        f'<td class="plot">{dot_plot(dots, title=f"{title_of(task)}: all arms")}</td>{cells}'
        f'{gains}<td class="num">{row["n"]}</td></tr>'
    )


def _margin(row: Mapping[str, Any], ours: str) -> str:
    """The difference to the strongest baseline, and its interval below."""
    differences = row["differences"].get(ours)
    if not differences:
        return ""
    least = min(differences.values(), key=lambda d: float(d["mean"]))
    low, high = signed(least["low"]), signed(least["high"])
    return f'<b>{signed(least["mean"])}</b><br><span class="interval">{low} to {high}</span>'


def signed(value: float) -> str:
    """+0.25 or −0.10, with a true minus sign."""
    return f"{round(value, 2) + 0.0:+.2f}".replace("-", "\N{MINUS SIGN}")


def _interval(value: Mapping[str, Any]) -> dict[str, float]:
    return {key: float(value[key]) for key in ("mean", "low", "high")}


def _parts(tasks: Mapping[str, Any], arms: Arms) -> str:
    head = _headings(arms)
    rows = "".join(
        f"<tr><td>{escape(title_of(task)) if i == 0 else ''}</td><td>{escape(part)}"
        f'<span class="what">{escape(meaning)}</span></td>'
        + "".join(_part(row["arms"].get(a), part) for a in arms)
        + "</tr>"
        for task, row in tasks.items()
        for i, (part, meaning) in enumerate(row["parts"].items())
    )
    return (
        f'<div class="scroll"><table class="wide"><thead><tr><th>task</th><th>part</th>{head}'
        f"</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _part(arm: Mapping[str, Any] | None, part: str) -> str:
    value = None if arm is None else arm["parts"].get(part)
    return f'<td class="num">{"" if value is None else f"{value:.2f}"}</td>'
