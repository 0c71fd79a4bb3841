"""The tables of `benchmarks.kernels` in docs/pages/kernels.md."""

from __future__ import annotations

from typing import Any, Final

from benchmarks._page import table

Row = dict[str, Any]
TARGETS: Final = (
    ("float32", "ours / plain", "at most 1.10"),
    ("float32", "loop / ours", "at least 1.3"),
    ("float32", "dense / ours at r 32", "at least 2"),
    ("bfloat16", "loop / ours", "at least 1.8"),
    ("bfloat16", "ours / plain", ""),
    ("float32", "tuned / ours", ""),
    ("bfloat16", "tuned / ours", ""),
    ("float32", "grouped / ours", ""),
    ("bfloat16", "grouped / ours", ""),
)
"""Of a training step on a CPU: dtype, which ratio of the summary, what it is to be."""
PARTS: Final = ("base", "moves", "elementwise", "lora_products", "python")


def tables(result: dict[str, Any], earlier: dict[str, Any] | None = None) -> str:
    """Where the result comes from, its targets, a table per dtype and direction, the breakdown.

    Args:
        result: of a run.
        earlier: of another one, whose means stand beside.
    """
    rates = result["gemm_GFLOP_per_s"]
    parts = [
        [f"{result['device']} ({result['clocks']}), {result['threads']} thread(s), torch "
         f"{result['torch']}, triton {result['triton']}, commit {result['commit']}. Measured "
         f"ceilings: {', '.join(f'{rate:.0f} GFLOP/s in {kind}' for kind, rate in rates.items())}, "
         f"{result['copy_GB_per_s']:.0f} GB/s copied."],
        ["### Against the targets"], _targets(result, earlier),
    ]  # fmt: skip
    for key in result["summary"]:
        dtype, _, way = key.partition(" ")
        backward = way == "forward+backward"
        rows = [row for row in result["rows"]
                if row["shape"]["dtype"] == dtype and row["backward"] == backward]  # fmt: skip
        parts += [[f"### {dtype}, {way.replace('+', ' + ')}"], _rows(rows, backward)]
    parts += [["### Where the time goes"], _breakdown(result)]
    return "\n\n".join("\n".join(part) for part in parts if part)


def _targets(result: dict[str, Any], earlier: dict[str, Any] | None) -> list[str]:
    runs = [found for found in (earlier, result) if found]
    head = ["forward + backward, geometric mean", "target", *(f"{run['commit']}" for run in runs)]
    body = []
    for dtype, name, bar in TARGETS:
        means = [run["summary"].get(f"{dtype} forward+backward", {}).get(name) for run in runs]
        if all(means):
            body.append([f"{dtype}: {name}", bar, *(f"{mean:.2f}" for mean in means)])
    return table(head, body, 2)


def _rows(rows: list[Row], backward: bool) -> list[str]:
    head = ["shape", "base ms", "ours ms [p20-p80]", "/ base", "/ roof", "/ plain", "loop /",
            "tuned /", "dense /", "grouped /"]  # fmt: skip
    on_gpu = any(row["launches"] is not None for row in rows)
    head += ["kept B per token"] * backward + ["launches", "peak MB", "graph ms"] * on_gpu
    body = []
    for row in rows:
        mine, over, rivals = row["ours_ms"], row["ours_over"], row["over_ours"]
        line = [
            _shape(row), f"{row['base_ms']:.1f}",
            f"{mine['median_ms']:.1f} [{mine['p20_ms']:.1f}-{mine['p80_ms']:.1f}]",
            *(f"{over[name]:.2f}" for name in ("base", "roof", "plain")),
            *(f"{rivals[name]:.2f}" for name in ("loop", "tuned", "dense", "grouped")),
        ]  # fmt: skip
        if backward:
            kept = row["saved_bytes_per_token"]
            line.append(f"{kept['ours']} (plain {kept['plain']}, loop {kept['loop']})")
        if on_gpu:
            line += [str(row["launches"]), str(row["peak_MB"]), str(row["graph_ms"] or "-")]
        body.append(line)
    return table(head, body)


def _shape(row: Row) -> str:
    shape = row["shape"]
    words = [f"T {shape['tokens']}", f"d {shape['width']}"]
    words += ["K+V"] if shape["projections"] == 2 else []
    words += [f"r {shape['rank']}", f"N {shape['experts']}"]
    words += [] if shape["skew"] == "uniform" else [shape["skew"]]
    words += [] if shape["learning"] >= shape["experts"] else [f"{shape['learning']} learn"]
    return ", ".join(words)


def _breakdown(result: dict[str, Any]) -> list[str]:
    body = [
        [key.replace("+", " + "), *(f"{100 * shares[part]:.0f} %" for part in PARTS)]
        for key, means in result["summary"].items()
        if (shares := means.get("where ours goes"))
    ]
    return table(["", *(part.replace("_", " ") for part in PARTS)], body) if body else []
