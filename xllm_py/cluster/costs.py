"""What a request would cost at an instance, in seconds: lines fitted to what requests did cost, and the work that waits there now.

    time to first token = a + b * tokens to be computed before it, those of others that wait included
    time of a token     = c + d * requests that decode beside it

Each line forgets exponentially, so it follows a machine that gets slower. What one instance has not shown yet is believed to be as with the
others (Typical): else who was slower than a guess would never be tried, or who was tried first get everything. Work of our own
counts from the moment it is placed, not from the next report, so that requests that come together do not all see the same idle instance.
Source of the fit: weighted least squares of two unknowns. Pure; owned by master/router.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

_KEEP = 0.97  # weight of what was known, per observation
_FIRST_TOKEN = ((0.0, 0.02), (1000.0, 0.5))  # (tokens, seconds) believed before anything was seen
_TOKEN = ((0.0, 0.02), (32.0, 0.05))
_PRIOR = 0.2  # weight of each of these
_BELIEVED = 3.0  # points that a parent line is worth
_LEAST_DEVIATION = 0.05  # of a prediction, as a share of it


class Line:
    """y = a + b x with a, b >= 0."""

    __slots__ = ("_n", "_parent", "_squares", "_x", "_xx", "_xy", "_y", "a", "b")

    def __init__(
        self, prior: Iterable[tuple[float, float]] = (), parent: Line | None = None
    ) -> None:
        """prior: points that are believed a little. parent: a line that is believed as much as a few points of it."""
        self._n = self._x = self._y = self._xx = self._xy = self._squares = 0.0
        self._parent = parent
        self.a = self.b = 0.0
        for x, y in prior:
            self._add(x, y, _PRIOR)
        self.solve()

    def _add(self, x: float, y: float, weight: float) -> None:
        self._n += weight
        self._x += weight * x
        self._y += weight * y
        self._xx += weight * x * x
        self._xy += weight * x * y

    def observe(self, x: float, y: float) -> None:
        """It was y at x."""
        error = y - self.predict(x)
        self._squares = _KEEP * self._squares + error * error
        self._n *= _KEEP
        self._x *= _KEEP
        self._y *= _KEEP
        self._xx *= _KEEP
        self._xy *= _KEEP
        self._add(x, y, 1.0)
        if self._parent is not None:
            self._parent.observe(x, y)
        self.solve()

    def solve(self) -> None:
        """Fit anew; the parent may have moved."""
        n, x, y, xx, xy = self._n, self._x, self._y, self._xx, self._xy
        parent = self._parent
        if parent is not None:
            share = _BELIEVED / parent._n
            n, x, y = n + share * parent._n, x + share * parent._x, y + share * parent._y
            xx, xy = xx + share * parent._xx, xy + share * parent._xy
        spread = n * xx - x * x
        self.b = max(0.0, (n * xy - x * y) / spread) if spread > 1e-12 else 0.0
        self.a = max(0.0, (y - self.b * x) / n)
        if self.a == 0.0 and xx > 0:
            self.b = max(0.0, xy / xx)

    def predict(self, x: float) -> float:
        """At x."""
        return self.a + self.b * x

    def chance(self, x: float, limit: float) -> float:
        """Of staying within a limit at x, errors taken for normal."""
        expected = self.predict(x)
        source = self if self._parent is None or self._n > _BELIEVED else self._parent
        deviation = math.sqrt(source._squares / max(1.0, source._n))
        deviation = max(deviation, _LEAST_DEVIATION * expected, 1e-6)
        return 0.5 * (1.0 + math.erf((limit - expected) / (deviation * math.sqrt(2.0))))


class Typical:
    """What requests cost anywhere."""

    def __init__(self) -> None:
        self.first_token, self.token = Line(_FIRST_TOKEN), Line(_TOKEN)


class Costs:
    """Of one incarnation. The numbers that every decision reads are kept ready."""

    __slots__ = (
        "_running_elsewhere",
        "_waiting_elsewhere",
        "ahead_s",
        "decoding",
        "first_token",
        "free_blocks",
        "kv_usage",
        "prompt_token_s",
        "queued",
        "queued_tokens",
        "rows",
        "token",
        "token_s",
        "tokens_ahead",
    )

    def __init__(self, typical: Typical | None = None) -> None:
        typical = typical or Typical()
        self.first_token = Line(parent=typical.first_token)
        self.token = Line(parent=typical.token)
        self.queued: dict[str, int] = {}  # our requests before their first token: tokens to compute
        self.queued_tokens = 0
        self.decoding = 0  # of our requests
        self._waiting_elsewhere = self._running_elsewhere = (
            0  # requests in its last report that are not ours
        )
        self.free_blocks: float = math.inf  # at the last report
        self.kv_usage = 0.0
        self._refresh()

    def _refresh(self) -> None:
        # of others' requests only the number is known
        mean = self.queued_tokens / len(self.queued) if self.queued else 256.0
        self.tokens_ahead = self.queued_tokens + self._waiting_elsewhere * mean
        self.rows = self.decoding + self._running_elsewhere
        self.prompt_token_s = self.first_token.b
        self.ahead_s = self.first_token.predict(self.tokens_ahead)
        self.token_s = self.token.predict(self.rows + 1)

    def enqueue(self, request_id: str, tokens: int) -> None:
        """It was placed here to be computed."""
        self.queued_tokens += tokens - self.queued.pop(request_id, 0)
        self.queued[request_id] = tokens
        self._refresh()

    def dequeue(self, request_id: str) -> None:
        """Its first token is there, or it is gone."""
        self.queued_tokens -= self.queued.pop(request_id, 0)
        self._refresh()

    def decode(self, change: int) -> None:
        """One more of ours decodes here, or one less."""
        self.decoding += change
        self._refresh()

    def report(self, waiting: int, running: int, free_blocks: int, total_blocks: int) -> None:
        """As its heartbeat says; what is not ours is some other master's."""
        ours = len(self.queued) + self.decoding
        theirs = max(0, waiting + running - ours)
        self._waiting_elsewhere = min(waiting, theirs)
        self._running_elsewhere = theirs - self._waiting_elsewhere
        self.free_blocks = free_blocks if total_blocks else math.inf
        self.kv_usage = 1 - free_blocks / total_blocks if total_blocks else 0.0
        self.first_token.solve()
        self.token.solve()
        self._refresh()

    def observe_first_token(self, tokens: float, seconds: float) -> None:
        """It came so long after the request was placed behind so many tokens, its own included."""
        self.first_token.observe(tokens, seconds)
        self._refresh()

    def observe_token(self, seconds: float) -> None:
        """A token of an answer took so long."""
        self.token.observe(self.rows, seconds)
        self._refresh()

    def first_token_s(self, tokens: int) -> float:
        """Predicted, for a newcomer with so many tokens to compute; `token_s` is what one of its tokens takes then."""
        return self.ahead_s + self.prompt_token_s * tokens
