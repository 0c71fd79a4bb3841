"""Benchmarks of a run: its rows, beside papers' where that is fair, and its failures."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, Final, TypeAlias

from PIL import Image

from prw_flux.evaluation.published import Comparison, compare, tables_of
from prw_flux.report.facts import Facts
from prw_flux.report.layout import section, title_of

Row: TypeAlias = Mapping[str, Any]
WORST: Final = 10
SIDE: Final = 144
"""Of the pictures of a gallery, in pixels."""
LOWER: Final = ("L1", "L2", "RMSE", "FID")
"""Metrics of which less is better."""
NOT_OURS: Final = ("CLIP-T of the target", "confidence")
"""Values in a row that grade something else than the picture."""


def benchmarks(facts: Facts) -> str:
    """Every benchmark whose scores lie in the run's folder; "" where there is none."""
    parts = [_benchmark(scores) for scores in facts.benchmarks]
    return section(
        "Benchmarks",
        "benchmarks",
        "Rows of this run, and the published tables that have one of its metrics. A number that "
        "was obtained by another protocol than the published ones is refused. Of a metric with ↓ "
        "less is better.",
        "".join(parts),
    ) if parts else ""  # fmt: skip


def _benchmark(scores: Mapping[str, Any]) -> str:
    lines: Sequence[Row] = scores["lines"]
    names = dict.fromkeys(name for line in lines for name in line["metrics"])
    places = {name: decimals([line["metrics"].get(name) for line in lines]) for name in names}
    head = "".join(f'<th class="num">{_heading(name)}</th>' for name in names)
    body = "".join(
        f'<tr><td>{escape(line["label"])}</td><td class="num">{line["n"]}</td>'
        + "".join(_number(line["metrics"].get(name), places[name]) for name in names)
        + "</tr>"
        for line in lines
    )
    told = [*scores["notes"], *_problems(scores["problems"])]
    notes = "".join(f'<p class="sub">{escape(str(note))}</p>' for note in told)
    return (
        f"<h3>{escape(scores['benchmark'])}</h3>{notes}"
        f'<div class="scroll"><table class="wide"><thead><tr><th></th><th class="num">n</th>{head}'
        f"</tr></thead><tbody>{body}</tbody></table></div>"
        + "".join(_beside(one) for one in _comparisons(scores))
        + _galleries(scores)
    )


def _heading(name: str) -> str:
    return escape(name) + (" ↓" if less_is_better(name) else "")


def less_is_better(metric: str) -> bool:
    """Whether a smaller value is a better one."""
    return any(word in LOWER or word.startswith("frechet[") for word in metric.split())


def _problems(problems: Sequence[str]) -> list[str]:
    if not problems:
        return []
    those = "1 picture has" if len(problems) == 1 else f"{len(problems)} pictures have"
    return [f"{those} no score, the first: {problems[0]}."]


def _number(value: float | None, places: int) -> str:
    return f'<td class="num">{"" if value is None else f"{value:.{places}f}"}</td>'


def decimals(column: Sequence[float | None]) -> int:
    """Four of shares and cosines, two of what is counted in tens or hundreds."""
    return 4 if all(abs(value) < 2 for value in column if value is not None) else 2


def _comparisons(scores: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, Comparison]]]]:
    """(source of a table, [(line, comparison)]) of every published table with a metric of ours."""
    found = []
    for table in tables_of(scores["benchmark"]):
        those = [
            (line["label"], compare(table, line["label"], line["metrics"], line["protocol"]))
            for line in scores["lines"]
            if set(table.metrics) & set(line["metrics"])
        ]
        if those:
            found.append((table.rows[0].source, those))
    return found


def _beside(one: tuple[str, list[tuple[str, Comparison]]]) -> str:
    source, those = one
    columns, *_ = (comparison.columns for _, comparison in those)
    head = "".join(
        f"<th{'' if i == 0 else ' class=num'}>{_heading(name)}</th>"
        for i, name in enumerate(columns)
    )
    theirs = those[0][1].rows[:-1]
    rows = "".join(_cells(row, "") for row in theirs)
    ours = "".join(_cells(comparison.rows[-1], "strong") for _, comparison in those)
    notes: dict[str, None] = {note: None for _, comparison in those for note in comparison.notes}
    told = "".join(f'<p class="sub">{escape(note)}</p>' for note in notes)
    return (
        f"<details><summary>Beside {escape(source)}</summary>"
        f'<div class="scroll"><table class="wide"><thead><tr>{head}</tr></thead>'
        f"<tbody>{rows}</tbody><tfoot>{ours}</tfoot></table></div>{told}</details>"
    )


def _cells(row: Sequence[str], style: str) -> str:
    name, *values = row
    cells = "".join(f'<td class="num {style}">{escape(value)}</td>' for value in values)
    return f"<tr><td>{escape(name)}</td>{cells}</tr>"


def _galleries(scores: Mapping[str, Any]) -> str:
    """The ten worst items by every metric, in folds; the first one is open."""
    folder, pictures = Path(scores["results"]), Thumbnails()
    folds: list[str] = []
    for title, those in worst(scores["items"]):
        figures = "".join(_failure(folder, row, value, pictures) for row, value in those)
        folds.append(
            f"<details{'' if folds else ' open'}><summary>{escape(title)}</summary>"
            f'<div class="worst">{figures}</div></details>'
        )
    return "".join(folds)


def worst(rows: Sequence[Row]) -> Iterator[tuple[str, list[tuple[Row, float]]]]:
    """(what it is, [(row, value)]) of every metric, worst first.

    Rows with a task of their own (shapes) are compared within it, by the headline. A picture that
    stands in two rows with one value (a MagicBrush session of one turn) comes once.
    """
    tasks = dict.fromkeys(row.get("task") for row in rows)
    for task in tasks:
        chosen = [row for row in rows if row.get("task") == task]
        names = dict.fromkeys(
            name for row in chosen for name, value in row.items()
            if isinstance(value, float) and name not in NOT_OURS
        )  # fmt: skip
        for name in ("headline",) if task else names:
            of_each = {
                (row.get("output"), float(row[name])): row
                for row in chosen
                if row.get(name) is not None
            }
            valued = [(row, value) for (_, value), row in of_each.items()]
            if not valued:
                continue
            up = not less_is_better(name)
            valued.sort(key=lambda pair: pair[1] if up else -pair[1])
            whose = f"{title_of(task)}: worst" if task else "Worst"
            count = f"{min(WORST, len(valued))} of {len(valued)}"
            yield f"{whose} {count} by {spoken(name)}", valued[:WORST]


def spoken(metric: str) -> str:
    """ "L1 target" -> "L1 against the target"; another name as it is."""
    for reference in ("target", "source", "all photos", "the reference"):
        if metric.endswith(f" {reference}"):
            article = "" if " " in reference else "the "
            return f"{metric.removesuffix(f' {reference}')} against {article}{reference}"
    return metric


def _failure(folder: Path, row: Row, value: float, pictures: Thumbnails) -> str:
    roles = {"given": row.get("given"), "output": folder / str(row["output"]),
             "target": row.get("target")}  # fmt: skip
    strip = "".join(
        f'<div class="{role}"><img alt="{role}" src="{source}"><span>{role}</span></div>'
        for role, path in roles.items()
        if path is not None and (source := pictures.uri(Path(path)))
    )
    columns = "" if row.get("target") else " two"
    return (
        f'<figure class="sample"><div class="strip{columns}">{strip}</div><figcaption><span>'
        f'{escape(str(row.get("text") or row["key"]))}</span><span class="score">{value:.3g}</span>'
        "</figcaption></figure>"
    )


class Thumbnails:
    """Small pictures as data URIs, each decoded once; "" for what cannot be read."""

    def __init__(self) -> None:
        self._known: dict[Path, str] = {}

    def uri(self, path: Path) -> str:
        """A JPEG of at most `SIDE` pixels."""
        if path not in self._known:
            self._known[path] = _thumbnail(path)
        return self._known[path]


def _thumbnail(path: Path) -> str:
    try:
        with Image.open(path) as picture:
            small = picture.convert("RGB")
            small.thumbnail((SIDE, SIDE))
            buffer = io.BytesIO()
            small.save(buffer, "JPEG", quality=85)
    except Exception:  # a report is written whatever lies in the folder
        return ""
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
