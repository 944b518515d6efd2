"""SamplingParams: how the next token is chosen and when a request ends. Validated on construction.

Made by the HTTP door (or rebuilt from a control message), carried by a Submission to P and D alike. Sampling itself is a
pure function of (logits, seed, choice, position); see docs/decisions on counter-based sampling.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from xllm_py.base.errors import InvalidValue

MAX_BEST_OF = (
    128  # what the wire takes; --max_best_of and --max_logprobs are the doors' lower bounds
)
MAX_LOGPROBS = 2000
MAX_GRAMMAR_CHARS = 128 << 10


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """One request's sampling parameters; raises InvalidValue naming the field when one is out of range."""

    max_tokens: int
    seed: int  # 63 bits; drawn at the door when the client sent none
    temperature: float = 1.0  # 0: greedy
    top_p: float = 1.0
    top_k: int = -1  # -1: all
    min_p: float = 0.0
    stop: tuple[str, ...] = ()  # matched where text is made, never in the engine
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    best_of: int = (
        1  # candidates that are generated; which of them are shown is the door's business
    )
    frequency_penalty: float = 0.0  # off a logit for every time its token was generated
    presence_penalty: float = 0.0  # off the logit of every generated token
    repetition_penalty: float = 1.0  # divides the logits of tokens of prompt and answer
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token id, added to its logit)
    min_tokens: int = 0  # no stop token before so many tokens
    logprobs: int = -1  # -1: none; 0: of the token alone; k: also of the k most likely
    prompt_logprobs: int = -1  # the same for the tokens of the prompt
    grammar: str = ""  # what the answer must match, in the guide's own form; empty: anything

    def __post_init__(self) -> None:
        """Check every range of SPEC section 7.3."""
        _check(self.max_tokens >= 1, "max_tokens", self.max_tokens, "at least 1")
        _check(-(2**63) <= self.seed < 2**63, "seed", self.seed, "a signed 64-bit integer")
        _check(_within(self.temperature, 0, 2), "temperature", self.temperature, "in [0, 2]")
        _check(_within(self.top_p, 0, 1) and self.top_p > 0, "top_p", self.top_p, "in (0, 1]")
        _check(self.top_k == -1 or 1 <= self.top_k < 2**31, "top_k", self.top_k, "-1 or at least 1")
        _check(_within(self.min_p, 0, 1), "min_p", self.min_p, "in [0, 1]")
        _check(len(self.stop) <= 4, "stop", len(self.stop), "at most 4 strings")
        for text in self.stop:
            _check(0 < len(text.encode()) <= 64, "stop", text, "1 to 64 bytes a string")
        _check(
            len(self.stop_token_ids) <= 64, "stop_token_ids", len(self.stop_token_ids), "at most 64"
        )
        for token in self.stop_token_ids:
            _check(0 <= token < 2**31, "stop_token_ids", token, "token ids")
        _check(1 <= self.best_of <= MAX_BEST_OF, "best_of", self.best_of, f"in [1, {MAX_BEST_OF}]")
        for name in ("frequency_penalty", "presence_penalty"):
            value = getattr(self, name)
            _check(_within(value, -2, 2), name, value, "in [-2, 2]")
        repetition = self.repetition_penalty
        good = _within(repetition, 0, 2) and repetition > 0
        _check(good, "repetition_penalty", repetition, "in (0, 2]")
        _check(
            len(self.logit_bias) <= 300, "logit_bias", len(self.logit_bias), "at most 300 entries"
        )
        for token, bias in self.logit_bias:
            _check(0 <= token < 2**31, "logit_bias", token, "token ids")
            _check(_within(bias, -100, 100), "logit_bias", bias, "in [-100, 100]")
        limit = self.max_tokens
        _check(0 <= self.min_tokens <= limit, "min_tokens", self.min_tokens, f"in [0, {limit}]")
        size, most = len(self.grammar), MAX_GRAMMAR_CHARS
        _check(size <= most, "grammar", f"{size} characters", f"at most {most}")
        endless = bool(self.grammar) and self.ignore_eos
        _check(not endless, "ignore_eos", True, "false with a grammar, whose answers end")
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            _check(-1 <= value <= MAX_LOGPROBS, name, value, f"in [0, {MAX_LOGPROBS}]")

    @property
    def penalised(self) -> bool:
        """Whether tokens seen before are more or less likely than others."""
        penalties = (self.frequency_penalty, self.presence_penalty, self.repetition_penalty)
        return penalties != (0.0, 0.0, 1.0)

    @property
    def has_history(self) -> bool:
        """Whether choosing a token depends on tokens before it, beyond what the model makes of them."""
        return self.penalised or bool(self.grammar)

    @property
    def takes_highest(self) -> bool:
        """Whether the next token is the one with the highest logit as the model gives it, and nothing else is asked."""
        edited = self.has_history or bool(self.logit_bias) or self.min_tokens > 0
        return self.greedy and self.logprobs < 0 and not edited

    @property
    def greedy(self) -> bool:
        """True when the most likely token is taken, ties to the lowest id."""
        return self.temperature == 0


def _within(value: float, low: float, high: float) -> bool:
    return math.isfinite(value) and low <= value <= high


def _check(good: bool, field: str, value: object, rule: str) -> None:
    if not good:
        raise InvalidValue(f"{field} is {value}; it must be {rule}", param=field)
