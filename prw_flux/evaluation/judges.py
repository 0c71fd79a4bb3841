"""Judges for `metrics.judge`: an OpenAI-compatible endpoint, recorded answers, and a recorder."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import time
import urllib.request
from http.client import HTTPException, HTTPResponse, IncompleteRead
from pathlib import Path
from typing import Any, Final, final

import numpy as np
from PIL import Image as PILImage

from prw import PRWError
from prw_flux.evaluation.metrics.judge import Judge, Question, read_scores
from prw_flux.rundir import write_atomically
from prw_flux.tasks.base import Image

CHUNK: Final = 65536


class RecordError(PRWError):
    """An answer came and cannot be kept; not the judge's fault, so it is not asked again."""


@final
class EndpointJudge:
    """Any server that answers POST {url}/chat/completions with pictures as data URLs.

    Args:
        url: up to and without "/chat/completions", e.g. http://localhost:8000/v1.
        model: its name there; part of every score's protocol.
        key_variable: environment variable with the key; None sends none.
        timeout: seconds for one answer, all of it.
        max_tokens: of one answer.

    Raises:
        ValueError: the URL is not http(s), or the variable is not set.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        key_variable: str | None = None,
        timeout: float = 120.0,
        max_tokens: int = 1400,
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"a judge's url starts with http:// or https://, got {url!r}")
        if key_variable is not None and not os.environ.get(key_variable):
            raise ValueError(f"the judge's key is to be in ${key_variable}, which is not set")
        self._url = url.rstrip("/") + "/chat/completions"
        self._model, self._timeout, self._max_tokens = model, timeout, max_tokens
        self._headers = {"Content-Type": "application/json"}
        if key_variable is not None:
            self._headers["Authorization"] = f"Bearer {os.environ[key_variable]}"

    def __call__(self, question: Question) -> str:
        """The text of the first choice.

        Raises:
            OSError: no answer came in time, or an error status.
            ValueError: the reply is no chat completion.
        """
        content: list[dict[str, Any]] = [{"type": "text", "text": question.text}]
        content += [
            {"type": "image_url", "image_url": {"url": _data_url(image)}}
            for image in question.images
        ]
        body = {
            "model": self._model,
            "max_tokens": self._max_tokens,
            "messages": [{"role": "user", "content": content}],
        }
        request = urllib.request.Request(
            self._url, data=json.dumps(body).encode(), headers=self._headers, method="POST"
        )
        until = time.monotonic() + self._timeout
        try:
            with urllib.request.urlopen(request, timeout=self._timeout) as reply:
                text = _read(reply, until).decode("utf-8", errors="replace")
        except HTTPException as problem:  # a reply cut short
            raise OSError(f"{type(problem).__name__}: {problem}") from None
        try:
            return str(json.loads(text)["choices"][0]["message"]["content"])
        except (ValueError, KeyError, IndexError, TypeError):
            raise ValueError(f"no chat completion: {text[:60]!r}") from None


@final
class RecordedJudge:
    """Answers from a file of lines {"key": ..., "part": "SC" or "PQ", "answer": ...}.

    Of several answers to one question the last counts: the judge was asked again because the one
    before was unusable.

    Raises:
        ValueError: there is no such file, or a line is not of this form; the line is named.
    """

    def __init__(self, path: str | Path) -> None:
        self._answers: dict[tuple[str, str], str] = {}
        try:
            text = Path(path).read_text("utf-8")
        except (OSError, UnicodeDecodeError) as problem:
            told = problem.strerror if isinstance(problem, OSError) else "no text in UTF-8"
            raise ValueError(f"{path}, the recorded answers, cannot be read: {told}") from None
        for number, line in enumerate(text.splitlines(), start=1):
            try:
                row = json.loads(line)
                self._answers[str(row["key"]), str(row["part"])] = str(row["answer"])
            except (ValueError, KeyError, TypeError):
                raise ValueError(f"{path}, line {number}: no recorded answer") from None

    def __call__(self, question: Question) -> str:
        """The recorded text.

        Raises:
            ValueError: this question was not recorded.
        """
        try:
            return self._answers[question.key, question.part]
        except KeyError:
            raise ValueError("no answer was recorded") from None


@final
class Recorder:
    """Passes questions on and appends every answer to a file that `RecordedJudge` reads.

    What the file holds already is not asked again: the same question about the same pixels, where
    its last answer has scores in it. So a grading that was killed goes on where it was.

    Args:
        judge: the one that answers.
        path: the file; lines are added as answers come. A line that a crash cut off is left out.
    """

    def __init__(self, judge: Judge, path: str | Path) -> None:
        self._judge, self._path = judge, Path(path)
        self._known = _recorded(self._path)

    def __call__(self, question: Question) -> str:
        """The judge's answer, recorded.

        Raises:
            RecordError: the file does not take it.
        """
        digest = question_digest(question)
        if digest in self._known:
            return self._known[digest]
        answer = self._judge(question)
        row = {"key": question.key, "part": question.part, "answer": answer, "digest": digest}
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as problem:
            raise RecordError(
                f"{self._path} cannot be written ({problem.strerror or problem}): the answers "
                "before are kept, and the same command goes on."
            ) from problem
        return answer


def _read(reply: HTTPResponse, until: float) -> bytes:
    """The whole body; a socket's own timeout never ends one that comes drop by drop.

    Raises:
        TimeoutError: it is not there at the monotonic time `until`.
        IncompleteRead: the connection was closed before its end.
    """
    parts, missing = [], reply.length
    while part := reply.read1(CHUNK):
        parts.append(part)
        if time.monotonic() > until:
            raise TimeoutError("timed out in the middle of an answer")
    found = b"".join(parts)
    if missing is not None and len(found) < missing:
        raise IncompleteRead(found, missing - len(found))
    return found


def question_digest(question: Question) -> str:
    """Of the words and the pixels."""
    found = hashlib.sha256(f"{question.key}\0{question.part}\0{question.text}".encode())
    for image in question.images:
        found.update(f"{image.shape}".encode() + np.ascontiguousarray(image).tobytes())
    return found.hexdigest()


def _recorded(path: Path) -> dict[str, str]:
    """Answers with scores in a recorder's file, by the digest of the question."""
    if not path.is_file():
        return {}
    text = path.read_text("utf-8")
    if text and not text.endswith("\n"):  # a line that a crash cut off
        write_atomically(path, text[: text.rfind("\n") + 1])
    known: dict[str, str] = {}
    for line in text.splitlines():
        try:
            row = json.loads(line)
            digest, answer = str(row["digest"]), str(row["answer"])
            read_scores(answer)
        except (ValueError, KeyError, TypeError):
            continue
        known[digest] = answer
    return known


def _data_url(image: Image) -> str:
    buffer = io.BytesIO()
    PILImage.fromarray(image).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
