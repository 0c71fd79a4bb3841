"""Every benchmark runs from a checkout and writes what it prints."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NAMES = sorted(file.stem for file in (ROOT / "benchmarks").glob("[a-z]*.py"))


@pytest.mark.parametrize("name", NAMES)
def test_it_checks_itself_and_reports(name: str, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    size = ["--size", "tiny"] if name == "pipeline" else []
    ran = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{name}", "--quick", *size, "--json", str(report)],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    told = json.loads(report.read_text())
    assert {"device", "torch", "commit", "variants"} <= set(told)
    timed = [v for v in told["variants"].values() if "median_ms" in v]
    assert timed or name in ("continual", "flip_rate")
    assert all(v["p20_ms"] <= v["median_ms"] <= v["p80_ms"] for v in timed)
    if name == "continual":
        assert told["variants"]["at stage"]["forgetting"]["mean"] == 0.0
