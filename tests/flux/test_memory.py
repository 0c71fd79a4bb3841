"""The real configuration of FLUX.1-dev, on the meta device."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from prw_flux import PRWAdapter, attach, source_pass
from prw_flux.cli import main
from prw_flux.cli.memory import NAMES
from prw_flux.encode import position_ids
from prw_flux.memory import GIB, budget, flux1, source_bytes
from prw_flux.stored import FLOAT8


@pytest.mark.parametrize("size, gib", [(512, 0.668), (1024, 2.672)])
def test_a_recorded_source_of_full_size(size: int, gib: float) -> None:
    """A source pass through all 57 blocks leaves what the formula says."""
    transformer = flux1().to(torch.bfloat16)
    assert sum(p.numel() for p in transformer.parameters()) == 11_901_408_320
    with torch.device("meta"):
        attach(transformer, PRWAdapter(19, 38, 3072))
        side = size // 16
        source = torch.empty(1, side * side, 64, dtype=torch.bfloat16)
        pooled, time = source.new_empty(1, 768), source.new_zeros(1)
    with torch.no_grad():
        cache = source_pass(
            transformer, source, position_ids(side, side, device="meta"), pooled, time
        )
    assert len(cache) == 57 and cache.slots[56].key_BSHD.shape == (1, side * side, 24, 128)
    assert cache.nbytes == source_bytes(transformer, size, size)
    assert cache.nbytes / GIB == pytest.approx(gib, abs=5e-4)
    small = cache.to(FLOAT8)
    assert small.nbytes == source_bytes(transformer, size, size, FLOAT8)
    assert small.nbytes / GIB <= 1.4 * size**2 / 1024**2


def test_the_parts_add_up() -> None:
    full, small = budget(), budget(base="nf4", cache="fp8", references=2, rank=64, experts=1)
    assert full.transformer == 2 * 11_901_408_320
    # 5 experts of 89.65 M in bf16; 57 x 5 columns of 3072 in float32, their noise, and the
    # 1 + 2 + 3 + 4 + 5 columns of the snapshots
    columns = 57 * 3072 * (5 + 15) * 2
    assert full.adapter == 2 * 448_266_240 + 4 * columns
    assert small.adapter < full.adapter / 9
    assert full.together - full.denoising == full.t5 + full.clip + full.vae
    assert full.t5 / GIB == pytest.approx(8.87, abs=0.01)
    assert small.transformer / GIB == pytest.approx(6.25, abs=0.05)
    assert small.sources == 2 * source_bytes(flux1(), 1024, 1024, FLOAT8)
    assert small.denoising / GIB < 10
    for wrong in ({"base": "int3"}, {"cache": "int4"}, {"references": 0}):
        with pytest.raises(ValueError, match="known are|at least"):
            budget(**wrong)


def test_the_verb_tells_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["memory", "--json", "--references", "2"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["bf16"]["sources"] == 2 * source_bytes(flux1(), 1024, 1024)
    assert main(["memory", "--cache", "fp8"]) == 0
    assert "1.38" in capsys.readouterr().out
    assert main(["memory", "--cache", "fp9"]) == 1
    assert "no precision 'bf16' / 'fp9'" in capsys.readouterr().err


def test_the_table_of_the_page_is_what_the_verb_prints() -> None:
    page = Path(__file__).parents[2] / "docs/pages/howto/edit-images.md"
    rows = [line.strip("| ").split(" | ") for line in page.read_text("utf-8").splitlines()]
    told = {
        name: numbers for name, *numbers in rows if len(numbers) == 3 and name in NAMES.values()
    }
    parts = {base: budget(base=base) for base in ("bf16", "int8", "nf4")}
    wanted = {
        name: [f"{getattr(part, key) / GIB:.2f}" for part in parts.values()]
        for key, name in NAMES.items()
    }
    assert told == wanted
