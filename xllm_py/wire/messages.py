"""What the API process and the engine process of one instance say to each other.

Frozen dataclasses of plain types, in columns where many; transport/pipe.py turns them into typed msgpack on a private
socketpair. COMMANDS go down, EVENTS come up; the order of the two tables is the wire format, so append only.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from xllm_py.core.config import EngineConfig
from xllm_py.core.plan import Outputs
from xllm_py.core.request import FirstToken, Offer, OfferAnswer, Submission


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """First command: the engine's configuration. Answered by Ready or Failed."""

    config: EngineConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Submit:
    """New requests. A refusal comes back as an output with an error code."""

    submissions: list[Submission]


@dataclass(frozen=True, slots=True, kw_only=True)
class Abort:
    """End requests: their blocks are freed; an id not yet known leaves a tombstone. attempt 0 means all attempts."""

    request_ids: list[str]
    attempts: list[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Offers:
    """D: offers of a giver; answered by Answers with the same (request, attempt)."""

    offers: list[Offer]


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """OfferAnswers: as an event D's word on its way to P, as a command the same word arrived at P."""

    answers: list[OfferAnswer]


@dataclass(frozen=True, slots=True, kw_only=True)
class FirstTokens:
    """D: first tokens sampled by P; answered by FirstTaken."""

    firsts: list[FirstToken]


@dataclass(frozen=True, slots=True, kw_only=True)
class FirstTaken:
    """D's word on FirstTokens as an event; the same word arrived at P as a command. accepted[i]: the grant was known.

    reached[i] False: P's own side says that no answer came, so the token is told again. Empty: all were answered.
    """

    request_ids: list[str]
    attempts: list[int]
    accepted: list[bool]
    reached: list[bool] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerGone:
    """A giver is gone (unlinked, or a new incarnation): its reservations end."""

    incarnation: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspect:
    """Ask for the ledger; answered by Ledger with the same call."""

    call: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Drain:
    """Refuse new work from now on; what runs goes on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FlushCache:
    """Forget the cached prefixes that nobody uses; answered by Ledger with the same call, as things stand afterwards."""

    call: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """Does the KV link to this peer work, and how fast? Answered by Probed with the same call."""

    call: int
    endpoints: tuple[str, ...]  # of its ranks
    incarnation: str
    block_size: int  # the smaller one of both
    fetch: bool = False  # D: fetch from it; else P: push to it


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """The engine can serve; of a rank that plans nothing no more than its device is told."""

    num_blocks: int = 0
    block_size: int = 0
    vocab_size: int = 0
    max_model_len: int = 0
    eos_token_ids: tuple[int, ...] = ()
    dtype: str = ""
    device: str = ""
    model_fingerprint: str = ""
    layout_fingerprint: str = ""
    layout: str = ""  # the same for people
    numerics_fingerprint: str = ""
    kv_endpoints: tuple[str, ...] = ()  # host:port of each KV listener
    kv_token_bytes: int = 0
    summary: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """The engine cannot start, or cannot go on; it ends after this."""

    exit_code: int
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Stepped:
    """What happened to requests; one message per engine step."""

    outputs: Outputs


@dataclass(frozen=True, slots=True, kw_only=True)
class OffersOut:
    """P: please ask these receivers."""

    offers: list[Offer]


@dataclass(frozen=True, slots=True, kw_only=True)
class FirstTokensOut:
    """P: please tell these receivers; receivers[i] is a control address for firsts[i]."""

    receivers: list[str]
    firsts: list[FirstToken]


@dataclass(frozen=True, slots=True, kw_only=True)
class CancelsOut:
    """P: please cancel at these receivers."""

    receivers: list[str]
    request_ids: list[str]
    attempts: list[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdicts:
    """P: how handoffs ended; exactly one per attempt. kinds: landed, refused, lost, cancelled, finished_on_p."""

    request_ids: list[str]
    attempts: list[int]
    kinds: list[str]
    reasons: list[str]
    num_bytes: list[int]
    seconds: list[float]
    exposed: list[float]  # of these seconds, what no computation hid


@dataclass(frozen=True, slots=True, kw_only=True)
class ReservationsEnded:
    """D: reservations that will never run (link lost, expired, giver gone, aborted). P owns their story, so no output says it."""

    request_ids: list[str]
    attempts: list[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Counters for heartbeats and /health: before a step that may be long, about every 50 ms while steps are short, once a second idle."""

    steps: int = 0
    tokens: int = 0
    step_s: float = 0.0  # of the last step
    announced_s: float = 0.0  # a generous estimate of the step that begins now
    waiting: int = 0
    running: int = 0
    blocks: dict[str, int] = field(default_factory=dict)  # the ledger's block counts
    prefix: dict[str, int] = field(default_factory=dict)  # what the prefix cache has counted
    cached: list[bytes] = field(
        default_factory=list
    )  # hashes of blocks that became findable since the last one
    evicted: list[bytes] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ledger:
    """Answer to Inspect: scheduler and transport counts of SPEC 7.7."""

    call: int
    counts: dict[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Probed:
    """Answer to Probe."""

    call: int
    works: bool = False
    reason: str = ""  # why it does not
    round_trip_s: float = 0.0
    bytes_per_s: float = 0.0


Command = (
    Start
    | Submit
    | Abort
    | Offers
    | Answers
    | FirstTokens
    | FirstTaken
    | PeerGone
    | Inspect
    | Drain
    | FlushCache
    | Probe
)
Event = (
    Ready
    | Failed
    | Stepped
    | Answers
    | FirstTaken
    | OffersOut
    | FirstTokensOut
    | CancelsOut
    | Verdicts
    | ReservationsEnded
    | Progress
    | Ledger
    | Probed
)
COMMANDS: tuple[type, ...] = (
    Start,
    Submit,
    Abort,
    Offers,
    Answers,
    FirstTokens,
    FirstTaken,
    PeerGone,
    Inspect,
    Drain,
    FlushCache,
    Probe,
)
EVENTS: tuple[type, ...] = (
    Ready,
    Failed,
    Stepped,
    Answers,
    FirstTaken,
    OffersOut,
    FirstTokensOut,
    CancelsOut,
    Verdicts,
    ReservationsEnded,
    Progress,
    Ledger,
    Probed,
)
