"""P's calls to decode instances, asked for by its engine: offers, first tokens, cancels. One client per receiver.

What D answers goes back to the engine; a D that cannot be reached is an answer too. Nothing is repeated here, the giver's machine
(core/handoff) decides that.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable

from xllm_py.base import failpoints, log
from xllm_py.base.errors import LayoutMismatch, StaleIncarnation, XllmError
from xllm_py.base.tasks import TaskFamily
from xllm_py.control.channels import Channels
from xllm_py.control.client import InstanceClient
from xllm_py.core.request import FirstToken, Offer, OfferAnswer
from xllm_py.core.service_config import TlsSlice
from xllm_py.instance.replicas import Engine
from xllm_py.wire.messages import CancelsOut, FirstTaken, FirstTokensOut

_log = log.get(__name__)
_CANCEL_TRIES = 3
_CANCEL_WAIT_S = 0.2


class Peers:
    """Clients of the decode instances this P gives to."""

    def __init__(  # noqa: PLR0913  what it takes to call a peer and to be believed
        self,
        *,
        engine: Callable[[], Engine],
        card_json: Callable[[], bytes],
        identify: Callable[[Offer], Offer],
        cluster_key: bytes,
        incarnation: str,
        timeout_s: float,
        tls: TlsSlice | None,
        tasks: TaskFamily,
    ) -> None:
        """identify fills our name, address and incarnation into an offer; card_json is our signed card."""
        self._engine = engine
        self._card_json = card_json
        self._identify = identify
        self._cluster_key = cluster_key
        self._incarnation = incarnation
        self._timeout_s = timeout_s
        self._tasks = tasks
        self._channels = Channels(tls=tls)
        self._clients: dict[tuple[str, str], InstanceClient] = {}
        self._lives: dict[str, str] = {}  # address -> incarnation that was offered to last

    def _client(self, address: str, incarnation: str = "") -> InstanceClient:
        if incarnation and self._lives.get(address, incarnation) != incarnation:
            self._leave(address)
        client = self._clients.get((address, incarnation))
        if client is None:
            if incarnation:
                self._lives[address] = incarnation
            client = self._clients[address, incarnation] = InstanceClient(
                address,
                cluster_key=self._cluster_key,
                sender=self._incarnation,
                addressee=incarnation,
                timeout_s=self._timeout_s,
                channels=self._channels,
            )
        return client

    def _leave(self, address: str) -> None:
        """Another life answers there: the old one's channel waits long before it connects again, a new one connects at once."""
        for key in [key for key in self._clients if key[0] == address]:
            del self._clients[key]
        self._tasks.start(self._channels.drop(address), name=f"leave {address}")

    def on_offers(self, offers: list[Offer]) -> None:
        """The engine wants these receivers asked; one call per receiver."""
        by_receiver: dict[tuple[str, str], list[Offer]] = {}
        for offer in offers:
            receiver = offer.submission.receiver
            if receiver is not None:
                key = (receiver.address, receiver.incarnation)
                by_receiver.setdefault(key, []).append(self._identify(offer))
        for (address, incarnation), batch in by_receiver.items():
            self._tasks.start(self._offer(address, incarnation, batch), name=f"offer {address}")

    async def _offer(self, address: str, incarnation: str, offers: list[Offer]) -> None:
        client = self._client(address, incarnation)
        try:
            failpoints.hit("p.offer.pre")
            answers = await client.add_new_requests(offers)
            failpoints.hit("p.offer.post")
            if any(answer.refusal == "not_linked" for answer in answers):
                await client.link_instance(self._card_json())
        except LayoutMismatch as error:
            answers = [_refused(offer, "layout_differs", error.message) for offer in offers]
        except StaleIncarnation as error:
            answers = [_refused(offer, "stale_incarnation", error.message) for offer in offers]
        except XllmError as error:
            answers = [_refused(offer, "unreachable", error.message) for offer in offers]
        self._engine().answer_offers(answers)

    def on_first_tokens(self, out: FirstTokensOut) -> None:
        """The engine wants these receivers told."""
        for address, first in zip(out.receivers, out.firsts, strict=True):
            self._tasks.start(self._tell_first(address, first), name=f"first token {address}")

    async def _tell_first(self, address: str, first: FirstToken) -> None:
        accepted, reached = False, True
        try:
            failpoints.hit("p.first_generation.pre")
            accepted = (await self._client(address).first_generation([first]))[0]
            failpoints.hit("p.first_generation.post")
        except XllmError as error:
            reached = False
            _log.warning(
                "first token not delivered", request=first.request_id, reason=error.message
            )
        self._engine().first_taken(
            FirstTaken(
                request_ids=[first.request_id],
                attempts=[first.attempt],
                accepted=[accepted],
                reached=[reached],
            )
        )

    def on_cancels(self, out: CancelsOut) -> None:
        """The engine wants reservations dropped."""
        by_receiver: dict[str, tuple[list[str], list[int]]] = {}
        columns = zip(out.receivers, out.request_ids, out.attempts, strict=True)
        for address, request_id, attempt in columns:
            ids, attempts = by_receiver.setdefault(address, ([], []))
            ids.append(request_id)
            attempts.append(attempt)
        for address, (ids, attempts) in by_receiver.items():
            self._tasks.start(self._cancel(address, ids, attempts), name=f"cancel {address}")

    async def _cancel(self, address: str, ids: list[str], attempts: list[int]) -> None:
        """A few tries; when none arrives the reservation ends by its own time."""
        for attempt in range(_CANCEL_TRIES):
            try:
                await self._client(address).cancel(ids, attempts, "superseded")
                return
            except XllmError as error:
                _log.info("cancel not delivered", peer=address, reason=error.message)
            await asyncio.sleep(_CANCEL_WAIT_S * 2**attempt)

    async def close(self) -> None:
        """Close every channel."""
        await self._channels.close()


def _refused(offer: Offer, reason: str, text: str) -> OfferAnswer:
    submission = offer.submission
    return OfferAnswer(
        request_id=submission.request_id, attempt=submission.attempt, refusal=reason, text=text
    )


def identified(offer: Offer, *, name: str, address: str, incarnation: str) -> Offer:
    """An offer with the giver's names."""
    return dataclasses.replace(
        offer, giver_name=name, giver_address=address, giver_incarnation=incarnation
    )
