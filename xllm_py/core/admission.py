"""What an engine can take at all: checks of a submission or an offer against facts that do not change.

Used by the scheduler at the door, before anything is allocated. Raises RequestError leaves whose text names the limit and
the flag that moves it.
"""

from __future__ import annotations

from collections import OrderedDict

from xllm_py.base.errors import ContextLengthExceeded, InvalidValue, RequestError
from xllm_py.core.config import ModelFacts, SchedulerConfig
from xllm_py.core.journey import Moment
from xllm_py.core.request import Request, State, Submission

BEST_OF_NEEDS_PREFIX_CACHE = (
    "n or best_of above 1 through prefill and decode instances needs a decode instance with "
    "--enable_prefix_cache=true"
)
TOMBSTONE_S = 10.0  # an abort for an id not yet known kills a late arrival for so long
_MAX_TOMBSTONES = 10_000


class Admission:
    """The limits of one engine."""

    def __init__(
        self, config: SchedulerConfig, facts: ModelFacts, num_blocks: int, block_size: int
    ) -> None:
        self._config = config
        self._facts = facts
        self._num_blocks = num_blocks
        self._block_size = block_size
        self._eos = frozenset(facts.eos_token_ids)

    def check(self, submission: Submission, *, decode_here: bool) -> None:
        """Raise when the submission can never be served here."""
        num_prompt = len(submission.prompt_ids)
        if not num_prompt:
            raise InvalidValue("the prompt is empty; at least one token is needed", param="prompt")
        for ids in (submission.prompt_ids, submission.generated_ids):
            if ids and not (self.in_vocabulary(min(ids)) and self.in_vocabulary(max(ids))):
                raise InvalidValue(
                    f"a token id lies outside the vocabulary of {self._facts.vocab_size}",
                    param="prompt",
                )
        if num_prompt >= self._facts.max_model_len:
            raise ContextLengthExceeded(
                f"the prompt has {num_prompt} tokens; the model takes {self._facts.max_model_len} "
                "with the answer. Shorten the prompt"
            )
        if num_prompt + len(submission.generated_ids) >= self.max_len(submission):
            raise InvalidValue("the tokens generated so far are the whole answer already")
        self._check_blocks(submission, decode_here)
        limit = self._config.max_tokens_per_batch
        if not self._config.enable_chunked_prefill and num_prompt > limit:
            raise ContextLengthExceeded(
                f"the prompt has {num_prompt} tokens; without chunked prefill at most {limit} "
                "are computed in one step"
            )

    def make(self, submission: Submission, state: State, now: float) -> Request:
        """The request of a checked submission."""
        tokens = [*submission.prompt_ids, *submission.generated_ids]
        request = Request(
            submission=submission,
            state=state,
            deadline=now + submission.timeout_s,
            tokens=tokens,
            num_prompt=len(submission.prompt_ids),
            num_submitted=len(tokens),
            max_len=self.max_len(submission),
            stop_ids=self.stop_ids(submission),
            taken=state is State.RESERVED,
            num_draws=1 if submission.generated_ids else submission.sampling.best_of,
        )
        request.stamp(Moment.RECEIVED, now)
        return request

    def refusal(self, submission: Submission, *, shares_prompts: bool) -> tuple[str, str]:
        """Why an offer can never be taken, as reason (SPEC 6.4) and text; both empty when it can."""
        if submission.sampling.best_of > 1 and not shares_prompts:
            return "best_of_needs_prefix_cache", BEST_OF_NEEDS_PREFIX_CACHE
        if submission.timeout_s <= 0:
            return "deadline_passed", "no time is left"
        try:
            self.check(submission, decode_here=True)
        except ContextLengthExceeded as error:
            return "never_fits", error.message
        except RequestError as error:
            return "invalid", error.message
        return "", ""

    def in_vocabulary(self, token_id: int) -> bool:
        """Whether the model knows this token; an id from a peer may lie anywhere."""
        return 0 <= token_id < self._facts.vocab_size

    def _check_blocks(self, submission: Submission, decode_here: bool) -> None:
        tokens = len(submission.prompt_ids) + len(submission.generated_ids)
        if decode_here:
            tokens = max(tokens, self.max_len(submission) - 1)  # the last one is never computed
        need = -(-tokens // self._block_size)
        if need > self._num_blocks:
            raise ContextLengthExceeded(
                f"prompt and answer need {need} KV blocks of {self._block_size} tokens; this "
                f"instance has {self._num_blocks}. Lower max_tokens or raise --max_cache_size"
            )

    def max_len(self, submission: Submission) -> int:
        """Tokens of prompt and answer at which the answer ends."""
        wanted = len(submission.prompt_ids) + submission.sampling.max_tokens
        return min(wanted, self._facts.max_model_len)

    def stop_ids(self, submission: Submission) -> frozenset[int]:
        """Tokens that end the answer."""
        stops = frozenset(submission.sampling.stop_token_ids)
        return stops if submission.sampling.ignore_eos else stops | self._eos


class Tombstones:
    """Ids of requests that were ended before they arrived."""

    def __init__(self) -> None:
        self._until: OrderedDict[tuple[str, int], float] = OrderedDict()

    def bury(self, request_id: str, attempt: int, now: float) -> None:
        """attempt 0 stands for any."""
        self._until[request_id, attempt] = now + TOMBSTONE_S
        self._until.move_to_end((request_id, attempt))  # the oldest stay in front
        while len(self._until) > _MAX_TOMBSTONES:
            self._until.popitem(last=False)

    def has(self, request_id: str, attempt: int, now: float) -> bool:
        """Whether this arrival is dead already."""
        while self._until and next(iter(self._until.values())) < now:
            self._until.popitem(last=False)
        return (request_id, attempt) in self._until or (request_id, 0) in self._until
