"""What is remembered of requests for people: who served them and when each moment came (GET /admin/requests/{id}).

Moments are seconds since the master received the request. Instances report theirs as seconds since *they* received it; P's are
laid on the moment of Submit, D's between offer and answer. What the network's delay turned round is put in order again.
Never prompts, never text.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from xllm_py.base import ids
from xllm_py.cluster.routing import Route
from xllm_py.core.journey import Moment

_MOST = 1000
_KEEP_S = 600.0
_OF_TAKER = (Moment.LANDED, Moment.DECODING)
_ONE_AFTER_ANOTHER = (
    Moment.OFFERED,
    Moment.GRANTED,
    Moment.LANDED,
    Moment.DECODING,
    Moment.FINISHED,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Transfer:
    """What the KV of a handoff cost, as P saw it."""

    num_bytes: int
    seconds: float  # from the first byte to D's word that all is there
    exposed_s: float  # of these, what came after the last computation


@dataclass(slots=True, kw_only=True)
class Record:
    """One request's story."""

    request_id: str
    received_at: float  # the master's clock, as all *_at
    trace: str = ""  # as it is told to instances
    route: Route | None = None
    submitted_at: float = 0.0
    state: str = "received"
    attempt: int = 1
    moments: dict[str, float] = field(default_factory=dict)  # since received_at
    transfer: Transfer | None = None

    def stamp(self, moment: Moment, now: float) -> None:
        """A moment the master saw itself; the first time counts."""
        self.moments.setdefault(moment, now - self.received_at)

    def lay(self, incarnation: str, moments: Mapping[str, float]) -> None:
        """Moments an instance reported."""
        if self.route is None:
            return
        if incarnation == self.route.first.incarnation_id:
            self._lay_first(moments)
        else:
            self._lay_taker(moments)

    def _lay_first(self, moments: Mapping[str, float]) -> None:
        base = self.submitted_at - self.received_at
        for name in Moment:
            if name in moments and name not in (Moment.RECEIVED, Moment.FINISHED):
                self.moments.setdefault(name, base + moments[name])

    def _lay_taker(self, moments: Mapping[str, float]) -> None:
        """D's clock begins when it reserves: between P's question and the answer, when both are known."""
        base = self.moments.get(Moment.OFFERED, self.submitted_at - self.received_at)
        base = (base + self.moments.get(Moment.GRANTED, base)) / 2
        self.moments.setdefault(Moment.GRANTED, base)
        for name in _OF_TAKER:
            if name in moments:
                self.moments.setdefault(name, base + moments[name])

    def row(self) -> dict[str, object]:
        """As JSON."""
        decode = self.route.decode or self.route.first if self.route else None
        return {
            "request_id": self.request_id,
            "trace": self.trace,
            "state": self.state,
            "attempt": self.attempt,
            "mode": self.route.mode if self.route else "",
            "prefill_instance": self.route.first.name if self.route else None,
            "decode_instance": decode.name if decode else None,
            "reason": self.route.reason if self.route else "",
            "predicted_ttft_ms": round(1000 * self.route.ttft_s, 3) if self.route else 0.0,
            "predicted_tpot_ms": round(1000 * self.route.tpot_s, 3) if self.route else 0.0,
            "moments": self._ordered(),
            "transfer": self._moved(),
        }

    def _moved(self) -> dict[str, float] | None:
        moved = self.transfer
        if moved is None:
            return None
        return {
            "bytes": moved.num_bytes,
            "seconds": round(moved.seconds, 6),
            "exposed_seconds": round(moved.exposed_s, 6),
        }

    def _ordered(self) -> dict[str, float]:
        moments = dict(self.moments)
        if Moment.FIRST_TOKEN in moments and Moment.LANDED in moments:
            # COMMIT leaves when the first token is known
            moments[Moment.LANDED] = max(moments[Moment.LANDED], moments[Moment.FIRST_TOKEN])
        last = 0.0
        for name in _ONE_AFTER_ANOTHER:
            if name in moments:
                last = moments[name] = max(last, moments[name])
        return {name: round(moments[name], 6) for name in Moment if name in moments}


class Journeys:
    """The last requests."""

    def __init__(self) -> None:
        self._records: OrderedDict[str, Record] = OrderedDict()

    def open(self, request_id: str, now: float, trace: str = "") -> Record:
        """Begin a record; old ones go."""
        record = Record(request_id=request_id, received_at=now, trace=trace)
        record.stamp(Moment.RECEIVED, now)
        self._records[request_id] = record
        self._records.move_to_end(request_id)
        oldest = next(iter(self._records.values()))
        while len(self._records) > _MOST or now - oldest.received_at > _KEEP_S:
            self._records.popitem(last=False)
            oldest = next(iter(self._records.values()))
        return record

    def newest_first(self) -> Iterator[Record]:
        """All that are not forgotten yet."""
        return reversed(self._records.values())

    def get(self, request_id: str) -> Record | None:
        """A request that is not forgotten yet, by its own name or by the id its client sees."""
        found = self._records.get(request_id)
        lives = (
            each for each in self.newest_first() if ids.is_life_of(each.request_id, request_id)
        )
        return found or next(lives, None)
