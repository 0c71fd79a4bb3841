"""Data from the Hub by its own protocol: a server of this test's answers for huggingface_hub."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from flux.fake_hub import serve
from flux.test_build import pair_folder
from flux.test_on_disk import make

from prw_flux.data.build import build
from prw_flux.data.edit_pairs import EditPairs

pytestmark = pytest.mark.slow

PROGRAM = """
import json, sys
from prw_flux.cli import main
for words in json.load(sys.stdin):
    print("status", main(words), flush=True)
"""


def commands(tmp_path: Path, endpoint: str, *lines: list[str]) -> subprocess.CompletedProcess[str]:
    """Run in another process, as the Hub's library reads its address when it is imported."""
    return subprocess.run(
        [sys.executable, "-c", PROGRAM],
        input=json.dumps(lines),
        env={**os.environ, "HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0",
             "HF_HOME": str(tmp_path / "home"), "PRW_SHARD_CACHE": str(tmp_path / "cache")},
        cwd=tmp_path, text=True, capture_output=True, timeout=300, check=False,
    )  # fmt: skip


def test_a_repository_is_built_from_looked_at_and_drawn_from(tmp_path: Path) -> None:
    root = tmp_path / "repository"
    pair_folder(root / "pairs", 3)
    make(root / "built", "edit", 10)
    local = build(EditPairs(root / "pairs"), "edit", tmp_path / "local", made_from={})
    here = "hf://datasets/owner/name"
    with serve(root) as hub:
        done = commands(
            tmp_path,
            f"http://127.0.0.1:{hub.server_address[1]}",
            ["data", "build", "edit", "--from", "pairs", f"{here}/pairs", "--out", "pairs"],
            ["data", "build", "edit", "--from", "parquet", f"{here}/built/data", "--map",
             "source=source", "--map", "target=target", "--map", "text=text", "--out", "rows"],
            ["data", "inspect", f"{here}/built", "--out", "sheet.png"],
            ["data", "check", f"{here}/built"],
            ["data", "--source", f"disk:{here}/built", "--task", "edit", "--size", "48"],
            ["data", "check", "hf://datasets/owner/other"],
            ["data", "check", f"{here}/nothing"],
        )  # fmt: skip
        files = [line for line in hub.asked if "/pairs/" in line and line.startswith("GET /data")]
    statuses = [line for line in done.stdout.splitlines() if line.startswith("status")]
    assert statuses == ["status 0"] * 5 + ["status 1"] * 2, done.stderr
    manifests: list[Any] = [
        json.loads((tmp_path / name / "build.json").read_text()) for name in ("pairs", "rows")
    ]
    assert manifests[0]["shards"] == local.shards and manifests[1]["kept"] == 10
    assert len(files) == 7  # six pictures and their list, once each
    assert "10 rows, all as they were built" in done.stdout
    told = [line for line in done.stderr.splitlines() if line.startswith("prw-flux:")]
    assert told == [
        f"prw-flux: there is no {url}/build.json"
        for url in ("hf://datasets/owner/other", f"{here}/nothing")
    ]
