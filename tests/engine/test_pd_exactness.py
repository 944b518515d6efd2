"""Prefill on one engine, decode on another, KV over real TCP: the logits are those of one engine, bit for bit."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path

import pytest
import torch

from tests.checkpoints import make_checkpoint
from tests.engine.rig import Rig
from xllm_py.base.clock import RealClock
from xllm_py.core.request import Receiver, Submission
from xllm_py.core.sampling import SamplingParams
from xllm_py.engine.handoff_agent import HandoffAgent
from xllm_py.transport.tcp import TcpKvTransport
from xllm_py.wire import messages as m

KEY = b"k" * 32
LENGTHS = (1, 15, 16, 17, 100, 515)
COUNT = 6
TIMEOUT_S = 60.0


class Side:
    """One engine with its agent and transport; commands are handed over directly."""

    def __init__(self, model: Path, name: str, **fields: int) -> None:
        self.rig = Rig(model, **fields)  # type: ignore[arg-type]  # fields by name
        memory = self.rig.executor.kv_memory()
        self.transport = TcpKvTransport(memory=memory, incarnation=name, cluster_key=KEY)
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

    def turn(self, now: float) -> None:
        scheduler, agent = self.rig.scheduler, self.agent
        agent.on_news(now)
        plan = scheduler.schedule(now)
        agent.before_step(plan, now)
        if not plan.empty:
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


def submission(name: str, prompt: list[int], receiver: Receiver | None) -> Submission:
    sampling = SamplingParams(max_tokens=COUNT, seed=3, temperature=0.9, ignore_eos=True)
    return Submission(
        request_id=name, prompt_ids=tuple(prompt), sampling=sampling, receiver=receiver
    )


@pytest.mark.parametrize("chunk", [16, 64, 10240])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_logits_of_two_engines_are_those_of_one(tmp_path: Path, dtype: str, chunk: int) -> None:
    model = make_checkpoint(tmp_path, seed=2, heads=6, kv_heads=2, hidden_size=96, dtype=dtype)
    chooser = random.Random(8)
    prompts = {f"p{n}": [chooser.randrange(320) for _ in range(n)] for n in LENGTHS}
    alone = Rig(model)
    for name, prompt in prompts.items():
        alone.scheduler.add(submission(name, prompt, None), alone.clock.now())
    wanted = alone.run()

    clock = RealClock()
    giver, taker = Side(model, "p-1", chunk=chunk), Side(model, "d-1")
    try:
        receiver = Receiver(name="d", address="d", incarnation="d-1")
        for name, prompt in prompts.items():
            giver.rig.scheduler.add(submission(name, prompt, receiver), clock.now())
        deadline = clock.now() + TIMEOUT_S
        while any(len(taker.tokens.get(name, ())) < COUNT - 1 for name in prompts):
            assert clock.now() < deadline, (
                giver.rig.scheduler.ledger(),
                taker.rig.scheduler.ledger(),
            )
            giver.turn(clock.now())
            hand_over(giver, taker, clock.now())
            taker.turn(clock.now())
        while giver.rig.scheduler.ledger()["requests_open"]:
            assert clock.now() < deadline
            giver.turn(clock.now())
        giver.rig.scheduler.assert_empty()
        taker.rig.scheduler.assert_empty()
        assert taker.transport.ledger()["bytes_received"] > 0
    finally:
        giver.transport.close()
        taker.transport.close()

    for name in prompts:
        assert list(giver.tokens[name]) == [0], "the giver says the first token and no other"
        got = giver.tokens[name] | taker.tokens[name]
        assert [got[position] for position in range(COUNT)] == wanted[name]
    both = giver.rig.logits | taker.rig.logits
    different = [key for key, logits in alone.logits.items() if not torch.equal(logits, both[key])]
    assert not different
