"""Server-sent events of the two OpenAI streams: bytes in, bytes out, no I/O.

Everything of a chunk that does not change is encoded once per request; a token costs one JSON string and a join.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from xllm_py.base.errors import RequestError
from xllm_py.openai.errors import error_body

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": still here\n\n"
HEADERS = ((b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-store"))

_NULL = b"null"
_encode = msgspec.json.encode


def error_event(error: RequestError) -> bytes:
    """The last event of a stream that failed; no [DONE] follows."""
    return b"data: " + error_body(error) + b"\n\n"


class Chunks:
    """Writes the chunks of one response. `chat` chooses between chat.completion.chunk and text_completion."""

    def __init__(self, *, chat: bool, head: Mapping[str, object], with_usage: bool) -> None:
        """head: id, object, created, model, system_fingerprint, in the order they are to appear."""
        self._chat = chat
        self._id = str(head["id"]).encode()
        opened = _encode(head)
        self._prefix = b"data: " + opened[:-1] + b',"choices":['
        self._end = b',"usage":null}\n\n' if with_usage else b"}\n\n"

    def role(self, index: int) -> bytes:
        """Chat: the first chunk of a choice. Completions have none."""
        if not self._chat:
            return b""
        return self._chunk(index, b'"delta":{"role":"assistant","content":""}')

    def echo(self, index: int, text: str, logprobs: bytes = _NULL) -> bytes:
        """Completions: the prompt's text, ahead of a choice's own. It has no position in the answer."""
        return self._chunk(index, b'"text":' + _encode(text), logprobs)

    def text(self, index: int, position: int, text: str, logprobs: bytes = _NULL) -> bytes:
        """New text; position is that of the last token it came from, logprobs JSON."""
        written = _encode(text)
        body = b'"delta":{"content":%b}' % written if self._chat else b'"text":' + written
        return b"id: %b:%d:%d\n%b" % (self._id, index, position, self._chunk(index, body, logprobs))

    def finish(self, index: int, reason: str, logprobs: bytes = _NULL) -> bytes:
        """The last chunk of a choice."""
        body = b'"delta":{}' if self._chat else b'"text":""'
        return self._chunk(index, body, logprobs, _encode(reason))

    def usage(self, usage: Mapping[str, object]) -> bytes:
        """The chunk without choices that `include_usage` asks for."""
        return self._prefix + b'],"usage":' + _encode(usage) + b"}\n\n"

    def _chunk(
        self, index: int, body: bytes, logprobs: bytes = _NULL, reason: bytes = _NULL
    ) -> bytes:
        choice = b'{"index":%d,%b,"logprobs":%b,"finish_reason":%b}]' % (
            index,
            body,
            logprobs,
            reason,
        )
        return self._prefix + choice + self._end
