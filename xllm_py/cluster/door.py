"""The master's queue before the instances: who is let through next when all of them have work enough.

Online before offline, then by priority, then the tenant that was let through least (of tokens), then who came first. Waiting raises a priority, so
nobody starves. Bounded in requests and tokens; who waits too long is turned away by its own deadline. A tenant that was idle begins where the
least served of the others stands: idleness is no credit. Source: Demers et al. 1989, fair queueing, with prompts for packets. Pure; `now` is monotonic
seconds. Owned by master/dispatcher.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

RAISED_S = 10.0  # a request that has waited so long counts as of the next higher priority
OFFLINE_LEVELS = 3  # priorities that an offline request stands behind
NORMAL = 2  # what priority 0 means


@dataclass(slots=True, kw_only=True, eq=False)
class Ticket:
    """One request that waits."""

    tenant: str
    tokens: int  # of its prompt
    level: int  # priority, 1 first; offline ones stand further back
    since: float
    model: str = ""


def level_of(priority: int, *, offline: bool) -> int:
    """Priority as the submission has it: 1 high, 2 normal, 3 low, 0 normal."""
    return (priority or NORMAL) + (OFFLINE_LEVELS if offline else 0)


@dataclass(slots=True, kw_only=True)
class Door:
    """One master's."""

    most_waiting: int
    most_tokens: int
    _waiting: list[Ticket] = field(default_factory=list)
    _served: dict[str, float] = field(
        default_factory=dict
    )  # tenant -> tokens let through, while anybody waits
    tokens: int = 0  # of all that wait

    def __len__(self) -> int:
        return len(self._waiting)

    def has_room(self, tokens: int) -> bool:
        """Whether one more may wait."""
        return len(self._waiting) < self.most_waiting and self.tokens + tokens <= self.most_tokens

    def enter(self, ticket: Ticket) -> None:
        """It waits from now on; the caller has asked for room."""
        self._waiting.append(ticket)
        self.tokens += ticket.tokens
        if ticket.tenant not in self._served:
            tenants = {each.tenant for each in self._waiting if each.tenant in self._served}
            self._served[ticket.tenant] = min((self._served[each] for each in tenants), default=0.0)

    def leave(self, ticket: Ticket) -> None:
        """It gave up."""
        if ticket in self._waiting:
            self._remove(ticket)

    def take(
        self, now: float, may: Callable[[Ticket], bool] = lambda ticket: True
    ) -> Ticket | None:
        """The next one of those that may; it is let through. None: nobody is."""
        able = [each for each in self._waiting if may(each)]
        if not able:
            return None
        chosen = min(
            able,
            key=lambda each: (
                each.level - int((now - each.since) / RAISED_S),
                self._served[each.tenant],
                each.since,
            ),
        )
        self._served[chosen.tenant] += chosen.tokens
        self._remove(chosen)
        return chosen

    def _remove(self, ticket: Ticket) -> None:
        self._waiting.remove(ticket)
        self.tokens -= ticket.tokens
        if not self._waiting:
            self._served.clear()
