"""Reservations on D: what has been promised to givers, and what is still missing before it may run.

    reserve -> RESERVED --landed AND first token--> the scheduler runs it
                   '--lost, aborted, expired--> ended: the grant is open still, the blocks are quarantined until released

Used by the scheduler alone; the request itself and its state belong to the scheduler.
"""

from __future__ import annotations

from dataclasses import dataclass

from xllm_py.core.block_manager import BlockManager, Holding
from xllm_py.core.request import FirstToken, OfferAnswer, Request


@dataclass(slots=True)
class _Reservation:
    grant: bytes
    expires: float
    landed: bool = False
    first: FirstToken | None = None


class Reservations:
    """All reservations of one engine."""

    def __init__(self, ttl_s: float, blocks: BlockManager) -> None:
        self._ttl_s = ttl_s
        self._blocks = blocks
        self._open: dict[str, tuple[Request, _Reservation]] = {}
        self._run: dict[str, bytes] = {}  # requests that came by a grant, while they run
        self._ended: list[tuple[str, int, bytes]] = []
        self._quarantine: dict[tuple[str, int], list[int]] = {}

    @property
    def next_expiry(self) -> float:
        """When the first reservation expires."""
        return min((held.expires for _, held in self._open.values()), default=float("inf"))

    def open(self, request: Request, grant: bytes, now: float) -> OfferAnswer:
        """Take the blocks of the prompt; the caller has checked that they are free."""
        count = self._blocks.blocks_for(len(request.tokens))
        request.block_ids = self._blocks.allocate(count, Holding.STAGED)
        self._open[request.request_id] = (request, _Reservation(grant, now + self._ttl_s))
        return self._answer(request, grant)

    def repeat(self, request: Request, now: float) -> OfferAnswer:
        """The same offer again: the same grant, with a new expiry; or, when it runs already, the grant it came by."""
        if request.request_id in self._open:
            held = self._open[request.request_id][1]
            held.expires = now + self._ttl_s
            return self._answer(request, held.grant)
        if request.request_id in self._run:
            return self._answer(request, self._run[request.request_id])
        return OfferAnswer(
            request_id=request.request_id,
            attempt=request.submission.attempt,
            refusal="invalid",
            text="the request is here already and did not come by an offer",
        )

    def _answer(self, request: Request, grant: bytes) -> OfferAnswer:
        return OfferAnswer(
            request_id=request.request_id,
            attempt=request.submission.attempt,
            grant=grant,
            num_blocks=self._blocks.blocks_for(request.num_prompt),
            expires_s=self._ttl_s,
        )

    @property
    def num_open(self) -> int:
        """Reservations that do not run yet."""
        return len(self._open)

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

    def ran_by(self, request: Request, grant: bytes) -> bool:
        """Whether a running request came by this grant: its first token was told twice."""
        return self._run.get(request.request_id) == grant

    def close_when_complete(self, request: Request) -> FirstToken | None:
        """When nothing is missing any more: the reservation is over, the first token comes back."""
        held = self._open[request.request_id][1]
        if not held.landed or held.first is None:
            return None
        del self._open[request.request_id]
        self._run[request.request_id] = held.grant
        return held.first

    def forget(self, request_id: str) -> None:
        """A request that came by a grant has ended."""
        self._run.pop(request_id, None)

    def end(self, request: Request) -> None:
        """It will never run: the blocks wait until the transport says that nothing can be written any more."""
        _, held = self._open.pop(request.request_id)
        key = (request.request_id, request.submission.attempt)
        self._ended.append((*key, held.grant))
        self._blocks.move(request.block_ids, Holding.STAGED, Holding.QUARANTINED)
        self._quarantine[key] = request.block_ids
        request.block_ids = []

    def take_ended(self) -> list[tuple[str, int, bytes]]:
        """Those that ended since the last call."""
        ended, self._ended = self._ended, []
        return ended

    def released(self, request_id: str, attempt: int) -> None:
        """Free the quarantined blocks; harmless when there are none."""
        blocks = self._quarantine.pop((request_id, attempt), None)
        if blocks is not None:
            self._blocks.free(blocks, Holding.QUARANTINED)

    def expired(self, now: float) -> list[Request]:
        """Reservations without a sign of life for too long; the caller ends them."""
        return [request for request, held in self._open.values() if held.expires <= now]

    def assert_empty(self) -> None:
        """Nothing is promised and nothing waits for release."""
        assert not self._open and not self._run and not self._quarantine
