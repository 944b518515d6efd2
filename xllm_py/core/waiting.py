"""Who waits for a row and blocks, in the order in which they are to be tried: --priority_strategy.

    fcfs       who came first
    priority   who came first, as if every step of priority down had come `STEP_S` later
    deadline   whose deadline is nearest

A request with `offline` set counts as if it had come `OFFLINE_S` later, whatever the strategy. All of these are moments that
do not change, so that nobody starves: whoever waits is overtaken only by requests that come within that time after it. One that
ran already and lost its blocks goes before all others, except an offline one, which gave way and takes its old place. Used by the batch and the scheduler alone.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterator, Mapping

from xllm_py.core.journey import Moment
from xllm_py.core.request import Request

STEP_S = 10.0
OFFLINE_S = 60.0
_NORMAL = 2  # what a request without a priority counts as; 1 is high, 3 is low


def _arrival(request: Request) -> float:
    offline = OFFLINE_S if request.submission.offline else 0.0
    return request.journey[Moment.RECEIVED] + offline


def _prioritised(request: Request) -> float:
    return _arrival(request) + STEP_S * (request.submission.priority or _NORMAL)


def _deadline(request: Request) -> float:
    return request.deadline + (OFFLINE_S if request.submission.offline else 0.0)


STRATEGIES: Mapping[str, Callable[[Request], float]] = {
    "fcfs": _arrival,
    "priority": _prioritised,
    "deadline": _deadline,
}


class Waiting:
    """Sorted; equal ones stay in the order in which they came."""

    def __init__(self, strategy: str) -> None:
        """strategy: a key of STRATEGIES."""
        self.moment = STRATEGIES[strategy]
        self._requests: list[Request] = []

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._requests)

    def __getitem__(self, index: int) -> Request:
        return self._requests[index]

    def add(self, request: Request) -> None:
        """A new one."""
        bisect.insort(self._requests, request, key=self._place)

    def _place(self, request: Request) -> float:
        ran = request.num_preemptions and not request.submission.offline
        return -1.0 if ran else self.moment(request)

    def put_back(self, request: Request) -> None:
        """One that was preempted: before all others, or where it stood when it is offline."""
        bisect.insort_left(self._requests, request, key=self._place)

    def goes_before_new(self, now: float) -> bool:
        """Whether the first one ran already and is not to be passed by somebody who comes now."""
        if not self._requests or not self._requests[0].num_preemptions:
            return False
        first = self._requests[0]
        return not first.submission.offline or _arrival(first) <= now

    def remove(self, request: Request) -> None:
        """It runs, or has ended."""
        self._requests.remove(request)
