"""How `benchmarks.kernels` tells its result: a table, a summary, a comparison, a picture."""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from benchmarks import _common

RIVALS = ("loop", "tuned", "dense", "grouped")
LABELS = {
    "plain": "one unrouted LoRA (PEFT)", "ours": "routed_linear",
    "loop": "PEFT's loop over experts",
    "tuned": "the loop with index_add_", "dense": "X-LoRA, every expert",
    "grouped": "sorted + grouped_mm, autograd",
}  # fmt: skip


def head(result: dict[str, Any]) -> None:
    """The machine, its ceilings, the columns."""
    _common.head(result, "clocks", "triton", "prw")
    print(f"ceilings: GFLOP/s {result['gemm_GFLOP_per_s']}, GB/s {result['copy_GB_per_s']}")
    print("ours / base, roof, plain; others / ours\n")
    print(
        f"{'':58} {'error':>8} {'base ms':>8} {'ours ms p50 [p20-p80]':>24} {'/base':>6} "
        f"{'/roof':>6} {'/plain':>6} {'loop/':>6} {'tuned/':>6} {'dense/':>6} {'grouped/':>8} "
        f"{'kept B/T':>8} {'peak MB':>8} {'launches':>8}"
    )


def line(row: dict[str, Any]) -> None:
    """One row."""
    mine, over, rivals = row["ours_ms"], row["ours_over"], row["over_ours"]
    kept = row["saved_bytes_per_token"]["ours"] if row["backward"] else "-"
    told = f"{mine['median_ms']:.2f} [{mine['p20_ms']:.2f}-{mine['p80_ms']:.2f}]"
    print(
        f"{row['name']:58} {row['error']:8.1e} {row['base_ms']:8.2f} {told:>24} "
        f"{over['base']:6.2f} {over['roof']:6.2f} {over['plain']:6.2f} {rivals['loop']:6.2f} "
        f"{rivals['tuned']:6.2f} {rivals['dense']:6.2f} {rivals['grouped']:8.2f} {kept:>8} "
        f"{_or_dash(row['peak_MB']):>8} {_or_dash(row['launches']):>8}",
        flush=True,
    )
    if row["graph_ms"]:
        print(f"{'':58} as a CUDA graph, ms: {row['graph_ms']}")


def _or_dash(value: object) -> str:
    return "-" if value is None else str(value)


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Geometric means over the evenly routed rows with every expert learning, by dtype."""
    found: dict[str, Any] = {}
    for row in rows:
        shape = row["shape"]
        if shape["skew"] == "uniform" and shape["learning"] >= shape["experts"]:
            key = f"{shape['dtype']} {'forward+backward' if row['backward'] else 'forward'}"
            found.setdefault(key, []).append(row)
    made = {}
    for key, group in found.items():
        small = [row for row in group if row["shape"]["rank"] == 32] or group
        made[key] = {
            "rows": len(group),
            "ours / base": _mean([row["ours_over"]["base"] for row in group]),
            "ours / plain": _mean([row["ours_over"]["plain"] for row in group]),
            **{f"{n} / ours": _mean([row["over_ours"][n] for row in group]) for n in RIVALS},
            "dense / ours at r 32": _mean([row["over_ours"]["dense"] for row in small]),
        }
        if group[0]["spent_ms"]:
            whole = sum(row["ours_ms"]["median_ms"] for row in group)
            made[key]["where ours goes"] = {
                part: round(sum(row["spent_ms"][part] for row in group) / whole, 3)
                for part in group[0]["spent_ms"]
            }
        print(f"\n{key}, {len(group)} shapes, geometric means:")
        print("  " + ", ".join(f"{n} {v}" for n, v in made[key].items() if n != "rows"))
    return made


def _mean(values: list[float]) -> float:
    return round(statistics.geometric_mean(values), 3)


def earlier(name: str) -> dict[str, Any]:
    """A result of this benchmark, for argparse: read before the run."""
    try:
        found: dict[str, Any] = json.loads(Path(name).read_text("utf-8"))
        assert found["benchmark"] == "kernels"
        assert all(row["ours_over"]["base"] > 0 and row["name"] for row in found["rows"])
    except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
        told = f"{type(error).__name__} {error}".strip()
        raise argparse.ArgumentTypeError(
            f"{name} is no --json of this benchmark ({told})"
        ) from None
    return found


def compare(result: dict[str, Any], old: dict[str, Any]) -> None:
    """The ratio of ours to the base, then and now; more than a tenth apart is marked."""
    before = {row["name"]: row["ours_over"]["base"] for row in old["rows"]}
    print(f"\nours / base: {old['commit']} -> {result['commit']}")
    changes = []
    for row in result["rows"]:
        now, then = row["ours_over"]["base"], before.get(row["name"])
        if then is not None:
            changes.append(now / then)
            mark = "" if 0.9 < now / then < 1.1 else "  <--"
            print(f"{row['name']:58} {then:6.2f} -> {now:6.2f}  {now / then - 1:+.1%}{mark}")
    if changes:
        apart = statistics.median([abs(change - 1) for change in changes])
        print(
            f"{len(changes)} rows in both, mean {_mean(changes) - 1:+.1%}, median {apart:.1%} apart"
        )
    else:
        print("no row in both")


def plot(result: dict[str, Any], file: Path) -> None:
    """Time of a training step over that of the frozen base, one row of dots per shape."""
    from matplotlib.figure import Figure

    rows = [row for row in result["rows"] if row["backward"]][::-1]
    figure = Figure(figsize=(9, 1.7 + 0.28 * len(rows)), layout="constrained")
    axes = figure.subplots()
    places = range(len(rows))
    marks = dict(zip(LABELS, ("|", "o", "s", "D", "^", "x"), strict=True))
    for name, label in LABELS.items():
        values = [row["over_base"][name] for row in rows]
        big = name in ("ours", "plain")
        axes.scatter(values, places, s=64 if big else 26, marker=marks[name], label=label,
                     zorder=3 if big else 2)  # fmt: skip
    axes.set_xscale("log")
    ticks = [1, 1.5, 2, 3, 5, 10, 20]
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.axvline(1, color="grey", linewidth=0.8)
    axes.set_yticks(places, [row["name"].removesuffix(" forward+backward") for row in rows])
    axes.set_xlabel("forward + backward, times the frozen base alone (log)")
    axes.set_title(f"{result['device']}, {result['threads']} thread(s), torch {result['torch']}")
    axes.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside lower center", ncols=3, fontsize=8)
    figure.savefig(file, dpi=110)
