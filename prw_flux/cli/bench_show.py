"""What `evaluate --bench` prints: the row of one's own, and under the published ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape

from prw_flux.cli import show

if TYPE_CHECKING:
    from prw_flux.evaluation.benchmarks import Scores


def comparisons_of(scores: Scores, name: str) -> list[dict[str, Any]]:
    """Every line under every table of the benchmark that has one of its metrics."""
    from prw_flux.evaluation.published import compare, tables_of

    return [
        {"line": line.label, "table": table.name, "source": table.rows[0].source,
         **asdict(compare(table, name, line.metrics, line.protocol))}
        for line in scores.lines
        for table in tables_of(scores.benchmark)
        if set(table.metrics) & set(line.metrics)
    ]  # fmt: skip


def tell(scores: Scores, name: str, comparisons: Sequence[Mapping[str, Any]]) -> None:
    """The row, then every published table with it below, and why a number is refused."""
    from prw_flux.evaluation.published import tables_of

    console = show.human()
    columns = dict.fromkeys(metric for line in scores.lines for metric in line.metrics)
    made = show.table(
        f"{scores.benchmark}: {name}",
        {"": "left", "n": "right", **dict.fromkeys(map(escape, columns), "right")},
    )
    for line in scores.lines:
        cells = [f"{line.metrics[m]:.4f}" if m in line.metrics else "" for m in columns]
        made.add_row(line.label, str(line.n), *cells)
    console.print(made)
    for note in scores.notes:
        console.print(f"note: {note}", markup=False)
    for table in dict.fromkeys(one["table"] for one in comparisons):
        _beside(console, [one for one in comparisons if one["table"] == table])
    if not comparisons:
        what = "of these metrics" if tables_of(scores.benchmark) else "on this benchmark"
        console.print(f"The paper reports nothing {what}.")


def _beside(console: Console, those: Sequence[Mapping[str, Any]]) -> None:
    """A published table once, and below it a row for every line of one's own."""
    first = those[0]
    method, *metrics = first["columns"]
    table = show.table(first["source"], {method: "left", **dict.fromkeys(metrics, "right")})
    for row in first["rows"][:-1]:
        table.add_row(*row)
    table.add_section()
    for one in those:
        name, *cells = one["rows"][-1]
        table.add_row(escape(f"{name}, {one['line']}"), *cells)
    console.print(table)
    notes: dict[str, list[str]] = {}
    for one in those:
        for note in one["notes"]:
            notes.setdefault(note, []).append(one["line"])
    for note, lines in notes.items():
        where = "" if len(lines) == len(those) else f"{'; '.join(lines)}: "
        console.print(f"  {where}{note}", markup=False)
