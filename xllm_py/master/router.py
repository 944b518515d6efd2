"""Asks the routing policy for a place: keeps its counters, gives it the view, says why.

Called by cluster_backend once per request. It holds no request and talks to nobody.
"""

from __future__ import annotations

from xllm_py.base import log
from xllm_py.base.metrics import Metrics
from xllm_py.cluster.instance_info import Card
from xllm_py.cluster.membership import InstanceState
from xllm_py.cluster.routing import (
    ClusterView,
    Facts,
    Options,
    Route,
    narrowed,
    options,
    round_robin,
)
from xllm_py.core.request import Submission
from xllm_py.master.instance_manager import InstanceManager
from xllm_py.master.links import Links
from xllm_py.openai.backend import Readiness

_log = log.get(__name__)


class Router:
    """One master's choices."""

    def __init__(self, *, manager: InstanceManager, links: Links, metrics: Metrics) -> None:
        self._manager = manager
        self._links = links
        self._turns = [0, 0]  # requests placed, as P and as D
        self._last_mode = ""
        self._decisions = metrics.counter(
            "route_decisions", "Requests placed", ["policy", "reason"]
        )

    def view(self) -> ClusterView:
        """The cluster as it is now."""
        return ClusterView(
            candidates=self._manager.candidates(),
            linked=self._links.linked(),
            refused=self._links.refused(),
        )

    def place(
        self, submission: Submission, *, passed_over: frozenset[str], numerics: str = ""
    ) -> Route:
        """Choose. Raises what `round_robin` raises.

        passed_over: incarnations that do not count. numerics: only instances that compute the same bits count.
        """
        facts = Facts(
            num_prompt=len(submission.prompt_ids),
            max_tokens=submission.sampling.max_tokens,
            best_of=submission.sampling.best_of,
        )
        turns = (self._turns[0], self._turns[1])
        view = narrowed(self.view(), passed_over, numerics)
        route = round_robin(view, submission.model, facts, turns)
        self._turns[0] += 1
        if route.decode is not None:
            self._turns[1] += 1
        self._decisions.labels(policy="RR", reason=route.mode).inc()
        if route.mode != self._last_mode:
            say = _log.warning if route.mode == "degraded" else _log.info
            say("routing mode", mode=route.mode, before=self._last_mode or "none")
            self._last_mode = route.mode
        _log.debug("placed", request=submission.request_id, reason=route.reason)
        return route

    def knows(self, card: Card) -> bool:
        """Whether this life of an instance is not forgotten yet; it may be gone."""
        return self._manager.member(card.incarnation_id) is not None

    def options(self) -> Options:
        """What could serve now."""
        return options(self.view())

    def cards(self) -> tuple[Card, ...]:
        """Instances that requests are routed to."""
        return self.options().cards

    def ready(self) -> Readiness:
        """Whether a request would be served, and if not, why."""
        mode = self.options().mode
        if mode:
            return Readiness(ready=True, mode=mode)
        waiting = tuple(
            f"{member.card.role.name} {member.card.name} is {member.view.state.value}"
            for member in self._manager.members()
            if member.view.state is not InstanceState.READY
        )
        details = (*self._links.unlinked(), *waiting) or ("no instance has registered",)
        reason = "no_compatible_decode" if self._links.refused() else "no_instances"
        return Readiness(ready=False, reasons=(reason,), details=details)
