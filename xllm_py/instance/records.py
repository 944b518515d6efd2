"""The journeys of the last local requests, for /debug/requests/{id}; never prompts."""

from __future__ import annotations

from collections import OrderedDict

from xllm_py.base import ids
from xllm_py.base.clock import Clock

_MOST = 1000
_KEPT_S = 600.0


class Records:
    """Bounded in number and age."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._records: OrderedDict[str, tuple[float, str, dict[str, float]]] = OrderedDict()

    def put(self, request_id: str, state: str, moments: dict[str, float]) -> None:
        """A request ended: finished, cancelled or an error's code; moments in seconds since it was received."""
        now = self._clock.now()
        self._records[request_id] = (now, state, moments)
        while len(self._records) > _MOST or next(iter(self._records.values()))[0] < now - _KEPT_S:
            self._records.popitem(last=False)

    def get(self, request_id: str) -> tuple[str, dict[str, float]] | None:
        """State and moments, by the request's own name or the id its client sees; None when it is unknown or forgotten."""
        found = self._records.get(request_id)
        if found is None:
            lives = (name for name in reversed(self._records) if ids.is_life_of(name, request_id))
            found = self._records.get(next(lives, ""))
        return found[1:] if found is not None else None
