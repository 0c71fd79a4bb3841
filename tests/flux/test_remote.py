"""Shards that are elsewhere: listing, a bounded cache, builds and training from URLs."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from flux.test_build import pair_folder
from flux.test_on_disk import make
from flux.test_tar_rows import captioned, write_tar
from hypothesis import given
from hypothesis import strategies as st

from prw_flux.cli import main
from prw_flux.data import folder_copy
from prw_flux.data.build import build
from prw_flux.data.check import check, sample_rows
from prw_flux.data.folder_copy import local_folder
from prw_flux.data.manifest import read_manifest
from prw_flux.data.on_disk import OnDisk
from prw_flux.data.readers import Origin, open_reader
from prw_flux.data.remote import braces, fingerprint, found_files, is_url, opened
from prw_flux.data.row_checks import encode
from prw_flux.data.rows import DataError
from prw_flux.data.shard_cache import ShardCache
from prw_flux.evaluation.sheets import photo_samples
from prw_flux.rundir import RunFolder


@pytest.fixture
def memory() -> Iterator[Any]:
    """An empty file system in memory, as a bucket."""
    fs = fsspec.filesystem("memory")
    fs.store.clear()
    fs.pseudo_dirs[:] = [""]
    yield fs
    fs.store.clear()


def upload(fs: Any, folder: Path, to: str) -> str:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            fs.pipe_file(f"{to}/{path.relative_to(folder).as_posix()}", path.read_bytes())
    return f"memory://{to}"


@given(st.lists(st.integers(0, 30), min_size=2, max_size=2), st.text("ab-", max_size=4))
def test_braces_are_written_out_as_a_shell_does(ends: list[int], word: str) -> None:
    low, high = sorted(ends)
    assert braces(f"{word}{{{low:03d}..{high:03d}}}.tar") == [
        f"{word}{n:03d}.tar" for n in range(low, high + 1)
    ]
    assert braces(f"{{x,{word}y}}-{{{low}..{high}}}")[0] == f"x-{low}"
    assert len(braces(f"{{x,{word}y}}-{{{low}..{high}}}")) == 2 * (high - low + 1)


def test_files_are_found_at_urls_as_on_disk(memory: Any, tmp_path: Path) -> None:
    for name in ("b.tar", "a.tar", "sub/c.tar", "note.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    url = upload(memory, tmp_path, "/bucket")
    for where in (url, str(tmp_path)):
        names = [str(one).rsplit("/", 1)[1] for one in found_files(where, ".tar")]
        assert names == ["a.tar", "b.tar", "c.tar"]
        assert len(found_files(f"{where}/{{a,b}}.tar", ".tar")) == 2
        assert len(found_files(f"{where}/*.tar", ".tar")) == 2
    local, remote = found_files(str(tmp_path), ".tar"), found_files(url, ".tar")
    assert all(map(is_url, remote)) and not any(map(is_url, local))
    assert fingerprint(local) == fingerprint(remote)
    with opened(remote[1]) as file:
        assert file.read() == b"b.tar"


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("s3://bucket/x", "s3://bucket/x needs the package s3fs: pip install s3fs"),
        ("gs://bucket/x", "needs the package gcsfs: pip install gcsfs"),
        ("nonsense://x", "nonsense://x cannot be opened"),
        ("memory://nowhere/x.tar", "there are no .tar files at memory://nowhere/x.tar"),
    ],
)
def test_what_cannot_be_opened_is_one_sentence(memory: Any, url: str, message: str) -> None:
    for package, scheme in (("s3fs", "s3"), ("gcsfs", "gs")):
        if url.startswith(scheme) and find_spec(package):
            pytest.skip(f"{package} is installed")
    with pytest.raises(DataError, match=message) as found:
        found_files(url, ".tar")
    assert "\n" not in str(found.value)


def test_the_cache_is_bounded_and_forgets_what_was_not_used(memory: Any, tmp_path: Path) -> None:
    for name in "abcd":
        memory.pipe_file(f"/bucket/{name}", name.encode() * 100)
    cache = ShardCache(tmp_path, 250)
    for name, fetched in (("a", 1), ("b", 2), ("a", 2), ("c", 3), ("a", 3), ("b", 4), ("d", 5)):
        path = cache.local(f"memory://bucket/{name}")
        assert path.read_bytes() == name.encode() * 100
        assert cache.fetched == fetched, name
        held = sum(f.stat().st_size for f in tmp_path.iterdir() if f.suffix != ".lock")
        assert held <= 250
    assert ShardCache(tmp_path, 250).local("memory://bucket/d") == path  # shared between processes
    memory.pipe_file("/bucket/e", bytes(300))
    with pytest.raises(DataError, match="more than the cache may hold.*raise PRW_SHARD_CACHE_GIB"):
        cache.local("memory://bucket/e")
    assert cache.local(tmp_path / "local") == tmp_path / "local"


def test_many_threads_fetch_a_shard_once(memory: Any, tmp_path: Path) -> None:
    memory.pipe_file("/bucket/a", b"content")
    caches = [ShardCache(tmp_path, 100) for _ in range(8)]
    with ThreadPoolExecutor(8) as pool:
        paths = list(pool.map(lambda cache: cache.local("memory://bucket/a"), caches))
    assert len(set(paths)) == 1 and sum(cache.fetched for cache in caches) == 1


def test_a_shard_that_changes_is_fetched_again(memory: Any, tmp_path: Path) -> None:
    memory.pipe_file("/bucket/a", b"old")
    assert ShardCache(tmp_path, 100).local("memory://bucket/a").read_bytes() == b"old"
    memory.pipe_file("/bucket/a", b"newer")
    assert ShardCache(tmp_path, 100).local("memory://bucket/a").read_bytes() == b"newer"


def test_a_failing_network_is_tried_again_and_then_named(
    memory: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory.pipe_file("/bucket/a", b"content")
    failures = 2
    real = type(memory).get_file

    def flaky(self: Any, *args: Any, **how: Any) -> Any:
        nonlocal failures
        failures -= 1
        if failures >= 0:
            raise TimeoutError("read timed out")
        return real(self, *args, **how)

    monkeypatch.setattr(type(memory), "get_file", flaky)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    assert ShardCache(tmp_path, 100).local("memory://bucket/a").read_bytes() == b"content"
    failures = 99
    memory.pipe_file("/bucket/b", b"content")
    with pytest.raises(DataError, match="bucket/b cannot be read .TimeoutError: read timed out"):
        ShardCache(tmp_path, 100).local("memory://bucket/b")
    assert [f.suffix for f in tmp_path.iterdir() if len(f.name) != 64] == [".lock", ".lock"]


def test_tars_and_parquet_are_built_from_urls(
    memory: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PRW_SHARD_CACHE", str(tmp_path / "cache"))
    for shard in range(2):
        write_tar(tmp_path / "tars" / f"{shard}.tar", captioned(3, 3 * shard))
    url = upload(memory, tmp_path / "tars", "/tars")
    manifests = []
    for name, where in (("mem", url), ("disk", str(tmp_path / "tars"))):
        reader = open_reader(Origin(kind="webdataset", path=f"{where}/{{0..1}}.tar"), "inpaint")
        manifests.append(build(reader, "inpaint", tmp_path / name, made_from={}))
    assert manifests[0] == manifests[1] and manifests[0].kept == 6
    url = upload(memory, tmp_path / "mem" / "data", "/rows")
    origin = Origin(kind="parquet", path=url, columns=("target=target", "text=text"))
    again = build(open_reader(origin, "inpaint"), "inpaint", tmp_path / "again", made_from={})
    assert again.kept == 6
    monkeypatch.setenv("PRW_SHARD_CACHE_GIB", "much")
    with pytest.raises(DataError, match="PRW_SHARD_CACHE_GIB must be a number of GiB, got 'much'"):
        open_reader(origin, "inpaint")


def test_folders_of_pictures_at_urls_are_copied_and_followed(
    memory: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PRW_SHARD_CACHE", str(tmp_path / "cache"))
    pair_folder(tmp_path / "in", 3)
    url = upload(memory, tmp_path / "in", "/pairs")
    here, there = (
        build(open_reader(Origin(kind="pairs", path=path), "edit"), "edit", tmp_path / name,
              made_from={})
        for name, path in (("here", str(tmp_path / "in")), ("there", url))
    )  # fmt: skip
    assert here == there and here.kept == 3
    memory.rm("/pairs/before/2.png")
    memory.pipe_file("/pairs/before/1.png", memory.cat_file("/pairs/before/0.png"))
    monkeypatch.setattr(
        type(memory), "get_file", counting := Counting(type(memory).get_file)
    )  # fmt: skip
    folder = local_folder(url)
    assert counting.asked == ["/pairs/before/1.png"]
    assert sorted(path.name for path in (folder / "before").iterdir()) == ["0.png", "1.png"]
    assert (folder / "before/1.png").read_bytes() == (folder / "before/0.png").read_bytes()
    assert local_folder(f"{url}/edits.json").read_bytes().startswith(b"[")
    assert local_folder(tmp_path) == tmp_path
    with pytest.raises(DataError, match="there are no files at memory://nowhere"):
        local_folder("memory://nowhere")
    monkeypatch.setenv("PRW_SHARD_CACHE_GIB", "0.000001")
    with pytest.raises(DataError, match="more than the cache may hold.*pack them into tars"):
        local_folder(url)
    memory.pipe_file("/small/a.txt", b"x" * 900)
    with pytest.raises(DataError, match=r"no room in the cache .* remove .*-pairs, or raise PRW_"):
        local_folder("memory://small")


def test_a_copy_that_is_killed_keeps_what_it_had(
    memory: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill runs nothing at the end, so the index is written on the way."""
    monkeypatch.setenv("PRW_SHARD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(folder_copy, "NOTED", 1)
    monkeypatch.setattr(folder_copy, "WORKERS", 1)
    for name in "abc":
        memory.pipe_file(f"/letters/{name}", name.encode())
    real, noted = folder_copy.copy_file, list[str]()

    def last_one_waits(fs: Any, path: str, new: Path, told: str) -> None:
        until = time.monotonic() + 20
        while path.endswith("/c") and not noted and time.monotonic() < until:
            for index in (tmp_path / "cache" / "folders").glob("*.version"):
                noted.extend(json.loads(index.read_text()))
        real(fs, path, new, told)

    monkeypatch.setattr(folder_copy, "copy_file", last_one_waits)
    local_folder("memory://letters")
    assert noted and "c" not in noted


def test_photos_at_a_url_train_and_are_shown(
    memory: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PRW_SHARD_CACHE", str(tmp_path / "cache"))
    for i in range(6):
        picture = np.random.default_rng(i).integers(0, 255, (96, 96, 3), np.uint8)
        memory.pipe_file(f"/photos/{i}.png", encode(picture))
    words = ["data.samples=4", "stages.*.steps=1", "stages.*.batch_size=2", "optimizer.warmup=0",
             "remember=2", "adapter.rank=2"]  # fmt: skip
    told = [part for word in words for part in ("--set", word)]
    run = tmp_path / "run"
    assert main(["train", "photos", "--only", "inpaint", "--photos", "memory://photos",
                 "--no-evaluation", "--quiet", "--out", str(run), *told]) == 0  # fmt: skip
    folder = RunFolder.open(run)
    shown = photo_samples(folder, ["inpaint"], 2, 0)
    assert shown["inpaint"] and ", held out;" in shown.told
    memory.store.clear()
    assert photo_samples(folder, ["inpaint"], 2, 0) == {}


class Counting:
    """A method that remembers what it was asked for."""

    def __init__(self, method: Any) -> None:
        self.method, self.asked = method, list[str]()

    def __get__(self, owner: Any, kind: Any = None) -> Any:
        def asked(path: str, *args: Any, **how: Any) -> Any:
            self.asked.append(path)
            return self.method(owner, path, *args, **how)

        return asked


def test_a_data_set_at_a_url_is_inspected_and_checked(
    memory: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PRW_SHARD_CACHE", str(tmp_path / "cache"))
    url = upload(memory, make(tmp_path / "d", "edit", 10), "/bucket/d")
    assert read_manifest(url) == read_manifest(tmp_path / "d")
    assert sample_rows(url, 5) == sample_rows(tmp_path / "d", 5)
    assert check(url) == []
    monkeypatch.setattr(
        type(memory), "get_file", counting := Counting(type(memory).get_file)
    )  # fmt: skip
    assert check(url) == [] and counting.asked == []
    shard = bytearray(memory.cat_file("/bucket/d/data/train-00001.parquet"))
    shard[100] ^= 1
    memory.pipe_file("/bucket/d/data/train-00001.parquet", bytes(shard))
    memory.rm("/bucket/d/data/train-00002.parquet")
    missing, changed = check(url)
    assert missing == "data/train-00002.parquet is missing; run the same `data build` again"
    assert changed.startswith("data/train-00001.parquet has changed since it was built")


def test_a_data_set_trains_from_a_url(memory: Any, tmp_path: Path) -> None:
    local = make(tmp_path / "d", "edit", 22)  # shards of four rows
    url = upload(memory, local, "/bucket/d")
    data = OnDisk(url, 48, cache=tmp_path / "cache")
    assert len(data) == 21
    drawn = [data.example("edit", i) for i in range(42)]
    assert sorted(one.key for one in drawn[:21]) == sorted(f"d:k{i}" for i in range(21))
    assert sorted(one.key for one in drawn[21:]) == sorted(f"d:k{i}#1" for i in range(21))
    shards = [int(one.key[3:]) // 4 for one in drawn[:13]]
    assert len(set(shards)) <= 4  # a window holds at least 3 * 4 + 1 rows
    same = OnDisk(str(local), 48, cache=tmp_path / "arrow")
    by_key = {same.example("edit", i).key: same.example("edit", i) for i in range(21)}
    for one in drawn[:21]:
        np.testing.assert_array_equal(one.image, by_key[one.key].image)
        assert one.caption == by_key[one.key].caption
    assert data.fingerprint() != same.fingerprint()  # another order
    assert OnDisk(url, 48, cache=tmp_path / "cache").fingerprint() == data.fingerprint()
    held = OnDisk(url, 48, split="heldout", cache=tmp_path / "cache")
    assert [held.example("edit", 0).key] == ["d:k21"]


def test_the_next_shards_are_fetched_before_they_are_needed(
    memory: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = upload(memory, make(tmp_path / "d", "edit", 41), "/bucket/d")  # ten shards
    data = OnDisk(url, 48, cache=tmp_path / "cache")
    (opened,) = data._of["edit"]
    waited: list[int] = []
    real = opened.rows._mapped  # type: ignore[attr-defined]

    def mapped(shard: int) -> Any:
        entry = opened.rows._shards[shard]  # type: ignore[attr-defined]
        waited.append(not (tmp_path / "cache" / entry["sha256"]).is_file())
        return real(shard)

    monkeypatch.setattr(opened.rows, "_mapped", mapped)
    keys = {data.example("edit", i).key for i in range(40)}
    assert len(keys) == 40 and len(waited) == 10
    assert sum(waited[4:]) == 0  # only the first window has nobody to wait for it


def test_the_order_of_a_url_does_not_depend_on_the_cache(
    memory: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = make(tmp_path / "d", "edit", 22)
    url = upload(memory, local, "/bucket/d")
    largest = max(path.stat().st_size for path in (local / "data").iterdir())
    keys = []
    for number, gib in enumerate((20.0, 2.5 * largest / 2**30)):
        monkeypatch.setenv("PRW_SHARD_CACHE_GIB", str(gib))
        data = OnDisk(url, 48, cache=tmp_path / str(number))
        keys.append([data.example("edit", i).key for i in range(30)])
        held = [f.stat().st_size for f in (tmp_path / str(number)).iterdir()]
        assert sum(held) <= gib * 2**30
    assert keys[0] == keys[1]


def test_truncated_and_missing_shards_are_named(memory: Any, tmp_path: Path) -> None:
    local = make(tmp_path / "d", "edit", 6)
    shard = local / "data" / "train-00001.parquet"
    url = upload(memory, local, "/bucket/d")
    memory.pipe_file("/bucket/d/data/train-00001.parquet", shard.read_bytes()[:-200])
    data = OnDisk(url, 48, split="all", cache=tmp_path / "cache")
    with pytest.raises(DataError, match="train-00001.parquet is truncated or has changed"):
        for i in range(6):
            data.example("edit", i)
    shard.write_bytes(shard.read_bytes()[:-200])
    with pytest.raises(DataError, match="train-00001.parquet has .* bytes, not the .* truncated"):
        OnDisk(str(local), 48, cache=tmp_path / "arrow")
    memory.rm("/bucket/d/build.json")
    with pytest.raises(DataError, match="there is no memory:///bucket/d/build.json"):
        OnDisk(url, 48, cache=tmp_path / "cache")
    whole = make(tmp_path / "e", "edit", 6) / "data" / "train-00001.parquet"
    data_of = bytearray(whole.read_bytes())
    data_of[-2000:-8] = bytes(1992)
    whole.write_bytes(data_of)
    with pytest.raises(DataError, match="e cannot be read .*see `prw-flux data check`"):
        OnDisk(str(tmp_path / "e"), 48, cache=tmp_path / "arrow")


def test_mixtures_may_be_of_both_kinds(memory: Any, tmp_path: Path) -> None:
    url = upload(memory, make(tmp_path / "a", "edit", 6), "/bucket/a")
    local = make(tmp_path / "b", "edit", 6)
    data = OnDisk(f"{url}*3,{local}*1", 48, cache=tmp_path / "cache")
    keys = [data.example("edit", i).key for i in range(8)]
    assert sum(key.startswith("a:") for key in keys) == 6
