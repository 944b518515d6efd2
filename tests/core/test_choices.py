"""best_of: one prefill, choices that share its blocks and copy the last one on write, text as if each were alone."""

from __future__ import annotations

import random

import pytest

from tests.core.toy_rig import ToyRig, expected, offer_of, submission, take
from xllm_py.core.request import State, Submission

ROOT = b"root"
GRANT = b"g" * 16


def name_of(given: Submission, choice: int) -> str:
    return given.request_id if not choice else f"{given.request_id}#{choice}"


def check(rig: ToyRig, given: Submission, *, ends_of: ToyRig | None = None) -> None:
    """Every choice has the tokens of a lone run, and ended once."""
    for choice in range(given.sampling.best_of):
        tokens, reason = expected(given, block_size=rig.block_size, choice=choice)
        name = name_of(given, choice)
        assert rig.tokens[name] == tokens, name
        assert (ends_of or rig).ends[name] == [reason], name


@pytest.mark.parametrize("length", [1, 4, 7, 8, 9])
@pytest.mark.parametrize("root", [b"", ROOT])
def test_choices_say_what_each_would_say_alone(length: int, root: bytes) -> None:
    rig = ToyRig(num_blocks=60, prefix_root=root)
    one = rig.add(submission("a", list(range(1, length + 1)), 9, seed=5, best_of=4))
    plan = rig.step()
    assert plan.sample == [4]
    rig.run()
    check(rig, one)
    assert len({tuple(rig.tokens[name_of(one, choice)]) for choice in range(4)}) > 1
    rig.scheduler.assert_empty()


def test_nothing_of_the_prompt_is_computed_or_stored_twice() -> None:
    rig = ToyRig(num_blocks=60)
    prompt = list(range(1, 11))  # two full blocks and a half one
    rig.add(submission("a", prompt, 3, seed=3, best_of=4, ignore_eos=True))
    computed = 0
    most = 0
    while rig.scheduler.has_work():
        plan = rig.step()
        computed += len(plan.token_ids)
        most = max(most, rig.scheduler.ledger()["active"])
    assert computed == len(prompt) + 4 * 2  # and the first two tokens of each choice, once
    assert most == 3 + 3  # three for the prompt, and the half one copied for the other choices
    assert rig.scheduler.ledger()["copied_blocks"] == 3
    assert rig.scheduler.ledger()["forked_choices"] == 3


def test_the_last_holder_of_a_half_block_writes_it_in_place() -> None:
    rig = ToyRig(num_blocks=60)
    for seed in range(1, 400):  # choice 0 ends by its first token, choice 1 goes on
        given = submission("a", [1, 2, 3, 4, 5], 6, seed=seed, best_of=2)
        first, _ = expected(given, choice=0)
        second, _ = expected(given, choice=1)
        given = submission(
            "a", [1, 2, 3, 4, 5], 6, seed=seed, best_of=2, stop_token_ids=(first[0],)
        )
        if second[0] != first[0]:
            break
    rig.add(given)
    rig.run()
    assert rig.ends["a"] == ["stop"]
    assert rig.tokens["a"] == first[:1]
    assert rig.scheduler.ledger()["copied_blocks"] == 0
    rig.scheduler.assert_empty()


def test_one_token_each_begins_no_choice() -> None:
    rig = ToyRig()
    one = rig.add(submission("a", [1, 2, 3], 1, seed=2, best_of=3))
    rig.run()
    check(rig, one)
    assert rig.scheduler.ledger()["forked_choices"] == 0
    rig.scheduler.assert_empty()


def test_choices_without_rows_wait_for_those_that_run() -> None:
    rig = ToyRig(num_blocks=60, max_seqs_per_batch=2)
    one = rig.add(submission("a", [1, 2, 3, 4, 5], 8, seed=2, best_of=5, ignore_eos=True))
    rig.run()
    check(rig, one)
    rig.scheduler.assert_empty()


@pytest.mark.parametrize("root", [b"", ROOT])
def test_choices_are_preempted_and_begin_again(root: bytes) -> None:
    rig = ToyRig(num_blocks=12, prefix_root=root)
    one = rig.add(submission("a", [1, 2, 3, 4, 5, 6], 30, seed=2, best_of=3, ignore_eos=True))
    two = rig.add(submission("b", [6, 5, 4], 20, seed=9, best_of=2, ignore_eos=True))
    rig.run()
    check(rig, one)
    check(rig, two)
    rig.scheduler.assert_empty()


def test_a_cancel_frees_every_choice() -> None:
    rig = ToyRig(num_blocks=60)
    rig.add(submission("a", [1, 2, 3, 4, 5], 50, seed=2, best_of=4, ignore_eos=True))
    for _ in range(5):
        rig.step()
    assert rig.scheduler.ledger()["requests_running"] == 4
    assert rig.scheduler.abort("a", 1, rig.now) == State.RUNNING.value
    rig.collect()
    assert rig.ends["a"] == ["abort"]
    rig.scheduler.assert_empty()


def test_the_deadline_ends_all_choices_with_one_entry() -> None:
    rig = ToyRig(num_blocks=60)
    rig.add(submission("a", [1, 2, 3], 50, seed=2, best_of=3, timeout_s=1.0, ignore_eos=True))
    rig.step()
    rig.step(2.0)
    ended = [end for ends in rig.ends.values() for end in ends]
    assert ended == ["deadline_exceeded"]
    rig.scheduler.assert_empty()


def handed(given: Submission, **taker: object) -> tuple[ToyRig, ToyRig]:
    """P computes the prompt and the first tokens; D takes it over and finishes."""
    fields = {"num_blocks": 60, "prefix_root": ROOT, **taker}
    here, there = ToyRig(num_blocks=60), ToyRig(**fields)  # type: ignore[arg-type]  # by name
    here.add(given)
    here.step()
    request = here.scheduler.take_admitted()[0]
    blocks = tuple(request.block_ids)
    answer = there.scheduler.reserve(offer_of(given), GRANT, there.now)
    assert answer.grant == GRANT, answer.text
    first = take(here, there, given, answer, blocks)
    for choice, token in enumerate(first.token_ids):
        there.tokens[name_of(given, choice)] = [token]
    there.scheduler.on_landed(given.request_id, 1, there.now)
    assert there.scheduler.on_first_token(first, there.now)
    here.scheduler.on_given(given.request_id, 1, here.now)
    there.run()
    there.collect()
    here.scheduler.assert_empty()
    there.scheduler.assert_empty()
    return here, there


@pytest.mark.parametrize("length", [3, 4, 8, 9])
def test_through_a_handoff_all_choices_decode_from_one_landed_prompt(length: int) -> None:
    given = submission(
        "a", list(range(1, length + 1)), 9, seed=5, best_of=4, give=True, ignore_eos=True
    )
    _, there = handed(given)
    check(there, given)
    assert there.scheduler.ledger()["forked_choices"] == 3


def test_a_choice_that_ended_on_p_is_closed_on_d_without_a_token() -> None:
    chooser = random.Random(1)
    for _ in range(50):
        given = submission("a", [1, 2, 3, 4, 5], 6, seed=chooser.getrandbits(30), best_of=3)
        firsts = [expected(given, choice=choice)[0][0] for choice in range(3)]
        if len(set(firsts)) == 3:
            break
    for ended in range(3):
        one = submission(
            "a",
            [1, 2, 3, 4, 5],
            6,
            seed=given.sampling.seed,
            best_of=3,
            give=True,
            stop_token_ids=(firsts[ended],),
        )
        here, there = handed(one)
        assert here.ends[name_of(one, ended)] == ["stop"]
        check(there, one)


def test_d_without_prefix_cache_refuses_for_good() -> None:
    there = ToyRig()
    given = submission("a", [1, 2, 3], 5, seed=1, best_of=2, give=True)
    answer = there.scheduler.reserve(offer_of(given), GRANT, there.now)
    assert answer.refusal == "best_of_needs_prefix_cache"
    assert "--enable_prefix_cache=true" in answer.text


def test_kept_after_all_the_choices_decode_on_p() -> None:
    given = submission("a", [1, 2, 3, 4, 5], 9, seed=4, best_of=3, give=True, ignore_eos=True)
    rig = ToyRig(num_blocks=60)
    rig.add(given)
    rig.step()
    rig.scheduler.keep("a", 1, rig.now)
    rig.run()
    check(rig, given)
    rig.scheduler.assert_empty()


@pytest.mark.parametrize("seed", range(40))
def test_random_choices_in_a_small_cache_keep_their_text(seed: int) -> None:
    chooser = random.Random(seed)
    root = chooser.choice([b"", ROOT])
    rig = ToyRig(num_blocks=chooser.randint(16, 30), prefix_root=root, max_tokens_per_chunk=5)
    given = [
        submission(
            f"r{index}",
            [chooser.randint(1, 3) for _ in range(chooser.randint(1, 14))],
            chooser.randint(1, 16),
            seed=chooser.randint(0, 9),
            best_of=chooser.randint(1, 5),
        )
        for index in range(6)
    ]
    cancelled: set[str] = set()
    for one in given:
        rig.add(one)
        for _ in range(chooser.randint(0, 6)):
            rig.step()
        if chooser.random() < 0.2:
            cancelled.add(one.request_id)
            rig.scheduler.abort(one.request_id, 1, rig.now)
            rig.collect()
    rig.run()
    for one in given:
        if one.request_id not in cancelled:
            check(rig, one)
    rig.scheduler.assert_empty()
