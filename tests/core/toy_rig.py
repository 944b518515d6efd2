"""One engine in one thread: scheduler and toy executor under a hand-turned clock. Every step is checked as it passes."""

from __future__ import annotations

from typing import Any

from xllm_py.base.clock import HandClock
from xllm_py.core.config import CacheConfig, EngineConfig, ModelFacts, SchedulerConfig
from xllm_py.core.executor import Finish
from xllm_py.core.plan import Outputs, StepPlan
from xllm_py.core.request import (
    FirstToken,
    Offer,
    OfferAnswer,
    Receiver,
    State,
    Submission,
)
from xllm_py.core.sampling import SamplingParams
from xllm_py.core.scheduler import Scheduler
from xllm_py.engine.toy import EOS, VOCAB_SIZE, ToyExecutor, lone_answer

FACTS = ModelFacts(vocab_size=VOCAB_SIZE, max_model_len=200, eos_token_ids=(EOS,))
RECEIVER = Receiver(name="d", address="d:1", incarnation="d-1")


def submission(
    name: str,
    prompt: list[int],
    count: int,
    *,
    attempt: int = 1,
    seed: int = 0,
    generated: tuple[int, ...] = (),
    timeout_s: float = 600.0,
    give: bool = False,
    **sampling: Any,
) -> Submission:
    """Greedy when seed is 0; give: a receiver is named."""
    fields = {"temperature": 1.0 if seed else 0.0, **sampling}
    return Submission(
        request_id=name,
        attempt=attempt,
        prompt_ids=tuple(prompt),
        generated_ids=generated,
        sampling=SamplingParams(max_tokens=count, seed=seed, **fields),
        timeout_s=timeout_s,
        receiver=RECEIVER if give else None,
    )


def offer_of(given: Submission) -> Offer:
    """P's question to D."""
    return Offer(
        submission=given,
        giver_name="p",
        giver_address="p:1",
        giver_incarnation="p-1",
        model_fingerprint="toy",
        layout_fingerprint="toy",
        block_size=4,
    )


def expected(
    given: Submission, *, block_size: int = 4, limit: int = 200, choice: int = 0
) -> tuple[list[int], str]:
    """The oracle: tokens and finish reason of a lone run, whatever happened to the request elsewhere."""
    config = EngineConfig(
        toy_num_blocks=limit // block_size + 2, cache=CacheConfig(block_size=block_size)
    )
    sampling = given.sampling
    count = min(sampling.max_tokens, limit - len(given.prompt_ids))
    answer = lone_answer(
        ToyExecutor(config), list(given.prompt_ids), count, seed=sampling.seed, choice=choice
    )
    stops = set(sampling.stop_token_ids) | (set() if sampling.ignore_eos else {EOS})
    for index, token in enumerate(answer):
        if token in stops:
            return answer[: index + 1], "stop"
    return answer, "length"


class ToyRig:
    """Runs submissions; keeps tokens, endings and how often a plan was empty."""

    def __init__(
        self,
        *,
        num_blocks: int = 16,
        block_size: int = 4,
        prefix_root: bytes = b"",
        ahead: str = "",
        **scheduler: Any,
    ) -> None:
        """ahead: also plan a step before the one before it is taken in, and compute it `at once`, or as `late` as can be."""
        fields = {"prefill_usage_threshold": 1.0, "max_seqs_per_batch": 8, **scheduler}
        self.config = EngineConfig(
            toy_num_blocks=num_blocks,
            cache=CacheConfig(block_size=block_size),
            scheduler=SchedulerConfig(**fields),
        )
        self.block_size = block_size
        self.num_blocks = num_blocks
        self.executor = ToyExecutor(self.config)
        self.scheduler = Scheduler(
            self.config.scheduler,
            FACTS,
            num_blocks,
            block_size,
            prefix_root,
            self.executor.kv_memory().poison,
        )
        self.ahead = ahead
        self.num_ahead = 0  # steps that were planned ahead
        self.under_way: list[tuple[StepPlan, Finish]] = []
        self.clock = HandClock()
        self.tokens: dict[str, list[int]] = {}
        self.ends: dict[str, list[str]] = {}
        self.messages: dict[str, str] = {}
        self.outputs: list[Outputs] = []

    @property
    def now(self) -> float:
        return self.clock.now()

    def add(self, given: Submission) -> Submission:
        self.scheduler.add(given, self.now)
        self.tokens.setdefault(given.request_id, list(given.generated_ids))
        return given

    def step(self, seconds: float = 0.001) -> StepPlan:
        """One turn of the loop; the plan may be empty."""
        now = self.clock.turn(seconds)
        if not self.under_way:
            plan = self.scheduler.schedule(now)
            self._check_plan(plan)
            if plan.empty:
                self.collect()
                return plan
            self._begin(plan)
        ahead = self.scheduler.schedule_ahead(now) if self.ahead else None
        if ahead is not None:
            self.num_ahead += 1
            self._begin(ahead)
        plan, finish = self.under_way.pop(0)
        self.scheduler.apply(plan, finish(), now)
        self.collect()
        return plan

    def _begin(self, plan: StepPlan) -> None:
        finish: Finish = lambda: self.executor.execute(plan)  # noqa: E731
        self.under_way.append((plan, finish if self.ahead == "late" else self.executor.begin(plan)))

    def collect(self) -> Outputs:
        """Take the outputs; positions must follow on each other."""
        outputs = self.scheduler.take_outputs()
        self.outputs.append(outputs)
        for index, name in enumerate(outputs.request_ids):
            token, reason = outputs.token_ids[index], outputs.finish_reasons[index]
            if outputs.choices[index]:
                name = f"{name}#{outputs.choices[index]}"
            known = self.tokens.setdefault(name, [])
            if token >= 0:
                assert outputs.positions[index] == len(known), (name, outputs.positions[index])
                known.append(token)
            if reason:
                self.ends.setdefault(name, []).append(reason)
                self.messages[name] = outputs.messages.get(index, "")
        self.check_ledger()
        return outputs

    def run(self, most_steps: int = 5000) -> None:
        """Until nothing is left to compute."""
        for _ in range(most_steps):
            if not self.scheduler.has_work() and not self.under_way:
                return
            self.step()
        raise AssertionError(f"still at work after {most_steps} steps: {self.scheduler.ledger()}")

    def check_ledger(self) -> None:
        """Blocks are conserved (TRUST I5)."""
        counts = self.scheduler.ledger()
        parts = ("free", "active", "cached", "staged", "quarantined")
        assert counts["total"] == sum(counts[part] for part in parts), counts
        self._check_decodes()

    def _check_decodes(self) -> None:
        """Every running request is either among the decodes, whose columns say what it says itself, or among the others."""
        batch = self.scheduler._batch
        decodes, others = batch._decodes, batch._others
        assert len(decodes) + len(others) == len(batch.running)
        assert set(decodes.requests) | set(others) == set(batch.running)
        for lane, request in enumerate(decodes.requests):
            assert [column[lane] for column in decodes._columns[:6]] == [
                request,
                request.tokens,
                request.tokens[-1],
                request.row,
                request.num_computed,
                request.num_generated,
            ]
            assert request.lane == lane and request.num_due == 1
            full = request.num_computed >= len(request.block_ids) * self.block_size
            assert full == (request in decodes.full)
        assert all(request.lane < 0 for request in others)

    def _check_plan(self, plan: StepPlan) -> None:
        limits = self.config.scheduler
        assert len(set(plan.rows)) == len(plan.rows)
        assert len(plan.rows) <= limits.max_seqs_per_batch
        assert len(plan.token_ids) == sum(plan.num_tokens)
        assert all(count > 0 for count in plan.num_tokens)
        planned = self.scheduler._batch._now.planned  # nobody in a plan was preempted after all
        assert not planned or [request.row for request in planned] == plan.rows
        assert all(request.state is State.RUNNING for request in planned)
        if limits.enable_chunked_prefill:
            assert len(plan.token_ids) <= limits.max_tokens_per_batch
            assert all(count <= limits.max_tokens_per_chunk for count in plan.num_tokens)
        assert all(block < self.num_blocks for block in plan.grown_blocks)


def take(
    giver: ToyRig, taker: ToyRig, given: Submission, answer: OfferAnswer, blocks: tuple[int, ...]
) -> FirstToken:
    """What the KV link does: copy the prompt's blocks from P into D's reservation; returns the first token to tell."""
    source, target = giver.executor.kv_memory(), taker.executor.kv_memory()
    wanted = taker.scheduler.reserved_blocks(given.request_id)
    for here, there in zip(blocks, wanted, strict=True):
        for layer in range(source.layout.num_layers):
            for part in range(2):
                target.span(layer, part, there)[:] = source.span(layer, part, here)
    return FirstToken(
        request_id=given.request_id,
        attempt=given.attempt,
        grant=answer.grant,
        token_ids=tuple(
            giver.tokens[given.request_id if not choice else f"{given.request_id}#{choice}"][0]
            for choice in range(given.sampling.best_of)
        ),
    )
