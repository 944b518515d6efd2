"""Pairs (P, D): makes every D accept offers of every P, sees to it that KV really gets from one to the other, ends that when P is gone.

One task per pair, so that a hung peer stalls nobody else. A pair is used once P has sent a probe to D on the way that blocks
take; it is probed again every few seconds, and at once when a handoff was lost. A pair whose link does not work is out of routing,
not its instances; it is tried again with back-off, shows its reason in /ready and /admin/instances, and comes back by itself. Told
by the instance manager that members changed; it decides no liveness.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum

from xllm_py.base import log
from xllm_py.base.errors import LayoutMismatch, XllmError
from xllm_py.base.metrics import Metrics
from xllm_py.base.tasks import TaskFamily
from xllm_py.cluster.duties import Half, abilities
from xllm_py.cluster.instance_info import Card, inexact
from xllm_py.cluster.membership import InstanceState
from xllm_py.master.instance_manager import InstanceManager, Member
from xllm_py.master.peers import Peers
from xllm_py.wire.control_messages import LinkHealth

_log = log.get(__name__)
_FIRST_WAIT_S = 0.2
_MOST_WAIT_S = 10.0
LOOK_EVERY_S = 5.0  # a linked pair is probed so often
_LINKABLE = frozenset({InstanceState.READY, InstanceState.SUSPECT, InstanceState.DRAINING})


class PairState(Enum):
    """Where a pair stands."""

    TRYING = "trying"
    LINKED = "linked"
    BROKEN = "broken"  # the two are linked, but KV does not get through
    DIFFERS = "differs"  # in model or layout
    UNREACHABLE = "unreachable"


@dataclass(slots=True, kw_only=True)
class Pair:
    """A giver and a taker."""

    prefill: Member
    decode: Member
    state: PairState = PairState.TRYING
    reason: str = ""
    health: LinkHealth | None = None  # as it was found last
    doubt: asyncio.Event = field(default_factory=asyncio.Event)  # it is to be probed now
    task: asyncio.Task[None] | None = None

    def sentence(self) -> str:
        """For people."""
        names = f"prefill {self.prefill.card.name} and decode {self.decode.card.name}"
        return f"{names}: {self.state.value}" + (f" ({self.reason})" if self.reason else "")


class Links:
    """All wanted pairs of one master."""

    def __init__(
        self, *, manager: InstanceManager, peers: Peers, tasks: TaskFamily, metrics: Metrics
    ) -> None:
        self._manager = manager
        self._peers = peers
        self._tasks = tasks
        self._pairs: dict[tuple[str, str], Pair] = {}
        self._jitter = random.Random()
        self.rates: dict[
            tuple[str, str], float
        ] = {}  # bytes/s of pairs that were measured, by incarnation
        self.on_changed: list[Callable[[], None]] = []  # a pair can be used now, or cannot any more
        names = ["prefill", "decode"]
        self._gauge = metrics.gauge("pair_linked", "1 for a linked pair", names)
        self._round_trip = metrics.gauge(
            "pair_round_trip_seconds", "Of a small probe on the KV link", names
        )
        self._rate = metrics.gauge("pair_bytes_per_second", "Of a large probe", names)
        manager.on_changed.append(self.reconcile)

    def reconcile(self) -> None:
        """Start what is newly wanted, end what is not wanted any more."""
        wanted = _wanted(self._manager.members())
        for key in [key for key in self._pairs if key not in wanted]:
            self._end(self._pairs.pop(key))
            self.rates.pop(key, None)
        for key, pair in wanted.items():
            if key not in self._pairs:
                self._pairs[key] = pair
                pair.task = self._tasks.start(self._keep(pair), name=f"link {pair.sentence()}")

    def _end(self, pair: Pair) -> None:
        if pair.task is not None:
            pair.task.cancel()
        names = (pair.prefill.card.name, pair.decode.card.name)
        self._gauge.labels(*names).set(0)
        decode = self._manager.member(pair.decode.card.incarnation_id)
        if decode is not None and decode.view.state in _LINKABLE:
            self._tasks.start(self._unlink(pair), name=f"unlink {pair.sentence()}")

    async def _unlink(self, pair: Pair) -> None:
        """Once; when it fails, D ends the reservations of that giver by their own time."""
        card = pair.prefill.card
        try:
            await self._peers.of(pair.decode.card).unlink_instance(card.name, card.incarnation_id)
        except XllmError as error:
            _log.warning("unlink failed", pair=pair.sentence(), reason=error.message)

    async def _keep(self, pair: Pair) -> None:
        """Link it and look after it, for ever."""
        wait_s = _FIRST_WAIT_S
        while True:
            works = await self._try(pair)
            self._show(pair)
            pause_s = LOOK_EVERY_S if works else wait_s * (0.75 + self._jitter.random() / 2)
            wait_s = _FIRST_WAIT_S if works else min(wait_s * 2, _MOST_WAIT_S)
            pair.doubt.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(pair.doubt.wait(), pause_s)

    async def _try(self, pair: Pair) -> bool:
        before = (pair.state, pair.reason)
        try:
            await self._link_and_probe(pair)
        except LayoutMismatch as error:
            pair.state, pair.reason = PairState.DIFFERS, error.message
        except XllmError as error:
            pair.state, pair.reason = PairState.UNREACHABLE, error.message
        if pair.health is not None and pair.health.bytes_per_s:
            key = pair.prefill.card.incarnation_id, pair.decode.card.incarnation_id
            self.rates[key] = pair.health.bytes_per_s
        if before != (pair.state, pair.reason):
            for tell in self.on_changed:
                tell()
            exact = pair.state is PairState.LINKED and not pair.reason
            (_log.info if exact else _log.warning)("pair " + pair.sentence())
        return pair.state is PairState.LINKED

    async def _link_and_probe(self, pair: Pair) -> None:
        prefill, decode = pair.prefill, pair.decode
        if pair.state is not PairState.LINKED:
            await self._peers.of(decode.card).link_instance(prefill.raw_card)
        try:
            health = await self._probe(prefill, decode)
        except XllmError:
            if pair.state is not PairState.LINKED:
                raise
            return  # nothing was learnt of the link; whether P lives is not judged here
        if health.works:
            pair.health, pair.state = health, PairState.LINKED
            pair.reason = inexact(prefill.card, decode.card)
        else:
            pair.health, pair.state, pair.reason = None, PairState.BROKEN, health.reason

    async def _probe(self, prefill: Member, decode: Member) -> LinkHealth:
        """By the side that connects."""
        if prefill.card.kv_cache_transfer_mode == "PULL":
            return await self._peers.of(decode.card).probe_peer(prefill.raw_card, fetch=True)
        return await self._peers.of(prefill.card).probe_peer(decode.raw_card)

    def _show(self, pair: Pair) -> None:
        names = (pair.prefill.card.name, pair.decode.card.name)
        self._gauge.labels(*names).set(pair.state is PairState.LINKED)
        if pair.health is not None:
            self._round_trip.labels(*names).set(pair.health.round_trip_s)
            self._rate.labels(*names).set(pair.health.bytes_per_s)

    def doubt(self, prefill: str, decode: str) -> None:
        """A handoff between these incarnations was lost: look now."""
        pair = self._pairs.get((prefill, decode))
        if pair is not None:
            pair.doubt.set()

    # ---- what others ask ----

    def linked(self) -> frozenset[tuple[str, str]]:
        """Pairs by incarnation that can be used."""
        return frozenset(key for key, pair in self._pairs.items() if pair.state is PairState.LINKED)

    def refused(self) -> tuple[str, ...]:
        """Why pairs that reached each other do not fit."""
        return self._sentences(lambda pair: pair.state is PairState.DIFFERS)

    def unlinked(self) -> tuple[str, ...]:
        """Every pair that cannot be used now, and why."""
        return self._sentences(lambda pair: pair.state is not PairState.LINKED)

    def _sentences(self, chosen: Callable[[Pair], bool]) -> tuple[str, ...]:
        return tuple(sorted(pair.sentence() for pair in self._pairs.values() if chosen(pair)))

    def rows(self, card: Card) -> list[dict[str, str | float]]:
        """The pairs of one instance, for /admin/instances."""
        rows: list[dict[str, str | float]] = []
        for pair in self._pairs.values():
            pair_cards = (pair.prefill.card, pair.decode.card)
            if card not in pair_cards:
                continue
            other = pair_cards[0] if card is pair_cards[1] else pair_cards[1]
            row: dict[str, str | float] = {
                "peer": other.name,
                "state": pair.state.value,
                "reason": pair.reason,
            }
            if pair.health is not None:
                row["round_trip_ms"] = round(pair.health.round_trip_s * 1000, 3)
                row["megabytes_per_s"] = round(pair.health.bytes_per_s / 1e6, 1)
            rows.append(row)
        return rows


def _wanted(members: list[Member]) -> dict[tuple[str, str], Pair]:
    able = [member for member in members if member.view.state in _LINKABLE]
    givers = [member for member in able if Half.PREFILL in abilities(member.card)]
    takers = [member for member in able if Half.DECODE in abilities(member.card)]
    return {
        (p.card.incarnation_id, d.card.incarnation_id): Pair(prefill=p, decode=d)
        for p in givers
        for d in takers
        if p is not d
    }
