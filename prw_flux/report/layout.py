"""Pieces that several sections share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from typing import Final

READABLE: Final = 70
"""Strength of a cell, in per cent, from which light figures are easier to read than dark ones."""

TITLES: Final = {
    "inpaint": "Inpainting",
    "ground": "Grounding",
    "control": "Control maps",
    "customise": "Customised generation",
    "edit": "Editing",
}


def title_of(task: str) -> str:
    """A task's name as a heading."""
    return TITLES.get(task, task.replace("_", " ").capitalize())


def section(title: str, anchor: str, sub: str, body: str) -> str:
    """A section with its heading and a sentence below it; `sub` and `body` are HTML."""
    lead = f'<p class="sub">{sub}</p>' if sub else ""
    return f'<section id="{anchor}"><h2>{escape(title)}</h2>{lead}{body}</section>'


def heat_table(
    rows: Sequence[str],
    columns: Sequence[str],
    values: Sequence[Sequence[float | None]],
    show: Callable[[float], str],
    *,
    dense: bool = False,
) -> str:
    """A table whose cells are shaded by their values in [0, 1]; None is an empty cell.

    All columns are as wide as the longest of their names.
    """
    head = "".join(f"<th>{escape(name)}</th>" for name in columns)
    body = "".join(
        f"<tr><th>{escape(name)}</th>{''.join(_heat_cell(v, show) for v in line)}</tr>"
        for name, line in zip(rows, values, strict=True)
    )
    kind = "heat dense" if dense else "heat"
    widest = max(map(len, columns), default=0)
    return (
        f'<div class="scroll"><table class="{kind}" style="--w:{widest}"><thead><tr><th></th>'
        f"{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _heat_cell(value: float | None, show: Callable[[float], str]) -> str:
    if value is None:
        return '<td class="none"></td>'
    strength = 6 + 84 * min(max(value, 0.0), 1.0)
    full = ' class="full"' if strength > READABLE else ""
    return f'<td{full} style="--m:{strength:.0f}%">{show(value)}</td>'
