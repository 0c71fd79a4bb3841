"""The figures of `benchmarks.ablation`, for the findings page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from benchmarks._ablation_plan import FINAL, ORDER, Arm
from benchmarks._ablation_report import shares
from benchmarks._ablation_statistics import Rows, as_numbers, average
from prw_flux.evaluation.statistics import bootstrap

PARTS: Final = {"C": "C: attributes", "L": "L: box IoU", "S": "S: likeness to the truth",
                "headline": "changed x L x K"}  # fmt: skip
BLUE, GREY, RED = "#0072b2", "#999999", "#d55e00"
TILE: Final = 96


def draw(
    folder: Path, rows: Rows, known: Mapping[str, Arm], pictures: Path
) -> list[tuple[str, str]]:
    """Write every figure there are rows for; (file name, what it shows) of each."""
    trained = [name for name, arm in known.items() if arm.phases and rows.of(name)]
    made: list[tuple[str, str, Figure | None]] = [
        ("ablation-edits.png", "Scores of the held-out edits per arm, with intervals over items",
         scores(rows, trained)),
        ("ablation-forgetting.png", "Headline of every task after every stage",
         matrices(rows, trained)),
        ("ablation-routing.png", "The expert that each block chooses at the end (yellow: always)",
         routes(rows, [n for n in trained if known[n].group == "main"])),
        ("ablation-curves.png", "Loss and usage of the newest expert over the steps",
         curves(rows, [n for n in trained if known[n].group == "main"])),
        ("ablation-pictures.png", "The first held-out edits: source, truth, and what the arms made",
         gallery(trained, pictures)),
    ]  # fmt: skip
    told = []
    for name, words, figure in made:
        if figure is not None:
            figure.savefig(folder / name, dpi=90)
            told.append((name, words))
    return told


def scores(rows: Rows, names: Sequence[str]) -> Figure | None:
    """A dot with its interval per arm, small dots for seeds, lines for what needs no training."""
    if not names:
        return None
    made = Figure(figsize=(13, 1.2 + 0.32 * len(names)), layout="constrained")
    axes = made.subplots(1, len(PARTS), sharey=True)
    found = next(iter(rows.of("references").values()), None)
    for axis, (part, words) in zip(axes, PARTS.items(), strict=True):
        for height, name in enumerate(names):
            seeds = [as_numbers(items) for items in rows.per_seed(name, FINAL, part).values()]
            if not seeds:
                continue
            means = np.mean(seeds, axis=0)
            interval = bootstrap(means[np.isfinite(means)].tolist())
            axis.plot([interval.low, interval.high], [height] * 2, color=BLUE, linewidth=2)
            axis.plot(interval.mean, height, "o", color=BLUE, markersize=6)
            if len(seeds) > 1:
                axis.plot([np.nanmean(s) for s in seeds], [height] * len(seeds), "|", color="black")
        for reference, style in (("copy", ":"), ("zero", "--"), ("ceiling", "-")):
            items = found["references"][reference][FINAL] if found else {}
            if part in items:
                axis.axvline(average(items[part]), color=GREY, linestyle=style, label=reference)
        axis.set(title=words, yticks=range(len(names)), yticklabels=names)
    axes[0].invert_yaxis()
    handles, labels = axes[0].get_legend_handles_labels()
    if handles:
        made.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    return made


def matrices(rows: Rows, names: Sequence[str]) -> Figure | None:
    """One heat map per arm with more than one stage, in [0, 1]."""
    shown = [name for name in names if len(first(rows, name)["stages"]) > 1]
    if not shown:
        return None
    columns = min(4, len(shown))
    lines = -(-len(shown) // columns)
    made = Figure(figsize=(3.6 * columns, 3.1 * lines), layout="constrained")
    axes = made.subplots(lines, columns, squeeze=False).flatten()
    for axis in axes[len(shown) :]:
        axis.set_axis_off()
    for axis, name in zip(axes, shown, strict=False):
        found = list(rows.of(name).values())
        tasks = [task for task in ORDER if task in found[0]["matrix"][-1]]
        stages = list(found[0]["stages"])
        grid = [[np.mean([average(r["matrix"][k][t]) for r in found])
                 if t in found[0]["matrix"][k] else np.nan for t in tasks]
                for k in range(len(stages))]  # fmt: skip
        if found[0]["at_stage"]:
            stages.append("own stage")
            grid.append([np.mean([average(r["at_stage"][t]) for r in found]) for t in tasks])
        heat(axis, np.array(grid), tasks, stages)
        axis.set_title(name, fontsize=10)
    return made


def heat(axis: Any, grid: Any, across: Sequence[str], down: Sequence[str]) -> None:
    """Numbers in coloured cells."""
    axis.imshow(grid, vmin=0.0, vmax=1.0, cmap="viridis", aspect="auto")
    axis.set_xticks(range(len(across)), across, rotation=35, ha="right", fontsize=8)
    axis.set_yticks(range(len(down)), down, fontsize=8)
    for (i, j), value in np.ndenumerate(grid):
        if np.isfinite(value):
            colour = "white" if value < 0.6 else "black"
            axis.text(j, i, f"{value:.2f}", ha="center", va="center", color=colour, fontsize=8)


def routes(rows: Rows, names: Sequence[str]) -> Figure | None:
    """Blocks by experts, a column per task, a row per arm."""
    if not names:
        return None
    made = Figure(figsize=(11, 2.2 * len(names)), layout="constrained")
    axes = made.subplots(len(names), len(ORDER), squeeze=False)
    for line, name in zip(axes, names, strict=True):
        found = list(rows.of(name).values())
        experts = found[0]["routing"]["stages"]
        for axis, task in zip(line, ORDER, strict=True):
            if task not in found[0]["routing"]["tasks"]:
                axis.set_axis_off()
                continue
            share = np.mean([shares(row, task) for row in found], axis=0)
            axis.imshow(share, vmin=0.0, vmax=1.0, cmap="viridis", aspect="auto")
            axis.set_xticks(range(len(experts)), [e[:9] for e in experts], rotation=35,
                            ha="right", fontsize=7)  # fmt: skip
            axis.set_yticks([0, len(share) - 1], ["1", str(len(share))], fontsize=7)
            axis.set_title(task, fontsize=9)
        line[0].set_ylabel(f"{name}\nblock", fontsize=9)
        if line[0].axison is False:
            line[0].text(0.5, 0.5, name, ha="center", fontsize=9)
    return made


def curves(rows: Rows, names: Sequence[str]) -> Figure | None:
    """Of the first seed."""
    if not names:
        return None
    made = Figure(figsize=(13, 1.9 * len(names)), layout="constrained")
    axes = made.subplots(len(names), 2, squeeze=False, sharex=True)
    for (loss, usage), name in zip(axes, names, strict=True):
        offset = 0
        for phase in first(rows, name)["phases"]:
            steps = [offset + point["step"] for point in phase["curve"]]
            loss.plot(steps, [point["loss"] for point in phase["curve"]], color=BLUE)
            if first(rows, name)["at_stage"]:  # experts that train together have no newest
                usage.plot(steps, [point["usage"] for point in phase["curve"]], color=BLUE)
            offset += phase["steps"]
            for axis in (loss, usage):
                axis.axvline(offset, color=GREY, linewidth=0.6)
            loss.text(offset, 0.97, f"{phase['phase']} ", ha="right", va="top", fontsize=8,
                      color=GREY, transform=loss.get_xaxis_transform())  # fmt: skip
        loss.set_ylabel(name, fontsize=9)
        usage.axhline(0.8, color=RED, linestyle=":", linewidth=1)
        usage.set_ylim(-0.03, 1.03)
    axes[0, 0].set_title("flow matching loss, mean of 20 steps", fontsize=10)
    axes[0, 1].set_title("usage of the newest expert in training; dots: 0.8", fontsize=10)
    axes[-1, 0].set_xlabel("step")
    axes[-1, 1].set_xlabel("step")
    return made


def gallery(names: Sequence[str], pictures: Path) -> Figure | None:
    """A strip of pictures per arm, under the sources and the truth."""
    shown = [name for name in ("source", "truth", *names) if (pictures / f"{name}.png").is_file()]
    if not shown:
        return None
    strips = [np.asarray(Image.open(pictures / f"{name}.png")) for name in shown]
    width = strips[0].shape[1] / TILE
    made = Figure(figsize=(1.6 + width, len(shown) + 0.2), layout="constrained")
    axes = made.subplots(len(shown), 1, squeeze=False)[:, 0]
    for axis, name, strip in zip(axes, shown, strips, strict=True):
        axis.imshow(strip, interpolation="nearest")
        axis.set(xticks=[], yticks=[])
        axis.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9)
    return made


def first(rows: Rows, name: str) -> dict[str, Any]:
    """The row of the lowest seed."""
    found = rows.of(name)
    return found[min(found)]
