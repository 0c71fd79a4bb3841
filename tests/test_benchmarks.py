"""Every benchmark runs from a checkout and writes what it prints."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch import Tensor

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
    if name == "kernels":
        assert all(row["error"] < 3e-2 and row["base_ms"] > 0 for row in told["rows"])
        assert {row["shape"]["skew"] for row in told["rows"]} == {"uniform", "sample"}
        assert set(told["summary"]) >= {"float32 forward", "bfloat16 forward+backward"}
    if name == "continual":
        assert told["variants"]["at stage"]["forgetting"]["mean"] == 0.0


def test_a_wrong_kernel_has_no_speed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(ROOT)
    from benchmarks import _peers, kernels

    def shifted(p: _peers.Problem) -> list[Tensor]:
        return [y + 1e-3 for y in _peers.ours(p)]

    monkeypatch.setitem(kernels.ROUTED, "ours", shifted)
    assert kernels.main(["--quick"]) == 1
    told = capsys.readouterr()
    assert "WRONG T512 d256x1 r32 N5 float32 uniform: ours" in told.err
    assert "T512" not in told.out


@pytest.mark.slow
def test_a_routed_step_costs_about_one_lora_on_a_cpu() -> None:
    """Ratios within one run, so any machine will do; measured 1.1 and 1.3, a third is for noise.

    pytest-benchmark would keep times of its own, which on a shared machine say nothing unless they
    are compared within a run: that is what `benchmarks.kernels` does already.
    """
    command = [sys.executable, "-c", """if True:
        import json, torch
        from functools import partial
        from benchmarks import _peers, kernels
        from benchmarks._ceilings import seconds
        from benchmarks._common import interleaved
        from benchmarks._shapes import Shape
        torch.set_num_threads(1)
        p = _peers.Problem(Shape(1024, 512), "cpu")
        plain = _peers.Plain(p)
        runs = {
            "plain": lambda: _peers.gradients(plain(p), p, plain.leaves(p)),
            "ours": lambda: _peers.gradients(_peers.ours(p), p, p.leaves()),
            "loop": lambda: _peers.gradients(_peers.loop(p), p, p.leaves()),
        }
        took = interleaved(runs, rounds=25, warmup=3, device="cpu", fresh=p.refresh,
                           timer=partial(seconds, device="cpu"))
        print(json.dumps([kernels.ratio(took["ours"], took[name]) for name in ("plain", "loop")]))
    """]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=True, env=environment
    )
    over_plain, over_loop = json.loads(ran.stdout)
    assert over_plain < 1.5
    assert over_loop < 1.1
