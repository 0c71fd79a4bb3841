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

WIDE = 8
"""Experts that have a column each; of more, the most used ones are listed."""
LISTED = 4


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
        table.add_row(name, ranks, f"{size:,}", scalings, f"{kept:,}" if kept else "-", state)
    if not weave.stages:
        table.add_row("(none: unlock one)", *"-----")
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
    shared = shared[: shared.rfind(".") + 1]
    heading = f"group ({shared}...)" if len(shared) > 8 else "group"
    table.add_column(heading, overflow="fold", ratio=1)
    wide = len(names) <= WIDE
    for name in names if wide else [f"most used of {len(names)}"]:
        table.add_column(name, justify="right" if wide else "left", overflow="fold")
    for heading in ("entropy", "margin", "confidence"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, found in (told["by_group"] | {"all": told["all"]}).items():
        if name == "all":
            table.add_section()
        label = name.removeprefix(shared) if len(shared) > 8 else name
        figures = [_figure(found[key]) for key in ("entropy", "margin", "confidence")]
        table.add_row(label, *_shares(found["usage"], names, wide=wide), *figures)
    return table


def _shares(usage: list[float] | None, names: list[str], *, wide: bool) -> list[str]:
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
