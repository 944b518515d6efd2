"""Token ids to text while they arrive: whole characters only, stop strings found across token borders.

Called by `answer`. For byte-level vocabularies the text is that of a full decode, byte for byte: each token is a run of
bytes and the UTF-8 decoder keeps what is not whole yet. Other vocabularies are decoded in a sliding window. The prompt
never takes part: ids that end inside a character would make it appear in the answer.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Protocol

# a window decoder waits this many tokens for an unfinished character before it gives up on it
_MAX_HELD_TOKENS = 16


class Vocabulary(Protocol):
    """What the decoders need of a Tokenizer."""

    byte_level: bool
    special_ids: frozenset[int]

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token of a byte-level vocabulary; b"" for an unknown id."""
        ...

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """Text of a whole sequence."""
        ...


class TextStream(Protocol):
    """One answer's way from ids to text."""

    def push(self, ids: Sequence[int]) -> str:
        """Text that is whole after these ids."""
        ...

    def flush(self) -> str:
        """What is left at the end; unfinished characters become U+FFFD."""
        ...


class ByteStream:
    """For byte-level vocabularies."""

    def __init__(self, vocabulary: Vocabulary, *, skip_special_tokens: bool) -> None:
        self._bytes_of = vocabulary.token_bytes
        self._hidden = vocabulary.special_ids if skip_special_tokens else frozenset()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, ids: Sequence[int]) -> str:
        """See TextStream."""
        hidden = self._hidden
        return self._decoder.decode(b"".join([self._bytes_of(i) for i in ids if i not in hidden]))

    def flush(self) -> str:
        """See TextStream."""
        return self._decoder.decode(b"", True)


class WindowStream:
    """For any other vocabulary: decodes the last few tokens with and without the new one."""

    def __init__(self, vocabulary: Vocabulary, *, skip_special_tokens: bool) -> None:
        self._vocabulary = vocabulary
        self._skip = skip_special_tokens
        self._window: list[int] = []  # tokens since the last border, then those not shown yet
        self._num_shown = 0  # of the window

    def push(self, ids: Sequence[int]) -> str:
        """See TextStream."""
        return "".join([self._push_one(token_id) for token_id in ids])

    def _push_one(self, token_id: int) -> str:
        if self._skip and token_id in self._vocabulary.special_ids:
            return ""
        self._window.append(token_id)
        num_held = len(self._window) - self._num_shown
        new = self._news()
        if num_held < _MAX_HELD_TOKENS and (not new or new.endswith("\ufffd")):
            return ""
        self._window = self._window[self._num_shown :]
        self._num_shown = len(self._window)
        return new

    def _news(self) -> str:
        before = self._decode(self._window[: self._num_shown])
        return self._decode(self._window)[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return self._vocabulary.decode(ids, skip_special_tokens=False) if ids else ""

    def flush(self) -> str:
        """See TextStream."""
        new = self._news()
        self._window, self._num_shown = [], 0
        return new


def open_stream(vocabulary: Vocabulary, *, skip_special_tokens: bool) -> TextStream:
    """The decoder that fits the vocabulary."""
    kind = ByteStream if vocabulary.byte_level else WindowStream
    return kind(vocabulary, skip_special_tokens=skip_special_tokens)


class StopMatcher:
    """Finds the stop string that is complete first, however the text was cut; holds back what may become one."""

    def __init__(self, stops: Sequence[str], *, include: bool) -> None:
        self._stops = tuple(stops)
        self._include = include
        self._held = ""
        self.hit = False

    def push(self, text: str) -> str:
        """Text that is safe to show; after a hit nothing more is to be pushed."""
        text = self._held + text
        found = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            end, start = min(found)
            self.hit, self._held = True, ""
            return text[: end if self._include else start]
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        cut = len(text) - keep
        self._held = text[cut:]
        return text[:cut]

    def flush(self) -> str:
        """What was held back, at the end of an answer that hit no stop string."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop` without completing it."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
