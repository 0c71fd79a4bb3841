"""Caches on their own: storage, joining, files; with a pipeline in test_pipeline_cache.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.testing import assert_close

from prw import CheckpointError
from prw_flux import SourceCache, SourceMeta
from prw_flux.cache_file import read_cache
from prw_flux.source_cache import JoinedCache, joined
from prw_flux.stored import FLOAT8

EXACT = {"rtol": 0.0, "atol": 0.0}


def recorded(blocks: int = 3, batch: int = 1, tokens: int = 4, seed: int = 0) -> SourceCache:
    generator = torch.Generator().manual_seed(seed)
    meta = SourceMeta(adapter="a", base="b", task="edit", scale=0.5, height=32, width=32)
    picture = torch.arange(12, dtype=torch.uint8).reshape(1, 3, 2, 2)
    cache = SourceCache(blocks, meta, picture)
    for slot in cache:
        slot.write(*(torch.randn(batch, tokens, 2, 8, generator=generator) for _ in range(2)))
    return cache


def like(batch: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(batch, 1, 2, 8, dtype=dtype)


def test_size_is_told() -> None:
    cache = recorded()
    assert cache.nbytes == 3 * 2 * 4 * 2 * 8 * 4 and cache.batch == 1 and cache.recorded == 3
    assert cache.to(torch.bfloat16).nbytes == cache.nbytes // 2
    # one float32 scale for each row of 8 values
    assert cache.to(FLOAT8).nbytes == cache.nbytes // 4 + cache.nbytes // 8
    assert "1 x 4 tokens, 3 blocks, torch.float32, cpu" in repr(cache)
    assert repr(SourceCache(2)) == "SourceCache(2 blocks, empty)"


def test_reading_expands_moves_and_widens() -> None:
    cache = recorded(batch=2).to(torch.bfloat16)
    key, value = cache.slots[1].read(like(4, torch.float64))
    assert key.dtype == value.dtype == torch.float64 and len(key) == 4
    assert_close(key[:2], cache.slots[1].key_BSHD[[0, 0]].double(), **EXACT)
    assert_close(key[2:], cache.slots[1].key_BSHD[[1, 1]].double(), **EXACT)
    with pytest.raises(ValueError, match="2 sources cannot be shared by 3 samples"):
        cache.slots[0].read(like(3))


def test_moving_leaves_the_original() -> None:
    cache = recorded()
    eight = cache.to("cpu", FLOAT8)
    assert cache.slots[0].key_BSHD.dtype == torch.float32 and eight.meta == cache.meta
    back = eight.to(dtype=torch.float32)
    for one, other in zip(back, cache, strict=True):
        assert_close(one.key_BSHD, other.key_BSHD, rtol=1 / 15, atol=0.01)  # 3 bits of mantissa
    assert cache.to("meta").slots[0].key_BSHD.is_meta
    with pytest.raises(ValueError, match=r"stored as one of float32.*not as torch\.int8"):
        cache.to(torch.int8)
    with pytest.raises(ValueError, match="record it first"):
        SourceCache(2).to("cpu")


def test_joined_references_are_read_side_by_side() -> None:
    one, two = recorded(seed=1), recorded(batch=2, tokens=3, seed=2).to(FLOAT8)
    assert joined([one]) is one
    both = joined([one, two])
    assert len(both) == 3
    key, value = both.slots[2].read(like(2))
    assert key.shape == value.shape == (2, 7, 2, 8)
    assert_close(key[:, :4], one.slots[2].read(like(2))[0], **EXACT)
    assert_close(value[:, 4:], two.slots[2].read(like(2))[1], **EXACT)
    with pytest.raises(ValueError, match="caches of 3, 2 blocks cannot be joined"):
        JoinedCache([one, recorded(blocks=2)])


# Files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, FLOAT8])
def test_a_file_is_the_cache(tmp_path: Path, dtype: torch.dtype) -> None:
    cache = recorded().to(dtype)
    cache.save(tmp_path / "new" / "photo.safetensors")
    found = SourceCache.load(tmp_path / "new" / "photo.safetensors")
    assert found.meta == cache.meta and found.nbytes == cache.nbytes
    assert torch.equal(found.picture, cache.picture)
    for one, other in zip(found, cache, strict=True):
        for part in ("key", "value"):
            a, b = getattr(one, part), getattr(other, part)
            assert a.values.dtype == dtype and torch.equal(a.values.float(), b.values.float())
            assert (a.scale is None) == (b.scale is None)
            assert a.scale is None or torch.equal(a.scale, b.scale)
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["photo.safetensors"]


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "cache.safetensors"
    recorded().save(path)
    before = path.read_bytes()

    def full(tensors: Any, file: Path, **_: Any) -> None:
        file.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr("prw_flux.cache_file.save_file", full)
    with pytest.raises(CheckpointError, match="cannot be written to .*No space left"):
        recorded(seed=3).save(path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
    with pytest.raises(ValueError, match="record it first"):
        SourceCache(2).save(path)
    with pytest.raises(CheckpointError, match="is no file; choose another name"):
        recorded().save(tmp_path)


def test_files_that_are_no_caches(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"There is no source cache .*cache\.save"):
        read_cache(tmp_path / "none.safetensors")
    (tmp_path / "text.safetensors").write_text("hello")
    with pytest.raises(CheckpointError, match=r"text\.safetensors is damaged"):
        read_cache(tmp_path / "text.safetensors")
    save_file({"a": torch.ones(1)}, tmp_path / "lora.safetensors")
    with pytest.raises(CheckpointError, match="is not a source cache: give a file that"):
        read_cache(tmp_path / "lora.safetensors")
    path = tmp_path / "cache.safetensors"
    recorded().save(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="is damaged .*encode the source again"):
        read_cache(path)
    header = {"format": "prw_flux.source_cache", "version": "9", "blocks": "1", "meta": "{}"}
    save_file({"a": torch.ones(1)}, path, metadata=header)
    with pytest.raises(CheckpointError, match="of version 9, this library reads 1: upgrade"):
        read_cache(path)
    save_file({"a": torch.ones(1)}, path, metadata=header | {"version": "1"})
    with pytest.raises(CheckpointError, match=r"is damaged .*0\.key"):
        read_cache(path)
