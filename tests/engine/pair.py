"""Two engines (P and D) in one thread: schedulers, toy executors, handoff agents, the in-memory KV transport, and a post office.

The post office is what the two API processes are: it carries offers, answers, first tokens and cancels, and may deliver them
late, twice or never. The master is a token log: one token per position, whoever says it.
"""

from __future__ import annotations

import dataclasses
import heapq
import weakref
from collections.abc import Callable
from enum import Enum
from typing import Any

from xllm_py.base.clock import HandClock
from xllm_py.core.config import CacheConfig, EngineConfig, ModelFacts, SchedulerConfig
from xllm_py.core.plan import StepPlan
from xllm_py.core.request import Offer, OfferAnswer, Submission
from xllm_py.core.scheduler import Scheduler
from xllm_py.engine.handoff_agent import HandoffAgent
from xllm_py.engine.toy import EOS, VOCAB_SIZE, ToyExecutor
from xllm_py.transport.memory import Faults, MemoryKvTransport, MemoryNetwork
from xllm_py.wire import messages as m

FACTS = ModelFacts(vocab_size=VOCAB_SIZE, max_model_len=200, eos_token_ids=(EOS,))
TURN_S = 0.005
ANSWER_WAIT_S = 0.05  # how long a caller waits before it says that nobody answered


class Fate(Enum):
    """What happens to one control call."""

    GOOD = "good"
    SLOW = "slow"  # answered, but only just in time
    LOST = "lost"  # it never arrives
    UNANSWERED = "unanswered"  # it arrives, its answer does not
    LATE = "late"  # it arrives long after the caller gave up
    TWICE = "twice"


class Engine:
    """What engine/loop is, without pipe and process."""

    def __init__(
        self,
        name: str,
        clock: HandClock,
        network: MemoryNetwork,
        *,
        num_blocks: int,
        block_size: int = 4,
        prefix_root: bytes = b"",
        **scheduler: Any,
    ) -> None:
        fields = {"prefill_usage_threshold": 1.0, "max_seqs_per_batch": 6, **scheduler}
        config = EngineConfig(
            toy_num_blocks=num_blocks,
            cache=CacheConfig(block_size=block_size),
            scheduler=SchedulerConfig(**fields),
        )
        self.name = name
        self.clock = clock
        self.events: list[m.Event] = []
        self.executor = ToyExecutor(config)
        memory = self.executor.kv_memory()
        self.scheduler = Scheduler(
            config.scheduler, FACTS, num_blocks, block_size, prefix_root, memory.poison
        )
        self.transport = MemoryKvTransport(
            network=network,
            memory=self.executor.kv_memory(),
            incarnation=f"{name}-1",
            cluster_key=b"key",
        )
        # a test makes hundreds of these, and each has a pipe that select must be able to name
        weakref.finalize(self, self.transport.close)
        self.agent = HandoffAgent(
            scheduler=self.scheduler,
            transport=self.transport,
            config=config.scheduler,
            model_fingerprint="toy",
            layout=self.executor.kv_memory().layout,
            send=self.events.append,
        )

    def obey(self, command: m.Command) -> None:
        now = self.clock.now()
        match command:
            case m.Offers():
                self.agent.on_offers(command, now)
            case m.Answers():
                self.agent.giving.on_answers(command, now)
            case m.FirstTokens():
                self.agent.taking.on_first_tokens(command, now)
            case m.FirstTaken():
                self.agent.giving.on_first_taken(command, now)
            case m.PeerGone():
                self.agent.on_peer_gone(command, now)
            case m.Abort():
                for request_id, attempt in zip(command.request_ids, command.attempts, strict=True):
                    self.scheduler.abort(request_id, attempt, now)

    def turn(self) -> StepPlan:
        now = self.clock.now()
        self.agent.on_news(now)
        plan = self.scheduler.schedule(now)
        self.agent.before_step(plan, now)
        if not plan.empty:
            self.scheduler.apply(plan, self.executor.execute(plan, self.agent.layer_done), now)
        self.agent.after_step(now)
        return plan

    def assert_empty(self) -> None:
        self.scheduler.assert_empty()
        assert (self.agent.giving.num_open, self.agent.taking.num_open) == (0, 0)
        counts = self.transport.ledger()
        assert (counts["grants_open"], counts["grants_given"]) == (0, 0), counts


class Pair:
    """P gives to D. `fate(kind)` decides over each control call."""

    def __init__(
        self,
        *,
        fate: Callable[[str], Fate] = lambda _kind: Fate.GOOD,
        faults: Callable[[str, str], Faults] = lambda _giver, _taker: Faults(),
        p: dict[str, Any] | None = None,
        d: dict[str, Any] | None = None,
        pull: bool = False,
    ) -> None:
        """pull: D fetches what P pushes else."""
        self.clock = HandClock()
        self.network = MemoryNetwork(self.clock, faults)
        self.p = Engine(
            "p", self.clock, self.network, **{"num_blocks": 24, "kv_pull": pull, **(p or {})}
        )
        self.d = Engine("d", self.clock, self.network, **{"num_blocks": 24, **(d or {})})
        self.fate = fate
        self.tokens: dict[str, dict[int, int]] = {}
        self.speakers: dict[str, list[str]] = {}  # who said which position, in order of arrival
        self.ends: dict[str, list[str]] = {}
        self.verdicts: dict[str, list[str]] = {}
        self.reasons: dict[str, list[str]] = {}
        self.unused: list[tuple[str, int]] = []  # reservations that D said will never run
        self._post: list[tuple[float, int, Engine, m.Command, bool]] = []
        self._num_posted = 0

    # ---- the post office ----

    def post(
        self, to: Engine, command: m.Command, delay_s: float = 0.0, answered: bool = True
    ) -> None:
        """answered False: what the receiver says to it goes nowhere."""
        self._num_posted += 1
        due = self.clock.now() + delay_s
        heapq.heappush(self._post, (due, self._num_posted, to, command, answered))

    def _deliver(self) -> None:
        while self._post and self._post[0][0] <= self.clock.now():
            _, _, to, command, answered = heapq.heappop(self._post)
            to.obey(command)
            events, to.events[:] = list(to.events), []
            for event in events:
                if answered or not isinstance(event, m.Answers | m.FirstTaken):
                    self._on_event(to, event)

    def _call(self, kind: str, command: m.Command, no_answer: m.Command | None) -> None:
        fate = self.fate(kind)
        if fate in (Fate.GOOD, Fate.SLOW, Fate.TWICE):
            self.post(self.d, command, ANSWER_WAIT_S if fate is Fate.SLOW else 0.0)
            if fate is Fate.TWICE:
                self.post(self.d, command, 2 * ANSWER_WAIT_S, answered=False)
            return
        if fate is not Fate.LOST:
            delay_s = 20 * ANSWER_WAIT_S if fate is Fate.LATE else 0.0
            self.post(self.d, command, delay_s, answered=False)
        if no_answer is not None:
            self.post(self.p, no_answer, ANSWER_WAIT_S)

    def _on_event(self, who: Engine, event: m.Event) -> None:
        match event:
            case m.Answers() | m.FirstTaken():
                self.post(self.p, event)
            case m.OffersOut(offers=offers):
                for offer in offers:
                    named = dataclasses.replace(
                        offer, giver_incarnation="p-1", endpoints=(self.p.transport.endpoint,)
                    )
                    none = m.Answers(answers=[_unreachable(offer)])
                    self._call("offer", m.Offers(offers=[named]), none)
            case m.FirstTokensOut(firsts=firsts):
                for first in firsts:
                    key = {"request_ids": [first.request_id], "attempts": [first.attempt]}
                    none_taken = m.FirstTaken(**key, accepted=[False], reached=[False])
                    self._call("first", m.FirstTokens(firsts=[first]), none_taken)
            case m.ReservationsEnded(request_ids=request_ids, attempts=attempts):
                self.unused += zip(request_ids, attempts, strict=True)
            case m.CancelsOut(request_ids=request_ids, attempts=attempts):
                self._call("cancel", m.Abort(request_ids=request_ids, attempts=attempts), None)
            case m.Verdicts(request_ids=request_ids, kinds=kinds, reasons=reasons):
                for request_id, kind, reason in zip(request_ids, kinds, reasons, strict=True):
                    self.verdicts.setdefault(request_id, []).append(kind)
                    self.reasons.setdefault(request_id, []).append(reason)

    # ---- the master ----

    def submit(self, given: Submission) -> None:
        self.p.scheduler.add(given, self.clock.now())

    def abort(self, request_id: str, attempt: int = 0) -> None:
        """The client has gone."""
        for engine in (self.p, self.d):
            engine.scheduler.abort(request_id, attempt, self.clock.now())

    def _log(self, who: Engine) -> None:
        outputs = who.scheduler.take_outputs()
        for index, request_id in enumerate(outputs.request_ids):
            token, position = outputs.token_ids[index], outputs.positions[index]
            if token >= 0:
                said = self.tokens.setdefault(request_id, {}).setdefault(position, token)
                assert said == token, f"{request_id} position {position}: {said} and {token}"
                self.speakers.setdefault(request_id, []).append(f"{who.name}{position}")
            if outputs.finish_reasons[index]:
                self.ends.setdefault(request_id, []).append(outputs.finish_reasons[index])

    # ---- time ----

    def turn(self, seconds: float = TURN_S) -> None:
        """Post, one turn of each engine, post."""
        self.clock.turn(seconds)
        for engine in (self.p, self.d):
            self._deliver()
            engine.turn()
            events, engine.events[:] = list(engine.events), []
            for event in events:
                self._on_event(engine, event)
            self._log(engine)
            self.check()

    def run(self, until: Callable[[], bool], most_turns: int = 2000) -> None:
        """Turn until something is true."""
        for _ in range(most_turns):
            if until():
                return
            self.turn()
        raise AssertionError(f"not within {most_turns} turns: {self.p.agent.ledger()}")

    def settle(self) -> None:
        """Let everything end that ends by itself: a reservation nobody comes for may take its whole time, and those who
        need its blocks wait so long.
        """
        ttl_s = SchedulerConfig().grant_ttl_s
        self.run(lambda: not self.busy, most_turns=int(1.5 * ttl_s / TURN_S))
        for _ in range(300):
            self.turn()
        for _ in range(3):
            self.turn(seconds=ttl_s)
        self.run(lambda: not self.busy)

    @property
    def busy(self) -> bool:
        return self.p.scheduler.has_work() or self.d.scheduler.has_work()

    def check(self) -> None:
        """At every moment: blocks are conserved, nothing is written into a block that is free or somebody else's."""
        for engine in (self.p, self.d):
            counts = engine.scheduler.ledger()
            parts = ("free", "active", "cached", "staged", "quarantined")
            assert counts["total"] == sum(counts[part] for part in parts), counts

    def text(self, request_id: str) -> list[int]:
        """The log of a request, without gaps."""
        log = self.tokens.get(request_id, {})
        assert sorted(log) == list(range(len(log))), sorted(log)
        return [log[position] for position in range(len(log))]

    def assert_empty(self) -> None:
        self.p.assert_empty()
        self.d.assert_empty()
        assert not self._post


def _unreachable(offer: Offer) -> OfferAnswer:
    return OfferAnswer(
        request_id=offer.submission.request_id,
        attempt=offer.submission.attempt,
        refusal="unreachable",
        text="no answer",
    )
