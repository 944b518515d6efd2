"""Reservations on D: what has been promised to givers, and what is still missing before it may run.

    reserve -> RESERVED --landed AND first token--> the scheduler runs it
                   '--lost, aborted, expired--> ended: the grant is open still, the blocks are quarantined until released

Used by the scheduler alone; the request itself and its state belong to the scheduler.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from xllm_py.core.block_manager import BlockManager, Holding
from xllm_py.core.prefix_cache import PrefixCache
from xllm_py.core.request import FirstToken, OfferAnswer, Request, Submission

_MAX_PAST = 1000  # grants remembered after their request ended
_FULL_RETRY_S = 0.05


@dataclass(slots=True)
class _Reservation:
    grant: bytes
    expires: float
    num_held: int  # leading blocks that the prefix cache had; the giver writes the others
    landed: bool = False
    released: bool = False  # the transport forgot the grant after it had landed
    first: FirstToken | None = None


class Reservations:
    """All reservations of one engine."""

    def __init__(self, ttl_s: float, blocks: BlockManager, prefix: PrefixCache) -> None:
        self._ttl_s = ttl_s
        self._blocks = blocks
        self._prefix = prefix
        self._open: dict[str, tuple[Request, _Reservation]] = {}
        self._run: dict[str, _Reservation] = {}  # of requests that came by a grant, while they run
        self._past: OrderedDict[tuple[str, int], bytes] = OrderedDict()  # the same, ended since
        self._ended: list[
            tuple[str, int, bytes]
        ] = []  # since the last look; an empty grant is closed already
        self._quarantine: dict[tuple[str, int], list[int]] = {}

    @property
    def next_expiry(self) -> float:
        """When the first reservation expires."""
        return min((held.expires for _, held in self._open.values()), default=float("inf"))

    def need(self, submission: Submission) -> int:
        """Blocks that a reservation would take from those that can be allocated."""
        ids = submission.prompt_ids + submission.generated_ids
        found = self._prefix.find_ids(ids, submission.cache_salt)
        return self._blocks.blocks_for(len(ids)) - len(found) + self._blocks.num_idle(found)

    def open(self, request: Request, grant: bytes, now: float) -> OfferAnswer:
        """Take the blocks of the prompt, those that are here already first; the caller has checked that there is room."""
        # nothing of a prompt is computed here, so all of it may be there already
        found = self._prefix.find(request, len(request.tokens))
        count = self._blocks.blocks_for(len(request.tokens)) - len(found)
        self._blocks.acquire(found, Holding.STAGED)
        request.block_ids = found + self._blocks.allocate(count, Holding.STAGED, request.tag)
        self._prefix.begin(request, len(found))
        self._prefix.note(len(request.tokens), len(found) * self._blocks.block_size)
        reservation = _Reservation(grant, now + self._ttl_s, num_held=len(found))
        self._open[request.request_id] = (request, reservation)
        return self._answer(request, reservation)

    def repeat(self, request: Request, attempt: int, now: float) -> OfferAnswer:
        """The same offer again: the same grant, with a new expiry; or, when it runs already, the grant it came by."""
        if request.submission.attempt != attempt:
            text = "a later attempt of the request is here already"
            return refusal(request.request_id, attempt, "cancelled", text)
        if request.request_id in self._open:
            held = self._open[request.request_id][1]
            held.expires = now + self._ttl_s
            return self._answer(request, held)
        if request.request_id in self._run:
            return self._answer(request, self._run[request.request_id])
        text = "the request is here already and did not come by an offer"
        return refusal(request.request_id, attempt, "invalid", text)

    def _answer(self, request: Request, held: _Reservation) -> OfferAnswer:
        return OfferAnswer(
            request_id=request.request_id,
            attempt=request.submission.attempt,
            grant=held.grant,
            block_size=self._blocks.block_size,
            num_held_blocks=held.num_held,
            num_blocks=self._blocks.blocks_for(request.num_submitted),
            expires_s=self._ttl_s,
        )

    @property
    def num_open(self) -> int:
        """Reservations that do not run yet."""
        return len(self._open)

    def renew(self, request: Request, now: float) -> None:
        """A sign of life of the giver."""
        self._open[request.request_id][1].expires = now + self._ttl_s

    def on_landed(self, request: Request) -> None:
        """Its KV is in place."""
        self._open[request.request_id][1].landed = True

    def on_first_token(self, request: Request, first: FirstToken, now: float) -> bool:
        """Note it, when the grant is the right one; a sign of life of the giver."""
        held = self._open[request.request_id][1]
        if held.grant != first.grant:
            return False
        held.first = first
        held.expires = now + self._ttl_s
        return True

    def ran_by(self, first: FirstToken) -> bool:
        """Whether a request that runs or has ended came by this grant: its first token was told twice."""
        past = self._past.get((first.request_id, first.attempt))
        running = self._run.get(first.request_id)
        return first.grant in (past, running.grant if running is not None else None)

    def has_run(self, request_id: str, attempt: int) -> bool:
        """Whether a request came by a grant and ended lately."""
        return (request_id, attempt) in self._past

    def close_when_complete(self, request: Request) -> FirstToken | None:
        """When nothing is missing any more: the reservation is over, the first token comes back."""
        held = self._open[request.request_id][1]
        if not held.landed or held.first is None:
            return None
        del self._open[request.request_id]
        self._run[request.request_id] = held
        return held.first

    def ran(self, request: Request) -> None:
        """A running request has ended; its grant is remembered for a while, when it came by one."""
        held = self._run.pop(request.request_id, None)
        if held is not None:
            self._past[request.request_id, request.submission.attempt] = held.grant
            if len(self._past) > _MAX_PAST:
                self._past.popitem(last=False)

    def end(self, request: Request) -> None:
        """It will never run: the blocks wait until the transport says that nothing can be written any more."""
        _, held = self._open.pop(request.request_id)
        key = (request.request_id, request.submission.attempt)
        self._ended.append((*key, b"" if held.released else held.grant))
        shared, written = request.block_ids[: held.num_held], request.block_ids[held.num_held :]
        self._blocks.free(shared, Holding.STAGED)
        if held.released:
            self._blocks.free(written, Holding.STAGED)
        else:
            self._blocks.move(written, Holding.STAGED, Holding.QUARANTINED)
            self._quarantine[key] = written
        request.block_ids = []

    def take_ended(self) -> list[tuple[str, int, bytes]]:
        """Those that ended since the last call."""
        ended, self._ended = self._ended, []
        return ended

    def released(self, request_id: str, attempt: int) -> None:
        """Free the quarantined blocks, or note that they will need no quarantine; harmless when there are none."""
        blocks = self._quarantine.pop((request_id, attempt), None)
        if blocks is not None:
            self._blocks.free(blocks, Holding.QUARANTINED)
            return
        request, held = self._open.get(request_id, (None, None))
        if request is not None and held is not None and request.submission.attempt == attempt:
            held.released = True

    def expired(self, now: float) -> list[Request]:
        """Reservations without a sign of life for too long; the caller ends them."""
        return [request for request, held in self._open.values() if held.expires <= now]

    def assert_empty(self) -> None:
        """Nothing is promised and nothing waits for release."""
        assert not self._open and not self._run and not self._quarantine


def refusal(request_id: str, attempt: int, reason: str, text: str) -> OfferAnswer:
    """D says no, with a reason of SPEC 6.4; one that is only full for now is worth asking again soon."""
    return OfferAnswer(
        request_id=request_id,
        attempt=attempt,
        refusal=reason,
        text=text,
        retry_after_s=_FULL_RETRY_S if reason == "full_now" else 0.0,
    )
