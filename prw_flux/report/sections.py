"""Training, routing, forgetting, cost: each a function from facts to HTML, "" for nothing."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, Final

from prw_flux.report.charts import Series, line_chart, smooth
from prw_flux.report.facts import Facts, StageFacts
from prw_flux.report.layout import heat_table, section, title_of
from prw_flux.report.text import count, duration, named, share

DENSE: Final = 20
"""Blocks from which a routing table is drawn without numbers."""
MANY: Final = 50
"""Values from which the highest 2 % may lie above the top of a chart."""


HELD_OUT: Final = (
    '<span><i class="swatch second"></i>loss of the same held-out samples at each look</span>'
)


def training(facts: Facts) -> str:
    """Loss and usage of every stage that has begun."""
    begun = [stage for stage in facts.stages if stage.log]
    if not begun:
        return ""
    legend = (
        '<div class="legend"><span><i class="swatch"></i>loss, running mean</span>'
        '<span><i class="swatch faint"></i>loss of one batch</span>'
        f"{HELD_OUT if any(map(_held_out, begun)) else ''}"
        '<span><i class="swatch"></i>usage as generation routes</span>'
        '<span><i class="swatch second"></i>usage with router noise</span>'
        '<span><i class="swatch dashed"></i>density, its target</span></div>'
    )
    cards = "".join(_curves(number, stage) for number, stage in enumerate(begun))
    return section(
        "Training",
        "training",
        "Usage is the share of the routing that goes to the stage's own expert.",
        f'{legend}<div class="cards">{cards}</div>',
    )


def _curves(number: int, stage: StageFacts) -> str:
    steps = [float(line["step"]) for line in stage.log]
    loss = _column(stage, "loss")
    loss_chart = line_chart(
        [
            Series(x=steps, y=loss, style="raw", name="loss of one batch"),
            Series(x=steps, y=smooth(loss, len(loss) // 16), style="main", name="running mean"),
            *_held_out(stage),
        ],
        title=f"loss of stage {stage.name}",
        high=_top(loss),
    )
    usage_chart = line_chart(
        [
            Series(x=steps, y=_column(stage, "usage_noisy"), style="second", name="noisy"),
            Series(x=steps, y=_column(stage, "usage_deterministic"), style="main", name="quiet"),
        ],
        title=f"usage of the expert of stage {stage.name}",
        height=120,
        low=0.0,
        high=1.0,
        rule=stage.density if stage.weight > 0 else None,
    )
    state = "" if stage.done else f", {int(steps[-1])} of {stage.steps} steps so far"
    took = f"{duration(stage.seconds)}" if stage.seconds is not None else ""
    told = f"{stage.steps:,} steps of {stage.batch_size}{', ' + took if took else ''}{state}"
    return (
        f'<div class="card"><h3>{number + 1} · {escape(named(stage))}</h3><p class="sub">{told}</p>'
        f"<h4>loss</h4>{loss_chart}<h4>usage</h4>{usage_chart}{_features(stage)}</div>"
    )


def _features(stage: StageFacts) -> str:
    """Loss and effective rank of a feature stream; "" where the stage has none."""
    lines = [line for line in stage.log if "feature_rank" in line]
    if not lines:
        return ""
    steps, loss, rank = (
        [float(line[name]) for line in lines] for name in ("step", "feature_loss", "feature_rank")
    )
    losses = [Series(x=steps, y=loss, style="main", name="feature loss")]
    ranks = [Series(x=steps, y=rank, style="main", name="effective rank")]
    return (
        "<h4>feature loss</h4>"
        + line_chart(losses, title=f"feature loss of stage {stage.name}", high=_top(loss))
        + "<h4>effective rank of the projected features</h4>"
        + line_chart(ranks, title=f"feature rank of stage {stage.name}", height=120, low=0.0)
    )


def _held_out(stage: StageFacts) -> list[Series]:
    """The held-out loss where it was measured; nothing where it never was."""
    lines = [line for line in stage.log if "held_out_loss" in line]
    if not lines:
        return []
    steps, loss = ([float(line[name]) for line in lines] for name in ("step", "held_out_loss"))
    return [Series(x=list(steps), y=list(loss), style="second", name="held out")]


def _column(stage: StageFacts, name: str) -> list[float]:
    return [float(line.get(name, "nan")) for line in stage.log]


def _top(values: Sequence[float]) -> float | None:
    """The 98th percentile of `MANY` values or more, so that a spike does not flatten the rest.

    Of fewer values the percentile would cut the highest one off whether it is a spike or not.
    """
    known = sorted(filter(math.isfinite, values))
    return known[int(0.98 * (len(known) - 1))] if len(known) >= MANY else None


def drawn(facts: Facts) -> str:
    """What every finished stage was trained on, by kind, and what was rejected, by reason."""
    stages = [stage for stage in facts.stages if stage.kinds]
    if not stages:
        return ""
    rows = "".join(
        f"<tr><td>{escape(named(stage))}</td><td>{_counted(stage.kinds, shares=True)}</td>"
        f"<td>{_counted(stage.rejected)}</td></tr>"
        for stage in stages
    )
    return section(
        "What was drawn",
        "drawn",
        "Samples by kind: the shape of a hole, the form of a mark, the condition, the edit. "
        "Rejected draws were replaced by others; one sample may have had several.",
        '<div class="scroll"><table class="wide"><thead><tr><th>stage</th><th>samples</th>'
        f"<th>rejected draws</th></tr></thead><tbody>{rows}</tbody></table></div>",
    )


def _counted(counts: Mapping[str, int], *, shares: bool = False) -> str:
    total = sum(counts.values())
    ordered = sorted(counts.items(), key=lambda item: -item[1])
    told = (
        f"{escape(name)} {n:,}" + (f" ({n / total:.0%})" if shares else "") for name, n in ordered
    )
    return ", ".join(told) or "none"


def routing(facts: Facts) -> str:
    """Block by expert, one table per task."""
    if not facts.routing:
        return ""
    tables = "".join(
        f"<div><h3>{escape(title_of(task))}</h3>{_routing_table(facts.routing, found['counts'])}"
        "</div>"
        for task, found in facts.routing["tasks"].items()
    )
    times = "".join(
        f"<h3>{escape(title_of(task))} by time</h3>{_by_time(facts.routing, found['times'])}"
        for task, found in facts.routing["tasks"].items()
        if len(found.get("times", ())) > 1
    )
    when = (
        " Below, the same at the times at which the source was looked at, from noise (1) to data; "
        "there the experts have the numbers of their columns."
        if times
        else " The source is read at time 0 in every denoising step, so its routing does not "
        "change with the timestep."
        if facts.config.adapter.source_timestep == "zero"
        else ""
    )
    return section(
        "Routing",
        "routing",
        "Share of the sources of each task, in per cent, that every block sends to every expert "
        "(columns), without router noise. D are double-stream blocks, S single-stream blocks."
        + when,
        f'<div class="pair">{tables}</div>{times}',
    )


def _by_time(routing: Mapping[str, Any], times: Sequence[Mapping[str, Any]]) -> str:
    numbered = {**routing, "stages": [str(i + 1) for i in range(len(routing["stages"]))]}
    tables = "".join(
        f"<div><h4>time {one['time']:g}</h4>{_routing_table(numbered, one['counts'])}</div>"
        for one in times
    )
    return f'<div class="times">{tables}</div>'


def _routing_table(routing: Mapping[str, Any], counts_BE: Sequence[Sequence[int]]) -> str:
    dense = len(routing["groups"]) > DENSE
    rows = [[value / max(sum(counts), 1) for value in counts] for counts in counts_BE]
    return heat_table(
        [block_name(group) for group in routing["groups"]],
        list(routing["stages"]),
        rows,
        lambda v: "" if dense else f"{100 * v:.0f}",
        dense=dense,
    )


def block_name(group: str) -> str:
    """transformer_blocks.3.attn -> D3, single_transformer_blocks.7.attn -> S7."""
    parts = group.split(".")
    if len(parts) < 2 or not parts[1].isdigit():
        return group
    return ("S" if parts[0].startswith("single") else "D") + parts[1]


def forgetting(facts: Facts) -> str:
    """The metric of every task after every stage: with each router, and pinned to its own stage."""
    matrix = facts.evaluation["forgetting"] if facts.evaluation else None
    if not matrix:
        return ""
    rows = [f"after {name}" for name in matrix["stages"]]
    columns = list(matrix["tasks"])
    router = heat_table(rows, columns, matrix["router"], lambda v: f"{v:.2f}")
    pinned = heat_table(rows, columns, matrix["at_stage"], lambda v: f"{v:.2f}")
    return section(
        "What later stages forgot",
        "forgetting",
        f"Headline metric of every task learned so far, {matrix['n']} samples per cell. Left, the "
        "router as it was at the end of the row's stage: a value that falls down a column was "
        "forgotten by the router, the experts are frozen. Right, each task pinned by "
        "<code>at_stage</code> to the last stage that trained it: later stages cannot change it.",
        f'<div class="pair"><div><h3>Free routing after each stage</h3>{router}</div>'
        f"<div><h3>Pinned to the task's own stage</h3>{pinned}</div></div>",
    )


def cost(facts: Facts) -> str:
    """Parameters and time, stage by stage."""
    rows = "".join(
        f'<tr><td>{i + 1} · {escape(named(stage))}</td><td class="num">{stage.steps:,}</td>'
        f'<td class="num">{stage.batch_size}</td><td class="num">{stage.lr:g}</td>'
        f'<td class="num">{stage.density:g}</td><td class="num">{count(stage.parameters)}</td>'
        f'<td class="num">{duration(stage.seconds)}</td>'
        f"<td>{'done' if stage.done else 'begun' if stage.log else 'not begun'}</td></tr>"
        for i, stage in enumerate(facts.stages)
    )
    experts = sum(stage.parameters or 0 for stage in facts.stages)
    seconds = sum(stage.seconds or 0.0 for stage in facts.stages)
    total = (
        f'<tr><td>all stages</td><td class="num">{sum(s.steps for s in facts.stages):,}</td><td>'
        f'</td><td></td><td></td><td class="num">{count(experts)}</td>'
        f'<td class="num">{duration(seconds)}</td><td></td></tr>'
    )
    told = []
    if facts.router_parameters is not None:
        told.append(f"routers {count(facts.router_parameters)} parameters")
    if facts.base_parameters is not None:
        told.append(
            f"frozen transformer {count(facts.base_parameters)} parameters, so the experts add "
            f"{share(experts, facts.base_parameters)}"
        )
    if facts.memory_mib is not None:
        told.append(f"largest memory in training {facts.memory_mib / 1024:.1f} GiB")
    if facts.evaluation and "seconds" in facts.evaluation:
        told.append(f"evaluation {duration(float(facts.evaluation['seconds']))}")
    sentence = "; ".join(told)
    return section(
        "Parameters and time",
        "cost",
        f"{sentence[:1].upper()}{sentence[1:]}." if sentence else "",
        '<div class="scroll"><table class="wide"><thead><tr><th>stage</th><th class="num">steps'
        '</th><th class="num">batch</th><th class="num">lr</th><th class="num">density</th>'
        '<th class="num">expert parameters</th><th class="num">time</th><th>state</th></tr>'
        f"</thead><tbody>{rows}</tbody><tfoot>{total}</tfoot></table></div>",
    )


def configuration(facts: Facts) -> str:
    """Everything that the run was told, verbatim."""
    text = json.dumps(facts.index["config"], indent=2)
    return section(
        "Configuration",
        "configuration",
        "",
        f"<details><summary>run.json</summary><pre>{escape(text)}</pre></details>",
    )
