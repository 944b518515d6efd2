"""What instances that may do either now do: prefill, decode or both. Decided by the elected master alone, kept by each instance itself.

A duty is one instance's, numbered by (term of the master that gave it, epoch): an instance takes only a later one than it has, so a
master that was deposed changes nothing, and says what it has in its heartbeats, so every master routes by the same word and a new one
goes on from there. A change goes by drain: the instance gets nothing new until what it has is done (or patience is over), then the work
of its new duty. It is moved when the one side has more to do than the other has room for, and that for a while:

    pressure >= HIGH on one side and <= LOW on the other, for HOLD_S; then nothing for COOL_S

What is left must always be able to do both halves: where the last instance for one of them is gone, another one takes it over at once.
Those set by hand are left alone, save for that. Pure; owned by master/roles. `now` is monotonic seconds.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from enum import Enum

from xllm_py.cluster.instance_info import Card, Role

HIGH, LOW = 1.0, 0.5  # of pressure, where 1 is as much as an instance should have
HOLD_S = 3.0
COOL_S = 30.0
DRAIN_S = 10.0  # work of the old duty that lasts longer goes on beside that of the new one


class Half(Enum):
    """What a request needs done."""

    PREFILL = "prefill"
    DECODE = "decode"

    @property
    def other(self) -> Half:
        """The other half."""
        return Half.DECODE if self is Half.PREFILL else Half.PREFILL


_HALVES = {
    Role.DEFAULT: frozenset[Half](),
    Role.PREFILL: frozenset({Half.PREFILL}),
    Role.DECODE: frozenset({Half.DECODE}),
    Role.MIX: frozenset(Half),
}
_ONLY = {Half.PREFILL: Role.PREFILL, Half.DECODE: Role.DECODE}


def abilities(card: Card) -> frozenset[Half]:
    """What this instance could be given to do."""
    return frozenset(Half) if movable(card) else _HALVES[card.role]


def movable(card: Card) -> bool:
    """Whether its duty is not fixed by its role."""
    return card.role is Role.MIX or card.flexible


@dataclass(frozen=True, slots=True, kw_only=True)
class Duty:
    """One instance's, as it was given."""

    role: Role  # PREFILL, DECODE, or MIX: both
    term: int
    epoch: int
    settled: bool = True  # False: it ends the work of the duty before, and takes nothing new
    by_hand: bool = False

    @property
    def number(self) -> tuple[int, int]:
        """What is later is greater."""
        return self.term, self.epoch


@dataclass(slots=True)
class Fence:
    """What one instance keeps of elected masters' words, for as long as it lives."""

    term: int = 0  # the highest heard of
    duty: Duty | None = None  # the latest given

    def hear(self, term: int, duty: Duty | None) -> bool:
        """A master says its term (0: it is not elected) and what we are to do; True when that is new. A lower term is passed over."""
        if term < self.term:
            return False
        self.term = term
        if duty is None or duty.term != term:
            return False
        if self.duty is not None and duty.number <= self.duty.number:
            return False
        self.duty = duty
        return True


def duty_role(card: Card, duty: Duty | None) -> Role:
    """What it is there for."""
    return duty.role if duty is not None and movable(card) else card.role


def halves(card: Card, duty: Duty | None) -> frozenset[Half]:
    """What new work it takes now."""
    if duty is not None and movable(card) and not duty.settled:
        return frozenset()
    return _HALVES[duty_role(card, duty)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """One instance that may serve, as the elected master sees it. Pressures as in the module's text."""

    card: Card
    duty: Duty | None
    idle: bool = True  # it has nothing to do
    prefill: float = 0.0
    decode: float = 0.0

    @property
    def key(self) -> str:
        """The incarnation."""
        return self.card.incarnation_id

    @property
    def role(self) -> Role:
        """What it is there for, settled or not."""
        return duty_role(self.card, self.duty)

    @property
    def by_hand(self) -> bool:
        """Whether somebody set it."""
        return self.duty is not None and self.duty.by_hand

    @property
    def is_settled(self) -> bool:
        """Whether it takes new work."""
        return self.duty is None or self.duty.settled

    def pressure(self, half: Half) -> float:
        """Of one half of its work."""
        return self.prefill if half is Half.PREFILL else self.decode


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """An instance is to have this duty from now on."""

    key: str
    role: Role
    settled: bool
    by_hand: bool
    cause: str  # in a word, for metrics: needed, pressure, settled, hand


@dataclass(slots=True)
class Duties:
    """What the elected master remembers between two looks."""

    _pressed: dict[Half, float] = field(default_factory=dict)  # since when this half needs more
    _moved_at: float = float("-inf")
    _draining: dict[str, float] = field(default_factory=dict)  # incarnation -> since when

    def look(self, standings: Sequence[Standing], now: float) -> list[Move]:
        """The changes that are due, at most one instance's beside those that settle."""
        self._draining = {
            each.key: self._draining.get(each.key, now) for each in standings if not each.is_settled
        }
        needed = _needed(standings)
        if needed:
            self._pressed.clear()
            self._moved_at = now
            return [needed]
        moves = [_settle(each) for each in standings if self._has_drained(each, now)]
        moved = self._by_pressure(standings, now)
        return [*moves, moved] if moved else moves

    def _has_drained(self, each: Standing, now: float) -> bool:
        since = self._draining.get(each.key)
        return since is not None and (each.idle or now - since >= DRAIN_S)

    def _by_pressure(self, standings: Sequence[Standing], now: float) -> Move | None:
        for half in Half:
            if _mean(standings, half) >= HIGH and _mean(standings, half.other) <= LOW:
                self._pressed.setdefault(half, now)
            else:
                self._pressed.pop(half, None)
        if now - self._moved_at < COOL_S or self._draining:
            return None
        for half, since in self._pressed.items():
            chosen = _helper(standings, half) if now - since >= HOLD_S else None
            if chosen is not None:
                self._pressed.clear()
                self._moved_at = now
                return Move(
                    key=chosen.key,
                    role=_ONLY[half],
                    settled=chosen.idle,
                    by_hand=False,
                    cause="pressure",
                )
        return None


def by_hand(standings: Sequence[Standing], key: str, role: Role) -> Move | None:
    """As somebody wants it, if the others can do what this one will not; else None."""
    others = [each for each in standings if each.key != key]
    if _lacking(others) - _HALVES[role]:
        return None
    chosen = next((each for each in standings if each.key == key), None)
    idle = chosen is None or chosen.idle or chosen.role is role or role is Role.MIX
    return Move(key=key, role=role, settled=idle, by_hand=True, cause="hand")


def _lacking(standings: Collection[Standing]) -> frozenset[Half]:
    """Halves that nobody is there for."""
    there: set[Half] = set()
    for each in standings:
        there |= _HALVES[each.role]
    return frozenset(Half) - there


def _needed(standings: Sequence[Standing]) -> Move | None:
    """One instance for a half that nobody is there for or that only such are there for who take nothing yet."""
    for half in Half:
        there = [each for each in standings if half in _HALVES[each.role]]
        if any(each.is_settled for each in there):
            continue
        able = [each for each in there or standings if movable(each.card)]
        if not able:
            continue
        chosen = min(
            able, key=lambda each: (each.by_hand, each.pressure(half.other), each.card.name)
        )
        others = [each for each in standings if each is not chosen]
        role = Role.MIX if half.other in _lacking(others) else _ONLY[half]
        return Move(key=chosen.key, role=role, settled=True, by_hand=chosen.by_hand, cause="needed")
    return None


def _settle(each: Standing) -> Move:
    return Move(key=each.key, role=each.role, settled=True, by_hand=each.by_hand, cause="settled")


def _mean(standings: Sequence[Standing], half: Half) -> float:
    """Pressure of those that take this work; infinite when there is none of them."""
    there = [each.pressure(half) for each in standings if _takes(each, half)]
    return sum(there) / len(there) if there else float("inf")


def _takes(each: Standing, half: Half) -> bool:
    return each.is_settled and half in _HALVES[each.role]


def _helper(standings: Sequence[Standing], half: Half) -> Standing | None:
    """Who should do only this half from now on: one that does both first, then the least busy of the other side, if others remain there."""
    able = [
        each
        for each in standings
        if movable(each.card)
        and not each.by_hand
        and each.role is not _ONLY[half]
        and any(_takes(other, half.other) for other in standings if other is not each)
    ]
    if not able:
        return None
    return min(
        able,
        key=lambda each: (each.role is not Role.MIX, each.pressure(half.other), each.card.name),
    )
