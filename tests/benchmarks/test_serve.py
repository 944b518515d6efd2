"""The load generator from end to end, against a server of a few lines: what is sent, when, and what is told of the answers."""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from benchmarks.http_stream import Answer
from benchmarks.open_loop import Load
from benchmarks.serve import main
from benchmarks.service import Limits, attainment, figures_of
from benchmarks.traffic import Asked

SLOW = 0.05


class Handler(BaseHTTPRequestHandler):
    """Streams as many words as are asked for; a prompt that begins with 13 is refused."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Nothing."""

    def do_GET(self) -> None:
        """The list of models."""
        self._whole(200, {"data": [{"id": "some-model"}]})

    def do_POST(self) -> None:
        """A completion, with chunked events."""
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.seen.append((self.path, body, time.perf_counter()))  # type: ignore[attr-defined]
        if body.get("prompt", [0])[0] == 13:
            self._whole(503, {"error": "no"})
            return
        self.send_response(200)
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        for number in range(body["max_tokens"]):
            time.sleep(SLOW if number == 0 else 0)
            piece = {"text": "w"} if "prompt" in body else {"delta": {"content": "w"}}
            self._event({"choices": [piece]})
        self._event({"choices": [], "usage": {"completion_tokens": body["max_tokens"]}})
        self._chunk(b"data: [DONE]\n\n")
        self._chunk(b"")

    def _event(self, event: dict[str, Any]) -> None:
        self._chunk(b"data: " + json.dumps(event).encode() + b"\n\n")

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n" % len(data) + data + b"\r\n")

    def _whole(self, status: int, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def server() -> Iterator[ThreadingHTTPServer]:
    """On a port of its own; `seen` is what came."""
    serving = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    serving.seen = []  # type: ignore[attr-defined]
    serving.daemon_threads = True
    thread = threading.Thread(target=serving.serve_forever)
    thread.start()
    yield serving
    serving.shutdown()
    thread.join()
    serving.server_close()


def url_of(server: ThreadingHTTPServer) -> str:
    return f"http://127.0.0.1:{server.server_address[1]}"


def rows_of(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_requests_go_out_when_they_arrive_and_their_answers_are_told(
    server: ThreadingHTTPServer, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    trace = tmp_path / "trace.jsonl"
    wanted = [(0, 3), (200, 5), (400, 2)]
    trace.write_text(
        "\n".join(
            json.dumps({"timestamp": at, "input_length": 4, "output_length": count})
            for at, count in wanted
        )
    )
    saved = tmp_path / "result.json"
    words = ["--url", url_of(server), "--dataset", "trace", "--trace-file", str(trace)]
    words += ["--warm-up", "0", "--save-result", str(saved), "--goodput", "ttft:1"]
    assert main(words) == 0
    seen = server.seen  # type: ignore[attr-defined]
    assert [body["max_tokens"] for _, body, _ in seen] == [3, 5, 2]
    assert {body["model"] for _, body, _ in seen} == {"some-model"}
    gaps = [late - early for (_, _, early), (_, _, late) in itertools.pairwise(seen)]
    assert all(gap > 0.15 for gap in gaps)
    (row,) = rows_of(capsys)
    assert (row["requests"], row["failed"], row["attainment"]) == (3, 0, 0.0)
    assert row["ttft_ms"]["p50"] >= 1e3 * SLOW
    ((rate,),) = [json.loads(saved.read_text())]
    assert [len(answer["text_s"]) for answer in rate["answers"]] == [3, 5, 2]


def test_chat_rates_warm_up_and_further_fields(
    server: ThreadingHTTPServer, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--url", url_of(server), "--model", "m", "--endpoint", "chat", "--warm-up", "2"]
    words += ["--num-prompts", "6", "--request-rate", "50", "100", "--output-len", "2", "--quiet"]
    words += ["--extra-body", '{"top_k": 5}', "--max-concurrency", "1"]
    assert main(words) == 0
    seen = server.seen  # type: ignore[attr-defined]
    assert len(seen) == 2 + 2 * 6
    assert {path for path, _, _ in seen} == {"/v1/chat/completions"}
    assert all(body["top_k"] == 5 and body["messages"][0]["content"] for _, body, _ in seen)
    rows = rows_of(capsys)
    assert [row["rate"] for row in rows] == [50.0, 100.0]
    # one at a time: six answers cannot take less than six times the wait for their first word
    assert all(row["requests_s"] <= 1 / SLOW for row in rows)


def test_a_refused_request_is_a_failure_and_not_the_end(
    server: ThreadingHTTPServer, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    trace = tmp_path / "trace.jsonl"
    lines = [{"prompt_token_ids": [first], "output_length": 2} for first in (1, 13, 2)]
    trace.write_text("\n".join(map(json.dumps, lines)))
    words = ["--url", url_of(server), "--dataset", "trace", "--trace-file", str(trace)]
    assert main([*words, "--warm-up", "0", "--quiet"]) == 1
    captured = capsys.readouterr()
    row = json.loads(captured.out)
    assert (row["requests"], row["failed"]) == (3, 1)
    assert row["attainment"] == pytest.approx(2 / 3, abs=1e-3)
    assert "503" in captured.err


def test_a_server_that_is_not_there_is_a_failure_of_each_request(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["--url", "http://127.0.0.1:9", "--model", "m", "--warm-up", "0", "--quiet"]
    assert main([*words, "--num-prompts", "3"]) == 1
    captured = capsys.readouterr()
    assert json.loads(captured.out)["failed"] == 3
    assert "refused" in captured.err


@pytest.mark.parametrize(
    ("words", "cause"),
    [
        (["--goodput", "ttft"], "a limit is ttft:MS"),
        (["--goodput", "speed:3"], "a limit is ttft:MS"),
        (["--dataset", "trace"], "go together"),
        (["--trace-file", "x"], "go together"),
    ],
)
def test_a_wrong_command_line_says_what_is_wrong(
    words: list[str], cause: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--url", "http://127.0.0.1:9", *words])
    assert caught.value.code == 2
    assert cause in capsys.readouterr().err


def answer(ttft: float, tpot: float, *, error: str = "") -> Answer:
    at = [ttft + index * tpot for index in range(5)]
    return Answer(0.0, at[-1], at, 5, not error, error)


def test_goodput_counts_answers_within_every_limit_among_all_requests() -> None:
    answers = [answer(0.1, 0.01), answer(0.3, 0.01), answer(0.1, 0.05), answer(0.1, 0.0, error="x")]
    load = Load([Asked(0.0, [1], 5)] * 4, answers, 2.0)
    limits = Limits.read(["ttft:200", "tpot:20"])
    assert attainment(load, Limits()) == 0.75
    assert attainment(load, limits) == 0.25
    assert attainment(load, Limits.read(["e2e:150"])) == 0.25
    figures = figures_of(load, limits)
    assert (figures["goodput_s"], figures["requests_s"], figures["failed"]) == (0.5, 1.5, 1)
