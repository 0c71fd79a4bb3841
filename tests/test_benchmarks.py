"""Every benchmark runs from a checkout and writes what it prints."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from benchmarks import _flux, _peers, _report, coredi, kernels, pipeline
from benchmarks._kernels_page import tables
from benchmarks._page import between
from benchmarks._shapes import Shape
from prw_flux import main_pass

ROOT = Path(__file__).parent.parent
COREDI = "benchmarks/results/2026-11-22-coredi-cpu.jsonl"
KERNELS = "benchmarks/results/2026-11-22-kernels-cpu.json"
NAMES = sorted(file.stem for file in (ROOT / "benchmarks").glob("[a-z]*.py"))


@pytest.mark.parametrize("name", NAMES)
def test_it_checks_itself_and_reports(name: str, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    size = ["--size", "tiny", "--training"] if name == "pipeline" else []
    if name == "kernels":
        size = ["--compare", str(ROOT / KERNELS), "--plot", str(tmp_path / "plot.png")]
    ran = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{name}", "--quick", *size, "--json", str(report)],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    told = json.loads(report.read_text())
    assert {"device", "torch", "commit", "variants"} <= set(told)
    timed = [v for v in told["variants"].values() if "median_ms" in v]
    assert timed or name in ("ablation", "continual", "flip_rate", "stored_sources", "timestep")
    assert all(v["p20_ms"] <= v["median_ms"] <= v["p80_ms"] for v in timed)
    if name == "kernels":
        assert all(row["error"] < 3e-2 and row["base_ms"] > 0 for row in told["rows"])
        assert {row["shape"]["skew"] for row in told["rows"]} == {"uniform", "sample"}
        assert set(told["summary"]) >= {"float32 forward", "bfloat16 forward+backward"}
        assert "no row in both" in ran.stdout and (tmp_path / "plot.png").stat().st_size > 1e4
    if name == "pipeline":
        assert_pipeline(told)
    if name == "loading":
        names = {name.partition(",")[0] for name in told["variants"]}
        assert names == {"read", "plain", "folder", "file"}
    if name == "stored_sources":
        stored = told["variants"]
        assert stored["float32"]["PSNR"] == 99.0 > stored["float8"]["PSNR"] > 30.0
        assert stored["float32"]["KiB"] == 4 * stored["half"]["KiB"] > 2 * stored["float8"]["KiB"]
    if name == "timestep":
        assert set(told["variants"]) == {"zero", "current"}
        moved = told["variants"]["zero"]["changes"]["control"]
        assert moved["0.9"]["keys"]["mean"] > moved["0.1"]["keys"]["mean"] > 0.0
    if name == "ablation":
        assert set(told["variants"]) == {"cologen", "cotrain", "references"}
        assert 0.0 <= told["variants"]["cotrain"]["edit"]["C"] <= 1.0
    if name == "continual":
        assert told["variants"]["at stage"]["forgetting"]["mean"] == 0.0


def assert_pipeline(told: dict[str, Any]) -> None:
    """What is counted depends on no machine; what is timed here is too small to say anything."""
    (megapixel,) = told["counted"]
    assert megapixel["joint_over_ours"] >= 1.8 and megapixel["ours_over_text"] <= 1.25
    # flux.md, section 3.5: TFLOP of a step at 1024 pixels
    known = {"text": 74.38, "joint": 165.46, "current": 152.98, "cached": 87.6, "source": 65.37}
    assert megapixel["TFLOP"] == pytest.approx(known, abs=0.02)
    assert megapixel["cache_GiB"]["bf16"] == 2.672 and megapixel["cache_GiB"]["fp8"] < 1.4
    assert told["attach_full_width"]["attach_s"] < 2.0 and told["text_to_image"]["attach_s"] < 2.0
    assert {(row["base"], row["batch"]) for row in told["training"]} == {
        ("bf16", 1), ("bf16", 2), ("fp8", 1), ("fp8", 2)
    }  # fmt: skip
    assert all(row["median_ms"] > 0 for row in told["training"])


def test_a_wrong_velocity_has_no_speed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def shifted(*args: Any, **kwargs: Any) -> Tensor:
        return main_pass(*args, **kwargs) + 1e-3 * torch.rand(())

    monkeypatch.setattr(_flux, "main_pass", shifted)
    assert pipeline.main(["--quick", "--size", "tiny"]) == 1
    told = capsys.readouterr()
    assert "no times: the cache does not give the bits of a fresh recording" in told.err
    assert not told.out


def test_a_wrong_kernel_has_no_speed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def shifted(p: _peers.Problem) -> list[Tensor]:
        return [y + 1e-3 for y in _peers.ours(p)]

    monkeypatch.setitem(kernels.ROUTED, "ours", shifted)
    assert kernels.main(["--quick"]) == 1
    told = capsys.readouterr()
    assert "WRONG T512 d256x1 r32 N5 float32 uniform: ours" in told.err
    assert "T512" not in told.out


def test_a_run_is_compared_with_an_earlier_one(capsys: pytest.CaptureFixture[str]) -> None:
    def result(commit: str, **ratios: float) -> dict[str, Any]:
        rows = [{"name": name, "ours_over": {"base": ratio}} for name, ratio in ratios.items()]
        return {"commit": commit, "rows": rows}

    now, then = result("new", a=1.5, b=2.05, c=1.0), result("old", a=1.0, b=2.0, d=1.0)
    _report.compare(now, then)
    told = capsys.readouterr().out.splitlines()
    assert told[1] == "ours / base: old -> new"
    assert told[2].split() == ["a", "1.00", "->", "1.50", "+50.0%", "<--"]
    assert told[3].split() == ["b", "2.00", "->", "2.05", "+2.5%"]
    assert told[4].startswith("2 rows in both")


def test_the_page_tells_the_kept_result() -> None:
    result = _report.earlier(str(ROOT / KERNELS))
    shown = between(ROOT / "docs" / "pages" / "kernels.md", "kernels cpu")
    means, rows = tables(result).split("### float32, forward\n", 1)
    assert means.splitlines()[0] in shown
    assert rows in shown


def test_the_page_of_features_tells_the_kept_lines() -> None:
    result = json.loads((ROOT / COREDI).with_suffix(".json").read_text("utf-8"))
    lines = coredi.read(ROOT / COREDI)
    shown = between(ROOT / "docs" / "pages" / "coredi.md", "coredi")
    assert shown.strip() == coredi.tables(result, lines)
    for world, about in coredi.HEADLINE.items():
        own = [line for line in lines if line["world"] == world]
        for arm, told in coredi.summary(own, *about).items():
            assert result["variants"][f"{world}: {arm}"] == told


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--compare", "absent.json", "absent.json is no --json of this benchmark (FileNotFound"),
        ("--compare", "other.json", "other.json is no --json of this benchmark (KeyError"),
        ("--json", "absent/a.json", "cannot be written: give a file in a folder there is"),
        ("--plot", ".", "cannot be written: give a file in a folder there is"),
        ("--page", "absent.md", "No such file or directory: 'absent.md'"),
        ("--page", "other.json", "has no <!-- kernels cpu: begin -->"),
        ("--device", "cuda", "torch sees no CUDA device here; use --device cpu"),
    ],
)
def test_what_cannot_work_is_said_before_the_run(
    option: str, value: str, message: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    Path("other.json").write_text("{}")
    with pytest.raises(SystemExit, match="2"):
        kernels.main(["--quick", option, value])
    told = capsys.readouterr()
    assert message in told.err and not told.out


@pytest.mark.parametrize("skew", ["uniform", "sample"])
def test_the_truth_in_pieces_is_the_truth(
    skew: Literal["uniform", "sample"], monkeypatch: pytest.MonkeyPatch
) -> None:
    p = _peers.Problem(Shape(72, 16, projections=2, rank=4, skew=skew), "cpu")
    whole = _peers.truth(p)
    monkeypatch.setattr(_peers, "PIECE", 20)
    torch.testing.assert_close(_peers.truth(p), whole)
    assert len(whole) == 2 + len(p.leaves())


def test_steps_to_a_bar_are_those_after_which_it_is_held() -> None:
    """Between looks linearly; a look that falls back below the bar starts the count again."""
    rising = [{"step": 10, "C": 0.1}, {"step": 20, "C": 0.3}, {"step": 30, "C": 0.5}]
    assert coredi.steps_to(rising, "C", 1, 0.2) == 15.0
    assert coredi.steps_to(rising, "C", 1, 0.6) is None
    assert coredi.steps_to(rising, "C", 1, 0.05) == 10.0
    dipped = [{"step": 10, "C": 0.4}, {"step": 20, "C": 0.2}, {"step": 30, "C": 0.6}]
    assert coredi.steps_to(dipped, "C", 1, 0.3) == 22.5
    falling = [{"step": 10, "FD": 9.0}, {"step": 20, "FD": 5.0}]
    assert coredi.steps_to(falling, "FD", -1, 7.0) == 15.0
