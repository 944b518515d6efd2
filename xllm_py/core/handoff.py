"""The giver's half of a handoff as a table; the taker's half is core/reservations, whose two facts are in its docstring.

P gives, D takes. Events go in, actions come out; engine/handoff_agent acts them out. `now` is a parameter.

    OFFERED --granted--> PUSHING --prompt computed, all pushed, first token--> COMMITTED --acknowledged, told--> DONE
       |                    |                                    link failed, first token not taken '--> LOST
       '---- refused, unreachable, link failed before COMMIT ----> KEPT (decode here) or FAILED
    any of OFFERED, PUSHING, COMMITTED --request ended on P (whole answer, abort, deadline)--> CANCELLED

Who owns the request? Until COMMIT has left, P alone: D cannot run without a verified COMMIT, so P may cancel the grant and
decode here. After COMMIT has left and before the acknowledgement, perhaps D: P must not decode, and when the link fails now
the attempt is lost and its client gets an error. After the acknowledgement, D alone, and only then are P's blocks free. The
first token is told beside the KV; D's word that it knows the grant is needed too, else nobody would ever run the request.

Each handoff ends in exactly one closed state and says exactly one Verdict.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from xllm_py.base.errors import IllegalTransition
from xllm_py.core.request import OfferAnswer

OFFER_FIRST_WAIT_S = 0.05
OFFER_MOST_WAIT_S = 1.0
OFFER_TOTAL_S = 2.0  # a decode instance that is full for so long is not asked again
FIRST_TRIES = 3  # deliveries of the first token
FIRST_WAIT_S = 0.05  # before the second one; longer before the third
REPEATABLE = frozenset({"not_linked", "stale_incarnation"})  # one repeat

# what the client sees at last, when nobody else takes the request; all other reasons mean 429 no_decode_capacity
CODE_OF_REFUSAL = {
    "never_fits": "context_length_exceeded",
    "best_of_needs_prefix_cache": "best_of_requires_prefix_cache",
    "draining": "draining",
    "layout_differs": "no_compatible_decode",
    "model_differs": "no_compatible_decode",
    "unsupported_feature": "unsupported_value",
    "deadline_passed": "deadline_exceeded",
    "invalid": "internal_error",
    "unreachable": "instance_lost",
}
# what a client is told of a peer that failed: the failure's own words name addresses
UNREACHABLE = "the decode instance cannot be reached; send the request again"


class GiverState(Enum):
    """Where a handoff stands on P."""

    OFFERED = "offered"
    WAITING = "waiting"  # refused for now, will be offered again
    PUSHING = "pushing"
    COMMITTED = "committed"
    DONE = "done"
    KEPT = "kept"
    LOST = "lost"
    FAILED = "failed"
    CANCELLED = "cancelled"


CLOSED = frozenset(
    {
        GiverState.DONE,
        GiverState.KEPT,
        GiverState.LOST,
        GiverState.FAILED,
        GiverState.CANCELLED,
    }
)
_O, _W, _P, _C = (
    GiverState.OFFERED,
    GiverState.WAITING,
    GiverState.PUSHING,
    GiverState.COMMITTED,
)
TRANSITIONS: frozenset[tuple[GiverState, GiverState]] = frozenset(
    {
        (_O, _W),
        (_W, _O),
        (_O, _P),
        (_P, _C),
        (_C, GiverState.DONE),
        (_C, GiverState.LOST),
        *((state, GiverState.KEPT) for state in (_O, _W, _P)),
        *((state, GiverState.FAILED) for state in (_O, _W, _P)),
        *((state, GiverState.CANCELLED) for state in (_O, _W, _P, _C)),
    }
)


@dataclass(frozen=True, slots=True)
class SendOffer:
    """Ask D (again)."""


@dataclass(frozen=True, slots=True)
class Connect:
    """D granted: make the grant known to the transport."""

    answer: OfferAnswer


@dataclass(frozen=True, slots=True)
class Push:
    """Send these relative blocks, all layers."""

    first: int
    count: int


@dataclass(frozen=True, slots=True)
class Commit:
    """Everything was pushed."""


@dataclass(frozen=True, slots=True)
class SendFirst:
    """Tell D the first token (again)."""


@dataclass(frozen=True, slots=True)
class FreeBlocks:
    """D owns the request."""


@dataclass(frozen=True, slots=True)
class Keep:
    """Decode here."""


@dataclass(frozen=True, slots=True)
class Fail:
    """End the request with this error."""

    code: str
    message: str


@dataclass(frozen=True, slots=True)
class CancelPeer:
    """D shall drop its reservation."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """The one word the master gets per attempt: landed, refused, lost, cancelled or finished_on_p."""

    kind: str
    reason: str = ""


Action = (
    SendOffer
    | Connect
    | Push
    | Commit
    | SendFirst
    | FreeBlocks
    | Keep
    | Fail
    | CancelPeer
    | Verdict
)


class Giver:
    """One handoff on P."""

    def __init__(self, *, now: float, deadline: float, local_decode: bool, jitter: float) -> None:
        """jitter: in [0, 1), drawn by the caller; spreads the repeats of many givers."""
        self.state = GiverState.OFFERED
        self.next_tick: float | None = None
        self._num_blocks = 0  # of the prompt, as D counts them
        self._deadline = deadline
        self._local_decode = local_decode
        self._jitter = jitter
        self._give_up_at = now + OFFER_TOTAL_S
        self._wait_s = OFFER_FIRST_WAIT_S
        self._repeated = False
        self._granted = False
        self._pushed = 0
        self._first_known = False
        self._first_tries = 0
        self._first_taken = False
        self._acknowledged = False

    @property
    def closed(self) -> bool:
        """Nothing more will come of it."""
        return self.state in CLOSED

    def _move(self, to: GiverState) -> None:
        if (self.state, to) not in TRANSITIONS:
            raise IllegalTransition("giver", self.state.value, to.value)
        self.state = to
        if to in CLOSED:
            self.next_tick = None

    def start(self) -> list[Action]:
        """The request was admitted on P."""
        return [SendOffer()]

    def on_answer(self, answer: OfferAnswer, now: float) -> list[Action]:
        """D granted or refused. An answer that nobody waits for any more is passed over."""
        if self.state is not GiverState.OFFERED:
            return []
        if answer.grant:
            self._move(GiverState.PUSHING)
            self._granted = True
            self._num_blocks, self._pushed = answer.num_blocks, answer.num_held_blocks
            return [Connect(answer), *self._advance()]
        wait_s = self._wait_before_repeat(answer, now)
        if wait_s is None:
            code = CODE_OF_REFUSAL.get(answer.refusal, "no_decode_capacity")
            text = UNREACHABLE if answer.refusal == "unreachable" else answer.text
            return self._give_up("refused", answer.refusal, code, text)
        self._move(GiverState.WAITING)
        self.next_tick = now + wait_s
        return []

    def _wait_before_repeat(self, answer: OfferAnswer, now: float) -> float | None:
        """Seconds, or None when asking again is pointless."""
        if answer.refusal in REPEATABLE and not self._repeated:
            self._repeated = True
            return 0.0
        if answer.refusal != "full_now":
            return None
        wait_s = max(self._wait_s, answer.retry_after_s) * (1.0 + self._jitter)
        self._wait_s = min(self._wait_s * 2, OFFER_MOST_WAIT_S)
        return wait_s if now + wait_s < min(self._give_up_at, self._deadline) else None

    def on_tick(self, now: float) -> list[Action]:
        """The time of `next_tick` has come."""
        if self.next_tick is None or now < self.next_tick:
            return []
        self.next_tick = None
        if self.state is GiverState.WAITING:
            self._move(GiverState.OFFERED)
            return [SendOffer()]
        self._first_tries += 1
        return [SendFirst()]

    def claim(self, num_complete: int) -> tuple[int, int]:
        """(first, count) of blocks to push while the step that completes them runs; they count as pushed then."""
        if self.state is not GiverState.PUSHING or num_complete <= self._pushed:
            return self._pushed, 0
        first, self._pushed = self._pushed, num_complete
        return first, num_complete - first

    def unclaim(self, first: int) -> None:
        """The step did not complete them: from this block on they are pushed again."""
        self._pushed = min(self._pushed, first)

    def on_computed(self, num_complete: int, first_known: bool) -> list[Action]:
        """After a step: blocks whose KV is final, and whether the first token was sampled."""
        self._first_known = self._first_known or first_known
        if self.state is not GiverState.PUSHING:
            return []
        first, count = self.claim(num_complete)
        return [*([Push(first, count)] if count else []), *self._advance()]

    def _advance(self) -> list[Action]:
        """Commit once the prompt is pushed and the first token known."""
        ready = self._first_known and self._pushed >= self._num_blocks
        if self.state is not GiverState.PUSHING or not ready:
            return []
        self._move(GiverState.COMMITTED)
        self._first_tries = 1
        return [Commit(), SendFirst()]

    def on_first_delivered(self, accepted: bool, reached: bool, now: float) -> list[Action]:
        """D's word on the first token. reached False: no answer came, so it is told again, a few times."""
        if self.state is not GiverState.COMMITTED or self._first_taken:
            return []
        if accepted:
            self._first_taken = True
            self.next_tick = None
            return self._finish_when_both()
        if not reached and self._first_tries < FIRST_TRIES:
            self.next_tick = now + FIRST_WAIT_S * self._first_tries * (1.0 + self._jitter)
            return []
        reason = "grant unknown" if reached else "first token not delivered"
        return self._lose(reason)

    def on_acknowledged(self) -> list[Action]:
        """D verified the COMMIT."""
        if self.state is not GiverState.COMMITTED:
            return []
        self._acknowledged = True
        return self._finish_when_both()

    def _finish_when_both(self) -> list[Action]:
        if not (self._acknowledged and self._first_taken):
            return []
        self._move(GiverState.DONE)
        return [FreeBlocks(), Verdict("landed")]

    def on_link_failed(self, text: str) -> list[Action]:
        """The transport gave the grant up."""
        if self.state is GiverState.COMMITTED:
            return [] if self._acknowledged else self._lose(text)
        if self.state is GiverState.PUSHING:
            return self._give_up("lost", text, "instance_lost", UNREACHABLE)
        return []

    def _lose(self, reason: str) -> list[Action]:
        """D may own it already: P must neither decode nor say it landed."""
        self._move(GiverState.LOST)
        message = "the handoff to the decode instance was lost; send the request again"
        return [CancelPeer(), Fail("instance_lost", message), Verdict("lost", reason)]

    def _give_up(self, kind: str, reason: str, code: str, text: str) -> list[Action]:
        """D cannot own it: decode here when that is allowed."""
        cancel: list[Action] = [CancelPeer()] if self._granted or reason == "unreachable" else []
        if self._local_decode:
            self._move(GiverState.KEPT)
            return [*cancel, Keep(), Verdict(kind, reason)]
        self._move(GiverState.FAILED)
        return [*cancel, Fail(code, text or reason), Verdict(kind, reason)]

    def on_ended(self, complete: bool) -> list[Action]:
        """The request ended on P by itself. complete: its first token is the whole answer; else it was aborted or late."""
        if self.closed:
            return []
        self._move(GiverState.CANCELLED)
        return [CancelPeer(), Verdict("finished_on_p" if complete else "cancelled")]
