"""What `evaluate --bench` prints: the row of one's own, and under the published ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

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
    for one in comparisons:
        first, *metrics = one["columns"]
        title = f"{one['source']}, beside {one['line']}"
        table = show.table(title, {first: "left", **dict.fromkeys(metrics, "right")})
        for row in one["rows"]:
            table.add_row(*row)
        console.print(table)
        for note in one["notes"]:
            console.print(f"  {note}", markup=False)
    if not comparisons:
        console.print("The paper reports nothing on this benchmark.")
