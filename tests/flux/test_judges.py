from __future__ import annotations

import base64
import io
import json
import math
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from prw_flux.evaluation.judges import EndpointJudge, RecordedJudge, Recorder, RecordError
from prw_flux.evaluation.metrics import EditItem, Grading, Question, read_scores

BLACK, WHITE = np.zeros((32, 48, 3), np.uint8), np.full((32, 48, 3), 255, np.uint8)


def item(key: str, group: str = "colour") -> EditItem:
    return EditItem(key=key, group=group, instruction="make it red", source=BLACK, output=WHITE)


def fixed(scores: dict[tuple[str, str], list[float]]) -> object:
    return lambda q: json.dumps({"score": scores[q.key, q.part], "reasoning": ""})


def test_scores_by_hand() -> None:
    grading = Grading()
    judge = fixed({
        ("a", "SC"): [9, 4], ("a", "PQ"): [9, 9], ("b", "SC"): [8, 8], ("b", "PQ"): [2, 5],
        ("c", "SC"): [0, 10], ("c", "PQ"): [10, 10],
    })  # fmt: skip
    for one in (item("a"), item("b"), item("c", "style")):
        grading.add(one, judge)
    # groups: colour {(4, 9, 6), (8, 2, 4)}, style {(0, 10, 0)}
    assert grading.means() == {"G_SC": 3.0, "G_PQ": (5.5 + 10) / 2, "G_O": 2.5}
    assert grading.means()["G_O"] != math.sqrt(3.0 * 7.75)
    assert not grading.failed and not grading.retried
    with pytest.raises(ValueError, match="a: graded before"):
        grading.add(item("a"), judge)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("I would say 7 out of 10.", "no score in the answer"),
        ('{"score": [7]}', "two numbers"),
        ('{"score": [7, 11]}', "two numbers"),
        ('{"score": [true, 3]}', "two numbers"),
        ('{"score": "7, 8"}', "two numbers"),
        ('{"score": [7, NaN]}', "two numbers"),
        ('{"score": [], "reasoning": "[7, 8]"}', "two numbers"),
        ("[" * 5000, "no score"),
        ("a [7] and [1, 2, 3]", "no score"),
        ("[7, 11]", "two numbers"),
        ("", "no score"),
    ],
)
def test_nonsense_is_no_score(answer: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        read_scores(answer)


def test_scores_among_other_words() -> None:
    assert read_scores('Sure!\n```json\n{"score": [7, 8.5],\n "reasoning": "x"}\n```') == (7.0, 8.5)
    assert read_scores('{"score": [3, 4], "reasoning": "the {logo}\nis [0, 0]"}') == (3.0, 4.0)
    assert read_scores('{"reasoning": "a } brace", "score": [3, 4]}') == (3.0, 4.0)
    assert read_scores('{"answer": {"score": [3, 4]}}') == (3.0, 4.0)
    assert read_scores("Output: [6, 0]") == (6.0, 0.0)


def test_a_judge_is_asked_again_a_bounded_number_of_times_and_every_failure_is_kept() -> None:
    calls: list[tuple[str, str]] = []

    def moody(question: Question) -> str:
        calls.append((question.key, question.part))
        if question.key == "late":
            raise TimeoutError("timed out")
        if question.key == "shy" and len(calls) < 3:
            return "hm"
        return '{"score": [5, 5]}'

    grading = Grading()
    for key in ("shy", "late", "good"):
        grading.add(item(key), moody, tries=3)
    assert grading.failed == ["late SC: timed out", "late PQ: timed out"]
    assert grading.retried == 2 + 2 + 2
    assert set(grading.grades["colour"]) == {"shy", "good"}
    assert grading.means() == {"G_SC": 5.0, "G_PQ": 5.0, "G_O": 5.0}
    nothing = Grading()
    nothing.add(item("late"), moody, tries=1)
    with pytest.raises(ValueError, match="no item was graded; 2 questions failed"):
        nothing.means()


class Server(BaseHTTPRequestHandler):
    """Answers by what it is sent; keeps the requests."""

    seen: list[dict[str, object]] = []

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        Server.seen.append({"path": self.path, "auth": self.headers["Authorization"], **body})
        if body["model"] == "slow":
            time.sleep(0.5)
        reply = {"choices": [{"message": {"content": '{"score": [6, 7]}'}}]}
        if body["model"] == "odd":
            reply = {"error": "no"}
        if body["model"] == "gone":
            self.connection.close()
            return
        self.send_response(500 if body["model"] == "broken" else 200)
        if body["model"] == "cut":
            self.send_header("Content-Length", "9999")
        self.end_headers()
        for part in json.dumps(reply).encode() if body["model"] == "drops" else ():
            self.wfile.write(bytes([part]))
            time.sleep(0.02)
        if body["model"] != "drops":
            self.wfile.write(json.dumps(reply).encode())

    def log_message(self, *_: object) -> None:
        """Silent."""


@pytest.fixture
def url() -> Iterator[str]:
    Server.seen = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()


def test_an_endpoint_is_asked_with_pictures_and_its_answers_can_be_replayed(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("A_KEY", "k")
    judge = Recorder(EndpointJudge(url, "m", key_variable="A_KEY"), tmp_path / "answers.jsonl")
    grading, replayed = Grading(), Grading()
    grading.add(item("a"), judge)
    first, second = Server.seen
    assert first["path"] == "/v1/chat/completions" and first["auth"] == "Bearer k"
    text, source, output = first["messages"][0]["content"]
    assert "make it red" in text["text"]
    for part, expected in ((source, BLACK), (output, WHITE)):
        coded = part["image_url"]["url"].removeprefix("data:image/png;base64,")
        picture = Image.open(io.BytesIO(base64.b64decode(coded)))
        np.testing.assert_array_equal(np.asarray(picture), expected)
    assert len(second["messages"][0]["content"]) == 2
    assert grading.means()["G_SC"] == 6.0
    replayed.add(item("a"), RecordedJudge(tmp_path / "answers.jsonl"))
    assert replayed.means() == grading.means()
    replayed.add(item("b"), RecordedJudge(tmp_path / "answers.jsonl"), tries=1)
    assert replayed.failed == ["b SC: no answer was recorded", "b PQ: no answer was recorded"]


@pytest.mark.parametrize(
    ("model", "said", "timeout"),
    [("slow", "timed out", 0.1), ("drops", "timed out", 0.4), ("broken", "500", 20),
     ("odd", "no chat completion", 20), ("cut", "IncompleteRead", 20),
     ("gone", "closed connection", 20)],
)  # fmt: skip
def test_an_endpoint_that_fails_is_counted(url: str, model: str, said: str, timeout: float) -> None:
    grading = Grading()
    grading.add(item("a"), EndpointJudge(url, model, timeout=timeout), tries=2)
    assert len(grading.failed) == 2 and said in grading.failed[0]
    assert grading.retried == 2


def test_an_answer_that_cannot_be_kept_is_not_the_judges_fault(tmp_path: Path) -> None:
    asked: list[str] = []

    def judge(question: Question) -> str:
        asked.append(question.part)
        return '{"score": [1, 2]}'

    with pytest.raises(RecordError, match=r"/dev/full cannot be written \(No space left on device"):
        Grading().add(item("a"), Recorder(judge, "/dev/full"), tries=3)
    assert asked == ["SC"]


def test_bad_judges_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="starts with http"):
        EndpointJudge("localhost:8000", "m")
    with pytest.raises(ValueError, match="PRW_NO_SUCH_KEY, which is not set"):
        EndpointJudge("http://localhost", "m", key_variable="PRW_NO_SUCH_KEY")
    (tmp_path / "answers.jsonl").write_text('{"key": "a", "part": "SC", "answer": "x"}\n{}\n')
    with pytest.raises(ValueError, match="line 2: no recorded answer"):
        RecordedJudge(tmp_path / "answers.jsonl")
    with pytest.raises(ValueError, match=r"gone.jsonl, the recorded answers, cannot be read: No"):
        RecordedJudge(tmp_path / "gone.jsonl")
    (tmp_path / "odd.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="no text in UTF-8"):
        RecordedJudge(tmp_path / "odd.jsonl")
