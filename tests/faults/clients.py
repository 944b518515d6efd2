"""Requests with one right answer each, clients that ask them, and what they saw reduced to what must be equal."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from dataclasses import dataclass, field
from typing import Any

SCHEMA = {
    "type": "object",
    "properties": {
        "a": {"type": "integer", "maximum": 999},
        "b": {"type": "string", "maxLength": 20},
    },
    "required": ["a", "b"],
    "additionalProperties": False,
}
TIMEOUT_S = 60.0
CUT = "the stream ended without [DONE]"


def _completion(prompt: list[int], **fields: Any) -> tuple[str, dict[str, Any]]:
    return "/v1/completions", {"model": "tiny", "prompt": prompt, "ignore_eos": True, **fields}


def _prompt(start: int, count: int) -> list[int]:
    return [(start + 7 * n) % 300 for n in range(count)]


def requests() -> list[tuple[str, dict[str, Any]]]:
    """(path, body): greedy, seeded, several choices, the best of several, schemas, stops, log probabilities; streamed and whole."""
    chat = [{"role": "user", "content": "tell me of the sea"}]
    greedy = [
        _completion(_prompt(n, size), max_tokens=most, temperature=0, stream=n % 3 != 2)
        for n, (size, most) in enumerate([(5, 700), (400, 300), (40, 500), (900, 150), (3, 1)])
    ]
    seeded = [
        _completion(
            _prompt(50 + n, 20 * n + 3),
            max_tokens=600,
            temperature=0.9,
            top_p=0.95,
            seed=n,
            stream=n != 3,
        )
        for n in range(4)
    ]
    several = [
        _completion(_prompt(90, 60), max_tokens=300, temperature=1.0, n=2, seed=5, stream=True),
        _completion(_prompt(91, 30), max_tokens=250, temperature=1.0, best_of=3, n=1, seed=6),
        _completion(
            _prompt(92, 25), max_tokens=400, temperature=0.7, seed=7, logprobs=3, stream=True
        ),
        _completion(
            _prompt(93, 25),
            max_tokens=500,
            temperature=0.7,
            seed=8,
            frequency_penalty=0.6,
            repetition_penalty=1.1,
            stream=True,
        ),
        _completion(_prompt(94, 16), max_tokens=300, temperature=0.8, seed=9, stop=["e", "8"]),
    ]
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
    chats: list[tuple[str, dict[str, Any]]] = [
        (
            "/v1/chat/completions",
            {
                "model": "tiny",
                "messages": chat,
                "max_tokens": 120,
                "seed": n,
                "response_format": schema,
                "stream": n == 1,
            },
        )
        for n in (1, 2)
    ]
    found = greedy + seeded + several + chats
    for _, body in found:
        if body.get("stream"):
            body["stream_options"] = {"include_usage": True}
    return found


@dataclass(slots=True)
class Seen:
    """One answer: texts, reasons and log probabilities by choice, and usage."""

    texts: dict[int, str] = field(default_factory=dict)
    reasons: dict[int, list[str]] = field(default_factory=dict)
    logprobs: dict[int, list[Any]] = field(default_factory=dict)
    usage: dict[str, int] = field(default_factory=dict)
    wrong: str = ""
    request_id: str = field(default="", compare=False)

    def take(self, piece: dict[str, Any]) -> None:
        """A chunk of a stream, or a whole answer."""
        self.request_id = piece.get("id", self.request_id)
        if "error" in piece:
            self.wrong = f"error {piece['error']}"
            return
        for choice in piece["choices"]:
            index = choice["index"]
            said = choice.get("text")
            if said is None:
                said = (choice.get("delta") or choice.get("message") or {}).get("content") or ""
            self.texts[index] = self.texts.get(index, "") + said
            if choice.get("finish_reason"):
                self.reasons.setdefault(index, []).append(choice["finish_reason"])
            told = choice.get("logprobs")
            if told:
                self.logprobs.setdefault(index, []).extend(
                    zip(told["tokens"], told["token_logprobs"], told["top_logprobs"], strict=True)
                )
        if piece.get("usage"):
            usage = piece["usage"]
            self.usage = {name: usage[name] for name in ("prompt_tokens", "completion_tokens")}


class Client:
    """Asks in a thread of its own, and notes when each event came. With a key it goes on at another master when one is lost: behind the last event, or
    from the beginning where several choices interleave.
    """

    def __init__(
        self, ports: list[int], number: int, path: str, body: dict[str, Any], key: str = ""
    ) -> None:
        self.number = number
        self.seen = Seen()
        self.times: list[float] = []
        self.left = False
        self.port = ports[0]
        self._ports = ports
        self._key = key
        self._last_id = ""
        self._streams = bool(body.get("stream"))
        self._one_choice = body.get("n", 1) == 1
        self._ask = (path, json.dumps(body).encode())
        self._connect(ports[0])
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _connect(self, port: int) -> None:
        self.port = port
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)
        self._connection.connect()
        self._socket: socket.socket = self._connection.sock

    def _run(self) -> None:
        if self._ask_once() or not self._key or self.left:
            return
        for port in self._ports[1:]:
            self.seen.wrong = ""
            if not (self._streams and self._one_choice):
                self.seen, self._last_id = Seen(), ""
            self._connect(port)
            if self._ask_once():
                return

    def _ask_once(self) -> bool:
        """Whether the answer ended, with an error or well."""
        path, raw = self._ask
        headers = {"content-type": "application/json"}
        if self._key:
            headers["idempotency-key"] = self._key
        if self._last_id:
            headers["last-event-id"] = self._last_id
        try:
            self._connection.request("POST", path, raw, headers)
            response = self._connection.getresponse()
            if self._streams and response.status == 200:
                self._read_stream(response)
            else:
                self.seen.take(json.loads(response.read()))
                self.times.append(time.monotonic())
        except (OSError, http.client.HTTPException, ValueError) as error:
            self.seen.wrong = self.seen.wrong or f"{type(error).__name__}: {error}"
            return False
        finally:
            self._connection.close()
        return self.seen.wrong != CUT

    def _read_stream(self, response: http.client.HTTPResponse) -> None:
        done = False
        for line in response:
            if line.startswith(b"id: "):
                self._last_id = line[4:].strip().decode()
            if not line.startswith(b"data: "):
                continue
            if done:
                self.seen.wrong = "something came after [DONE]"
            self.times.append(time.monotonic())
            data = line[6:].strip()
            done = data == b"[DONE]"
            if not done:
                self.seen.take(json.loads(data))
        if not done and not self.seen.wrong:
            self.seen.wrong = CUT

    @property
    def over(self) -> bool:
        """Whether its answer has ended."""
        return not self._thread.is_alive()

    def leave(self) -> None:
        """Go away without a word."""
        self.left = True
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            self.left = False  # the answer was there already

    def join(self, timeout_s: float) -> bool:
        """Wait for the end."""
        self._thread.join(timeout_s)
        return self.over

    def longest_gap(self) -> float:
        """Seconds between two of its events."""
        return max((b - a for a, b in zip(self.times, self.times[1:], strict=False)), default=0.0)

    def gaps(self) -> list[float]:
        """All of them."""
        return [b - a for a, b in zip(self.times, self.times[1:], strict=False)]
