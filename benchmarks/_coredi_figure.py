"""The picture of `benchmarks.coredi`: curves of every arm, projected features as colours."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

COLOURS = (
    "#999999", "#0072b2", "#56b4e9", "#009e73", "#f0c800", "#cc79a7", "#e69f00", "#000000",
    "#d55e00",
)  # fmt: skip
"""Okabe and Ito's and a grey, told apart by colour-blind readers."""
PANELS = (
    ("feature_rank", "effective rank of the projected features", "linear"),
    ("feature_scale", "their scale before normalisation", "log"),
    ("feature_loss", "feature loss", "log"),
    ("loss", "image loss", "log"),
)
ROW = 0.62
"""Inches of a row of maps."""
QUALITY = (
    ("FD", "Fréchet distance to held-out pictures", "log"),
    ("C", "C: attributes of held-out scenes", "linear"),
)


def figure(lines: list[dict[str, Any]], arms: list[str]) -> Figure:
    """Mean over seeds with the range as a band; below, seed 0's features over the steps."""
    present = [arm for arm in arms if any(line["arm"] == arm for line in lines)]
    colours = {arm: COLOURS[i % len(COLOURS)] for i, arm in enumerate(arms)}
    learned = [arm for arm in present if first(lines, arm)["maps"]]
    below = 0.6 + ROW * max(1, len(learned))
    made = Figure(figsize=(16, 7.5 + below), layout="constrained")
    top, bottom = made.subfigures(2, 1, height_ratios=[7.5, below])
    axes = top.subplots(2, 3).flatten()
    for axis, (key, title, scale) in zip(axes, PANELS, strict=False):
        for arm in present:
            curve(axis, [pairs(line["log"], key) for line in of(lines, arm)], arm, colours[arm])
        label(axis, title, scale)
    for axis, (key, title, scale) in zip(axes[4:], QUALITY, strict=True):
        for arm in present:
            curve(axis, [pairs(line["quality"], key) for line in of(lines, arm)], arm, colours[arm])
        label(axis, title, scale)
        axis.set_visible(bool(axis.lines))
    handles, labels = axes[3].get_legend_handles_labels()
    top.legend(handles, labels, loc="outside lower center", ncols=len(present), frameon=False)
    if learned:
        teaser(bottom, {arm: first(lines, arm)["maps"] for arm in learned})
    return made


def of(lines: list[dict[str, Any]], arm: str) -> list[dict[str, Any]]:
    """The lines of an arm."""
    return [line for line in lines if line["arm"] == arm]


def first(lines: list[dict[str, Any]], arm: str) -> dict[str, Any]:
    """Its lowest seed."""
    return min(of(lines, arm), key=lambda line: int(line["seed"]))


def pairs(log: list[dict[str, float]], key: str) -> list[tuple[float, float]]:
    """(step, value) where there is a value."""
    return [(entry["step"], entry[key]) for entry in log if key in entry]


def label(axis: Any, title: str, scale: str) -> None:
    """Plain numbers on the axes, however short a logarithmic one is."""
    axis.set(title=title, xlabel="step", yscale=scale)
    if scale == "log":
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter(NullFormatter())


def curve(axis: Any, seeds: list[list[tuple[float, float]]], arm: str, colour: str) -> None:
    """Mean and range."""
    if not seeds[0]:
        return
    steps = [step for step, _ in seeds[0]]
    values = np.array([[value for _, value in seed] for seed in seeds])
    axis.plot(steps, values.mean(0), color=colour, label=arm, linewidth=1.6)
    axis.fill_between(steps, values.min(0), values.max(0), color=colour, alpha=0.15, linewidth=0)


def teaser(parent: Any, maps: dict[str, list[dict[str, Any]]]) -> None:
    """A row per arm, a block of pictures per look."""
    looks = len(next(iter(maps.values())))
    shown = len(next(iter(maps.values()))[0]["values"])
    axes = parent.subplots(len(maps), looks * shown, squeeze=False)
    for row, (arm, seen) in enumerate(maps.items()):
        for look, entry in enumerate(seen):
            for number, values in enumerate(entry["values"]):
                axis = axes[row, look * shown + number]
                axis.imshow(np.array(values, np.uint8), interpolation="nearest")
                axis.set(xticks=[], yticks=[])
                if row == 0 and number == shown // 2:
                    axis.set_title(f"step {entry['step']}", fontsize=9)
        axes[row, 0].set_ylabel(arm, rotation=0, ha="right", va="center", fontsize=9)
    parent.suptitle("first three projected channels of three pictures, as colours", fontsize=10)
