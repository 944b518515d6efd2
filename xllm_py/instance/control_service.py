"""What this instance does when it is called on its control port (SPEC 5.1). Implements control.server.InstanceHandlers.

Called by masters (Submit, LinkInstance, ProbePeer, UnlinkInstance, Cancel, Drain, Describe) and by givers (AddNewRequests, FirstGeneration,
Generations in relayed mode). It decides nothing about requests; the engine does.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import Any, NoReturn

from xllm_py.base import failpoints, log
from xllm_py.base.errors import Draining, LayoutMismatch, UnsupportedValue, XllmError
from xllm_py.base.tasks import TaskFamily
from xllm_py.cluster.instance_info import Card, card_from_json, card_key, differences
from xllm_py.core.request import FirstToken, Offer, OfferAnswer, Submission
from xllm_py.instance.generations import Generations
from xllm_py.instance.outlets import Destination, Outlets
from xllm_py.instance.relay import Relay
from xllm_py.instance.replicas import Engine, worst
from xllm_py.instance.token_logs import TokenLog, TokenLogs, as_json
from xllm_py.wire.control_messages import GenerationsDown, GenerationsUp, LinkHealth, LinkState

_log = log.get(__name__)
_ENGINE_TIMEOUT_S = 30.0  # the engine answers between two steps, and a step may be a long prefill
_LOOK_S, _LOOKS = 0.1, 10  # how often, and how many times it is looked whether a master is dead


class ControlService:
    """The handlers."""

    def __init__(  # noqa: PLR0913  the ends of ten wires meet here
        self,
        *,
        engine: Engine,
        outlets: Outlets,
        generations: Generations,
        relay: Relay,
        card: Callable[[], Card],
        cluster_key: bytes,
        takes_handoffs: bool,
        tasks: TaskFamily,
        drain: Callable[[float], Awaitable[None]],
        describe: Callable[[], Awaitable[dict[str, Any]]],
        token_logs: TokenLogs,
    ) -> None:
        self._engine = engine
        self._outlets = outlets
        self._generations = generations
        self._relay = relay
        self._card = card
        self._cluster_key = cluster_key
        self._takes_handoffs = takes_handoffs
        self._tasks = tasks
        self._drain = drain
        self._describe = describe
        self._token_logs = token_logs
        self._givers: dict[str, Card] = {}  # by incarnation
        self._refused: dict[str, str] = {}  # name -> why, as it was logged
        self.draining = False

    def links(self) -> tuple[LinkState, ...]:
        """The givers whose offers are accepted, for heartbeats."""
        return tuple(
            LinkState(peer=giver.name, incarnation=incarnation, linked=True)
            for incarnation, giver in self._givers.items()
        )

    async def submit(self, submission: Submission) -> None:
        """A master's request. What the engine refuses comes back as an output."""
        failpoints.hit("p.recv")
        if self.draining:
            raise Draining("this instance is draining; send the request to another one")
        if submission.receiver is not None and not self._takes_handoffs:
            raise UnsupportedValue(
                "this instance gives no requests away; start it with --enable_disagg_pd"
            )
        _log.debug("submitted", request=submission.request_id, trace=submission.trace)
        destination = Destination(submission.master)
        if submission.relay and submission.receiver is not None:
            self._relay.open(
                submission.request_id,
                destination,
                submission.sampling.best_of,
                attempt=submission.attempt,
                timeout_s=submission.timeout_s,
            )
        self._outlets.open_remote(submission, destination)
        self._engine.submit(submission)

    async def add_new_requests(self, offers: list[Offer]) -> list[OfferAnswer]:
        """A giver's offers, put before our engine."""
        failpoints.hit("d.grant.pre")
        known = [
            self._with_source(offer) for offer in offers if offer.giver_incarnation in self._givers
        ]
        answers: dict[tuple[str, int], OfferAnswer] = {}
        if known:
            # a giver that hangs up meanwhile changes nothing: what the engine says still has to be heard
            asking = self._tasks.start(self._ask_engine(known), name="offers")
            answered = await asyncio.shield(asking)
            if isinstance(answered, XllmError):
                raise answered
            answers = answered
            failpoints.hit("d.grant.post")
        return [answers.get(_key(offer.submission)) or _not_linked(offer) for offer in offers]

    def _with_source(self, offer: Offer) -> Offer:
        """What is fetched is fetched from where the giver's signed card says: of several engines, from the one that the offer names."""
        giver = self._givers[offer.giver_incarnation]
        known = len(offer.endpoints) == giver.tp_size and set(offer.endpoints) <= set(giver.addrs)
        addrs = offer.endpoints if known else giver.addrs[: giver.tp_size]
        return dataclasses.replace(offer, endpoints=addrs, num_ranks=giver.tp_size)

    async def _ask_engine(
        self, offers: list[Offer]
    ) -> dict[tuple[str, int], OfferAnswer] | XllmError:
        """Outlets are open before the engine is asked, and closed again for what it refuses. Its failure is the caller's to raise."""
        fresh = {}
        for offer in offers:
            request_id, attempt = _key(offer.submission)
            if not self._outlets.awaits(request_id, attempt):
                _log.debug("offered", request=request_id, trace=offer.submission.trace)
                self._outlets.open_remote(offer.submission, _destination(offer))
                fresh[request_id] = attempt
        try:
            answers = await self._engine.offer(offers, timeout_s=_ENGINE_TIMEOUT_S)
        except XllmError as error:
            for request_id, attempt in fresh.items():
                self._outlets.close(request_id, attempt)
            self._engine.abort(list(fresh), list(fresh.values()))
            return error
        granted = {answer.request_id for answer in answers if not answer.refusal}
        for request_id in fresh.keys() - granted:
            self._outlets.close(request_id, fresh[request_id])
        return {(answer.request_id, answer.attempt): answer for answer in answers}

    async def first_generation(self, firsts: list[FirstToken]) -> list[bool]:
        """A giver's first tokens."""
        failpoints.hit("d.first_generation.pre")
        accepted = await self._engine.first_tokens(firsts, timeout_s=_ENGINE_TIMEOUT_S)
        failpoints.hit("d.first_generation.post")
        for first, taken in zip(firsts, accepted, strict=True):
            if taken:
                self._outlets.on_first(first)
        return accepted

    async def link_instance(self, card_json: bytes) -> None:
        """Accept offers of this giver from now on. Raises LayoutMismatch naming every field that differs."""
        giver = card_from_json(card_json, card_key(self._cluster_key))
        if not self._takes_handoffs:
            raise LayoutMismatch(
                "this instance takes no handoffs; start it with --enable_disagg_pd"
            )
        found = differences(giver, self._card())
        if found:
            self._refuse(giver, "; ".join(found))
        for incarnation, known in list(self._givers.items()):
            if known.name == giver.name and incarnation != giver.incarnation_id:
                self._forget_giver(incarnation)
        if giver.incarnation_id not in self._givers:
            _log.info("linked", giver=giver.name)
        self._givers[giver.incarnation_id] = giver

    def _refuse(self, giver: Card, reason: str) -> NoReturn:
        """Masters ask again and again; it is logged when it is news."""
        if self._refused.get(giver.name) != reason:
            _log.warning("giver refused", giver=giver.name, reason=reason)
        self._refused[giver.name] = reason
        raise LayoutMismatch(reason)

    async def probe_peer(self, card_json: bytes, fetch: bool) -> LinkHealth:
        """Try our KV link to this peer: push to a decode instance, or fetch from a prefill instance. Raises DeadlineExceeded when our
        engine is too busy to say.
        """
        peer = card_from_json(card_json, card_key(self._cluster_key))
        if not peer.addrs:
            return LinkHealth(works=False, reason=f"{peer.name} has no KV port")
        block_size = min(peer.block_size, self._card().block_size)
        found = worst(
            await asyncio.gather(
                *(
                    self._engine.probe(
                        peer.addrs[first : first + peer.tp_size],
                        peer.incarnation_id,
                        block_size,
                        fetch,
                        timeout_s=_ENGINE_TIMEOUT_S,
                    )
                    for first in range(0, len(peer.addrs), peer.tp_size)
                )
            )
        )
        return LinkHealth(
            works=found.works,
            reason=found.reason,
            round_trip_s=found.round_trip_s,
            bytes_per_s=found.bytes_per_s,
        )

    async def unlink_instance(self, name: str, incarnation: str) -> None:
        """Forget a giver and end its reservations."""
        if incarnation in self._givers:
            _log.info("unlinked", giver=name)
            self._forget_giver(incarnation)

    def _forget_giver(self, incarnation: str) -> None:
        giver = self._givers.pop(incarnation)
        self._engine.peer_gone(incarnation)
        self._generations.leave(giver.rpc_address)

    async def cancel(self, request_ids: list[str], attempts: list[int], reason: str) -> list[str]:
        """End requests; a late arrival of an unknown one dies at once."""
        states = ["open" if self._outlets.has(name) else "unknown" for name in request_ids]
        self.end(request_ids, attempts)
        _log.debug("cancelled", requests=request_ids, reason=reason)
        return states

    def end(self, request_ids: list[str], attempts: list[int]) -> None:
        """Nobody waits for these any more."""
        for request_id, attempt in zip(request_ids, attempts, strict=True):
            self._outlets.close(request_id, attempt)
            self._generations.forget(request_id, attempt)
            self._relay.cancel(request_id, attempt)
        self._engine.abort(list(request_ids), list(attempts))

    async def drain(self, mode: str, timeout_s: float) -> int:
        """Take no new work from now on, and end when empty, as on SIGTERM; the number of open requests.

        mode: `finish` lets them run for timeout_s; `move` ends at once, so that masters go on with them elsewhere.
        """
        if mode not in ("finish", "move"):
            raise UnsupportedValue(f"drain mode {mode!r} is unknown; use finish or move")
        await self._drain(timeout_s if mode == "finish" else 0.0)
        return self._outlets.num_open

    async def describe(self, stream_id: str) -> dict[str, Any]:
        """Card, state, load and ledger; or what was said of one request, which ends here when its own master does not listen."""
        if not stream_id:
            return await self._describe()
        found = self._token_logs.find(stream_id)
        if found is not None and not self._give_over(found):
            self._tasks.start(self._give_over_soon(found), name=f"give over {found.request_id}")
        return as_json(found)

    def _give_over(self, log: TokenLog) -> bool:
        """Another master goes on with this one: end it when its own does not listen. Whether it has ended."""
        if log.ended_at is None:
            to = self._outlets.destination(log.request_id)
            if to is None or not self._generations.is_broken(to):
                return False
            _log.info("taken over by another master", request=log.request_id)
            self.end([log.request_id], [log.attempt])
        return True

    async def _give_over_soon(self, log: TokenLog) -> None:
        """The other master may have been asked before we saw that ours is dead."""
        for _ in range(_LOOKS):
            await asyncio.sleep(_LOOK_S)
            if self._give_over(log):
                return

    async def generations(
        self, ups: AsyncIterator[GenerationsUp]
    ) -> AsyncGenerator[GenerationsDown, None]:
        """Relayed mode: a decode instance's stream."""
        async for down in self._relay.serve(ups, self._generations):
            yield down


def _destination(offer: Offer) -> Destination:
    submission = offer.submission
    if submission.relay:
        return Destination(
            offer.giver_address,
            relay=True,
            master=submission.master,
            incarnation=offer.giver_incarnation,
        )
    return Destination(submission.master)


def _key(submission: Submission) -> tuple[str, int]:
    return submission.request_id, submission.attempt


def _not_linked(offer: Offer) -> OfferAnswer:
    return OfferAnswer(
        request_id=offer.submission.request_id,
        attempt=offer.submission.attempt,
        refusal="not_linked",
        text="the giver is not linked to this instance yet",
    )
