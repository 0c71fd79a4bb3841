"""A server that answers as the Hub does for one data set in a folder: tree, paths, files.

``serve(folder)`` runs it in a thread; HF_ENDPOINT then names it.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0" * 39 + "1"


class Hub(ThreadingHTTPServer):
    """The data set `owner/name` in a folder; remembers what it was asked for."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.folder = folder
        self.asked: list[str] = []


class Answer(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *args: Any) -> None:
        """Nothing is printed."""

    def reply(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        self.server.asked.append(f"{self.command} {path}")
        root, api = self.server.folder, "/api/datasets/owner/name"
        if path in (api, f"{api}/revision/main"):
            self.json({"id": "owner/name", "sha": COMMIT, "siblings": [], "private": False})
        elif path.startswith(f"{api}/tree/"):
            below = path.removeprefix(f"{api}/tree/").partition("/")[2]
            deep = "recursive" in self.path and "recursive=False" not in self.path
            found = (root / below).rglob("*") if deep else (root / below).glob("*")
            self.json([self.entry(one) for one in sorted(found)])
        elif path.startswith(f"{api}/paths-info/"):
            text = body.decode()
            kind = self.headers.get("Content-Type", "")
            names = json.loads(text)["paths"] if "json" in kind else parse_qs(text)["paths"]
            names = [names] if isinstance(names, str) else names
            self.json([self.entry(root / one) for one in names if (root / one).exists()])
        elif path.startswith("/datasets/owner/name/resolve/"):
            self.file(root / path.removeprefix("/datasets/owner/name/resolve/").partition("/")[2])
        else:
            self.json({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})

    def entry(self, path: Path) -> dict[str, Any]:
        name = path.relative_to(self.server.folder).as_posix()
        if path.is_dir():
            return {"type": "directory", "oid": digest(name.encode()), "size": 0, "path": name}
        content = path.read_bytes()
        return {"type": "file", "oid": digest(content), "size": len(content), "path": name}

    def file(self, path: Path) -> None:
        if not path.is_file():
            self.json({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})
            return
        content, status = path.read_bytes(), 200
        headers = {
            "ETag": f'"{digest(content)}"',
            "X-Repo-Commit": COMMIT,
            "Accept-Ranges": "bytes",
        }
        wanted = self.headers.get("Range")
        if wanted and self.command == "GET":
            low, _, high = wanted.removeprefix("bytes=").partition("-")
            size, end = len(content), int(high or len(content) - 1)
            content, status = content[int(low) : end + 1], 206
            headers["Content-Range"] = f"bytes {low}-{int(low) + len(content) - 1}/{size}"
        self.send(content, status, headers)

    def json(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        kind = {"Content-Type": "application/json"}
        self.send(json.dumps(value).encode(), status, kind | (headers or {}))

    def send(self, content: bytes, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_HEAD = do_POST = reply


def digest(content: bytes) -> str:
    """40 hexadecimal digits."""
    return hashlib.sha1(content, usedforsecurity=False).hexdigest()


@contextmanager
def serve(folder: Path) -> Iterator[Hub]:
    """The server, while the block runs."""
    server = Hub(folder)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()
