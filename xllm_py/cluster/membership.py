"""The life of one instance as a master sees it: a pure step over three witnesses.

    card    in the registry: who is a member                    CardSeen, CardRemoved
    link    heartbeats, and the instance's Generations stream   Heard, Spoke, StreamOpened, StreamEnded
    steps   the engine's own progress, told in heartbeats       Heard(stalled)

    JOINING --heard--> READY --silence, stalled--> SUSPECT --heard--> READY
                         '- silence, connection ended, long stalled -> GONE --heard, not stalled--> JOINING
    DRAINING by the instance's own word, from JOINING, READY and SUSPECT; it ends in GONE like the others.

A silent registry is not a missing card, and a vanished card of an instance that speaks is only a warning. A card with a new
incarnation is a new instance; whoever owns the views ends the old one. A judge that was away itself (stopped, or starved of its
processor) heard nobody meanwhile, which is no silence of theirs: Overslept. `now` is monotonic seconds.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from enum import Enum

RECONNECT_S = 0.05  # a connection that ended has so long to come back
STALLED_GONE_S = (
    0.5  # an engine that is known to be stuck for so long is given up; its requests go on elsewhere
)
_REPLACED = "replaced by a new life of the same name"
_ENDED = "its connection ended"
_DEATHS = frozenset({_REPLACED, _ENDED})


class InstanceState(Enum):
    """Where an instance stands; the value is what people see."""

    JOINING = "JOINING"
    READY = "READY"
    SUSPECT = "SUSPECT"
    DRAINING = "DRAINING"
    GONE = "GONE"


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How long silence is borne."""

    suspect_after_s: float = 0.5
    gone_after_s: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """What is known of one incarnation."""

    state: InstanceState = InstanceState.JOINING
    has_card: bool = False
    heard_at: float | None = None  # None: it never spoke
    stream_open: bool = False
    ended_at: float | None = None  # its connection ended then and has not come back
    stalled_at: float | None = None  # since then its engine finishes nothing
    excused_until: float = 0.0  # its connection may be away until then: we were away ourselves
    since: float = 0.0  # in this state
    reason: str = ""  # of the last change


@dataclass(frozen=True, slots=True)
class CardSeen:
    """The registry has its card."""

    draining: bool = False


@dataclass(frozen=True, slots=True)
class CardRemoved:
    """The registry has its card no more."""


@dataclass(frozen=True, slots=True)
class Heard:
    """A heartbeat."""

    draining: bool = False
    stalled: bool = False


@dataclass(frozen=True, slots=True)
class Spoke:
    """A message on its stream."""


@dataclass(frozen=True, slots=True)
class StreamOpened:
    """Its Generations stream reached us."""


@dataclass(frozen=True, slots=True)
class StreamEnded:
    """Its Generations stream ended, in order or not."""


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed."""


@dataclass(frozen=True, slots=True)
class Overslept:
    """Whoever judges was away himself; connections may have broken by that and have some time to come back."""

    away_s: float
    excused_s: float


@dataclass(frozen=True, slots=True)
class Replaced:
    """A card with another incarnation took its name."""


Event = (
    CardSeen
    | CardRemoved
    | Heard
    | Spoke
    | StreamOpened
    | StreamEnded
    | Tick
    | Overslept
    | Replaced
)


@dataclass(frozen=True, slots=True)
class Changed:
    """The state is another one now."""

    before: InstanceState
    after: InstanceState
    reason: str

    @property
    def is_death(self) -> bool:
        """Its process ended, and not by its own will. One that is silent or stuck may be cut off or stand still, and comes back."""
        gone = self.after is InstanceState.GONE and self.before is not InstanceState.DRAINING
        return gone and self.reason in _DEATHS


def step(
    view: View, event: Event, now: float, patience: Patience
) -> tuple[View, tuple[Changed, ...]]:
    """The view after an event, and what changed; at most one change."""
    noted = _note(view, event, now)
    state, reason = _judge(noted, event, now, patience)
    if state is view.state:
        return noted, ()
    after = dataclasses.replace(noted, state=state, since=now, reason=reason)
    if state is InstanceState.GONE:
        after = dataclasses.replace(after, stream_open=False, ended_at=None)
    return after, (Changed(view.state, state, reason),)


def _note(view: View, event: Event, now: float) -> View:
    """Write down what the event says, without judging."""
    match event:
        case CardSeen():
            return dataclasses.replace(view, has_card=True)
        case CardRemoved():
            return dataclasses.replace(view, has_card=False)
        case Heard(stalled=stalled):
            first = now if view.stalled_at is None else view.stalled_at
            return dataclasses.replace(view, heard_at=now, stalled_at=first if stalled else None)
        case Spoke():
            return dataclasses.replace(view, heard_at=now)
        case StreamOpened():
            return dataclasses.replace(view, stream_open=True, ended_at=None, heard_at=now)
        case StreamEnded():
            return dataclasses.replace(view, stream_open=False, ended_at=now)
        case Overslept(away_s=away_s, excused_s=excused_s):
            heard_at = None if view.heard_at is None else min(now, view.heard_at + away_s)
            return dataclasses.replace(view, heard_at=heard_at, excused_until=now + excused_s)
        case _:
            return view


def _judge(view: View, event: Event, now: float, patience: Patience) -> tuple[InstanceState, str]:
    if isinstance(event, Replaced):
        return InstanceState.GONE, _REPLACED
    if view.state is InstanceState.GONE:
        heard = isinstance(event, Heard) and view.has_card and not event.stalled
        return (InstanceState.JOINING, "heard again") if heard else (view.state, view.reason)
    if view.ended_at is not None and now >= max(view.ended_at + RECONNECT_S, view.excused_until):
        return InstanceState.GONE, _ENDED
    if view.heard_at is None:
        return _draining(view, event) or (view.state, view.reason)
    if view.stalled_at is not None and now - view.stalled_at >= STALLED_GONE_S:
        return InstanceState.GONE, "work is queued and no step is done"
    silence_s = now - view.heard_at
    if silence_s >= patience.gone_after_s:
        return InstanceState.GONE, f"silent for {silence_s:.1f} s"
    return _judge_living(view, event, silence_s, patience)


def _judge_living(
    view: View, event: Event, silence_s: float, patience: Patience
) -> tuple[InstanceState, str]:
    draining = _draining(view, event)
    if draining is not None:
        return draining
    if view.state is InstanceState.DRAINING:
        return view.state, view.reason
    if view.state is InstanceState.JOINING:
        joined = isinstance(event, Heard) and view.has_card
        return (InstanceState.READY, "card and heartbeat") if joined else (view.state, view.reason)
    if silence_s >= patience.suspect_after_s:
        return InstanceState.SUSPECT, f"silent for {silence_s:.1f} s"
    if view.stalled_at is not None:
        return InstanceState.SUSPECT, "work is queued and no step is done"
    return InstanceState.READY, "it speaks"


def _draining(view: View, event: Event) -> tuple[InstanceState, str] | None:
    if isinstance(event, CardSeen | Heard) and event.draining:
        return InstanceState.DRAINING, "it said so"
    return None


def may_serve(view: View) -> bool:
    """Whether new work may go there when nothing better is known: ready, or only slow."""
    return view.state in (InstanceState.READY, InstanceState.SUSPECT)
