"""Prefill on one engine, decode on another, KV over real TCP: the logits are those of one engine, bit for bit."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoints import make_checkpoint, make_int8
from tests.engine.rig import Rig
from xllm_py.base.clock import RealClock
from xllm_py.core.request import Receiver, Submission
from xllm_py.core.sampling import SamplingParams
from xllm_py.engine.handoff_agent import HandoffAgent
from xllm_py.transport import mirrored
from xllm_py.transport.tcp import TcpKvTransport
from xllm_py.wire import messages as m

Logits = dict[tuple[str, int], torch.Tensor]
KEY = b"k" * 32
ROOT = b"root"
LENGTHS = (1, 15, 16, 17, 128, 515)
COUNT = 6
TIMEOUT_S = 60.0
SAMPLINGS: tuple[dict[str, float], ...] = (
    {"temperature": 0.0},
    {"temperature": 0.9},
    {"temperature": 1.2, "top_k": 20},
    {"temperature": 1.0, "top_p": 0.8},
    {"temperature": 1.5, "min_p": 0.02},
    {"temperature": 0.7, "top_k": 50, "top_p": 0.95, "min_p": 0.001},
)
RECEIVER = Receiver(name="d", address="d", incarnation="d-1")


@dataclasses.dataclass(frozen=True, slots=True)
class Wish:
    """One request."""

    name: str
    prompt: list[int]
    count: int
    sampling: dict[str, float]

    def submission(self, receiver: Receiver | None) -> Submission:
        fields: dict[str, float] = {"max_tokens": self.count, "seed": 3, **self.sampling}
        sampling = SamplingParams(ignore_eos=True, **fields)  # type: ignore[arg-type]  # floats and ints by name
        return Submission(
            request_id=self.name,
            prompt_ids=tuple(self.prompt),
            sampling=sampling,
            receiver=receiver,
        )


def wishes(prefix: str, lengths: tuple[int, ...], count: int) -> list[Wish]:
    """Random prompts; every kind of sampling in turn."""
    chooser = random.Random(prefix)
    prompts = [[chooser.randrange(320) for _ in range(length)] for length in lengths]
    return [
        Wish(f"{prefix}{i}", prompt, count, SAMPLINGS[i % len(SAMPLINGS)])
        for i, prompt in enumerate(prompts)
    ]


def alone(model: Path, wanted: list[Wish]) -> tuple[dict[str, list[int]], Logits]:
    """Tokens and logits of each request when one engine computes nothing else, its prompt whole."""
    tokens: dict[str, list[int]] = {}
    logits: Logits = {}
    for wish in wanted:
        rig = Rig(model, block_size=128)
        rig.scheduler.add(wish.submission(None), rig.clock.now())
        tokens |= rig.run()
        logits |= rig.logits
    return tokens, logits


class Side:
    """One engine with its agent and transport; commands are handed over directly."""

    def __init__(self, model: Path, name: str, **fields: Any) -> None:
        self.rig = Rig(model, **fields)  # type: ignore[arg-type]  # fields by name
        memory = self.rig.executor.kv_memory()
        tcp = TcpKvTransport(memory=memory, incarnation=name, cluster_key=KEY)
        self.transport = mirrored.over(tcp, memory)
        self.events: list[m.Event] = []
        self.agent = HandoffAgent(
            scheduler=self.rig.scheduler,
            transport=self.transport,
            config=self.rig.config.scheduler,
            model_fingerprint="same",
            layout=memory.layout,
            send=self.events.append,
        )
        self.tokens: dict[str, dict[int, int]] = {}
        self.num_starts = 0  # rows assigned; more than requests when some were preempted
        self.begun_again: set[str] = set()  # requests taken over that were computed from the start

    def turn(self, now: float) -> None:
        scheduler, agent = self.rig.scheduler, self.agent
        agent.on_news(now)
        plan = scheduler.schedule(now)
        agent.before_step(plan, now)
        if not plan.empty:
            self.num_starts += len(plan.started)
            again = {row for row, at in zip(plan.rows, plan.num_computed, strict=True) if at == 0}
            self.begun_again |= {start.request_id for start in plan.started if start.row in again}
            scheduler.apply(plan, self.rig.executor.execute(plan, agent.layer_done), now)
        agent.after_step(now)
        outputs = scheduler.take_outputs()
        rows = zip(
            outputs.request_ids,
            outputs.positions,
            outputs.token_ids,
            outputs.finish_reasons,
            strict=True,
        )
        for name, position, token, reason in rows:
            assert reason in ("", "length"), (name, reason, outputs.messages)
            self.tokens.setdefault(name, {})[position] = token


def hand_over(giver: Side, taker: Side, now: float) -> None:
    """What the two API processes do."""
    for event in giver.events:
        if isinstance(event, m.OffersOut):
            offers = [dataclasses.replace(offer, giver_incarnation="p-1") for offer in event.offers]
            taker.agent.taking.on_offers(m.Offers(offers=offers), now)
        elif isinstance(event, m.FirstTokensOut):
            taker.agent.taking.on_first_tokens(m.FirstTokens(firsts=event.firsts), now)
    giver.events.clear()
    for event in taker.events:
        if isinstance(event, m.Answers):
            giver.agent.giving.on_answers(event, now)
        elif isinstance(event, m.FirstTaken):
            giver.agent.giving.on_first_taken(event, now)
    taker.events.clear()


class Two:
    """P and D in one thread, KV over real TCP."""

    def __init__(self, model: Path, *, p: dict[str, Any], d: dict[str, Any]) -> None:
        self.clock = RealClock()
        self.giver, self.taker = Side(model, "p-1", **p), Side(model, "d-1", **d)

    def submit(self, side: Side, wish: Wish, receiver: Receiver | None = None) -> None:
        side.rig.scheduler.add(wish.submission(receiver), self.clock.now())

    def turn(self) -> None:
        self.giver.turn(self.clock.now())
        hand_over(self.giver, self.taker, self.clock.now())
        self.taker.turn(self.clock.now())

    def run(self, wanted: list[Wish]) -> None:
        """Until every request has all its tokens; both engines must be empty then."""
        deadline = self.clock.now() + TIMEOUT_S
        schedulers = (self.giver.rig.scheduler, self.taker.rig.scheduler)
        while any(len(self.tokens(wish.name)) < wish.count for wish in wanted) or any(
            scheduler.ledger()["requests_open"] for scheduler in schedulers
        ):
            assert self.clock.now() < deadline, [scheduler.ledger() for scheduler in schedulers]
            self.turn()
        for scheduler in schedulers:
            scheduler.assert_empty()

    def tokens(self, name: str) -> list[int]:
        both = self.giver.tokens.get(name, {}) | self.taker.tokens.get(name, {})
        return [both[position] for position in sorted(both)]

    def close(self) -> None:
        self.giver.transport.close()
        self.taker.transport.close()


def check(two: Two, model: Path, wanted: list[Wish]) -> None:
    """Tokens and logits are, bit for bit, those of an engine that computes nothing else."""
    tokens, logits = alone(model, wanted)
    assert {wish.name: two.tokens(wish.name) for wish in wanted} == tokens
    for side in (two.giver, two.taker):
        assert side.rig.logits
        different = [
            key for key, seen in side.rig.logits.items() if not torch.equal(seen, logits[key])
        ]
        assert not different
    assert two.giver.rig.logits.keys() | two.taker.rig.logits.keys() == logits.keys()


@pytest.fixture(scope="module", params=["float32", "bfloat16", "8-bit"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, eight = tmp_path_factory.mktemp("model"), request.param == "8-bit"
    dtype = "bfloat16" if eight else request.param
    make_checkpoint(folder, seed=2, heads=6, kv_heads=2, hidden_size=96, dtype=dtype)
    return make_int8(folder) if eight else folder


@pytest.mark.parametrize("chunk", [16, 64, 512, 10240])
def test_the_logits_of_two_engines_are_those_of_one(model: Path, chunk: int) -> None:
    given, on_p, on_d = wishes("g", LENGTHS, COUNT), wishes("p", (9, 70), 9), wishes("d", (40,), 9)
    two = Two(model, p={"chunk": chunk}, d={"chunk": 48})
    try:
        chooser = random.Random(chunk)
        todo = [(two.giver, wish, RECEIVER) for wish in given]
        todo += [(two.giver, wish, None) for wish in on_p]
        todo += [(two.taker, wish, None) for wish in on_d]
        chooser.shuffle(todo)
        for side, wish, receiver in todo:
            two.submit(side, wish, receiver)
            for _ in range(chooser.randrange(3)):
                two.turn()
        two.run([*given, *on_p, *on_d])
        assert two.taker.transport.ledger()["bytes_received"] > 0
    finally:
        two.close()
    for wish in given:
        assert list(two.giver.tokens[wish.name]) == [0], "P says the first token and no other"
    check(two, model, [*given, *on_p, *on_d])


@pytest.mark.parametrize("roots", [(ROOT, b""), (b"", ROOT), (ROOT, ROOT)], ids=["P", "D", "both"])
@pytest.mark.parametrize("chunk", [16, 10240])
def test_cached_prefixes_on_either_side_change_no_bit(
    model: Path, chunk: int, roots: tuple[bytes, bytes]
) -> None:
    first = wishes("g", LENGTHS, COUNT)
    again = [dataclasses.replace(wish, name=f"again {wish.name}") for wish in first]
    longer = [
        dataclasses.replace(wish, name=f"longer {wish.name}", prompt=[*wish.prompt, 7, 8, 9])
        for wish in first
    ]
    two = Two(model, p={"chunk": chunk, "prefix_root": roots[0]}, d={"prefix_root": roots[1]})
    received = []
    try:
        for wanted in (first, [*again, *longer]):
            for wish in wanted:
                two.submit(two.giver, wish, RECEIVER)
                two.turn()
            two.run(wanted)
            received.append(two.taker.transport.ledger()["bytes_received"])
    finally:
        two.close()
    ledgers = [side.rig.scheduler.ledger() for side in (two.giver, two.taker)]
    assert bool(ledgers[0]["prefix_hit_tokens"]) == bool(roots[0])
    if roots[1]:  # most of twice as many prompts was there already
        assert received[1] - received[0] < received[0] / 2
    check(two, model, [*first, *again, *longer])


SIZES = [(16, 32), (32, 16), (16, 128), (128, 16), (32, 128), (128, 32), (1, 64)]


@pytest.mark.parametrize(("on_p", "on_d"), SIZES)
def test_blocks_of_other_sizes_on_the_two_sides_change_no_bit(
    model: Path, on_p: int, on_d: int
) -> None:
    """Prefix caches on both, so that D holds blocks already that end inside one of P's."""
    first = wishes("g", (1, 15, 16, 17, 31, 129, 300), COUNT)
    longer = [
        dataclasses.replace(wish, name=f"longer {wish.name}", prompt=[*wish.prompt, 7, 8, 9])
        for wish in first
    ]
    fields = {"prefix_root": ROOT, "cache_bytes": 16 << 20}
    p, d = {**fields, "block_size": on_p, "chunk": 48}, {**fields, "block_size": on_d}
    two = Two(model, p=p, d=d)
    received = []
    try:
        for wanted in (first, longer):
            for wish in wanted:
                two.submit(two.giver, wish, RECEIVER)
                two.turn()
            two.run(wanted)
            received.append(two.taker.transport.ledger()["bytes_received"])
    finally:
        two.close()
    assert 0 < received[1] - received[0] < received[0]
    for wish in (*first, *longer):
        assert list(two.giver.tokens[wish.name]) == [0], "P says the first token and no other"
    check(two, model, [*first, *longer])


def small_cache(model: Path, wanted: list[Wish], spare: int) -> dict[str, int]:
    """Room for these prompts in blocks of 4, and for so many blocks of answers."""
    layout = Rig(model, block_size=4).executor.kv_memory().layout
    blocks = sum(-(-len(wish.prompt) // 4) for wish in wanted) + spare
    return {
        "block_size": 4,
        "cache_bytes": blocks * layout.block_bytes * layout.num_layers * 2,
    }


@pytest.mark.parametrize("chunk", [16, 10240])
def test_requests_begun_again_on_either_side_end_the_same(model: Path, chunk: int) -> None:
    given = wishes("g", (36, 37, 38), 24)
    on_p, on_d = wishes("p", (33, 41, 34, 20), 24), wishes("d", (20, 24), 40)
    p = {**small_cache(model, [*on_p, given[0]], 3), "chunk": chunk}
    two = Two(model, p=p, d={**small_cache(model, [*on_d, given[0]], 5), "chunk": 64})
    try:
        for wish in on_p:
            two.submit(two.giver, wish)
        for wish in on_d:
            two.submit(two.taker, wish)
        for wish in given:
            two.submit(two.giver, wish, RECEIVER)
        two.run([*given, *on_p, *on_d])
    finally:
        two.close()
    assert two.giver.num_starts > len(given) + len(on_p), "nobody began again on P"
    taken = {wish.name for wish in given}
    assert taken & two.taker.begun_again, "nobody who was taken over began again on D"
    check(two, model, [*given, *on_p, *on_d])
