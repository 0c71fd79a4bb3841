"""Data in S3's own protocol: builds, looks and training from a bucket, and a network that fails.

The server is moto's; between it and s3fs stands a proxy that can drop connections or say no. It
runs where both packages are installed: ``pip install "moto[server]" s3fs``.
"""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flux.test_build import pair_folder
from flux.test_on_disk import make
from flux.test_tar_rows import captioned, write_tar

from prw_flux.cli import main
from prw_flux.data.folder_copy import local_folder
from prw_flux.data.on_disk import OnDisk
from prw_flux.data.rows import DataError
from prw_flux.data.shard_cache import ShardCache

pytest.importorskip("s3fs", reason="S3 needs s3fs")
moto_server = pytest.importorskip("moto.server", reason="a server for S3 needs moto[server]")
pytestmark = pytest.mark.slow

DENIED = b"""<?xml version="1.0" encoding="UTF-8"?><Error><Code>SignatureDoesNotMatch</Code>
<Message>The request signature does not match.</Message></Error>"""


class Faults(ThreadingHTTPServer):
    """A proxy that counts what is read, drops connections in the middle, or refuses everybody."""

    daemon_threads = True

    def __init__(self, behind: int) -> None:
        super().__init__(("127.0.0.1", 0), Relay)
        self.behind = behind
        self.gets: list[str] = []
        self.drop = 0
        self.deny = False


class Relay(BaseHTTPRequestHandler):
    """One connection of the proxy."""

    protocol_version = "HTTP/1.1"
    server: Faults

    def log_message(self, *args: Any) -> None:
        """Nothing is printed."""

    def relay(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.server.deny:
            self.answer(403, {"Content-Type": "application/xml"}, DENIED)
            return
        behind = http.client.HTTPConnection("127.0.0.1", self.server.behind)
        behind.request(self.command, self.path, body, dict(self.headers))
        reply = behind.getresponse()
        data = reply.read()
        headers = {
            name: value
            for name, value in reply.getheaders()
            if name.lower() not in ("content-length", "transfer-encoding", "connection")
        }
        if self.command == "HEAD":
            headers["Content-Length"] = reply.getheader("Content-Length", "0")
        content = self.command == "GET" and "list-type" not in self.path
        if content:
            self.server.gets.append(self.path.split("?")[0])
        if content and self.server.drop and len(data) > 1000:
            self.server.drop -= 1
            self.answer(reply.status, headers, data, whole=False)
        else:
            self.answer(reply.status, headers, data)
        behind.close()

    def answer(
        self, status: int, headers: dict[str, str], data: bytes, *, whole: bool = True
    ) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if self.command != "HEAD":
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data if whole else data[:100])
        self.close_connection = self.close_connection or not whole

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = relay


@pytest.fixture(scope="module")
def server() -> Iterator[Faults]:
    moto = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    proxy = Faults(moto.get_host_and_port()[1])
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    yield proxy
    proxy.shutdown()
    proxy.server_close()
    moto.stop()


@pytest.fixture
def bucket(server: Faults, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """An empty bucket, reached as a user would say it: by the environment."""
    import s3fs

    for name, value in {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_address[1]}",
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "PRW_SHARD_CACHE": str(tmp_path / "cache"),
    }.items():
        monkeypatch.setenv(name, value)
    server.drop, server.deny = 0, False
    s3fs.S3FileSystem.clear_instance_cache()
    fs = s3fs.S3FileSystem(skip_instance_cache=True, use_listings_cache=False)
    if fs.exists("bucket"):
        fs.rm("bucket", recursive=True)
    fs.mkdir("bucket")
    server.gets.clear()
    return fs


def command(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    """What a command answers as JSON."""
    assert main([*words, "--json"]) == 0, capsys.readouterr().err
    answer: dict[str, Any] = json.loads(capsys.readouterr().out)
    return answer


def test_shards_are_built_looked_at_and_checked(
    bucket: Any, server: Faults, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for shard in range(2):
        write_tar(tmp_path / "tars" / f"{shard}.tar", captioned(3, 3 * shard))
    bucket.put(str(tmp_path / "tars"), "bucket/tars", recursive=True)
    build = ["data", "build", "inpaint", "--shard-rows", "2", "--from", "webdataset"]
    there = command(capsys, *build, "s3://bucket/tars/{0..1}.tar", "--out", str(tmp_path / "a"))
    here = command(capsys, *build, f"{tmp_path}/tars/{{0..1}}.tar", "--out", str(tmp_path / "b"))
    assert there["shards"] == here["shards"] and there["kept"] == 6
    bucket.put(str(tmp_path / "a"), "bucket/built", recursive=True)
    rows = ["data", "build", "inpaint", "--map", "target=target", "--map", "text=text"]
    again = command(capsys, *rows, "--from", "parquet", "s3://bucket/built/data",
                    "--out", str(tmp_path / "c"))  # fmt: skip
    assert again["kept"] == 6
    sheet = tmp_path / "sheet.png"
    seen = command(capsys, "data", "inspect", "s3://bucket/built", "--out", str(sheet))
    assert seen["shards"] == there["shards"] and sheet.stat().st_size > 1000
    assert command(capsys, "data", "check", "s3://bucket/built") == {"rows": 6, "problems": []}
    server.gets.clear()
    assert command(capsys, "data", "check", "s3://bucket/built")["problems"] == []
    assert [path for path in server.gets if path.endswith(".parquet")] == []  # known by their tags
    shard = bytearray(bucket.cat_file("bucket/built/data/train-00001.parquet"))
    shard[100] ^= 1
    bucket.pipe_file("bucket/built/data/train-00001.parquet", bytes(shard))
    bucket.rm("bucket/built/data/train-00002.parquet")
    assert main(["data", "check", "s3://bucket/built"]) == 1
    told = capsys.readouterr().out
    assert "train-00001.parquet has changed since it was built" in told
    assert "train-00002.parquet is missing" in told
    assert main([*rows, "--from", "in.parquet", "--out", "s3://bucket/out"]) == 1
    assert "built in a local folder, not at s3://bucket/out" in capsys.readouterr().err


def test_a_folder_of_pictures_is_copied_once_and_follows_its_original(
    bucket: Any, server: Faults, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pair_folder(tmp_path / "in", 3)
    bucket.put(str(tmp_path / "in"), "bucket/pairs", recursive=True)
    build = ["data", "build", "edit", "--from", "pairs", "s3://bucket/pairs", "--out"]
    first = command(capsys, *build, str(tmp_path / "a"))
    here = command(capsys, "data", "build", "edit", "--from", "pairs", str(tmp_path / "in"),
                   "--out", str(tmp_path / "b"))  # fmt: skip
    assert first["shards"] == here["shards"] and len(server.gets) == 7
    server.gets.clear()
    bucket.pipe_file("bucket/pairs/before/1.png", bucket.cat_file("bucket/pairs/before/0.png"))
    bucket.rm("bucket/pairs/after/2.png")
    server.gets.clear()
    folder = local_folder("s3://bucket/pairs")
    assert server.gets == ["/bucket/pairs/before/1.png"]
    assert (folder / "before/1.png").read_bytes() == (folder / "before/0.png").read_bytes()
    assert not (folder / "after/2.png").exists() and (folder / "after/1.png").is_file()
    assert local_folder("s3://bucket/pairs/edits.json").read_bytes().startswith(b"[")
    bucket.pipe_file("bucket/bad/../x.png", b"x" * 10)
    with pytest.raises(DataError, match="leads out of the folder"):
        local_folder("s3://bucket/bad")


def test_training_reads_a_bucket_through_a_cache_that_keeps_its_limit(
    bucket: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = make(tmp_path / "d", "edit", 33)  # shards of four rows
    bucket.put(str(local), "bucket/d", recursive=True)
    largest = max(path.stat().st_size for path in (local / "data").iterdir())
    limit = 2.5 * largest
    monkeypatch.setenv("PRW_SHARD_CACHE_GIB", str(limit / 2**30))
    data = OnDisk("s3://bucket/d", 48)
    same = OnDisk(str(local), 48, cache=tmp_path / "arrow")
    by_key = {same.example("edit", i).key: same.example("edit", i) for i in range(len(same))}
    seen = []
    for index in range(len(data)):
        example = data.example("edit", index)
        seen.append(example.key)
        np.testing.assert_array_equal(example.image, by_key[example.key].image)
        held = [path for path in (tmp_path / "cache").iterdir() if len(path.name) == 64]
        assert sum(path.stat().st_size for path in held) <= limit
    assert len(set(seen)) == len(data) == 32
    with pytest.raises(DataError, match="more than the cache may hold"):
        ShardCache(tmp_path / "small", 100).local("s3://bucket/d/data/train-00000.parquet")
    with pytest.raises(DataError, match="of files, more than the cache may hold.*pack them"):
        monkeypatch.setenv("PRW_SHARD_CACHE_GIB", "0.000001")
        local_folder("s3://bucket/d")


def test_dropped_connections_are_tried_again(
    bucket: Any,
    server: Faults,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("prw_flux.data.shard_cache.PAUSE", 0.01)
    content = np.random.default_rng(0).bytes(200_000)
    bucket.pipe_file("bucket/a.tar", content)
    server.drop = 2
    assert ShardCache().local("s3://bucket/a.tar").read_bytes() == content
    server.drop = 10**6
    bucket.pipe_file("bucket/b.tar", content)
    with pytest.raises(DataError, match=r"s3://bucket/b.tar cannot be read \(") as told:
        ShardCache().local("s3://bucket/b.tar")
    assert "\n" not in str(told.value)
    assert not [path for path in (tmp_path / "cache").iterdir() if path.suffix == ".raw"]
    make(tmp_path / "d", "edit", 6)
    bucket.put(str(tmp_path / "d"), "bucket/d", recursive=True)
    for words in (
        ["data", "build", "edit", "--from", "parquet", "s3://bucket/d/data", "--map",
         "source=source", "--map", "target=target", "--map", "text=text", "--out", "nowhere"],
        ["data", "check", "s3://bucket/d"],
        ["data", "inspect", "s3://bucket/d", "--out", "nowhere"],
        ["data", "--source", "disk:s3://bucket/d", "--task", "edit"],
    ):  # fmt: skip
        assert main(words) == 1
        told_to_user = capsys.readouterr().err
        assert "s3://bucket/d/" in told_to_user and "--debug" not in told_to_user
        assert told_to_user.count("prw-flux:") == 1
    assert not Path("nowhere").exists()


@pytest.mark.parametrize(
    ("url", "deny", "message"),
    [
        ("s3://bucket/none/*.tar", False, "there are no .tar files at s3://bucket/none/*.tar"),
        ("s3://elsewhere/shards", False, "there is no s3://elsewhere/shards"),
        ("s3://bucket/shards", True, "s3://bucket/shards may not be read"),
    ],
)
def test_what_is_not_there_or_not_allowed_is_one_sentence(
    bucket: Any, server: Faults, capsys: pytest.CaptureFixture[str], url: str, deny: bool,
    message: str,
) -> None:  # fmt: skip
    server.deny = deny
    for kind in ("webdataset", "pairs"):
        words = ["data", "build", "edit", "--from", kind, url, "--out", "nowhere"]
        assert main(words) == 1
        told = capsys.readouterr().err
        assert told.count("\n") == 1 and url in told
        assert message in told or kind == "pairs"
    assert not Path("nowhere").exists()
    if deny:
        assert main(["data", "--source", "disk:s3://bucket/built"]) == 1
        assert "s3://bucket/built/build.json may not be read" in capsys.readouterr().err
