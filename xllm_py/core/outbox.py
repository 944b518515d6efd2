"""What an engine has to say of its requests since it was last asked: entries on their way into one Outputs.

Used by the scheduler alone, whose hot loop appends ordinary tokens to the columns itself; everything rarer is here.
"""

from __future__ import annotations

from xllm_py.base.logprob import TokenLogprob
from xllm_py.core.plan import FINISH_LENGTH, FINISH_STOP, Outputs, StepResult
from xllm_py.core.request import Request, Submission


class Outbox:
    """One engine's; `outputs` are the columns that are being filled."""

    def __init__(self) -> None:
        self.outputs = Outputs()

    def take(self) -> Outputs:
        """All entries since the last call."""
        outputs, self.outputs = self.outputs, Outputs()
        return outputs

    def put_first(self, request: Request, result: StepResult, at: int) -> None:
        """The first token of each choice; those that are the last one too end their choice. `at`: of choice 0 in the result."""
        outputs = self.outputs
        key = (request.request_id, request.submission.attempt)
        for choice, token in enumerate(request.first_ids):
            entry = outputs.add(
                *key,
                choice=choice,
                position=request.num_generated,
                token_id=token,
                finish_reason=request.finish_by(token),
            )
            if at + choice in result.logprobs:
                outputs.logprobs[entry] = result.logprobs[at + choice]
            if choice == 0 and request.prompt_logprobs:
                outputs.prompt_logprobs[entry] = request.prompt_logprobs
        self.describe(request, len(outputs.request_ids) - 1)

    def put_token(self, request: Request, token_id: int, logprob: TokenLogprob | None) -> int:
        """The next token of a choice; returns the entry."""
        entry = self.outputs.add(
            request.request_id,
            request.submission.attempt,
            choice=request.choice,
            position=request.num_generated,
            token_id=token_id,
        )
        if logprob is not None:
            self.outputs.logprobs[entry] = logprob
        return entry

    def put_reason(self, entry: int, request: Request) -> None:
        """Its newest token, which is in this entry, was its last."""
        stopped = request.tokens[-1] in request.stop_ids
        self.outputs.finish_reasons[entry] = FINISH_STOP if stopped else FINISH_LENGTH

    def put_taken(self, request: Request, choice: int) -> None:
        """A choice that ended by its first token. When P told the token: that nothing more of it comes from here."""
        if not request.taken:
            return
        key = (request.request_id, request.submission.attempt)
        token_id = request.first_ids[choice]
        reason = FINISH_STOP if token_id in request.stop_ids else FINISH_LENGTH
        position = request.num_submitted - request.num_prompt + 1
        self.outputs.add(*key, choice=choice, position=position, finish_reason=reason)

    def put_end(
        self, submission: Submission, reason: str, message: str = "", position: int = 0
    ) -> int:
        """An entry that ends a request and carries no token; returns it."""
        key = (submission.request_id, submission.attempt)
        return self.outputs.add(*key, position=position, finish_reason=reason, message=message)

    def describe(self, request: Request, entry: int) -> None:
        """What goes with an entry."""
        self.outputs.journeys[entry] = request.journey_s()
        self.outputs.cached_tokens[entry] = request.num_cached
