"""A client that asks in a thread of its own, so that a test can look at the cluster meanwhile, and leave in the middle."""

from __future__ import annotations

import http.client
import json
import socket
import threading
from typing import Any

from tests.e2e.cluster import Answer, Daemon, wait_for


class Pending:
    """One POST under way. A stream's pieces arrive in `pieces` one by one; `answer` waits for the end."""

    def __init__(
        self,
        daemon: Daemon,
        body: dict[str, Any],
        path: str = "/v1/completions",
        headers: dict[str, str] | None = None,
    ) -> None:
        self.pieces: list[Any] = []
        self.body = body
        self._connection = http.client.HTTPConnection("127.0.0.1", daemon.port, timeout=90)
        self._connection.connect()
        self._socket: socket.socket = self._connection.sock
        sent = {"content-type": "application/json", **(headers or {})}
        self._connection.request("POST", path, json.dumps(body).encode(), sent)
        self._answer: Answer | None = None
        self._thread = threading.Thread(target=self._read, args=(bool(body.get("stream")),))
        self._thread.start()

    def _read(self, stream: bool) -> None:
        try:
            response = self._connection.getresponse()
            headers = {name.lower(): value for name, value in response.headers.items()}
            if stream and response.status == 200:
                for line in response:
                    if line.startswith(b"data: "):
                        data = line[6:].strip().decode()
                        self.pieces.append(data if data == "[DONE]" else json.loads(data))
                body = None
            else:
                body = json.loads(response.read())
            self._answer = Answer(response.status, headers, body)
        except (OSError, http.client.HTTPException, ValueError):
            self._answer = None  # we left, or the server did
        finally:
            self._connection.close()

    @property
    def over(self) -> bool:
        """Whether the answer has ended."""
        return not self._thread.is_alive()

    def leave(self) -> None:
        """Close the connection without a word, as a browser does; the answer must not have come before."""
        assert self._thread.is_alive(), (self._answer, self.pieces[-1:])
        self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join(30)

    def wait_pieces(self, count: int) -> None:
        """Until so many pieces of the stream are here."""
        wait_for(f"{count} pieces of a stream", lambda: len(self.pieces) >= count)

    def answer(self, timeout_s: float = 60.0) -> Answer:
        """The whole answer; of a stream status and headers, its pieces are in `pieces`."""
        self._thread.join(timeout_s)
        assert not self._thread.is_alive(), f"no answer within {timeout_s} s"
        assert self._answer is not None, "the connection ended without an answer"
        return self._answer

    def stream_error(self, timeout_s: float = 60.0) -> dict[str, Any]:
        """The error with which a begun stream ended; nothing may follow it, [DONE] least of all."""
        assert self.answer(timeout_s).status == 200
        assert "[DONE]" not in self.pieces
        errors = [piece["error"] for piece in self.pieces if "error" in piece]
        assert len(errors) == 1
        assert self.pieces[-1] == {"error": errors[0]}
        return dict(errors[0])
