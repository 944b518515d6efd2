"""The Backend protocol: what the HTTP routes ask of whoever computes.

Real: instance/local_backend.py (this instance's own engine) and master/cluster_backend.py (a whole cluster). Fake: a
ten-line echo in the tests. A backend speaks token ids only; text, templates and stop strings are the routes' business.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from xllm_py.base.logprob import TokenLogprob
from xllm_py.core.request import Submission


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """News of one choice of one request; several tokens may be coalesced into one.

    position is that of the first token. finish_reason: "" goes on, "stop" or "length". Errors are raised, never sent.
    """

    choice: int = 0
    position: int
    token_ids: tuple[int, ...]
    finish_reason: str = ""
    cached_tokens: int = (
        0  # prompt tokens that were not computed, as far as known; the greatest counts
    )
    logprobs: tuple[TokenLogprob, ...] = ()  # one per token when sampling.logprobs >= 0
    # of the prompt's tokens from the second on, when asked for; in the first delta of choice 0
    prompt_logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """What others are known to have said of a request already: a new answer goes on behind it."""

    ids: tuple[int, ...] = ()  # of its one choice
    numerics: str = ""  # what they were computed with, when it was one thing
    origin: bytes = b""  # Submission.origin


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """One row of /v1/models and the limits the door checks."""

    name: str
    max_model_len: int  # tokens of prompt and answer together
    vocab_size: int
    created: int = 0  # wall-clock second
    fingerprint: str = ""
    sampling_defaults: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Readiness:
    """The answer of /ready: `reasons` say why not (SPEC 7.1); `details` are sentences for people."""

    ready: bool
    mode: str = ""  # master: pd, default or degraded
    reasons: tuple[str, ...] = ()
    details: tuple[str, ...] = ()


class Backend(Protocol):
    """One verb that computes, and others that tell."""

    def generate(
        self, submission: Submission, told: Told | None = None
    ) -> AsyncGenerator[Delta, None]:
        """Deltas until each choice has finished, of what was told already first.

        Raises a RequestError leaf, before or after the first delta. Closing the generator early (aclose, or
        cancellation of its consumer) ends the request everywhere at once. Never runs past submission.timeout_s.
        """
        ...

    async def recall(self, stream_id: str) -> Told | None:
        """What is known of a request that somebody else was asked for; None when nothing is."""
        ...

    def models(self) -> tuple[ServedModel, ...]:
        """What can be asked for now; may be empty."""
        ...

    def ready(self) -> Readiness:
        """Whether a request would be served now."""
        ...

    def explain(self, request_id: str) -> str:
        """Why a request is served where it is, as one line of ASCII; empty when there was nothing to decide."""
        ...
