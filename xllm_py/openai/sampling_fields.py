"""From the fields of a body to SamplingParams, and to what of the answer is to be shown. Pure.

Called by `intake`. Every value out of range is an InvalidValue that names the field and what is allowed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from xllm_py.base.errors import ContextLengthExceeded, InvalidValue
from xllm_py.core.sampling import SamplingParams
from xllm_py.openai.backend import ServedModel
from xllm_py.openai.schema import ChatBody, Common, CompletionBody
from xllm_py.openai.settings import HttpSettings

_DEFAULT_MAX_TOKENS = 5120
_DEFAULTED = ("temperature", "top_p", "top_k", "min_p")
_INTEGERS = frozenset({"top_k"})
_AS_THEY_ARE = (
    *("include_stop_str_in_output", "ignore_eos", "skip_special_tokens", "min_tokens"),
    *("frequency_penalty", "presence_penalty", "repetition_penalty"),
)
_MAX_BIASES = 300
_MAX_PRIORITY = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """What the client wants to see: n of best_of choices; logprobs -1: none, k: of each token and the k likeliest."""

    n: int = 1
    best_of: int = 1
    logprobs: int = -1
    prompt_logprobs: int = -1
    echo: bool = False

    @property
    def ranked(self) -> bool:
        """Whether some candidates are not shown, which is known only at the end."""
        return self.best_of != self.n


def shown(body: Common, settings: HttpSettings) -> Shown:
    """Checked against the door's limits; raises InvalidValue."""
    n, best_of = _choices(body, settings.max_best_of)
    limit = settings.max_logprobs
    wanted = Shown(
        n=n,
        best_of=best_of,
        logprobs=_logprobs(body, limit),
        prompt_logprobs=_limited("prompt_logprobs", body.prompt_logprobs, limit),
        echo=isinstance(body, CompletionBody) and bool(body.echo),
    )
    if wanted.prompt_logprobs >= 0 and body.stream:
        raise InvalidValue(
            "prompt_logprobs cannot be streamed; leave out stream", param="prompt_logprobs"
        )
    return wanted


def _choices(body: Common, limit: int) -> tuple[int, int]:
    n = 1 if body.n is None else body.n
    if not 1 <= n <= limit:
        raise InvalidValue(f"n is {n}; it must be in [1, {limit}]", param="n")
    best_of = n if body.best_of is None else body.best_of
    if not n <= best_of <= limit:
        raise InvalidValue(
            f"best_of is {best_of}; it must be in [{n}, {limit}], n and the limit", param="best_of"
        )
    return n, best_of


def _logprobs(body: Common, limit: int) -> int:
    if isinstance(body, CompletionBody):
        return _limited("logprobs", body.logprobs, limit)
    if not isinstance(body, ChatBody):
        return -1
    num_top = _limited("top_logprobs", body.top_logprobs, limit)
    if not body.logprobs:
        if num_top > 0:
            raise InvalidValue("top_logprobs needs logprobs: true", param="top_logprobs")
        return -1
    return max(num_top, 0)


def _limited(name: str, value: int | None, limit: int) -> int:
    if value is None:
        return -1
    if not 0 <= value <= limit:
        raise InvalidValue(f"{name} is {value}; it must be in [0, {limit}]", param=name)
    return value


def sampling_params(
    body: Common,
    model: ServedModel,
    wanted: Shown,
    *,
    num_prompt: int,
    seed: int,
    grammar: str = "",
) -> SamplingParams:
    """For a prompt of so many tokens; raises InvalidValue or ContextLengthExceeded.

    Candidates that are ranked are scored, and an echo with logprobs needs those of the prompt, shown or not.
    """
    logprobs, of_prompt = wanted.logprobs, wanted.prompt_logprobs
    return SamplingParams(
        max_tokens=_max_tokens(body, model, num_prompt),
        seed=seed,
        grammar=grammar,
        best_of=wanted.best_of,
        logprobs=max(logprobs, 0) if wanted.ranked else logprobs,
        prompt_logprobs=max(of_prompt, logprobs) if wanted.echo else of_prompt,
        logit_bias=_logit_bias(body.logit_bias or {}, model.vocab_size),
        **_fields(body, model.sampling_defaults),
    )


def _max_tokens(body: Common, model: ServedModel, num_prompt: int) -> int:
    """What the client named, if the context allows it, else what the context leaves."""
    left = model.max_model_len - num_prompt
    if left < 1:
        raise ContextLengthExceeded(
            f"the prompt has {num_prompt} tokens and the model's context is {model.max_model_len}, "
            "answer included; shorten the prompt",
            param="messages" if isinstance(body, ChatBody) else "prompt",
        )
    named, field = body.max_completion_tokens, "max_completion_tokens"
    if named is None:
        named, field = body.max_tokens, "max_tokens"
    if named is None:
        return min(_DEFAULT_MAX_TOKENS, left)
    if named < 1:
        raise InvalidValue(f"{field} is {named}; it must be at least 1", param=field)
    if named > left:
        raise ContextLengthExceeded(
            f"{num_prompt} prompt tokens and {field}={named} exceed the model's context of "
            f"{model.max_model_len}; ask for at most {left}",
            param=field,
        )
    return named


def _logit_bias(biases: Mapping[str, float], vocab_size: int) -> tuple[tuple[int, float], ...]:
    """Pairs in the order of their ids, so that the same wish is always the same value."""
    if len(biases) > _MAX_BIASES:
        raise InvalidValue(
            f"logit_bias has {len(biases)} entries; at most {_MAX_BIASES} are allowed",
            param="logit_bias",
        )
    pairs = []
    for key, bias in biases.items():
        is_id = key.isascii() and key.isdecimal() and len(key) <= 10 and str(int(key)) == key
        if not is_id or int(key) >= vocab_size:
            raise InvalidValue(
                f"logit_bias names {key[:40]!r}; keys are token ids below {vocab_size}",
                param="logit_bias",
            )
        pairs.append((int(key), bias))
    return tuple(sorted(pairs))


def _fields(body: Common, defaults: Mapping[str, float]) -> dict[str, Any]:
    """Keyword arguments of SamplingParams that need no thought."""
    fields: dict[str, Any] = {}
    for name in _DEFAULTED:
        value = getattr(body, name)
        if value is None and name in defaults:
            value = int(defaults[name]) if name in _INTEGERS else float(defaults[name])
        if value is not None:
            fields[name] = value
    if body.stop is not None:
        fields["stop"] = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop)
    if body.stop_token_ids is not None:
        fields["stop_token_ids"] = tuple(body.stop_token_ids)
    for name in _AS_THEY_ARE:
        value = getattr(body, name)
        if value is not None:
            fields[name] = value
    return fields


def urgency(body: Common) -> dict[str, Any]:
    """Keyword arguments of a Submission that say how much hurry there is; raises InvalidValue."""
    priority = body.priority or 0
    if not 0 <= priority <= _MAX_PRIORITY:
        raise InvalidValue(
            f"priority is {priority}; it must be 1 (high), 2 (normal), 3 (low) or 0",
            param="priority",
        )
    found: dict[str, Any] = {"priority": priority, "offline": bool(body.offline)}
    for name in ("ttft_slo_ms", "tpot_slo_ms"):
        value = getattr(body, name) or 0.0
        if not (math.isfinite(value) and value >= 0):
            raise InvalidValue(f"{name} is {value}; it must be milliseconds, 0: none", param=name)
        found[name] = value
    return found
