"""One choice of one response as it grows: tokens in, text out, and why it ended.

Made by the generation routes per prompt. Stop strings are matched here, token by token, so that the result and the
usage do not depend on how many tokens a delta happened to carry.
"""

from __future__ import annotations

from collections.abc import Sequence

from xllm_py.base.errors import InternalServerError
from xllm_py.core.sampling import SamplingParams
from xllm_py.openai.backend import Delta
from xllm_py.openai.detokenizer import StopMatcher, Vocabulary, open_stream


class Answer:
    """`take` deltas in order until `finish_reason` is set."""

    def __init__(self, vocabulary: Vocabulary, sampling: SamplingParams) -> None:
        self._stream = open_stream(vocabulary, skip_special_tokens=sampling.skip_special_tokens)
        self._stops = StopMatcher(sampling.stop, include=sampling.include_stop_str_in_output)
        self._has_stops = bool(sampling.stop)
        self._silent_ids: frozenset[int] = frozenset()
        if not sampling.include_stop_str_in_output:
            self._silent_ids = vocabulary.special_ids.union(sampling.stop_token_ids)
        self.num_tokens = 0
        self.cached_tokens = 0
        self.finish_reason = ""

    def has_ended(self) -> bool:
        """Whether finish_reason is set."""
        return bool(self.finish_reason)

    def take(self, delta: Delta) -> str:
        """New text of this delta; sets finish_reason. Raises InternalServerError on a gap in positions."""
        if delta.position != self.num_tokens or self.has_ended():
            raise InternalServerError("the answer's tokens arrived out of order")
        self.cached_tokens = max(self.cached_tokens, delta.cached_tokens)
        shown = self._shown(delta)
        if self._has_stops:
            text = self._take_with_stops(shown)
        else:
            text = self._stream.push(shown)
            self.num_tokens += len(shown)
        if self.has_ended():
            return text
        self.num_tokens += len(delta.token_ids) - len(shown)
        if delta.finish_reason:
            text += self._end(delta.finish_reason)
        return text

    def _shown(self, delta: Delta) -> Sequence[int]:
        """The ids whose text counts: the token that ended the answer does not, unless asked for."""
        ids = delta.token_ids
        if delta.finish_reason == "stop" and ids and ids[-1] in self._silent_ids:
            return ids[:-1]
        return ids

    def _take_with_stops(self, ids: Sequence[int]) -> str:
        parts = []
        for token_id in ids:
            self.num_tokens += 1
            parts.append(self._stops.push(self._stream.push((token_id,))))
            if self._stops.hit:
                self.finish_reason = "stop"
                break
        return "".join(parts)

    def _end(self, reason: str) -> str:
        self.finish_reason = reason
        text = self._stops.push(self._stream.flush())
        if self._stops.hit:
            self.finish_reason = "stop"
            return text
        return text + self._stops.flush()
