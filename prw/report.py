"""A weave as rich tables: its stages, its experts, and where a summary says the rows went."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from prw.errors import ConfigError
from prw.telemetry import RoutingSummary

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

    from prw.weaving import Weave

WIDTH = 100
"""Characters that the tables are made for."""
FIGURES = 36
"""Characters of the columns that are no expert's and of the frame."""
LISTED = 3
"""Experts that are listed per group where not all have a column."""


def report(weave: Weave, summary: RoutingSummary | None) -> Group:
    """The tables of `Weave.report`; raises ConfigError where the summary is of another weave."""
    from rich.console import Group

    if summary is None:
        return Group(_stages(weave))
    unknown = sorted(set(summary.groups) - set(weave.pools))
    experts = summary.rows_GSBE.shape[3]
    if unknown or experts > len(weave.stages):
        what = f"the group {unknown[0]!r}" if unknown else f"{experts} experts"
        raise ConfigError(f"the summary is of another weave: it has {what}, this one has not")
    return Group(_stages(weave), _usage(weave, summary))


def _stages(weave: Weave) -> Table:
    from rich.table import Table

    table = Table(title="Stages and their experts", title_justify="left")
    table.add_column("expert", justify="right")
    table.add_column("stage", overflow="fold")
    for heading in ("rank", "parameters", "scaling", "remembered"):
        table.add_column(heading, justify="right")
    table.add_column("state")
    for stage in weave.stages:
        experts = [(pool, pool.expert(stage.index)) for pool in weave.pools.values()]
        pairs = [(e.rank(p), e.scaling(p)) for pool, e in experts for p in pool.projections]
        size = sum(parameter.numel() for _, e in experts for parameter in e.parameters())
        kept = sum(len(pool.columns.memory(stage.index)) for pool, _ in experts)
        learns = any(stage.index in pool.learning.experts for pool, _ in experts)
        state = "[bold green]learning[/]" if learns else "frozen"
        ranks, scalings = (_range(sorted(set(found))) for found in zip(*pairs, strict=True))
        name = stage.name.replace("[", r"\[")
        table.add_row(
            str(stage.index),
            name,
            ranks,
            f"{size:,}",
            scalings,
            f"{kept:,}" if kept else "-",
            state,
        )
    if not weave.stages:
        table.add_row("-", "(none: unlock one)", *"-----")
    return table


def _usage(weave: Weave, summary: RoutingSummary) -> Table:
    from rich.table import Table

    names = [stage.name for stage in weave.stages][: summary.rows_GSBE.shape[3]]
    told = summary.to_dict()
    table = Table(
        title=f"Routing of {told['all']['rows']:,} rows: share of each expert",
        title_justify="left",
        caption="means over rows: entropy in nats; confidence: largest probability; margin: that "
        "minus the next one",
        caption_justify="left",
    )
    shared = os.path.commonprefix(list(summary.groups)) if len(summary.groups) > 1 else ""
    shared = shared[: shared.rfind(".") + 1] if len(shared) > 8 else ""
    labels = {name: name.removeprefix(shared) for name in summary.groups} | {"all": "all"}
    headings = _headings(names, max(len(label) for label in labels.values()))
    table.add_column(f"group ({shared}...)" if shared else "group", overflow="fold")
    for name in headings or [f"most used of {len(names)}"]:
        table.add_column(name, justify="right" if headings else "left", no_wrap=bool(headings))
    for heading in ("entropy", "margin", "confidence"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, found in (told["by_group"] | {"all": told["all"]}).items():
        if name == "all":
            table.add_section()
        figures = [_figure(found[key]) for key in ("entropy", "margin", "confidence")]
        table.add_row(labels[name], *_shares(found["usage"], names, bool(headings)), *figures)
    return table


def _headings(names: list[str], label: int) -> list[str]:
    """A heading per expert: its name, or its index where names are too wide, or none at all."""
    for headings in (names, [str(index) for index in range(len(names))]):
        if sum(max(len(h), 4) + 3 for h in headings) <= WIDTH - FIGURES - min(label, 40):
            return headings
    return []


def _shares(usage: list[float] | None, names: list[str], wide: bool) -> list[str]:
    """The cells of one row."""
    if usage is None:
        return ["-"] * (len(names) if wide else 1)
    if wide:
        return [f"[bold]{u:.2f}[/]" if u == max(usage) else f"{u:.2f}" for u in usage]
    most = sorted(zip(usage, names, strict=True), key=lambda pair: -pair[0])[:LISTED]
    return ["  ".join(f"{name} {share:.2f}" for share, name in most if share)]


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _range(values: list[float]) -> str:
    """One value, or the least and the largest of several."""
    return f"{values[0]:g}" if len(values) == 1 else f"{values[0]:g} to {values[-1]:g}"
