"""What instances and masters say to each other beside calls about one request: streams of outputs, heartbeats.

Frozen dataclasses of plain types, in columns where many; control/convert.py turns them into protobuf and back. Submission,
Offer and the like travel as core/request defines them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from xllm_py.cluster.duties import Duty
from xllm_py.cluster.instance_info import Role
from xllm_py.cluster.load import Load, Progress
from xllm_py.cluster.prefix_index import NO_NEWS, CacheNews
from xllm_py.core.plan import Outputs
from xllm_py.wire.messages import Verdicts


def no_verdicts() -> Verdicts:
    """Empty columns."""
    return Verdicts(
        request_ids=[], attempts=[], kinds=[], reasons=[], num_bytes=[], seconds=[], exposed=[]
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationsUp:
    """One engine step of one instance. The first message of a stream is empty and only says who speaks.

    In relayed mode P passes D's messages on unchanged: name, incarnation and sequence are then D's.
    """

    name: str
    incarnation: str
    sequence: int  # counts the messages of this incarnation to this master, from 0
    outputs: Outputs = field(default_factory=Outputs)
    verdicts: Verdicts = field(default_factory=no_verdicts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Positions:
    """Columns of (request, attempt, choice, next position)."""

    request_ids: list[str] = field(default_factory=list)
    attempts: list[int] = field(default_factory=list)
    choices: list[int] = field(default_factory=list)
    nexts: list[int] = field(default_factory=list)

    def add(self, request_id: str, attempt: int, choice: int, position: int) -> None:
        """Append one entry."""
        self.request_ids.append(request_id)
        self.attempts.append(attempt)
        self.choices.append(choice)
        self.nexts.append(position)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cancels:
    """Columns of (request, attempt) that nobody waits for any more."""

    request_ids: list[str] = field(default_factory=list)
    attempts: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationsDown:
    """The master's word on a GenerationsUp.

    acks: everything before `next` is in the log; after a finish was acknowledged the instance may forget the request.
    again: send again from `next`. cancels: end these.
    """

    acks: Positions = field(default_factory=Positions)
    again: Positions = field(default_factory=Positions)
    cancels: Cancels = field(default_factory=Cancels)

    @property
    def empty(self) -> bool:
        """Nothing to say."""
        columns = (self.acks, self.again, self.cancels)
        return not any(column.request_ids for column in columns)


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkState:
    """What D knows of one giver."""

    peer: str
    incarnation: str
    linked: bool
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkHealth:
    """What P found when it tried its KV link to a D."""

    works: bool
    reason: str = ""  # why it does not
    round_trip_s: float = 0.0
    bytes_per_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Heartbeat:
    """An instance is alive and says how it is, every heart_beat_interval, to each master."""

    name: str
    incarnation: str
    sequence: int
    state: str  # READY or DRAINING, as in the card
    role: Role
    load: Load = field(default_factory=Load)
    progress: Progress = field(default_factory=Progress)
    links: tuple[LinkState, ...] = ()
    cache: CacheNews = NO_NEWS
    term: int = 0  # the highest of an elected master that it knows of
    duty: Duty | None = None  # as it has it; None: none was given


@dataclass(frozen=True, slots=True, kw_only=True)
class HeartbeatReply:
    """known is False when the master has no card of this incarnation: put it again. cache_next: the number of the change of the prefix cache
    that it wants to hear from, 0: nothing. The elected master beside that says its term, and what this instance is to do.
    """

    known: bool
    cache_next: int = 0
    term: int = 0
    duty: Duty | None = None
