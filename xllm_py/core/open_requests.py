"""The requests of one engine that have not ended, each with those of its choices that have not, and when the next one is late.

Used by the scheduler alone; states and blocks are its business.
"""

from __future__ import annotations

from collections.abc import Iterator

from xllm_py.core.request import HOLDS_BLOCKS, Request, State

NEVER = float("inf")


class OpenRequests:
    """By request id; a request is forgotten with its last choice."""

    def __init__(self) -> None:
        self._choices: dict[str, list[Request]] = {}
        self.next_deadline = NEVER  # may be early, never late

    def __len__(self) -> int:
        return len(self._choices)

    def add(self, request: Request) -> Request:
        """A new request, or one more choice of an open one; returns it."""
        self._choices.setdefault(request.request_id, []).append(request)
        self.next_deadline = min(self.next_deadline, request.deadline)
        return request

    def get(self, request_id: str) -> Request | None:
        """Its first open choice; the only one while it waits, is given or is reserved."""
        choices = self._choices.get(request_id)
        return choices[0] if choices else None

    def find(self, request_id: str, attempt: int) -> Request | None:
        """As `get`, of this attempt only."""
        request = self.get(request_id)
        return request if request is not None and request.submission.attempt == attempt else None

    def choices(self, request_id: str) -> list[Request]:
        """Its open choices; a copy."""
        return list(self._choices[request_id])

    def remove(self, request: Request) -> bool:
        """A choice has ended. True when it was the last one of its request."""
        choices = self._choices[request.request_id]
        choices.remove(request)
        if not choices:
            del self._choices[request.request_id]
        return not choices

    def late(self, now: float) -> list[Request]:
        """One choice of every request whose deadline has passed."""
        firsts = [choices[0] for choices in self._choices.values()]
        return [request for request in firsts if request.deadline <= now]

    def look_ahead(self) -> None:
        """Find the next deadline anew, after some requests ended."""
        deadlines = (choices[0].deadline for choices in self._choices.values())
        self.next_deadline = min(deadlines, default=NEVER)

    def holding(self) -> Iterator[Request]:
        """Choices that hold blocks."""
        for choices in self._choices.values():
            for request in choices:
                if request.state in HOLDS_BLOCKS:
                    yield request

    def counts(self) -> dict[str, int]:
        """Choices by state, and requests in all; for the ledger."""
        counts = dict.fromkeys(State, 0)
        for choices in self._choices.values():
            for request in choices:
                counts[request.state] += 1
        return {
            **{f"requests_{state.value}": count for state, count in counts.items()},
            "requests_open": len(self._choices),
        }
