"""Asks the routing policy for a place: keeps its counters, costs and prefix index, gives it the view, says why.

Called by the dispatcher for each attempt, and told what became of it, so that the costs follow what requests do cost. It talks to nobody.
"""

from __future__ import annotations

import dataclasses
import random
from dataclasses import dataclass

from xllm_py.base import log
from xllm_py.base.hashing import block_hashes, chain_root, salted
from xllm_py.base.metrics import Children, Metrics
from xllm_py.cluster.costs import Costs, Typical
from xllm_py.cluster.instance_info import Card
from xllm_py.cluster.membership import InstanceState
from xllm_py.cluster.policies import Known, choose
from xllm_py.cluster.prefix_index import PrefixIndex
from xllm_py.cluster.routing import (
    ClusterView,
    Facts,
    Options,
    Route,
    able,
    kept_by,
    narrowed,
    options,
    round_robin,
)
from xllm_py.core.request import Submission
from xllm_py.master.instance_manager import InstanceManager
from xllm_py.master.links import Links
from xllm_py.openai.backend import Readiness
from xllm_py.wire.control_messages import Heartbeat

_log = log.get(__name__)
_CACHE_AWARE = frozenset({"CAR", "SLO_AWARE"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """As the flags say."""

    name: str = "RR"
    ttft_s: float = 1.0  # targets of requests that name none
    tpot_s: float = 0.05
    cluster_key: bytes = b""  # hashes are made with it
    prefix_seed: int = 1024


class _AllCosts(dict[str, Costs]):
    """By incarnation; of one not heard of yet what is typical."""

    def __init__(self) -> None:
        super().__init__()
        self._typical = Typical()

    def __missing__(self, incarnation: str) -> Costs:
        costs = self[incarnation] = Costs(self._typical)
        return costs


class Router:
    """One master's choices."""

    def __init__(
        self, *, manager: InstanceManager, links: Links, metrics: Metrics, policy: Policy
    ) -> None:
        self._manager = manager
        self._links = links
        self._policy = policy
        self._turns = [0, 0]  # requests placed, as P and as D
        self._last_mode = ""
        self._costs = _AllCosts()
        self._standing: Options | None = None
        self._index = PrefixIndex()
        self._random = random.Random()
        self._roots: dict[str, bytes] = {}  # model fingerprint -> parent of every first block
        decisions = metrics.counter("route_decisions", "Requests placed", ["policy", "reason"])
        self._decisions = Children(lambda reason: decisions.labels(policy.name, reason).inc)
        self._predicted = metrics.seconds(
            "ttft_prediction_error_seconds", "Predicted time to first token against the real one"
        )
        self._predicted_pace = metrics.seconds(
            "tpot_prediction_error_seconds", "Predicted time of a token against the real one"
        )
        metrics.gauge("prefix_index_blocks", "Blocks known to be cached somewhere").set_function(
            lambda: float(len(self._index))
        )
        manager.on_changed.append(self._on_changed)
        links.on_changed.append(self._on_changed)
        manager.on_forgotten.append(lambda card: self._forget(card.incarnation_id))
        manager.on_lost.append(lambda card, _reason, _died: self._index.forget(card.incarnation_id))

    def view(self) -> ClusterView:
        """The cluster as it is now."""
        return ClusterView(
            candidates=self._manager.candidates(),
            linked=self._links.linked(),
            refused=self._links.refused(),
        )

    def place(
        self,
        submission: Submission,
        *,
        passed_over: frozenset[str],
        numerics: str = "",
        giver: str = "",
    ) -> Route:
        """Choose. Raises what `able` and `policies.choose` raise.

        passed_over: incarnations that do not count. numerics: only instances that compute the same bits count. giver: the incarnation
        that computed the prompt for an attempt before this one.
        """
        num_said = len(submission.generated_ids)
        facts = Facts(
            num_prompt=len(submission.prompt_ids) + num_said,
            max_tokens=submission.sampling.max_tokens - num_said,
            best_of=submission.sampling.best_of,
        )
        standing = self._standing_options() if not passed_over and not numerics else None
        if standing is not None and standing.suits(submission.model, facts):
            found = standing
        else:
            found = able(narrowed(self.view(), passed_over, numerics), submission.model, facts)
        route = self._choose(kept_by(found, giver) if giver else found, submission, facts)
        self._turns[0] += 1
        if route.decode is not None:
            self._turns[1] += 1
        self._decisions[f"{route.mode}:{route.why}"]()
        if route.mode != self._last_mode:
            say = _log.warning if route.mode == "degraded" else _log.info
            say("routing mode", mode=route.mode, before=self._last_mode or "none")
            self._last_mode = route.mode
        _log.debug("placed", request=submission.request_id, reason=route.reason)
        return route

    def _standing_options(self) -> Options | None:
        """The view's, until something changes; None where they change by time alone."""
        if self._standing is None:
            found = options(self.view())
            if found.mode not in ("pd", "default"):
                return None
            self._standing = found
        return self._standing

    def _on_changed(self) -> None:
        self._standing = None

    def _choose(self, found: Options, submission: Submission, facts: Facts) -> Route:
        if self._policy.name == "RR":
            return round_robin(found, (self._turns[0], self._turns[1]), facts.num_prompt)
        known = Known(
            costs=self._costs,
            held=self._held(found, submission) if self._policy.name in _CACHE_AWARE else {},
            rates=self._links.rates,
            draw=self._random.randrange,
            ttft_s=submission.ttft_slo_ms / 1000 or self._policy.ttft_s,
            tpot_s=submission.tpot_slo_ms / 1000 or self._policy.tpot_s,
            may_refuse=submission.attempt == 1,
        )
        route = choose(self._policy.name, found, facts, known)
        held = known.held.get(route.first.incarnation_id, 0)
        return dataclasses.replace(route, num_to_compute=facts.num_prompt - held)

    def costs(self, incarnation: str) -> Costs:
        """Of one life of an instance."""
        return self._costs[incarnation]

    def pressures(self, incarnation: str) -> tuple[float, float]:
        """How much an instance has to do, of prompts and of answers, where 1 is all that it should have.

        Prompts: the wait for those before, as a share of the wanted time to first token. Answers: what is used of the KV memory, or what
        others add to the time of a token as a share of the wanted one, whichever is more.
        """
        costs, policy = self._costs[incarnation], self._policy
        wait = costs.tokens_ahead * costs.prompt_token_s / policy.ttft_s
        return wait, max(costs.kv_usage, costs.rows * costs.token.b / policy.tpot_s)

    def _held(self, found: Options, submission: Submission) -> dict[str, int]:
        """Leading tokens of the prompt, and of what was said already, that each instance has."""
        held: dict[str, int] = {}
        ids = submission.prompt_ids + submission.generated_ids
        for fingerprint, size in found.kinds:
            if not size:
                continue
            root = self._root(fingerprint)
            # the last token is computed always, so a block that ends with it is not worth anything
            hashes = block_hashes(salted(root, submission.cache_salt), ids[:-1], size)
            for incarnation, count in self._index.match(hashes).items():
                held[incarnation] = max(held.get(incarnation, 0), count * size)
        return held

    def _root(self, fingerprint: str) -> bytes:
        root = self._roots.get(fingerprint)
        if root is None:
            root = self._roots[fingerprint] = chain_root(
                key=self._policy.cluster_key,
                model_fingerprint=fingerprint,
                seed=self._policy.prefix_seed,
            )
        return root

    def soonest_s(self, model: str) -> float:
        """When, predicted, the freest instance that a request for this model may go to gets to it; infinite: there is none."""
        found = self._standing_options()
        if found is None or (model and model not in found.cards[0].served_names):
            return float("inf")
        keys = found.giver_keys or [each.key for each in found.alone]
        return min(self._costs[key].ahead_s for key in keys)

    # ---- what became of it ----

    def on_heartbeat(self, beat: Heartbeat) -> int:
        """An instance reports; returns from which change of its prefix cache on it is to tell, 0: none."""
        load = beat.load
        self.costs(beat.incarnation).report(
            load.waiting_requests, load.running_requests, load.free_blocks, load.total_blocks
        )
        if self._policy.name not in _CACHE_AWARE:
            return 0
        return self._index.take(beat.incarnation, beat.cache)

    def on_placed(self, request_id: str, route: Route) -> float:
        """It is on its way there; returns how many tokens stand before its first one."""
        costs = self.costs(route.first.incarnation_id)
        ahead = costs.tokens_ahead + route.num_to_compute
        costs.enqueue(request_id, route.num_to_compute)
        return ahead

    def on_first_token(self, request_id: str, route: Route, ahead: float, seconds: float) -> None:
        """It came after so long."""
        costs = self.costs(route.first.incarnation_id)
        costs.dequeue(request_id)
        costs.observe_first_token(ahead, seconds)
        if route.ttft_s:
            self._predicted.observe(abs(seconds - route.ttft_s))
        self.costs(_decoder(route)).decode(1)

    def on_pace(self, route: Route, seconds: float) -> None:
        """A token of an answer took so long where it is decoded."""
        self.costs(_decoder(route)).observe_token(seconds)
        if route.tpot_s:
            self._predicted_pace.observe(abs(seconds - route.tpot_s))

    def on_gone(self, request_id: str, route: Route, *, decoding: bool) -> None:
        """The attempt is over, before its first token or after; of an instance that was forgotten meanwhile nothing is kept."""
        first, decoder = route.first.incarnation_id, _decoder(route)
        if first in self._costs:
            self._costs[first].dequeue(request_id)
        if decoding and decoder in self._costs:
            self._costs[decoder].decode(-1)

    def _forget(self, incarnation: str) -> None:
        self._index.forget(incarnation)
        self._costs.pop(incarnation, None)

    # ---- what others ask ----

    def knows(self, card: Card) -> bool:
        """Whether this life of an instance is not forgotten yet; it may be gone."""
        return self._manager.member(card.incarnation_id) is not None

    def options(self) -> Options:
        """What could serve now."""
        return self._standing_options() or options(self.view())

    def cards(self) -> tuple[Card, ...]:
        """Instances that requests are routed to."""
        return self.options().cards

    def inputs(self, incarnation: str) -> dict[str, float]:
        """What the policies know of one instance, for people."""
        costs = self.costs(incarnation)
        return {
            "tokens_ahead": round(costs.tokens_ahead, 1),
            "decoding": costs.rows,
            "first_token_ms": round(1000 * costs.first_token.a, 3),
            "ms_per_prompt_token": round(1000 * costs.first_token.b, 6),
            "token_ms": round(1000 * costs.token_s, 3),
            "cached_blocks": self._index.count(incarnation),
        }

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


def _decoder(route: Route) -> str:
    return (route.decode or route.first).incarnation_id
