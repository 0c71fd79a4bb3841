"""What benchmarks share: arguments, interleaved medians, where a result comes from."""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import time
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import prw


def parser(name: str, about: str) -> argparse.ArgumentParser:
    """The arguments that every benchmark takes."""
    made = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}",
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--device", type=_device, choices=("cpu", "cuda"), default="cpu")
    made.add_argument("--quick", action="store_true", help="smaller, and few rounds")
    made.add_argument("--json", type=new_file, help="write the result here, too")
    return made


def new_file(name: str) -> Path:
    """A file to be written, for argparse: refused before the run, not after it."""
    file = Path(name)
    if not file.parent.is_dir() or file.is_dir():
        raise argparse.ArgumentTypeError(
            f"{name} cannot be written: give a file in a folder there is"
        )
    return file


def _device(name: str) -> str:
    if name == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError("torch sees no CUDA device here; use --device cpu")
    return name


def interleaved(
    variants: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    warmup: int,
    device: str,
    clock: Callable[[], float] = time.perf_counter,
    timer: Callable[[Callable[[], object]], float] | None = None,
    fresh: Callable[[], object] | None = None,
) -> dict[str, list[float]]:
    """Seconds of every variant in every round; a round runs each variant once, in turn.

    With `fresh`, which makes new inputs before every round, the turn is reversed in every other
    round, so that nobody always runs after the same neighbour. `timer` takes the time of one run
    otherwise than by `clock`.
    """

    def timed(run: Callable[[], object]) -> float:
        synchronise(device)
        started = clock()
        run()
        synchronise(device)
        return clock() - started

    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(warmup + rounds):
        if fresh:
            fresh()
        names = list(variants)
        for name in reversed(names) if fresh and number % 2 else names:
            took = (timer or timed)(variants[name])
            if number >= warmup:
                seconds[name].append(took)
    return seconds


def synchronise(device: str) -> None:
    """Wait for the device; a CPU never runs ahead."""
    if device == "cuda":
        torch.cuda.synchronize()


def spread(seconds: list[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile in milliseconds."""
    values = torch.tensor(seconds, dtype=torch.float64) * 1e3
    return {
        name: round(float(torch.quantile(values, share)), 3)
        for name, share in (("median_ms", 0.5), ("p20_ms", 0.2), ("p80_ms", 0.8))
    }


def triton_version() -> str:
    """Installed with torch's CUDA builds."""
    try:
        return version("triton")
    except PackageNotFoundError:
        return "none"


def processor() -> str:
    """The CPU's own name, where the system tells."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def machine(device: str) -> dict[str, Any]:
    """Device, threads, versions and commit."""
    name = torch.cuda.get_device_name() if device == "cuda" else processor()
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "prw": prw.__version__,
        "torch": torch.__version__,
        "triton": triton_version(),
        "commit": commit(),
    }


def commit() -> str:
    """The commit, "-dirty" where code differs from it; results and documents do not count."""
    told = _git("describe", "--always")
    code = (
        "--untracked-files=no",
        "--",
        ":/",
        ":(top,exclude)benchmarks/results",
        ":(top,exclude)docs",
    )
    changed = told and _git("status", "--porcelain", *code)
    return f"{told}-dirty" if changed else told or "unknown"


def _git(*words: str) -> str:
    ran = subprocess.run(
        ["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    return ran.stdout.strip()


def head(result: Mapping[str, Any], *more: str) -> None:
    """Print where a result comes from, in a line: device, threads, torch, commit, and `more`."""
    names = ("device", "threads", "torch", "commit", *more)
    print("  ".join(f"{name} {result[name]}" for name in names))


def keep(result: Mapping[str, Any], file: Path | None) -> None:
    """Write a result as json, where a file is asked for."""
    if file:
        file.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
