"""The tables of the CoLoGen paper as data, and a row of one's own beside them where that is fair.

One CSV per table: method, metrics, protocol, source. A protocol is a list of `field=value`; a value
or the end of a value that the source does not state is "?". Two numbers may stand in one column if
no field on which the metric depends differs; fields that the source leaves open are named below the
table, because then nobody can know.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Final, TypeAlias, final

Protocol: TypeAlias = Mapping[str, str]

ONLY: Final[Mapping[str, tuple[str, ...]]] = {
    "clip": ("CLIP",),
    "dino": ("DINO",),
    "reference": ("CLIP-I", "DINO", "L1", "L2"),
    "against": ("CLIP-I", "DINO"),
    "captions": ("CLIP-T", "CLIP-dir"),
    "judge": ("G_",),
    "questions": ("G_",),
    "language": ("G_",),
    "canny maps": ("canny F1",),
    "hed maps": ("hed SSIM",),
    "lineart maps": ("lineart SSIM",),
    "depth maps": ("depth RMSE",),
    "seg maps": ("seg mIoU",),
}
"""Fields that concern only the metrics whose names, or a word in them, begin so; every other field
concerns all."""


@final
@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of a table: metrics that the source leaves out are absent."""

    method: str
    metrics: Mapping[str, float]
    protocol: Protocol
    source: str


@final
@dataclass(frozen=True, kw_only=True)
class PublishedTable:
    """A table of a paper: `name` of its file, its metrics in order, its rows."""

    name: str
    metrics: tuple[str, ...]
    rows: tuple[Row, ...]


@final
@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A row of one's own under a published table, ready to be printed.

    Attributes:
        columns: "method", then the metrics.
        rows: texts, the last one is the own row; "" where there is no number, "refused" where the
            number was obtained by another protocol.
        notes: why a number was refused, and what the source does not state.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...]


def names() -> tuple[str, ...]:
    """The tables there are, by the names of their files."""
    files = resources.files(__package__).iterdir()
    return tuple(sorted(f.name.removesuffix(".csv") for f in files if f.name.endswith(".csv")))


def load(name: str) -> PublishedTable:
    """One table.

    Raises:
        ValueError: there is no table of this name, or a row is not as its header says.
    """
    if name not in names():
        raise ValueError(f"there is no published table {name!r}; there are {', '.join(names())}")
    text = resources.files(__package__).joinpath(f"{name}.csv").read_text("utf-8")
    header, *lines = list(csv.reader(text.splitlines()))
    metrics = tuple(header[1:-2])
    rows = []
    for line in lines:
        if len(line) != len(header):
            raise ValueError(f"published table {name!r}: {line} does not fit {header}")
        values = {m: float(v) for m, v in zip(metrics, line[1:-2], strict=True) if v}
        rows.append(Row(method=line[0], metrics=values, protocol=parse(line[-2]), source=line[-1]))
    return PublishedTable(name=name, metrics=metrics, rows=tuple(rows))


def tables_of(bench: str) -> tuple[PublishedTable, ...]:
    """All tables of a benchmark; none for one that the paper does not report."""
    loaded = (load(name) for name in names())
    return tuple(t for t in loaded if t.rows[0].protocol["bench"] == bench)


def parse(protocol: str) -> Protocol:
    """ "a=1;b=2" -> {"a": "1", "b": "2"}.

    Raises:
        ValueError: a part is no field=value.
    """
    parts = [part.partition("=") for part in protocol.split(";")]
    if not all(name and equals and value for name, equals, value in parts):
        raise ValueError(f"a protocol is field=value;field=value, got {protocol!r}")
    return {name: value for name, _, value in parts}


def disagreement(
    metric: str, ours: Protocol, theirs: Protocol
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Fields on which the metric depends and in which two protocols differ, or `theirs` is open.

    A value "clip:?" agrees with every "clip:...", "?" with everything; a field of only one side is
    open.

    Returns:
        ("field: ours against theirs", ...) and (names of open fields, ...).
    """
    differing, unstated = [], []
    for field in sorted({*ours, *theirs}):
        if field in ONLY and not _concerns(ONLY[field], metric):
            continue
        mine, other = ours.get(field, "?"), theirs.get(field, "?")
        if other.endswith("?") and mine.startswith(other[:-1]):
            unstated.append(field)
        elif mine == "?":
            unstated.append(field)
        elif mine != other:
            differing.append(f"{field} is {mine} here and {other} there")
    return tuple(differing), tuple(unstated)


def _concerns(beginnings: tuple[str, ...], metric: str) -> bool:
    """Whether the name, or a word in it ("canny CLIP-S"), begins so."""
    return metric.startswith(beginnings) or any(w.startswith(beginnings) for w in metric.split())


def compare(
    table: PublishedTable, method: str, metrics: Mapping[str, float], protocol: Protocol
) -> Comparison:
    """Puts a row under a table; numbers of another protocol are refused, with the reason.

    A number is refused if it disagrees with any row that has a number in its column.
    """
    rows = [_texts(row.method, row.metrics, table.metrics) for row in table.rows]
    refused: dict[str, list[str]] = {}
    unstated: dict[str, list[str]] = {}
    allowed = {}
    for metric in table.metrics:
        if metric not in metrics:
            continue
        found = [
            disagreement(metric, protocol, r.protocol) for r in table.rows if metric in r.metrics
        ]
        reasons = dict.fromkeys(reason for differing, _ in found for reason in differing)
        for reason in reasons:
            refused.setdefault(reason, []).append(metric)
        if not reasons:
            allowed[metric] = metrics[metric]
            for name in dict.fromkeys(name for _, names_ in found for name in names_):
                unstated.setdefault(name, []).append(metric)
    own = _texts(method, allowed, table.metrics)
    out = {metric for those in refused.values() for metric in those}
    last = (
        method,
        *("refused" if m in out else t for m, t in zip(table.metrics, own[1:], strict=True)),
    )
    notes = [f"{', '.join(those)} refused: {reason}" for reason, those in refused.items()]
    notes += [f"the source does not state {name} ({', '.join(those)})"
              for name, those in unstated.items()]  # fmt: skip
    return Comparison(columns=("method", *table.metrics), rows=(*rows, last), notes=tuple(notes))


def _texts(method: str, metrics: Mapping[str, float], order: Sequence[str]) -> tuple[str, ...]:
    shown = (f"{metrics[m]:.{2 if metrics[m] >= 2 else 3}f}" if m in metrics else "" for m in order)
    return (method, *shown)


__all__ = [
    "Comparison",
    "PublishedTable",
    "Row",
    "compare",
    "disagreement",
    "load",
    "names",
    "parse",
    "tables_of",
]
