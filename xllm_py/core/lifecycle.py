"""How the choices of a request begin to decode and how they end: what leaves which queue, who gets blocks back, what is told.

Used by the scheduler alone, which says when; states move along the table of core/request.
"""

from __future__ import annotations

from xllm_py.core.admission import Tombstones
from xllm_py.core.batch import Batch
from xllm_py.core.block_manager import BlockManager
from xllm_py.core.journey import Moment
from xllm_py.core.open_requests import OpenRequests
from xllm_py.core.outbox import Outbox
from xllm_py.core.plan import StepResult
from xllm_py.core.request import HOLDS_BLOCKS, Request, State
from xllm_py.core.reservations import Reservations


class Lifecycle:
    """Of all requests of one engine; the parts it changes are the scheduler's."""

    def __init__(
        self,
        *,
        blocks: BlockManager,
        batch: Batch,
        reservations: Reservations,
        tombstones: Tombstones,
        open_requests: OpenRequests,
        outbox: Outbox,
    ) -> None:
        self._blocks = blocks
        self._batch = batch
        self._reservations = reservations
        self._tombstones = tombstones
        self._open = open_requests
        self._outbox = outbox
        self.num_forked = 0  # choices that began behind another's prompt, since the start

    def decode(self, request: Request, now: float) -> None:
        """The first tokens are known and it goes on here: every choice whose first token was not its last begins to decode.

        They share the blocks of the prompt, of which nothing is computed or stored again.
        """
        if request not in self._batch.running:
            self._batch.run(request)
        for choice, token in enumerate(request.first_ids[1:], start=1):
            sibling = request.fork(choice, token)
            sibling.shares_tail = request.num_submitted % self._blocks.block_size != 0
            if sibling.complete:
                self._outbox.put_taken(request, choice)
            else:
                self._blocks.share(sibling.block_ids)
                self._open.add(sibling)
                sibling.stamp(Moment.DECODING, now)
                self._batch.run(sibling)
                self.num_forked += 1
        if request.complete:
            self._outbox.put_taken(request, 0)
            self.close(request, now)
        else:
            request.stamp(Moment.DECODING, now)

    def on_first(
        self, request: Request, result: StepResult, at: int, draws: int, now: float
    ) -> None:
        """The first token of each choice, drawn from the same logits; what follows is decided for all together."""
        request.stamp(Moment.FIRST_TOKEN, now)
        request.first_ids, request.num_draws = tuple(result.token_ids[at : at + draws]), 1
        if not request.to_give:
            request.stamp(Moment.DECODING, now)
        self._outbox.put_first(request, result, at)
        all_ended = all(map(request.finish_by, request.first_ids))
        request.tokens.append(request.first_ids[0])
        if all_ended:
            self.close(request, now)
        elif request.to_give:
            self._batch.remove(request)
            request.move(State.GIVING)
        else:
            self.decode(request, now)

    def finish(self, request: Request, reason: str, now: float, message: str = "") -> None:
        """End a request, all its choices, with an entry that carries no token.

        A reservation ends in silence, P owns its story.
        """
        reserved = request.state is State.RESERVED
        for choice in self._open.choices(request.request_id):
            self.close(choice, now)
        if reserved:
            return
        entry = self._outbox.put_end(request.submission, reason, message, request.num_generated)
        self._outbox.describe(request, entry)

    def close(self, request: Request, now: float) -> None:
        """One choice leaves every queue, gives everything back, and is forgotten."""
        if request.state is State.RESERVED:
            self._reservations.end(request)
            self._tombstones.bury(request.request_id, request.submission.attempt, now)
        else:
            self._batch.remove(request)
            if request.state in HOLDS_BLOCKS:
                self._blocks.free(request.block_ids)
                request.block_ids = []
        request.stamp(Moment.FINISHED, now)
        request.move(State.FINISHED)
        if self._open.remove(request):
            self._reservations.ran(request)
