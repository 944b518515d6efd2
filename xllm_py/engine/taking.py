"""D's side of handoffs: reserves, opens grants, lets requests run once they are complete.

Part of engine/handoff_agent. A block that the transport may still write is never given to another request: when a reservation
ends, its grant is revoked and its blocks wait in quarantine until the transport says RELEASED.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

from xllm_py.base import ids, log
from xllm_py.base.hashing import prompt_digest
from xllm_py.core.kv_memory import KvLayout, in_pieces
from xllm_py.core.kv_plan import Ranks, can_share
from xllm_py.core.request import Offer, OfferAnswer
from xllm_py.core.scheduler import Scheduler
from xllm_py.transport.base import KvEvent, KvEventKind, KvTransport, TakerGrant
from xllm_py.wire import messages as m

_log = log.get(__name__)


@dataclass(frozen=True, slots=True)
class _Taking:
    """Of one grant."""

    request_id: str
    attempt: int
    peer: str  # incarnation of the giver
    stream: int  # over which of the links to it we fetch


class TakingAgent:
    """All grants this D has given out."""

    def __init__(
        self,
        *,
        scheduler: Scheduler,
        transport: KvTransport | None,
        model_fingerprint: str,
        layout: KvLayout,
        send: Callable[[m.Event], None],
        ranks: Ranks,
    ) -> None:
        self._ranks = ranks
        self._scheduler = scheduler
        self._transport = transport
        self._model_fingerprint = model_fingerprint
        self._layout = layout
        self._send = send
        self._taking: dict[bytes, _Taking] = {}  # by grant

    @property
    def num_open(self) -> int:
        """Grants the transport still knows, for the ledger."""
        return len(self._taking)

    def on_transport(self, event: KvEvent, now: float) -> None:
        """Take an event of one of our grants; others are passed over."""
        taking = self._taking.get(event.grant)
        if taking is None or self._transport is None:
            return
        request_id, attempt = taking.request_id, taking.attempt
        if event.kind is KvEventKind.RECEIVING:
            self._scheduler.on_receiving(request_id, attempt, now)
        elif event.kind is KvEventKind.LANDED:
            self._scheduler.on_landed(request_id, attempt, now)
            self._transport.revoke(event.grant)  # one commit per grant: forget it
        elif event.kind is KvEventKind.FAILED:
            _log.warning("reservation lost", request=request_id, reason=event.text)
            self._scheduler.on_reservation_lost(request_id, attempt, now)
        elif event.kind is KvEventKind.RELEASED:
            self._scheduler.released(request_id, attempt)
            del self._taking[event.grant]

    def on_offers(self, command: m.Offers, now: float) -> None:
        """D: reserve or refuse each."""
        answers = [self._answer(offer, now) for offer in command.offers]
        self._send(m.Answers(answers=answers))

    def _answer(self, offer: Offer, now: float) -> OfferAnswer:
        submission = offer.submission
        if self._transport is None:
            return _refuse(
                offer, "not_linked", "this instance takes no handoffs; it has no KV port"
            )
        if offer.model_fingerprint != self._model_fingerprint:
            return _refuse(offer, "model_differs", "the giver serves another model")
        if offer.layout_fingerprint != self._layout.fingerprint or offer.block_size < 1:
            return _refuse(offer, "layout_differs", "the giver's KV layout is another one")
        if not can_share(self._ranks.share, offer.num_ranks):
            text = f"the heads of {offer.num_ranks} ranks do not fit those of our {self._ranks.share.num_ranks}"
            return _refuse(offer, "layout_differs", text)
        if offer.read_grant and not offer.endpoints:
            return _refuse(offer, "not_linked", "the giver's card names no KV port to fetch from")
        fresh = ids.grant_id()
        answer = self._scheduler.reserve(offer, fresh, now)
        if not answer.grant:
            return answer
        length = len(submission.prompt_ids) + len(submission.generated_ids)
        pieces = max(1, self._layout.block_size // offer.block_size)
        size = self._layout.block_size // pieces
        answer = dataclasses.replace(
            answer,
            block_size=size,
            num_held_blocks=answer.num_held_blocks * pieces,
            num_blocks=-(-length // size),
            endpoints=self._ranks.endpoints or (self._transport.endpoint,),
        )
        if answer.grant == fresh:
            self._open(offer, answer, pieces, self._transport)
        # a repeated offer gets the grant it has, which may be in use or closed already
        taking = self._taking.get(answer.grant)
        return dataclasses.replace(answer, stream=taking.stream if taking is not None else 0)

    def _open(self, offer: Offer, answer: OfferAnswer, pieces: int, transport: KvTransport) -> None:
        """pieces: of one of our blocks, as the grant counts."""
        submission = offer.submission
        blocks = in_pieces(self._scheduler.reserved_blocks(submission.request_id), pieces)
        stream = transport.open_grant(
            TakerGrant(
                grant=answer.grant,
                peer_incarnation=offer.giver_incarnation,
                block_size=answer.block_size,
                block_ids=blocks[: answer.num_blocks],
                first_wanted=answer.num_held_blocks,
                prompt_digest=prompt_digest(submission.prompt_ids + submission.generated_ids),
                sources=offer.endpoints if offer.read_grant else (),
                peer_ranks=offer.num_ranks,
                read_grant=offer.read_grant,
            )
        )
        self._taking[answer.grant] = _Taking(
            submission.request_id, submission.attempt, offer.giver_incarnation, stream
        )

    def on_first_tokens(self, command: m.FirstTokens, now: float) -> None:
        """D: first tokens sampled by P."""
        firsts = command.firsts
        accepted = [self._scheduler.on_first_token(first, now) for first in firsts]
        self._send(
            m.FirstTaken(
                request_ids=[first.request_id for first in firsts],
                attempts=[first.attempt for first in firsts],
                accepted=accepted,
            )
        )

    def on_peer_gone(self, command: m.PeerGone, now: float) -> None:
        """D: the reservations of a giver end."""
        for taking in list(self._taking.values()):
            if taking.peer == command.incarnation:
                self._scheduler.on_reservation_lost(taking.request_id, taking.attempt, now)

    def revoke_ended(self) -> None:
        """Reservations that will never run: take open grants back, blocks follow with RELEASED; and say so."""
        ended = self._scheduler.take_ended_reservations()
        if self._transport is None or not ended:
            return
        for _, _, grant in ended:
            if grant:
                self._transport.revoke(grant)
        self._send(
            m.ReservationsEnded(
                request_ids=[request_id for request_id, _, _ in ended],
                attempts=[attempt for _, attempt, _ in ended],
            )
        )


def _refuse(offer: Offer, reason: str, text: str) -> OfferAnswer:
    return OfferAnswer(
        request_id=offer.submission.request_id,
        attempt=offer.submission.attempt,
        refusal=reason,
        text=text,
    )
