"""Who is in the cluster: cards from the registry, heartbeats and connections, put through cluster/membership.

Owns one Member per incarnation. Others ask it for members and hear of two things: that something changed (links, routing),
and that an incarnation is lost (the token log). It calls nobody over the network.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from xllm_py.base import log
from xllm_py.base.clock import Clock
from xllm_py.base.errors import ProtocolViolation, RequestNotFound
from xllm_py.base.metrics import Metrics
from xllm_py.cluster import keys
from xllm_py.cluster.duties import Duty
from xllm_py.cluster.instance_info import Card, card_from_json, card_key
from xllm_py.cluster.load import Load, Progress
from xllm_py.cluster.membership import (
    CardRemoved,
    CardSeen,
    Changed,
    Event,
    Heard,
    InstanceState,
    Overslept,
    Patience,
    Replaced,
    Spoke,
    StreamEnded,
    StreamOpened,
    Tick,
    View,
    may_serve,
    step,
)
from xllm_py.cluster.routing import Candidate
from xllm_py.registry.base import Entry, Registry
from xllm_py.wire.control_messages import Heartbeat, HeartbeatReply, LinkState

_log = log.get(__name__)
TICK_S = 0.025
_STALLED_S = 1.0  # beside three times the step the instance announced


@dataclass(slots=True, kw_only=True)
class Member:
    """One incarnation of an instance."""

    key: str  # in the registry
    card: Card
    raw_card: bytes
    view: View
    load: Load = field(default_factory=Load)
    progress: Progress = field(default_factory=Progress)
    links: tuple[LinkState, ...] = ()
    duty: Duty | None = None  # as it has it
    sequence: int = -1
    ready_at: float | None = None  # when it first became ready


class InstanceManager:
    """All instances one master knows."""

    def __init__(
        self,
        *,
        cluster_key: bytes,
        clock: Clock,
        metrics: Metrics,
        patience: Patience,
        forget_gone_after_s: float,
    ) -> None:
        self._card_key = card_key(cluster_key)
        self._clock = clock
        self._patience = patience
        self._forget_after_s = forget_gone_after_s
        self._members: dict[str, Member] = {}
        self._streams: dict[str, int] = {}  # incarnation -> open Generations streams
        self._ticked_at: float | None = None  # None: nobody keeps time yet
        self._registry: Registry | None = None
        self._listed: tuple[Sequence[Entry], int] = ((), 0)
        self.highest_term = 0  # of an elected master, that any instance told of
        self.on_changed: list[Callable[[], None]] = []
        self.on_lost: list[Callable[[Card, str, bool], None]] = []  # card, why, whether it died
        self.on_forgotten: list[Callable[[Card], None]] = []
        self._ignored = metrics.counter(
            "cards_ignored", "Cards that were not believed", ["reason"]
        ).labels
        self._gauge = metrics.gauge("instances", "Instances by state", ["role", "state"])
        metrics.gauge("etcd_up", "Whether the registry answers").set_function(self._is_up)

    def _is_up(self) -> float:
        return float(self._registry is not None and self._registry.up)

    # ---- the registry ----

    async def begin(self, registry: Registry) -> None:
        """The first list. Raises RegistryUnavailable."""
        self._registry = registry
        self._listed = await registry.entries(keys.EVERYTHING)
        self.on_entries(self._listed[0])

    async def follow(self, registry: Registry) -> None:
        """Changes since `begin`, for ever; outages are the registry's business."""
        async for changes in registry.watch(keys.EVERYTHING, *self._listed):
            self.on_entries(changes)

    def on_entries(self, entries: Sequence[Entry]) -> None:
        """Cards that came, changed or went; other keys are passed over."""
        for entry in entries:
            named = keys.parse_instance(entry.key)
            if named is None:
                continue
            if entry.value is None:
                self._on_card_removed(entry.key)
            else:
                self._on_card(entry.key, named, entry.value)

    def _on_card(self, key: str, named: tuple[object, str], raw: bytes) -> None:
        try:
            card = card_from_json(raw, self._card_key)
            if (card.role, card.name) != named:
                raise ProtocolViolation("the card contradicts its key")
        except ProtocolViolation as error:
            self._ignored(reason="unreadable").inc()
            _log.warning("card ignored", key=key, reason=error.message)
            return
        member = self._members.get(card.incarnation_id)
        if member is None:
            for other in [each for each in self._members.values() if each.card.name == card.name]:
                self._step(other, Replaced())
                self._forget(other)
            member = Member(key=key, card=card, raw_card=raw, view=View(since=self._clock.now()))
            self._members[card.incarnation_id] = member
            _log.info("instance registered", name=card.name, role=card.role.name)
            if self._streams.get(card.incarnation_id):
                self._step(member, StreamOpened())
        member.key, member.card, member.raw_card = key, card, raw
        self._step(member, CardSeen(draining=card.state == InstanceState.DRAINING.value))
        self._tell_changed()

    def _on_card_removed(self, key: str) -> None:
        for member in [each for each in self._members.values() if each.key == key]:
            self._step(member, CardRemoved())
            if member.view.heard_at is None:
                self._forget(member)
            elif may_serve(member.view):
                _log.warning("card of a living instance vanished", name=member.card.name)

    # ---- the instances themselves ----

    def on_heartbeat(self, beat: Heartbeat) -> HeartbeatReply:
        """An instance speaks. Old beats of a reordered connection say nothing new."""
        member = self._members.get(beat.incarnation)
        if member is None:
            return HeartbeatReply(known=False)
        self._hear(member, beat)
        return HeartbeatReply(known=member.view.has_card)

    def _hear(self, member: Member, beat: Heartbeat) -> None:
        if beat.sequence <= member.sequence:
            return
        member.sequence = beat.sequence
        member.load, member.progress, member.links = beat.load, beat.progress, beat.links
        self.highest_term = max(self.highest_term, beat.term)
        if beat.duty != member.duty:
            member.duty = beat.duty
            self._tell_changed()
        draining = beat.state == InstanceState.DRAINING.value
        self._step(member, Heard(draining=draining, stalled=_is_stalled(beat)))

    def on_stream_opened(self, incarnation: str) -> None:
        """The Generations stream of an instance reached us."""
        self._streams[incarnation] = self._streams.get(incarnation, 0) + 1
        member = self._members.get(incarnation)
        if member is not None:
            self._step(member, StreamOpened())

    def on_spoke(self, incarnation: str) -> None:
        """A message came on an instance's stream."""
        member = self._members.get(incarnation)
        if member is not None:
            self._step(member, Spoke())

    def on_stream_ended(self, incarnation: str) -> None:
        """A Generations stream ended; another one of the same instance may be open already."""
        left = self._streams.get(incarnation, 0) - 1
        if left > 0:
            self._streams[incarnation] = left
            return
        self._streams.pop(incarnation, None)
        member = self._members.get(incarnation)
        if member is not None:
            self._step(member, StreamEnded())

    # ---- time ----

    async def keep_time(self) -> None:
        """Let silence be noticed, for ever."""
        self._ticked_at = self._clock.now()
        while True:
            await asyncio.sleep(TICK_S)
            self.tick()

    def tick(self) -> None:
        """Judge every member by the clock; forget those gone for long."""
        now = self._clock.now()
        self._notice_oversleeping(now)
        self._ticked_at = now
        for member in list(self._members.values()):
            self._step(member, Tick())
            view = member.view
            gone = view.state is InstanceState.GONE
            if gone and not view.has_card and now - view.since >= self._forget_after_s:
                self._forget(member)

    def _notice_oversleeping(self, now: float) -> None:
        """Before anything is judged: while this process was stopped or starved it heard nobody, and that is nobody's silence."""
        if self._ticked_at is None:
            return
        away_s = now - self._ticked_at - TICK_S
        if away_s < self._patience.suspect_after_s / 2:
            return
        _log.warning("was away, nobody is judged for it", seconds=round(away_s, 3))
        self._ticked_at = now
        long = self._patience.gone_after_s  # a shorter absence breaks no connection
        event = Overslept(away_s=away_s, excused_s=long if away_s >= long else 0.0)
        for member in list(self._members.values()):
            self._step(member, event)

    def _step(self, member: Member, event: Event) -> None:
        now = self._clock.now()
        self._notice_oversleeping(now)
        member.view, changes = step(member.view, event, now, self._patience)
        for change in changes:
            self._on_change(member, change, now)

    def _on_change(self, member: Member, change: Changed, now: float) -> None:
        card = member.card
        lost = change.after is InstanceState.GONE and change.before is not InstanceState.DRAINING
        say = _log.warning if lost else _log.info
        say(
            f"instance {change.after.value.lower()}",
            name=card.name,
            role=card.role.name,
            before=change.before.value,
            reason=change.reason,
        )
        if change.after is InstanceState.READY and member.ready_at is None:
            member.ready_at = now
        if change.after is InstanceState.GONE:
            for tell_lost in self.on_lost:
                tell_lost(card, change.reason, change.is_death)
        self._tell_changed()

    def _forget(self, member: Member) -> None:
        if self._members.pop(member.card.incarnation_id, None) is None:
            return
        for tell_forgotten in self.on_forgotten:
            tell_forgotten(member.card)
        self._tell_changed()

    def _tell_changed(self) -> None:
        self._gauge.clear()
        for member in self._members.values():
            role, state = member.card.role.name, member.view.state.value
            self._gauge.labels(role=role, state=state).inc()
        for tell_changed in self.on_changed:
            tell_changed()

    # ---- what others ask ----

    def now(self) -> float:
        """On the clock that all moments of members are of."""
        return self._clock.now()

    def members(self) -> list[Member]:
        """All, by name."""
        return sorted(self._members.values(), key=lambda member: member.card.name)

    def member(self, incarnation: str) -> Member | None:
        """One life of an instance."""
        return self._members.get(incarnation)

    def candidates(self) -> tuple[Candidate, ...]:
        """Those that may get work."""
        now = self._clock.now()
        return tuple(
            Candidate(
                card=member.card,
                ready=member.view.state is InstanceState.READY,
                alive_s=now - member.ready_at,
                duty=member.duty,
            )
            for member in self._members.values()
            if member.ready_at is not None and may_serve(member.view)
        )

    def card_of(self, name: str) -> bytes:
        """The signed card of an instance. Raises RequestNotFound."""
        for member in self._members.values():
            if member.card.name == name:
                return member.raw_card
        raise RequestNotFound("no instance of this name is known")


def _is_stalled(beat: Heartbeat) -> bool:
    """Work is queued and no step was finished for longer than the running one was announced to take."""
    has_work = beat.load.waiting_requests + beat.load.running_requests > 0
    return has_work and beat.progress.step_age_s > _STALLED_S + 3 * beat.progress.announced_s
