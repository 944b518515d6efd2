"""One choice of one response as it grows: tokens in, text out, and why it ended.

Made by `choices`, one per candidate of a prompt. Stop strings are matched here, token by token, so that the result and
the usage do not depend on how many tokens a delta happened to carry.
"""

from __future__ import annotations

from collections.abc import Sequence

from xllm_py.base.errors import InternalServerError
from xllm_py.base.logprob import TokenLogprob
from xllm_py.core.sampling import SamplingParams
from xllm_py.openai.backend import Delta
from xllm_py.openai.detokenizer import StopMatcher, Vocabulary, open_stream
from xllm_py.openai.logprobs import Held, Scored
from xllm_py.openai.ranking import Score


class Answer:
    """`take` deltas in order until `finish_reason` is set."""

    def __init__(self, vocabulary: Vocabulary, sampling: SamplingParams) -> None:
        self._stream = open_stream(vocabulary, skip_special_tokens=sampling.skip_special_tokens)
        self._stops = StopMatcher(sampling.stop, include=sampling.include_stop_str_in_output)
        self._has_stops = bool(sampling.stop)
        self._silent_ids: frozenset[int] = frozenset()
        if not sampling.include_stop_str_in_output:
            self._silent_ids = vocabulary.special_ids.union(sampling.stop_token_ids)
        self._is_scored = sampling.logprobs >= 0
        self._held = Held()
        self._num_whole = 0  # characters the tokens made, as far as tokens are looked at one by one
        self._num_shown = 0  # of them
        self._total = 0.0
        self.scored: list[Scored] = []  # that go with the text `take` returned last
        self.num_tokens = 0
        self.finish_reason = ""

    def has_ended(self) -> bool:
        """Whether finish_reason is set."""
        return bool(self.finish_reason)

    @property
    def score(self) -> Score:
        """How likely the tokens were that `num_tokens` counts; they must be scored."""
        return Score(total=self._total, num_tokens=self.num_tokens)

    def take(self, delta: Delta) -> str:
        """New text of this delta; sets finish_reason and `scored`.

        Raises InternalServerError on a gap in positions and on tokens without the logprobs that were asked for.
        """
        if delta.position != self.num_tokens or self.has_ended():
            raise InternalServerError("the answer's tokens arrived out of order")
        if self._is_scored and len(delta.logprobs) != len(delta.token_ids):
            raise InternalServerError("the answer's tokens arrived without their logprobs")
        text = self._text_of(delta)
        self._num_shown += len(text)
        if self._is_scored:
            self.scored = self._freed()
        return text

    def _text_of(self, delta: Delta) -> str:
        shown = self._shown(delta)
        if self._has_stops or self._is_scored:
            text = self._take_each(shown, delta.logprobs)
        else:
            text = self._stream.push(shown)
            self.num_tokens += len(shown)
        if self.has_ended():
            return text
        self.num_tokens += len(delta.token_ids) - len(shown)
        if self._is_scored:
            self._total += sum(each.logprob for each in delta.logprobs[len(shown) :])
        if delta.finish_reason:
            text += self._end(delta.finish_reason)
        return text

    def _shown(self, delta: Delta) -> Sequence[int]:
        """The ids whose text counts: the token that ended the answer does not, unless asked for."""
        ids = delta.token_ids
        if delta.finish_reason == "stop" and ids and ids[-1] in self._silent_ids:
            return ids[:-1]
        return ids

    def _take_each(self, ids: Sequence[int], logprobs: Sequence[TokenLogprob]) -> str:
        parts = []
        for index, token_id in enumerate(ids):
            self.num_tokens += 1
            whole = self._stream.push((token_id,))
            begin, self._num_whole = self._num_whole, self._num_whole + len(whole)
            if self._is_scored:
                self._total += logprobs[index].logprob
                self._held.push(Scored(token_id, logprobs[index], begin), self._num_whole)
            parts.append(self._stops.push(whole))
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

    def _freed(self) -> list[Scored]:
        if self._stops.hit:
            return self._held.cut(self._num_shown)
        return self._held.rest() if self.has_ended() else self._held.shown(self._num_shown)
