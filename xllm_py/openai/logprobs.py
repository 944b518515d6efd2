"""Logprobs as clients see them: which tokens go with which text, and the shapes of the two OpenAI routes and of vLLM.

`Held` is used by `answer`, the shapes by `generation`. A token goes out with the text it made, or helped to make; one
that left no trace in the text because a stop string, or the end token, was cut off has no logprobs either. A token is
written as its bytes decoded with replacement, so that several tokens may look alike; `bytes` are exact.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from xllm_py.base.logprob import TokenLogprob
from xllm_py.openai.detokenizer import Vocabulary, open_stream

LOWEST = -9999.0  # stands for impossible: JSON has no infinity


@dataclass(frozen=True, slots=True)
class Scored:
    """One token. offset: characters of its text's beginning; logprob None: the first of a prompt."""

    token_id: int
    logprob: TokenLogprob | None
    offset: int


class Held:
    """Tokens of one answer whose text is not shown yet; they leave in their order."""

    def __init__(self) -> None:
        self._tokens: deque[tuple[Scored, int]] = deque()

    def push(self, token: Scored, end: int) -> None:
        """end: characters of the answer after this token, as far as they were whole then."""
        self._tokens.append((token, end))

    def shown(self, num_chars: int) -> list[Scored]:
        """Those that `num_chars` characters pass. One without text of its own goes with the next text."""
        tokens = self._tokens
        free = []
        while tokens and tokens[0][0].offset < num_chars and tokens[0][1] <= num_chars:
            free.append(tokens.popleft()[0])
        return free

    def cut(self, num_chars: int) -> list[Scored]:
        """The last ones of an answer that a stop string cut to so many characters; the others are dropped."""
        free = [token for token, _ in self._tokens if token.offset < num_chars]
        self._tokens.clear()
        return free

    def rest(self) -> list[Scored]:
        """All that are left, at the end of an answer that was not cut."""
        free = [token for token, _ in self._tokens]
        self._tokens.clear()
        return free


def of_prompt(
    vocabulary: Vocabulary, ids: Sequence[int], logprobs: Sequence[TokenLogprob], text: str
) -> list[Scored]:
    """The tokens of an echoed prompt, the first without logprob. One that is not in `text` has no width there."""
    stream = open_stream(vocabulary, skip_special_tokens=False)
    tokens: list[Scored] = []
    at = 0
    for token_id, logprob in zip(ids, (None, *logprobs), strict=True):
        tokens.append(Scored(token_id, logprob, at))
        piece = stream.push((token_id,))
        if text.startswith(piece, at):
            at += len(piece)
    return tokens


def completion_shape(
    vocabulary: Vocabulary, tokens: Sequence[Scored], num_top: int
) -> dict[str, object]:
    """`logprobs` of /v1/completions. top_logprobs also names the token itself; of tokens that look alike the likeliest."""
    return {
        "tokens": [_text(vocabulary, token.token_id) for token in tokens],
        "token_logprobs": [
            None if token.logprob is None else finite(token.logprob.logprob) for token in tokens
        ],
        "top_logprobs": [_by_text(vocabulary, token, num_top) for token in tokens],
        "text_offset": [token.offset for token in tokens],
    }


def chat_shape(vocabulary: Vocabulary, tokens: Sequence[Scored], num_top: int) -> dict[str, object]:
    """`logprobs` of /v1/chat/completions."""
    content = []
    for token in tokens:
        if token.logprob is None:
            continue
        row = _row(vocabulary, token.token_id, token.logprob.logprob)
        row["top_logprobs"] = [
            _row(vocabulary, token_id, logprob)
            for token_id, logprob in _top(token.logprob, num_top)
        ]
        content.append(row)
    return {"content": content}


def prompt_shape(
    vocabulary: Vocabulary, ids: Sequence[int], logprobs: Sequence[TokenLogprob], num_top: int
) -> list[dict[str, object] | None]:
    """`prompt_logprobs` as vLLM has them: per token a map from id, null for the first; rank null: not among the top."""
    shape: list[dict[str, object] | None] = [None]
    for token_id, logprob in zip(ids[1:], logprobs, strict=True):
        ranks = {top_id: rank for rank, top_id in enumerate(logprob.top_ids, start=1)}
        rows = dict(_top(logprob, num_top))
        rows.setdefault(token_id, logprob.logprob)
        shape.append(
            {
                str(each): {
                    "logprob": finite(value),
                    "rank": ranks.get(each),
                    "decoded_token": _text(vocabulary, each),
                }
                for each, value in rows.items()
            }
        )
    return shape


def finite(logprob: float) -> float:
    """A number JSON can carry."""
    return logprob if logprob > LOWEST else LOWEST


def _top(logprob: TokenLogprob, num_top: int) -> list[tuple[int, float]]:
    pairs = zip(logprob.top_ids, logprob.top_logprobs, strict=True)
    return list(pairs)[:num_top]


def _by_text(vocabulary: Vocabulary, token: Scored, num_top: int) -> dict[str, float] | None:
    if token.logprob is None:
        return None
    found: dict[str, float] = {}
    for token_id, logprob in _top(token.logprob, num_top):
        found.setdefault(_text(vocabulary, token_id), finite(logprob))
    found.setdefault(_text(vocabulary, token.token_id), finite(token.logprob.logprob))
    return found


def _row(vocabulary: Vocabulary, token_id: int, logprob: float) -> dict[str, object]:
    written = _bytes(vocabulary, token_id)
    return {
        "token": written.decode(errors="replace"),
        "logprob": finite(logprob),
        "bytes": list(written),
    }


def _text(vocabulary: Vocabulary, token_id: int) -> str:
    return _bytes(vocabulary, token_id).decode(errors="replace")


def _bytes(vocabulary: Vocabulary, token_id: int) -> bytes:
    if vocabulary.byte_level:
        return vocabulary.token_bytes(token_id)
    return vocabulary.decode((token_id,), skip_special_tokens=False).encode()
