"""The launch guide: its scripts are valid, and its plan is what the command prints."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from prw_flux.cli import main

PAGE = Path(__file__).parents[2] / "docs/pages/howto/launch.md"
PLAN = ["train", "paper", "--dry-run", "--ranks", "64", "--price-per-hour", "3"]


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE.read_text("utf-8"), flags=re.M | re.S)


def test_the_slurm_script_is_valid(tmp_path: Path) -> None:
    (script,) = [block for block in blocks("bash") if block.startswith("#!")]
    bash = shutil.which("bash")
    assert bash is not None and "#SBATCH --requeue" in script
    ran = subprocess.run([bash, "-n"], input=script, capture_output=True, text=True, check=False)
    assert ran.returncode == 0 and not ran.stderr, ran.stderr


@pytest.mark.parametrize(
    ("begun", "status", "arguments", "requeued"),
    [
        (False, 0, "paper --out", False),
        (False, 143, "paper --out", False),
        (True, 0, "--resume", False),
        (True, 143, "--resume", True),
    ],
)
def test_the_slurm_script_resumes_and_queues_again(
    tmp_path: Path, begun: bool, status: int, arguments: str, requeued: bool
) -> None:
    """Run with stand-ins for SLURM's commands."""
    (script,) = [block for block in blocks("bash") if block.startswith("#!")]
    run = tmp_path / "run"
    if begun:
        run.mkdir()
        (run / "run.json").write_text("{}")
    for name, body in {
        "srun": f'echo "$@" > {tmp_path}/ran; exit {status}',
        "scontrol": f'if [ "$1" = requeue ]; then touch {tmp_path}/queued; else echo n1; fi',
    }.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    environment = {
        "PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_NODELIST": "n[1-8]", "SLURM_NNODES": "8",
        "SLURM_JOB_ID": "7",
    }  # fmt: skip
    script = script.replace("/shared/runs/paper", str(run))
    ran = subprocess.run(["/bin/bash"], input=script, env=environment, text=True, check=False)
    assert ran.returncode == status
    told = (tmp_path / "ran").read_text()
    assert "-m prw_flux.cli train " + arguments in told and "--rdzv-endpoint n1:29500" in told
    assert (tmp_path / "queued").exists() == requeued


def test_the_kubernetes_job_is_valid(tmp_path: Path) -> None:
    (text,) = blocks("yaml")
    service, job = list(yaml.safe_load_all(text))
    spec: dict[str, Any] = job["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    assert (service["kind"], job["kind"], spec["completionMode"]) == ("Service", "Job", "Indexed")
    assert pod["subdomain"] == service["metadata"]["name"]
    assert spec["completions"] == spec["parallelism"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {
        volume["name"] for volume in pod["volumes"]
    }
    assert all(isinstance(entry["value"], str) for entry in container["env"])
    (script,) = container["args"]
    assert f"--nnodes {spec['completions']} " in script
    ran = subprocess.run(["/bin/bash", "-n"], input=script, text=True, check=False)
    assert ran.returncode == 0


def test_every_launched_verb_exists() -> None:
    """What follows ``-m prw_flux.cli`` is a command line that prw-flux accepts."""
    import shlex

    from prw_flux.cli import build_parser

    lines = "\n".join(blocks("bash")).replace("\\\n", " ").splitlines()
    launched = [line.split("prw_flux.cli", 1)[1] for line in lines if "-m prw_flux.cli" in line]
    assert len(launched) >= 3
    for line in launched:
        words = [word for word in shlex.split(line) if not word.startswith("$")]
        build_parser().parse_args(words)


def test_the_plan_is_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    """Where this fails, put the output of the command on the page into its text block."""
    assert main(PLAN) == 0
    printed = capsys.readouterr().out
    (shown,) = [block for block in blocks("text") if "cached samples" in block]
    assert " ".join(PLAN) in PAGE.read_text("utf-8")
    assert [line.rstrip() for line in shown.splitlines()] == [
        line.rstrip() for line in printed.splitlines()
    ]
