"""GEdit-Bench through the command, against a server that answers, babbles, hangs and breaks."""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from prw_flux.cli import main
from prw_flux.evaluation.benchmarks import BenchmarkError, GEdit
from prw_flux.evaluation.published import compare, load

GOOD = '{"score": [8, 6], "reasoning": "fine"}'


def save(path: Path, grey: int, side: int = 48) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((side, side, 3), grey, np.uint8)).save(path)


@pytest.fixture
def places(tmp_path: Path) -> tuple[Path, Path]:
    """Four edits in two groups, one of them Chinese, and a picture for each."""
    data, results = tmp_path / "data", tmp_path / "gen"
    rows = [("a", "colour", "en", True), ("b", "colour", "en", False),
            ("c", "style", "en", True), ("a", "colour", "cn", True)]  # fmt: skip
    items = []
    for number, (key, group, language, shared) in enumerate(rows):
        save(data / f"{number}.png", 40 * number)
        save(results / f"fullset/{group}/{language}/{key}.png", 40 * number + 9, side=96)
        row = {"key": key, "task_type": group, "language": language, "intersection": shared}
        row |= {"instruction": f"edit {key} {language}", "image": f"{number}.png"}
        items.append(row)
    (data / "gedit.json").write_text(json.dumps({"version": 1, "items": items}))
    return data, results


class Server(ThreadingHTTPServer):
    """Answers questions by the words in them; counts them."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[str] = []
        self.trouble: dict[str, str] = {}
        self.sizes: list[int] = []


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text, *pictures = body["messages"][0]["content"]
        self.server.asked.append(text["text"])
        self.server.sizes.append(len(pictures))
        kind = next((k for word, k in self.server.trouble.items() if word in text["text"]), "")
        answer = "I would rather not say." if kind == "babble" else GOOD
        if kind == "once" and self.server.asked.count(text["text"]) == 1:
            answer = "hm"
        if kind == "hang":
            time.sleep(1.0)
        self.send_response(500 if kind == "break" else 200)
        self.end_headers()
        try:
            reply = {"choices": [{"message": {"content": answer}}]}
            self.wfile.write(json.dumps(reply).encode())
        except BrokenPipeError:
            pass

    def log_message(self, *_: object) -> None:
        """Silent."""


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    threading.Thread(target=made.serve_forever, daemon=True).start()
    yield made
    made.shutdown()
    made.server_close()


def told(
    capsys: pytest.CaptureFixture[str], places: tuple[Path, Path], *more: str
) -> tuple[int, str, str]:
    data, results = places
    status = main(["evaluate", "--bench", "gedit", "--data", str(data), "--results", str(results),
                   "--judge-pause", "0", *more])  # fmt: skip
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def judge(server: Server) -> list[str]:
    url = f"http://127.0.0.1:{server.server_port}/v1"
    return ["--judge", url, "--judge-model", "m", "--judge-timeout", "0.3"]


def test_grades_are_means_of_groups_and_answers_are_kept(
    places: tuple[Path, Path], server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, err = told(capsys, places, *judge(server), "--json")
    assert status == 0, err
    answer = json.loads(out)
    lines = {line["label"]: line for line in answer["lines"]}
    assert set(lines) == {"en, full set", "en, intersection set", "cn, full set",
                          "cn, intersection set"}  # fmt: skip
    assert lines["en, full set"]["n"] == 3 and lines["en, intersection set"]["n"] == 2
    assert lines["en, full set"]["metrics"] == {"G_SC": 6.0, "G_PQ": 6.0, "G_O": 6.0}
    assert len(server.asked) == 8 and sorted(set(server.sizes)) == [1, 2]
    # what is recorded is not asked again, and can be replayed without any judge
    again = told(capsys, places, *judge(server), "--json")
    assert again[0] == 0 and len(server.asked) == 8
    kept = places[1] / "answers.jsonl"
    rows = [json.loads(line) for line in kept.read_text().splitlines()]
    rows[0]["answer"] = '{"score": [4, 9]}'  # SC of a: 4; its O: sqrt(4 * 6)
    kept.write_text("".join(json.dumps(row) + "\n" for row in rows))
    status, out, _ = told(capsys, places, "--answers", str(kept), "--language", "en", "--json")
    found = json.loads(out)["lines"][0]["metrics"]
    assert found["G_SC"] == pytest.approx(((4 + 6) / 2 + 6) / 2)
    assert found["G_O"] == pytest.approx(((math.sqrt(24) + 6) / 2 + 6) / 2)
    # another picture is another question
    save(places[1] / "fullset/style/en/c.png", 200)
    told(capsys, places, *judge(server))
    assert len(server.asked) == 10


def test_a_grading_that_was_killed_goes_on(
    places: tuple[Path, Path], server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    told(capsys, places, *judge(server))
    kept = places[1] / "answers.jsonl"
    lines = kept.read_text().splitlines(keepends=True)
    kept.write_text("".join(lines[:3]) + lines[3][:20])  # the crash cut the fourth off
    status, _, err = told(capsys, places, *judge(server))
    assert status == 0, err
    assert len(server.asked) == 8 + 5
    assert len([json.loads(line) for line in kept.read_text().splitlines()]) == 8


@pytest.mark.parametrize(
    ("trouble", "said", "asked"),
    [("babble", "no score in the answer", 3), ("break", "500", 3), ("hang", "timed out", 3)],
)
def test_a_judge_that_fails_is_counted_and_the_others_are_graded(
    places: tuple[Path, Path], server: Server, capsys: pytest.CaptureFixture[str], trouble: str,
    said: str, asked: int,
) -> None:  # fmt: skip
    server.trouble = {"edit b en": trouble}
    status, out, err = told(capsys, places, *judge(server), "--json")
    assert status == 1 and said in err and err.count("\n") == 1
    assert "1 problem among 4 pictures" in err and "fullset/colour/en/b.png" in err
    answer = json.loads(out)
    assert len(answer["items"]) == 3 and answer["notes"][-1] == "the judge was asked again 2 times"
    assert sum("edit b en" in text for text in server.asked) == asked
    assert next(line for line in answer["lines"])["protocol"]["items"] == "2 of 3"


def test_an_answer_that_comes_the_second_time_counts(
    places: tuple[Path, Path], server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    server.trouble = {"edit b en": "once"}
    status, out, _ = told(capsys, places, *judge(server), "--json")
    assert status == 0 and len(json.loads(out)["items"]) == 4
    assert "asked again 1 times" in json.loads(out)["notes"][-1]


def test_a_judge_that_is_gone_ends_the_grading_and_what_was_graded_is_kept(
    places: tuple[Path, Path], server: Server, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("prw_flux.evaluation.benchmarks.gedit.GIVE_UP", 2)
    server.trouble = {"edit b": "break", "edit c": "break"}
    status, _, err = told(capsys, places, *judge(server), "--judge-tries", "1")
    assert status == 1 and "nor for the 1 items before it" in err and err.count("\n") == 1
    assert len(json.loads((places[1] / "scores.json").read_text())["items"]) == 1


def test_mistakes_are_one_sentence(
    places: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = tmp_path / "questions.json"
    bad.write_text('{"SC": "a"}')
    url = ["--judge", "http://127.0.0.1:9", "--judge-model", "m"]
    for words, said in (
        ([], "gedit needs --judge URL"),
        (["--judge", "http://127.0.0.1:9"], "needs --judge-model"),
        (["--judge", "ftp://x", "--judge-model", "m"], "starts with http"),
        ([*url, "--judge-key", "PRW_NO_SUCH_KEY"], "which is not set"),
        ([*url, "--judge-tries", "0"], "--judge-tries must be at least 1"),
        ([*url, "--questions", str(bad)], "needs name, SC and PQ"),
        (["--answers", str(tmp_path / "gone.jsonl")], "gone.jsonl"),
        ([*url, "--judge-tries", "1"], "the judge gave no usable answer"),
    ):
        status, _, err = told(capsys, places, *words)
        assert status == 1 and said in err and err.count("\n") == 1, (words, err)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"language": "fr"}, "the language is en or cn, got 'fr'"),
        ({"key": "../x"}, "leaves the folder"),
        ({"instruction": None}, "has no instruction"),
        ({"image": None, "key": None}, "needs key, task_type"),
    ],
)
def test_bad_files(places: tuple[Path, Path], change: dict[str, Any], said: str) -> None:
    data, _ = places
    index = json.loads((data / "gedit.json").read_text())
    for name, value in change.items():
        if value is None and name != "instruction":
            del index["items"][0][name]
        else:
            index["items"][0][name] = value or ""
    (data / "gedit.json").write_text(json.dumps(index))
    with pytest.raises(BenchmarkError, match=said):
        GEdit(data).asks()


def test_generation_lays_the_source_beside(places: tuple[Path, Path]) -> None:
    bench = GEdit(places[0], language="en")
    ask = bench.asks()[1]
    assert (ask.output, ask.prompt, ask.task) == ("fullset/colour/en/b.png", "edit b en", "edit")
    source = bench.source(ask)
    beside = bench.beside(ask, source, source)
    assert list(beside) == ["fullset/colour/en/b_SRCIMG.png"] and set(beside) <= bench.allowed


def test_our_questions_are_not_the_papers(tmp_path: Path) -> None:
    ours = {"bench": "gedit", "set": "full", "items": "all", "language": "en", "judge": "m"}
    table, scores = load("gedit"), {"G_SC": 7.0, "G_PQ": 7.0, "G_O": 7.0}
    own = compare(table, "mine", scores, {**ours, "questions": "prw-questions"})
    assert own.rows[-1] == ("mine", "refused", "refused", "refused")
    theirs = compare(table, "mine", scores, {**ours, "questions": "viescore"})
    assert theirs.rows[-1] == ("mine", "7.00", "7.00", "7.00")
    part = compare(table, "mine", scores, {**ours, "questions": "viescore", "set": "intersection"})
    assert "refused" in part.rows[-1]
