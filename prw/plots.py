"""Figures of routing and of forgetting. They need matplotlib (extra ``report``).

Every function returns a figure that belongs to no window and no global state:
``figure.savefig("usage.png")`` writes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from prw.errors import ConfigError
from prw.telemetry import MARGIN_BINS, By, RoutingSummary

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which also the colour-blind tell apart; further experts repeat them with
# another hatch or line.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#999999")
HATCHES = ("", "//", "xx", "..")
LINES = ("-", "--", ":", "-.")
MANY_ROWS = 40
"""Rows of a heat map from which on only some are labelled and no cell is."""


def usage_map(summary: RoutingSummary, names: Sequence[str] | None = None) -> Figure:
    """Heat map of the share of rows per routed group (down) and expert (across).

    Args:
        summary: what to show.
        names: of the experts, by default their indices.
    """
    shares = _shares(summary, "group")
    groups, experts = len(shares), len(shares[0])
    figure, axes = _figure(1.6 + _longest(summary.groups) * 0.08 + max(0.8 * experts, 3),
                           min(1.4 + 0.3 * groups, 14))  # fmt: skip
    _heat(axes, shares, "share of rows", cells=groups <= MANY_ROWS)
    axes.set_xticks(
        range(experts), _names(names, experts), rotation=30, ha="right", rotation_mode="anchor"
    )
    step = -(-groups // MANY_ROWS)
    axes.set_yticks(range(0, groups, step), list(summary.groups)[::step])
    axes.set_title("Usage by group and expert", loc="left")
    return figure


def usage_by_bin(
    summary: RoutingSummary, names: Sequence[str] | None = None, label: str = "value"
) -> Figure:
    """Stacked bars: the share of each expert in every bin, for instance of the timestep.

    Args:
        summary: made with values and cuts.
        names: of the experts, by default their indices.
        label: what the values are.

    Raises:
        ConfigError: the summary has no bins.
    """
    if not summary.cuts:
        raise ConfigError("the summary has no bins; give summarise() values and cuts")
    cuts = [f"{cut:g}" for cut in summary.cuts]
    inner = [f"{a} to {b}" for a, b in zip(cuts, cuts[1:], strict=False)]
    labels = [f"< {cuts[0]}", *inner, f"≥ {cuts[-1]}"]
    figure, axes = _figure(2.6 + max(0.9 * len(labels), 3.4), 3.6)
    _stack(axes, _shares(summary, "bin"), names)
    axes.set_xticks(range(len(labels)), labels, rotation=30 if len(labels) > 5 else 0)
    axes.set_xlabel(label)
    axes.set_title("Usage by bin", loc="left")
    return figure


def usage_over_steps(
    steps: Sequence[int],
    summaries: Sequence[RoutingSummary],
    names: Sequence[str] | None = None,
    density: float | None = None,
) -> Figure:
    """A line per expert: its share of rows at each of the given steps.

    Args:
        steps: rising.
        summaries: one for each step.
        names: of the experts, by default their indices.
        density: the target of the veteran gate, drawn as a dashed line.

    Raises:
        ConfigError: no step, or not as many summaries as steps.
    """
    if not steps or len(steps) != len(summaries):
        raise ConfigError(
            f"usage over steps needs a summary for each step, got {len(steps)} steps and "
            f"{len(summaries)} summaries"
        )
    found = [_shares(summary, None)[0] for summary in summaries]
    experts = max(len(shares) for shares in found)
    figure, axes = _figure(7, 3.6)
    for index, name in enumerate(_names(names, experts)):
        points = [(s, u[index]) for s, u in zip(steps, found, strict=True) if index < len(u)]
        style = LINES[index // len(COLOURS) % len(LINES)]
        axes.plot(*zip(*points, strict=True), label=name, color=_colour(index), ls=style,
                  marker="o" if len(points) < 20 else "", markersize=4)  # fmt: skip
    if density is not None:
        axes.axhline(density, color="#666666", ls=(0, (4, 3)), lw=1, label="density")
    axes.set(xlabel="step", ylabel="share of rows", ylim=(-0.02, 1.02))
    axes.set_title("Usage over steps", loc="left")
    _legend(axes)
    return figure


def margin_histogram(summary: RoutingSummary) -> Figure:
    """How far routers were from choosing otherwise: largest probability minus the next."""
    counts = summary.margin_histogram().double()
    shares = (counts / counts.sum().clamp(min=1)).tolist()
    figure, axes = _figure(6, 3.4)
    left = [index / MARGIN_BINS for index in range(MARGIN_BINS)]
    axes.bar(left, shares, width=1 / MARGIN_BINS, align="edge", color=_colour(0), edgecolor="white")
    axes.axvline(
        mean := float(summary.margin()), color=_colour(5), lw=1.5, label=f"mean {mean:.2f}"
    )
    axes.set(xlabel="gate margin", ylabel="share of rows", xlim=(0, 1))
    axes.set_title("Gate margins", loc="left")
    _legend(axes)
    return figure


def forgetting_matrix(
    scores: Tensor | Sequence[Sequence[float | None]], names: Sequence[str], label: str = "accuracy"
) -> Figure:
    """Heat map of a score per task (across) after each stage (down).

    Args:
        scores: ``[stages, tasks]``; None or NaN where nothing was measured.
        names: of the tasks, in the order of the stages.
        label: what the score is; between 0 and 1.

    Raises:
        ConfigError: not one column per name.
    """
    given = scores.tolist() if isinstance(scores, Tensor) else scores
    rows = [[float("nan") if value is None else float(value) for value in row] for row in given]
    if not rows or any(len(row) != len(names) for row in rows) or len(rows) > len(names):
        raise ConfigError(
            f"a forgetting matrix has a column for each of the {len(names)} tasks and at most as "
            f"many rows, got rows of {[len(row) for row in rows]}"
        )
    size = 2.4 + max(0.9 * len(names), 2.4)
    figure, axes = _figure(size, 1.5 + 0.6 * len(rows))
    _heat(axes, rows, label, cells=True)
    axes.set_xticks(range(len(names)), names, rotation=30, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(rows)), [f"after {name}" for name in names[: len(rows)]])
    axes.set_title(f"{label.capitalize()} after each stage", loc="left")
    return figure


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _heat(axes: Axes, rows: Sequence[Sequence[float]], label: str, *, cells: bool) -> None:
    """Cells coloured from 0 to 1, NaN left white, with their values where there is room."""
    image = axes.imshow(rows, vmin=0, vmax=1, cmap="Blues", aspect="auto")
    axes.figure.colorbar(image, ax=axes, label=label, shrink=0.9)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    for y, row in enumerate(rows if cells else ()):
        for x, value in enumerate(row):
            if value == value:
                colour = "white" if value > 0.55 else "black"
                axes.text(x, y, f"{value:.2f}", ha="center", va="center", color=colour, fontsize=8)


def _stack(axes: Axes, rows: Sequence[Sequence[float]], names: Sequence[str] | None) -> None:
    """A stacked bar per row; a row of NaN stays empty."""
    bottom = [0.0] * len(rows)
    for index, name in enumerate(_names(names, len(rows[0]))):
        heights = [row[index] if row[index] == row[index] else 0.0 for row in rows]
        axes.bar(range(len(rows)), heights, bottom=bottom, label=name, color=_colour(index),
                 edgecolor="white", width=0.8,
                 hatch=HATCHES[index // len(COLOURS) % len(HATCHES)])  # fmt: skip
        bottom = [a + b for a, b in zip(bottom, heights, strict=True)]
    axes.set(ylabel="share of rows", ylim=(0, 1))
    _legend(axes)


def _legend(axes: Axes) -> None:
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False, borderaxespad=0)


def _shares(summary: RoutingSummary, by: By) -> list[list[float]]:
    """Usage as rows of numbers."""
    usage = summary.usage(by).tolist()
    return [usage] if by is None else usage


def _names(names: Sequence[str] | None, count: int) -> list[str]:
    if names is None:
        return [f"expert {index}" for index in range(count)]
    if len(names) < count:
        raise ConfigError(f"there are {count} experts, but only {len(names)} names: {list(names)}")
    return list(names)[:count]


def _longest(names: Sequence[str]) -> int:
    return max(len(name) for name in names)


def _colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]
