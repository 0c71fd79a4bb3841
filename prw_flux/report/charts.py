"""Charts as SVG text. Colours are CSS variables of style.css, so they follow light and dark."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Final, final

WIDTH: Final = 360
LEFT, RIGHT, TOP, BOTTOM = 40, 10, 10, 22


@final
@dataclass(frozen=True, kw_only=True)
class Series:
    """One line: points, the name of its style in style.css, and its name in words."""

    x: Sequence[float]
    y: Sequence[float]
    style: str
    name: str


def line_chart(
    series: Sequence[Series],
    *,
    title: str,
    height: int = 150,
    low: float | None = None,
    high: float | None = None,
    rule: float | None = None,
) -> str:
    """Lines over training steps.

    Args:
        series: drawn in order; values that are not finite interrupt a line.
        title: read aloud by a screen reader.
        height: in units of a chart that is `WIDTH` wide.
        low, high: ends of the vertical axis; from the data where None. Values above are drawn at
            the top, and the chart says where it is cut.
        rule: a value to mark by a dashed line.
    """
    xs = [x for s in series for x in s.x]
    ys = [y for s in series for y in s.y if math.isfinite(y)]
    if not xs or not ys:
        return ""
    low = min(ys) if low is None else low
    high = max(ys) if high is None else high
    ticks = axis_ticks(low, high)
    low, high = min(low, ticks[0]), max(high, ticks[-1])
    right = max(xs)

    def at(x: float, y: float) -> tuple[float, float]:
        width, depth = WIDTH - LEFT - RIGHT, height - TOP - BOTTOM
        share = (min(max(y, low), high) - low) / max(high - low, 1e-12)
        return LEFT + width * x / max(right, 1e-12), TOP + depth * (1 - share)

    parts = [_grid(tick, at(0, tick)[1]) for tick in ticks]
    parts += [
        f'<text class="tick" x="{at(x, low)[0]:.1f}" y="{height - 6}" '
        f'text-anchor="{anchor}">{label(x)}</text>'
        for x, anchor in ((0, "start"), (right / 2, "middle"), (right, "end"))
    ]
    if rule is not None:
        y = at(0, rule)[1]
        parts.append(
            f'<line class="rule" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        )
    if max(ys) > high:
        parts.append(
            f'<text class="tick" x="{WIDTH - RIGHT}" y="{TOP - 2}" text-anchor="end">'
            f"cut at {label(high)}, highest {label(max(ys))}</text>"
        )
    parts += [f'<path class="line {s.style}" d="{_path(s, at)}"/>{_lone(s, at)}' for s in series]
    return _svg(WIDTH, height, title, parts)


def _path(series: Series, at: Callable[[float, float], tuple[float, float]]) -> str:
    commands, pen_down = [], False
    for x, y in zip(series.x, series.y, strict=True):
        if math.isfinite(y):
            px, py = at(x, y)
            commands.append(f"{'L' if pen_down else 'M'}{px:.1f} {py:.1f}")
        pen_down = math.isfinite(y)
    return "".join(commands)


def _lone(series: Series, at: Callable[[float, float], tuple[float, float]]) -> str:
    """A dot for a value without a finite neighbour, of which a line shows nothing."""
    known = [math.isfinite(y) for y in series.y]
    dots = []
    for i, (x, y) in enumerate(zip(series.x, series.y, strict=True)):
        if known[i] and not any(known[max(i - 1, 0) : i] + known[i + 1 : i + 2]):
            px, py = at(x, y)
            dots.append(
                f'<circle class="lone {series.style}" cx="{px:.1f}" cy="{py:.1f}" r="2.6"/>'
            )
    return "".join(dots)


def _grid(tick: float, y: float) -> str:
    text = f'<text class="tick" x="{LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{label(tick)}'
    return f"{_across('grid', y)}{text}</text>"


def _across(style: str, y: float) -> str:
    return f'<line class="{style}" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'


def axis_ticks(low: float, high: float, wanted: int = 4) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) that enclose [low, high]."""
    span = max(high - low, 1e-9, 1e-3 * abs(high))
    raw = span / wanted
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, max(last, first + 1) + 1)]


def label(value: float) -> str:
    """A short number: 1,200 or 0.35 or 12k."""
    if abs(value) >= 100_000:
        return f"{value / 1000:,.0f}k"
    if abs(value) >= 10 or value == round(value):
        return f"{value:,.0f}"
    return f"{value:.3g}"


MARKERS: Final = {
    "stage": "M-5.5 0A5.5 5.5 0 1 1 5.5 0A5.5 5.5 0 1 1 -5.5 0Z",
    "prw": "M-5.5 0A5.5 5.5 0 1 1 5.5 0A5.5 5.5 0 1 1 -5.5 0Z",
    "text": "M-4 -4H4V4H-4Z",
    "zero": "M0 -5.5L5.5 0L0 5.5L-5.5 0Z",
    "copy": "M0 -5.5L5.5 4H-5.5Z",
    "ceiling": "M0 -8V8",
}
"""A shape of its own per arm, so that colour is never the only difference."""


@final
@dataclass(frozen=True, kw_only=True)
class Dot:
    """A value with its interval, and the name of its style."""

    mean: float
    low: float
    high: float
    style: str
    name: str


def dot_plot(dots: Sequence[Dot], *, title: str, width: int = 260) -> str:
    """Values in [0, 1] on one line, with their 95 % intervals; the last one lies on top."""
    height, pad = 30, 8

    def x(value: float) -> float:
        return pad + (width - 2 * pad) * min(max(value, 0.0), 1.0)

    middle = height / 2
    parts = [f'<line class="grid" x1="{x(0)}" x2="{x(1)}" y1="{middle}" y2="{middle}"/>']
    parts += [
        f'<line class="grid" x1="{x(v)}" x2="{x(v)}" y1="{middle - 4}" y2="{middle + 4}"/>'
        for v in (0, 0.25, 0.5, 0.75, 1)
    ]
    for dot in dots:
        told = f"{dot.name}: {dot.mean:.2f} ({dot.low:.2f} to {dot.high:.2f})"
        parts.append(
            f'<g class="dot {dot.style}"><title>{escape(told)}</title>'
            f"{_whisker(dot, x(dot.low), x(dot.high), middle)}"
            f"{_marker(dot.style, x(dot.mean), middle)}</g>"
        )
    return _svg(width, height, title, parts)


def _whisker(dot: Dot, left: float, right: float, y: float) -> str:
    """The interval; none for the ceiling, which is a bound and not a contender."""
    if dot.style == "ceiling":
        return ""
    return f'<line x1="{left:.1f}" x2="{right:.1f}" y1="{y:g}" y2="{y:g}"/>'


def _marker(style: str, x: float, y: float) -> str:
    return f'<path transform="translate({x:.1f} {y:g})" d="{MARKERS[style]}"/>'


def marker(style: str) -> str:
    """The marker of an arm alone, for a legend."""
    return (
        f'<svg class="key" viewBox="0 0 18 18" aria-hidden="true">'
        f'<g class="dot {style}">{_marker(style, 9, 9)}</g></svg>'
    )


def _svg(width: int, height: int, title: str, parts: Sequence[str]) -> str:
    return (
        f'<svg class="chart" viewBox="0 0 {width} {height}" role="img">'
        f"<title>{escape(title)}</title>{''.join(parts)}</svg>"
    )


def smooth(values: Sequence[float], reach: int) -> list[float]:
    """Mean of the finite values at most `reach` places away, NaN where there is none."""
    averaged = []
    for i in range(len(values)):
        near = [v for v in values[max(0, i - reach) : i + reach + 1] if math.isfinite(v)]
        averaged.append(sum(near) / len(near) if near else math.nan)
    return averaged
