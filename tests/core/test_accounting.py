"""5,000 random requests through a giver and a taker: choices, cancels, preemption, shared prefixes, handoffs taken and refused."""

from __future__ import annotations

import dataclasses
from random import Random

from tests.core.toy_rig import ToyRig, offer_of, submission, take
from xllm_py.core.request import Request, State, Submission

NUM_REQUESTS = 5000
ROOT = b"a root"


def random_request(random: Random, number: int) -> Submission:
    stem = [random.randrange(3) * 50 + index for index in range(random.choice((0, 4, 8, 12)))]
    prompt = [*stem, *(random.randrange(319) for _ in range(random.randint(1, 5)))]
    made = submission(
        f"r{number}",
        prompt,
        random.randint(1, 9),
        seed=number,
        best_of=random.choice((1, 1, 1, 2, 3)),
        give=random.random() < 0.4,
        timeout_s=random.choice((600.0, 0.02)),
    )
    return dataclasses.replace(made, offline=random.random() < 0.2)


def hand_over(random: Random, giver: ToyRig, taker: ToyRig, request: Request, number: int) -> None:
    """One handoff, from the offer to one of its ends."""
    given, key = request.submission, (request.request_id, 1)
    grant = number.to_bytes(16, "little")
    answer = taker.scheduler.reserve(offer_of(given), grant, taker.now)
    if answer.grant and random.random() < 0.7:
        first = take(giver, taker, given, answer, tuple(request.block_ids))
        for choice, token in enumerate(first.token_ids):
            taker.tokens[f"{key[0]}#{choice}" if choice else key[0]] = [token]
        taker.scheduler.on_landed(*key, taker.now)
        taker.scheduler.released(*key)
        assert taker.scheduler.on_first_token(first, taker.now)
        giver.scheduler.on_given(*key, giver.now)
        return
    if answer.grant:
        taker.scheduler.on_reservation_lost(*key, taker.now)
        if random.random() < 0.5:
            taker.scheduler.released(*key)
    if random.random() < 0.5:
        giver.scheduler.keep(*key, giver.now)
    else:
        giver.scheduler.fail(*key, "instance_lost", "lost", giver.now)


def test_no_block_is_lost_and_a_flush_frees_them_all() -> None:
    random = Random(1)
    limits = {"max_tokens_per_chunk": 6, "max_seqs_per_batch": 6}
    giver = ToyRig(num_blocks=18, prefix_root=ROOT, **limits)
    taker = ToyRig(num_blocks=18, prefix_root=ROOT, **limits)
    to_give: list[Request] = []
    number = 0
    while (
        number < NUM_REQUESTS or giver.scheduler.has_work() or taker.scheduler.has_work() or to_give
    ):
        if number < NUM_REQUESTS and len(giver.scheduler._batch.waiting) < 8:
            giver.add(random_request(random, number))
            number += 1
        if random.random() < 0.2:
            side = random.choice((giver, taker))
            side.scheduler.abort(f"r{max(0, number - random.randint(1, 10))}", 0, side.now)
        for rig in (giver, taker):
            rig.step()
        to_give += giver.scheduler.take_admitted()
        for request in [each for each in to_give if each.state is State.GIVING]:
            hand_over(random, giver, taker, request, number)
        to_give = [each for each in to_give if each.state is State.RUNNING and each.to_give]
        for name, attempt, _ in taker.scheduler.take_ended_reservations():
            taker.scheduler.released(name, attempt)
    for rig in (giver, taker):
        counts = rig.scheduler.ledger()
        assert counts["free"] + counts["cached"] == counts["total"], counts
        assert counts["prefix_hit_tokens"] and counts["prefix_evicted_blocks"], counts
        rig.scheduler.flush_cache()
        assert rig.scheduler.ledger()["free"] == counts["total"]
        rig.scheduler.assert_empty()
    assert giver.scheduler.ledger()["copied_blocks"]
    assert {"abort", "deadline_exceeded", "instance_lost"} <= {
        end for ends in giver.ends.values() for end in ends
    }
