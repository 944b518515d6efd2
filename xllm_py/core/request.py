"""Submission (frozen, travels) and Request (the engine's own, with its transition table).

    WAITING --admitted--> RUNNING --first token, receiver named--> GIVING --landed--> FINISHED
       ^                    | |                                       +--refused/lost--> RUNNING (keep it) or FINISHED
       +----preempted-------+ +--stop, length, abort, deadline--> FINISHED
    RESERVED --landed AND first token--> RUNNING        RESERVED --lost/expired--> FINISHED

Blocks are held in RUNNING, GIVING and RESERVED and in no other state.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from xllm_py.base.errors import IllegalTransition
from xllm_py.base.logprob import TokenLogprob
from xllm_py.core.journey import Moment
from xllm_py.core.plan import FINISH_LENGTH, FINISH_STOP
from xllm_py.core.sampling import SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class Receiver:
    """The decode instance that is to take a request over."""

    name: str
    address: str  # host:disagg_pd_port
    incarnation: str


MAX_ORIGIN = 256 << 10  # bytes of Submission.origin


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """A request on its way to an engine; complete in itself, so that it can be sent again elsewhere."""

    request_id: str
    attempt: int = 1
    prompt_ids: tuple[int, ...]
    generated_ids: tuple[int, ...] = ()  # already in the token log of an earlier attempt
    sampling: SamplingParams
    timeout_s: float = 600.0  # what is left until the deadline, at the moment of sending
    receiver: Receiver | None = None  # None: decode here
    master: str = ""  # host:rpc_port the tokens go to; empty: this instance's own HTTP door
    relay: bool = False  # tokens go D -> P -> master instead of D -> master
    model: str = ""  # the served name the client asked for; empty: any
    cache_salt: str = ""  # only requests with the same salt share cached prefixes
    priority: int = 0  # 1 high, 2 normal, 3 low; 0: normal
    offline: bool = False  # may wait, and gives way to those that are not
    ttft_slo_ms: float = 0.0  # what the client hopes for; 0: nothing in particular
    tpot_slo_ms: float = 0.0
    trace: str = ""  # the client's `traceparent` with a span of ours; empty: none
    stream_id: str = ""  # under which the client may ask another master for it; empty: it will not
    origin: bytes = (
        b""  # what another master needs to make the answer; empty: only the client has it
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """P asks D to take a request: everything decoding needs, and who asks."""

    submission: Submission  # receiver is D itself
    giver_name: str
    giver_address: str  # host:disagg_pd_port of P, for relayed tokens
    giver_incarnation: str
    model_fingerprint: str
    layout_fingerprint: str
    block_size: int  # tokens, of P
    read_grant: bytes = (
        b""  # 16 random bytes of P's: D is to fetch with them (PULL); empty: P pushes
    )
    # P's KV listeners, where D fetches, one per rank; D believes those that P's card has too
    endpoints: tuple[str, ...] = ()
    num_ranks: int = 1  # of P; D has it from the card


@dataclass(frozen=True, slots=True, kw_only=True)
class OfferAnswer:
    """D's word: a grant, or a refusal with a reason of SPEC 6.4. `grant` is empty in a refusal."""

    request_id: str
    attempt: int
    grant: bytes = b""  # 16 random bytes
    block_size: int = 0  # tokens of the blocks that are granted: the smaller one of P and D
    num_held_blocks: int = 0  # leading blocks D already has
    num_blocks: int = 0  # blocks of the prompt in all
    endpoints: tuple[str, ...] = ()  # host:port of the KV listener, one per rank
    stream: int = 0  # over which of its links to P D fetches
    expires_s: float = 0.0
    refusal: str = ""
    text: str = ""
    retry_after_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class FirstToken:
    """P tells D the token it sampled for each choice, beside the KV."""

    request_id: str
    attempt: int
    grant: bytes
    token_ids: tuple[int, ...]
    cached_tokens: int = 0


class State(Enum):
    """Where a request stands in its engine."""

    WAITING = "waiting"
    RUNNING = "running"
    GIVING = "giving"
    RESERVED = "reserved"
    FINISHED = "finished"


TRANSITIONS: frozenset[tuple[State, State]] = frozenset(
    {
        (State.WAITING, State.RUNNING),  # admitted
        (State.WAITING, State.FINISHED),  # aborted, deadline
        (State.RUNNING, State.WAITING),  # preempted: blocks freed, tokens kept
        (State.RUNNING, State.GIVING),  # first token, receiver named
        (State.RUNNING, State.FINISHED),
        (State.GIVING, State.FINISHED),  # acknowledged, or lost
        (State.GIVING, State.RUNNING),  # nobody took it: decode here
        (State.RESERVED, State.RUNNING),  # landed and first token known
        (State.RESERVED, State.FINISHED),
    }
)
HOLDS_BLOCKS = frozenset({State.RUNNING, State.GIVING, State.RESERVED})


@dataclass(slots=True, kw_only=True, eq=False)
class Request:
    """One choice of a submission inside an engine. Owned and changed by the scheduler alone.

    Only choice 0 waits, is given or is reserved; the others begin when the first tokens are known, sharing its blocks.
    """

    submission: Submission
    state: State
    deadline: float  # monotonic seconds
    tokens: list[int]  # prompt, then generated
    num_prompt: int
    num_submitted: (
        int  # tokens that came with the submission: prompt, and what an earlier attempt generated
    )
    choice: int = 0
    max_len: int  # prompt and answer end here
    stop_ids: frozenset[int]  # any of these ends the answer
    num_computed: int = 0  # leading tokens whose KV is in the cache
    num_cached: int = 0  # of the prompt, found in the prefix cache when first admitted
    block_ids: list[int] = field(default_factory=list)
    hashes: list[bytes] = field(default_factory=list)  # of its leading full blocks, as far as known
    publish_at: int = 0  # with so many tokens computed, another block can be shared
    shares_tail: bool = False  # its last block, half full, is another choice's: copy before writing
    num_draws: int = 1  # tokens to draw at once for the next position: best_of for the first one
    first_ids: tuple[int, ...] = ()  # first token of each choice, from then on
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)  # until the first token
    row: int = -1  # batch row, -1 when it has none
    lane: int = -1  # its place among the decodes, -1 when it has none
    order: tuple[float, int] = (0.0, 0)  # among those that run
    num_preemptions: int = 0
    taken: bool = False  # it came by an offer: the receiver is this instance
    kept: bool = False  # nobody took it: it decodes here although a receiver was named
    journey: dict[Moment, float] = field(default_factory=dict)

    @property
    def request_id(self) -> str:
        """The submission's id."""
        return self.submission.request_id

    @property
    def tag(self) -> tuple[str, int]:
        """What marks its blocks as its own; the choices share it."""
        return self.submission.request_id, self.submission.attempt

    @property
    def num_generated(self) -> int:
        """Tokens after the prompt; also the position of the next one."""
        return len(self.tokens) - self.num_prompt

    @property
    def num_due(self) -> int:
        """Tokens known but not computed: what a step can work on. There are no phases."""
        return len(self.tokens) - self.num_computed

    @property
    def to_score(self) -> bool:
        """Whether the logprobs of its prompt are still due, so that all of the prompt has to be computed."""
        return self.submission.sampling.prompt_logprobs >= 0 and not self.num_generated

    @property
    def num_reusable(self) -> int:
        """Leading tokens that need not be computed where their KV is found: one at least is computed."""
        return 0 if self.to_score else len(self.tokens) - 1

    @property
    def to_give(self) -> bool:
        """Whether it is to be handed to another instance after its first token."""
        return self.submission.receiver is not None and not self.kept and not self.taken

    @property
    def complete(self) -> bool:
        """Whether the answer has come to its own end, by length or by a stop token."""
        grown = len(self.tokens) > self.num_submitted
        return grown and (len(self.tokens) >= self.max_len or self.tokens[-1] in self.stop_ids)

    def finish_by(self, token_id: int) -> str:
        """How the answer ends when this is its next token; empty: it goes on."""
        if token_id in self.stop_ids:
            return FINISH_STOP
        return FINISH_LENGTH if len(self.tokens) + 1 >= self.max_len else ""

    def fork(self, choice: int, token_id: int) -> Request:
        """Another choice behind the same prompt, with its own first token; the caller sees to the blocks.

        self: choice 0 behind its own first token, with all of the prompt computed and nothing more.
        """
        prompt = self.tokens[: self.num_submitted]
        return Request(
            submission=self.submission,
            state=State.RUNNING,
            deadline=self.deadline,
            tokens=[*prompt, token_id],
            num_prompt=self.num_prompt,
            num_submitted=self.num_submitted,
            choice=choice,
            max_len=self.max_len,
            stop_ids=self.stop_ids,
            num_computed=self.num_submitted,
            num_cached=self.num_cached,
            block_ids=list(self.block_ids),
            hashes=list(self.hashes),
            publish_at=self.publish_at,
            first_ids=self.first_ids,
            taken=self.taken,
            kept=self.kept,
            journey=dict(self.journey),
        )

    def move(self, to: State) -> None:
        """Change state along the table, or raise IllegalTransition."""
        if (self.state, to) not in TRANSITIONS:
            raise IllegalTransition(f"request {self.request_id}", self.state.value, to.value)
        self.state = to

    def stamp(self, moment: Moment, now: float) -> None:
        """Note when a moment happened; the first time counts."""
        self.journey.setdefault(moment, now)

    def journey_s(self) -> dict[str, float]:
        """The moments so far, as seconds since this engine received the request."""
        start = self.journey.get(Moment.RECEIVED, 0.0)
        return {moment.value: at - start for moment, at in self.journey.items()}
