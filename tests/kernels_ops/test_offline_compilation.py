"""Kernels compile for the chips they are shipped for, within what these have; no GPU is needed.

What to compile is listed in `kernels_ops.shipped`, how in `kernels_ops.offline`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="triton is not installed: nothing to compile")

from kernels_ops.offline import Build, complaints, reports
from kernels_ops.shipped import builds, columns, route

Reports = dict[str, dict[str, Any]]

QUICK = list(builds(all_of_them=False))


@pytest.fixture(scope="module")
def compiled(repository: Path) -> Reports:
    return reports(QUICK, repository / "kernels")


@pytest.mark.parametrize("build", QUICK, ids=str)
def test_a_shipped_kernel_fits_its_chip(build: Build, compiled: Reports) -> None:
    report = compiled[str(build)]
    assert not complaints(build, report), report


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_everything_that_is_shipped_fits(repository: Path) -> None:
    every = list(builds(all_of_them=True))
    assert len(every) > len(QUICK)
    found = reports(every, repository / "kernels")
    wrong = {str(build): complaints(build, found[str(build)]) for build in every}
    wrong = {name: sentences for name, sentences in wrong.items() if sentences}
    assert not wrong, json.dumps(wrong, indent=1)


def test_a_kernel_that_does_not_fit_is_reported(repository: Path, tmp_path: Path) -> None:
    (tmp_path / "dying.py").write_text("import os\nos.abort()\n")
    good = route("sm_80", 5, 4096)
    meta = {**good.meta, "b_token": 64, "b_width": 64, "b_expert": columns(64), "num_stages": 3}
    planted = {
        "spills": Build(kernel=good.kernel, arch="sm_80", args=good.args, meta=meta),
        "bytes of shared memory, gfx942 has 65536": Build(
            kernel=good.kernel, arch="gfx942", args=good.args, meta={**meta, "precision": "ieee"}
        ),
        "has no wgmma": Build(
            kernel=good.kernel,
            arch="sm_90",
            args=good.args,
            meta=good.meta,
            products="wgmma.mma_async",
        ),
        "does not compile: AttributeError": Build(kernel="math:pi", arch="sm_90", args=[]),
        "the compiler died with status": Build(kernel="dying:kernel", arch="sm_90", args=[]),
    }
    found = reports([good, *planted.values()], repository / "kernels", tmp_path)
    assert not complaints(good, found[str(good)])
    for words, build in planted.items():
        assert words in " ".join(complaints(build, found[str(build)]))
