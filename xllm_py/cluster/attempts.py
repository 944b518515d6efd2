"""The attempts of one request: what a failure of one means for the next, and which requests are tried no more.

    lost       the instance died, fell silent, or lost the handoff    next attempt at once by others, else after a pause; counted
    no room    full, draining, queue full, or nothing to route to     next attempt after a pause, others first; not counted
    anything else                                                     the client's

A request that was being computed by two instances when they died, and of which the second had not said a token, is suspected of killing them: it
ends, and its like is refused for a while (Quarantine). Two deaths that come together are one event, a box or a rack, and no request's
doing. Pure; `now` is monotonic seconds. Owned by master/dispatcher.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

LOST = frozenset({"instance_lost", "engine_down"})
NO_ROOM = frozenset(
    {"draining", "queue_full", "no_decode_capacity", "no_compatible_decode", "no_instances"}
)
FIRST_PAUSE_S = 0.05
MOST_PAUSE_S = 1.0
# before whoever lost it is asked again, nobody else being left: once soon, then only when what is bad for a moment has passed
AFTER_LOSS_S = (0.1, MOST_PAUSE_S)
TOGETHER_S = (
    0.5  # deaths seen no further apart are one event; a busy machine sees each up to 0.3 s late
)
_MOST_TOGETHER = 2  # deaths of one request that may be one event: a third is no chance
REFUSED_S = 600.0
_MOST_REFUSED = 1000


@dataclass(frozen=True, slots=True)
class Failure:
    """How an attempt ended. at_fault: incarnations that the next one had better not go to."""

    code: str
    message: str = ""
    at_fault: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Again:
    """Another attempt, after a pause in seconds."""

    pause_s: float


@dataclass(frozen=True, slots=True)
class GiveUp:
    """The request ends with this error."""

    code: str
    message: str


@dataclass(slots=True, kw_only=True)
class Attempts:
    """Of one request."""

    most: int  # that may be lost, and the one after is not made
    patience_s: float  # how long room is waited for
    number: int = 1  # of the current one; names it everywhere
    num_lost: int = 0
    # incarnations that lost it or had no room; forgotten at a pause, when nobody else is left: one that comes back is better than none
    passed_over: frozenset[str] = frozenset()
    _lost_by: frozenset[str] = frozenset()  # incarnations that lost it once
    _spoke: bool = False  # tokens came of the current attempt
    deadly: bool = False  # it is suspected of killing instances
    _num_deaths: int = 0  # of instances that computed it, since one of them had said tokens of it
    _died_at: float | None = None  # the last instance that computed it and died
    _waits_since: float | None = None
    _refusal: Failure | None = (
        None  # the last one of an instance, which tells more than that no other is left
    )
    _pause_s: float = FIRST_PAUSE_S

    def on_death(self, now: float, *, spoke: bool) -> None:
        """An instance died while it computed this request. spoke: it had said tokens of it, so it could compute it."""
        self._num_deaths = 1 if spoke else self._num_deaths + 1
        apart = self._died_at is not None and now - self._died_at > TOGETHER_S
        if not spoke and (apart or self._num_deaths > _MOST_TOGETHER):
            self.deadly = True
        self._died_at = now

    def on_taken(self) -> None:
        """An instance has it, and said tokens of it."""
        self._spoke = True
        self._waits_since, self._pause_s, self._refusal = None, FIRST_PAUSE_S, None

    def on_failed(self, failure: Failure, now: float) -> Again | GiveUp:
        """What follows; with Again the next attempt has its number."""
        if self.deadly:
            return GiveUp(
                "request_quarantined",
                "two instances died while they computed this request; it is not tried again",
            )
        spoke, self._spoke = self._spoke, False
        if failure.code in LOST:
            if failure.at_fault and failure.at_fault <= self._lost_by and not spoke:
                # it was tried again for want of others, and has not come back yet: no news, and not another loss
                return self._on_no_room(failure, now)
            self._lost_by |= failure.at_fault
            self._pause_s = AFTER_LOSS_S[min(self.num_lost, len(AFTER_LOSS_S) - 1)]
            self.num_lost += 1
            self.passed_over |= failure.at_fault
            if self.num_lost >= self.most:
                return GiveUp(
                    "instance_lost", f"{self.num_lost} attempts were lost; send the request again"
                )
            self.number += 1
            return Again(0.0)
        if failure.code not in NO_ROOM:
            return GiveUp(failure.code, failure.message)
        return self._on_no_room(failure, now)

    def _on_no_room(self, failure: Failure, now: float) -> Again | GiveUp:
        since = self._waits_since = now if self._waits_since is None else self._waits_since
        if failure.at_fault:
            self._refusal = failure
        if now - since >= self.patience_s:
            told = self._refusal or failure
            return GiveUp(told.code, told.message)
        self.number += bool(failure.at_fault)  # else it came to nobody
        if failure.at_fault - self.passed_over:
            # whoever is left may have room; when nobody is, this comes back without anyone at fault
            self.passed_over |= failure.at_fault
            return Again(0.0)
        self.passed_over = frozenset()
        pause_s, self._pause_s = self._pause_s, min(2 * self._pause_s, MOST_PAUSE_S)
        return Again(min(pause_s, since + self.patience_s - now))


class Quarantine:
    """Requests that two instances died of, by fingerprint."""

    def __init__(self) -> None:
        self._until: OrderedDict[bytes, float] = OrderedDict()

    def add(self, fingerprint: bytes, now: float) -> None:
        """Refuse its like from now on, for a while."""
        self._until[fingerprint] = now + REFUSED_S
        self._until.move_to_end(fingerprint)  # the oldest stay in front
        while len(self._until) > _MOST_REFUSED:
            self._until.popitem(last=False)

    def refuses(self, fingerprint: bytes, now: float) -> bool:
        """Whether it died lately."""
        while self._until and next(iter(self._until.values())) <= now:
            self._until.popitem(last=False)
        return fingerprint in self._until

    def __len__(self) -> int:
        return len(self._until)
