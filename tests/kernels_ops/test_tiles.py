"""The table of tiles and the search for faster ones."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from prw_kernels.tiles import Tile, arch_of, cache_file, tile
from prw_kernels.tiles.table import ANY, CANDIDATES, INTERPRETER, KERNELS, SAFE, TABLE

SEGMENTED = ("gather", "scatter", "gram")


@pytest.fixture
def search(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The search is on, with an empty cache folder."""
    monkeypatch.setenv("PRW_AUTOTUNE", "1")
    monkeypatch.setenv("PRW_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tiles.json"


def never(sizes: Tile) -> float:
    raise AssertionError(f"measured {sizes}")


def test_the_first_row_that_fits_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    small, long, large = Tile(16, 0, 1, 1, 1), Tile(16, 0, 2, 1, 1), Tile(16, 0, 3, 1, 1)
    rows = [(16, 100, small), (16, ANY, long), (64, 100, large)]
    monkeypatch.setitem(TABLE, "sm_77", {"route": rows})
    for rank, tokens, wanted in [
        (1, 0, small),
        (16, 100, small),
        (16, 101, long),
        (17, 100, large),
        (64, 1, large),
        (64, 101, SAFE["route"][0][2]),
        (65, 1, SAFE["route"][0][2]),
    ]:
        assert tile("route", "sm_77", rank, tokens, measure=never) == wanted
    assert tile("gram", "sm_77", 1, 1) == SAFE["gram"][0][2]
    assert tile("route", "sm_never", 1, 1) == SAFE["route"][0][2]


@pytest.mark.parametrize("arch", [*TABLE, "sm_never"])
@pytest.mark.parametrize("tokens", [0, 1, 1024, 4096, 20000, 10**6])
def test_every_tile_is_one_that_can_run(arch: str, tokens: int) -> None:
    block = max(tile(kernel, arch, 1, tokens).m for kernel in SEGMENTED)
    for kernel in KERNELS:
        for rank in (1, 16, 17, 64, 128, 10**4):
            found = tile(kernel, arch, rank, tokens)
            for size in (found.m, found.n, found.k):
                assert size == 0 or (size >= 16 and size & (size - 1) == 0)
            assert found.warps in (1, 2, 4, 8) and found.stages >= 1
            if kernel in SEGMENTED:  # one routing serves matrices of every rank
                assert block % found.m == 0 and found.n and found.k


def test_without_being_asked_nothing_is_searched(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("PRW_AUTOTUNE", raising=False)
    monkeypatch.setenv("PRW_CACHE", str(tmp_path))
    tile("scatter", "sm_90", 128, 4096, measure=never)
    assert not list(tmp_path.iterdir())


def test_the_fastest_candidate_is_found_once_and_kept(search: Path) -> None:
    measured: list[Tile] = []
    best = CANDIDATES["scatter"][3]

    def measure(sizes: Tile) -> float:
        measured.append(sizes)
        if sizes.n == CANDIDATES["scatter"][0].n and sizes.warps == 8:
            raise RuntimeError("out of resource: shared memory")
        return 1.0 if (sizes.n, sizes.k, sizes.warps, sizes.stages) == key else 2.0

    key = (best.n, best.k, 4, best.stages)
    shipped = tile("scatter", "sm_90", 128, 4096)
    found = tile("scatter", "sm_90", 128, 4096, measure=measure)
    assert (found.n, found.k, found.warps, found.stages) == key
    assert measured[0] == shipped and len(measured) == len(set(measured))
    assert {sizes.m for sizes in measured} == {shipped.m}

    assert tile("scatter", "sm_90", 128, 3000, measure=never) == found
    assert tile("scatter", "sm_90", 128, 4096) == found
    assert json.loads(search.read_text()) == {
        "sm_90 scatter rank<=128 tokens<=4096": {
            "m": found.m,
            "n": found.n,
            "k": found.k,
            "warps": found.warps,
            "stages": found.stages,
        }
    }
    other = tile("gram", "sm_90", 128, 5000, measure=lambda sizes: 1.0)
    assert other == tile("gram", "sm_90", 128, 5000, measure=never)
    assert len(json.loads(search.read_text())) == 2
    assert [file.name for file in search.parent.iterdir()] == ["tiles.json"]


def test_a_cache_that_cannot_be_written_stops_no_launch(
    search: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("PRW_CACHE", str(tmp_path / "file" / "below"))
    found = tile("scatter", "sm_90", 128, 4096, measure=lambda sizes: float(sizes.n))
    assert "cannot be written, so other processes search again" in caplog.text
    assert tile("scatter", "sm_90", 128, 4096, measure=never) == found
    assert not (tmp_path / "file").read_bytes()


def test_what_another_shipped_block_was_searched_with_is_not_used(
    search: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = tile("scatter", "sm_90", 128, 4096, measure=lambda sizes: 1.0)
    monkeypatch.setitem(TABLE["sm_90"], "scatter", [(ANY, ANY, Tile(2 * found.m, 64, 64, 4, 2))])
    assert tile("scatter", "sm_90", 128, 4096).m == 2 * found.m


def test_the_interpreter_is_never_measured(search: Path) -> None:
    tile("route", INTERPRETER, 5, 100, measure=never)
    assert not search.exists()


@pytest.mark.parametrize("text", ["", "[1]", '{"a": 1}', '{"a": {"m": 1}}', "\x00"])
def test_a_broken_file_is_ignored_and_named(
    search: Path, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    search.parent.mkdir()
    search.write_text(text)
    with caplog.at_level(logging.WARNING):
        assert tile("route", "sm_90", 5, 100) == TABLE["sm_90"]["route"][0][2]
    assert f"{search} is no list of tiles" in caplog.text
    tile("route", "sm_90", 5, 100, measure=lambda sizes: 1.0)
    assert len(json.loads(search.read_text())) == 1


def test_the_folder_of_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PRW_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    assert cache_file() == Path("/elsewhere/prw/tiles.json")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_file() == Path.home() / ".cache/prw/tiles.json"


def test_both_are_printed(search: Path, repository: Path) -> None:
    found = tile("route", "sm_90", 5, 100, measure=lambda sizes: float(sizes.k))
    command = [sys.executable, "-W", "error", "-m", "prw_kernels.tiles"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert any(line.split()[:2] == ["sm_90", "gather"] for line in lines)
    assert lines[-1].split("Tile")[0].strip() == "sm_90 route rank<=8 tokens<=128"
    assert lines[-1].endswith(str(found))


@pytest.mark.gpu
def test_the_architecture_of_a_device() -> None:
    major, minor = torch.cuda.get_device_capability()
    name = arch_of(torch.device("cuda", torch.cuda.current_device()))
    assert name.startswith("gfx") if torch.version.hip else name == f"sm_{major}{minor}"
