"""Handoffs between two toy engines: the text is the text of a lone run, and nothing is left behind on either side."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.core.toy_rig import expected, offer_of, submission
from tests.engine.pair import Fate, Pair
from xllm_py.core.request import Submission
from xllm_py.transport.memory import Faults
from xllm_py.wire import messages as m

ROOT = b"root" * 4


def prompt(length: int, salt: int = 0) -> list[int]:
    return [(index * 7 + salt * 13 + 1) % 300 for index in range(length)]


def ask(
    name: str = "a", length: int = 10, count: int = 12, salt: int = 0, **more: object
) -> Submission:
    return submission(name, prompt(length, salt), count, give=True, ignore_eos=True, **more)


def check_texts(pair: Pair, *asked: Submission) -> None:
    pair.settle()
    for one in asked:
        text, reason = expected(one)
        assert pair.text(one.request_id) == text
        assert pair.ends[one.request_id] == [reason]
    pair.assert_empty()


@pytest.mark.parametrize("length", [1, 3, 4, 5, 8, 30])
@pytest.mark.parametrize("chunk", [2, 4, 100])
@pytest.mark.parametrize("pull", [False, True])
def test_p_says_the_first_token_and_d_all_others(length: int, chunk: int, pull: bool) -> None:
    pair = Pair(p={"max_tokens_per_chunk": chunk}, pull=pull)
    one = ask(length=length)
    pair.submit(one)
    check_texts(pair, one)
    assert pair.verdicts == {"a": ["landed"]}
    assert pair.speakers["a"] == ["p0", *(f"d{position}" for position in range(1, 12))]


@pytest.mark.parametrize("on_p", [1, 2, 4, 16])
@pytest.mark.parametrize("on_d", [1, 2, 8, 16])
@pytest.mark.parametrize(("chunk", "pull"), [(3, False), (3, True), (100, False)])
def test_the_two_sides_may_cut_their_caches_differently(
    on_p: int, on_d: int, chunk: int, pull: bool
) -> None:
    sizes = [{"block_size": size, "num_blocks": 160 // size} for size in (on_p, on_d)]
    pair = Pair(
        p={**sizes[0], "max_tokens_per_chunk": chunk},
        d={**sizes[1], "prefix_root": ROOT},
        pull=pull,
    )
    asked = [ask(f"r{length}", length=length) for length in (1, 4, 7, 16, 23)]
    asked.append(ask("again", length=23))
    for one in asked:
        pair.submit(one)
        pair.settle()
    check_texts(pair, *asked)
    assert pair.verdicts == {one.request_id: ["landed"] for one in asked}


@pytest.mark.parametrize("size", [0, 3, 8])
def test_a_grant_in_blocks_that_are_no_part_of_ours_is_taken_for_a_refusal(size: int) -> None:
    pair = Pair()
    one = ask()
    pair.submit(one)
    answers: list[m.Answers] = []
    obey = pair.p.obey

    def other(command: m.Command) -> None:
        if isinstance(command, m.Answers):
            told = [dataclasses.replace(each, block_size=size) for each in command.answers]
            command = m.Answers(answers=told)
            answers.append(command)
        obey(command)

    pair.p.obey = other  # type: ignore[method-assign]
    check_texts(pair, one)
    assert answers
    assert pair.verdicts == {"a": ["refused"]}


def test_seeded_text_goes_on_at_d_as_it_began_at_p() -> None:
    pair = Pair()
    one = ask(seed=11)
    pair.submit(one)
    check_texts(pair, one)


def test_what_a_giver_gave_in_full_is_not_lost_with_it() -> None:
    """D hears of the death while it computes something else, and has not looked yet at what its transport has to tell."""
    pair = Pair()
    one = ask()
    pair.submit(one)
    while not pair.verdicts:  # P goes on, D only takes calls
        pair.clock.turn(0.01)
        pair._deliver()
        pair.p.turn()
        events, pair.p.events[:] = list(pair.p.events), []
        for event in events:
            pair._on_event(pair.p, event)
        pair._log(pair.p)
    assert pair.verdicts == {"a": ["landed"]}
    pair.d.obey(m.PeerGone(incarnation="p-1"))
    check_texts(pair, one)
    assert pair.speakers["a"] == ["p0", *(f"d{position}" for position in range(1, 12))]


def test_the_first_token_does_not_wait_for_d() -> None:
    pair = Pair(fate=lambda _kind: Fate.SLOW)
    one = ask()
    pair.submit(one)
    pair.turn()
    assert pair.speakers == {"a": ["p0"]}
    check_texts(pair, one)


def test_kv_leaves_while_the_prompt_is_still_computed() -> None:
    pair = Pair(p={"max_tokens_per_chunk": 4})
    pair.submit(ask(length=40))
    for _ in range(6):
        pair.turn()
    assert pair.tokens == {}
    assert pair.p.transport.ledger()["bytes_sent"] > 0
    pair.settle()
    pair.assert_empty()


def test_a_prompt_that_takes_longer_than_a_grant_lives_is_handed_over() -> None:
    """Its blocks come all the while, and every one of them says that the giver lives."""
    pair = Pair(p={"max_tokens_per_chunk": 4}, d={"grant_ttl_s": 5.0})
    one = ask(length=40)
    pair.submit(one)
    while pair.tokens == {}:
        pair.turn(seconds=2.0)
    check_texts(pair, one)
    assert pair.verdicts == {"a": ["landed"]}


def test_a_resumed_request_is_handed_over_with_its_generated_tokens() -> None:
    pair = Pair()
    whole = ask(count=14, seed=4)
    text, _ = expected(whole)
    pair.submit(ask(count=14, seed=4, attempt=2, generated=tuple(text[:5])))
    pair.settle()
    assert [pair.tokens["a"][position] for position in range(5, 14)] == text[5:]
    assert pair.speakers["a"] == ["p5", *(f"d{position}" for position in range(6, 14))]
    pair.assert_empty()


def test_an_answer_of_one_token_is_finished_on_p() -> None:
    pair = Pair()
    one = ask(count=1)
    pair.submit(one)
    check_texts(pair, one)
    assert pair.verdicts == {"a": ["finished_on_p"]}


def test_a_full_d_is_asked_again_until_it_has_room() -> None:
    pair = Pair(d={"num_blocks": 7})
    asked = [ask(name, salt=salt) for salt, name in enumerate("abc")]
    for one in asked:
        pair.submit(one)
    check_texts(pair, *asked)
    assert pair.verdicts == {name: ["landed"] for name in "abc"}


def test_a_d_that_can_never_hold_it_leaves_it_on_p() -> None:
    pair = Pair(d={"num_blocks": 5})
    one = ask()
    pair.submit(one)
    check_texts(pair, one)
    assert pair.verdicts == {"a": ["refused"]}
    assert set(pair.speakers["a"]) == {f"p{position}" for position in range(12)}


def test_without_decode_on_p_a_request_nobody_takes_ends_with_an_error() -> None:
    pair = Pair(d={"num_blocks": 5}, p={"enable_local_decode": False})
    pair.submit(ask())
    pair.settle()
    assert pair.ends["a"] == ["context_length_exceeded"]
    pair.assert_empty()


def test_a_preemption_on_d_changes_nothing_in_the_text() -> None:
    pair = Pair(d={"num_blocks": 9})
    asked = [ask(name, count=20, salt=salt) for salt, name in enumerate("abc")]
    for one in asked:
        pair.submit(one)
    check_texts(pair, *asked)


def test_an_offer_that_arrives_again_while_the_request_runs_opens_no_second_grant() -> None:
    pair = Pair(fate=lambda kind: Fate.TWICE if kind == "offer" else Fate.GOOD)
    one = ask(count=40)
    pair.submit(one)
    pair.run(lambda: len(pair.tokens.get("a", {})) > 25)
    assert pair.d.agent.taking.num_open == 0
    assert pair.d.transport.ledger()["grants_open"] == 0
    check_texts(pair, one)


def test_a_new_attempt_lets_go_of_the_old_one_s_blocks() -> None:
    pair = Pair(p={"max_tokens_per_chunk": 4})
    pair.submit(ask(length=40))
    for _ in range(4):
        pair.turn()
    again = ask(length=40, attempt=2)
    pair.submit(again)
    pair.run(lambda: pair.p.scheduler.ledger()["requests_giving"] == 1)
    pair.settle()
    assert pair.text("a") == expected(again)[0]
    assert pair.verdicts["a"] == ["cancelled", "landed"]
    pair.assert_empty()


def test_blocks_that_are_still_sent_are_let_go_of_before_they_are_promised_to_a_peer() -> None:
    """An instance that gives and takes, and hears in one breath that a client left and that a peer asks for room."""
    pair = Pair(faults=lambda _giver, _taker: Faults(delay_s=1000.0))
    pair.submit(ask())
    pair.run(lambda: pair.p.scheduler.ledger()["requests_giving"] == 1)
    assert pair.p.transport.ledger()["grants_given"] == 1
    pair.p.scheduler.abort("a", 0, pair.clock.now())
    offer = dataclasses.replace(
        offer_of(ask("b")), layout_fingerprint=pair.p.executor.kv_memory().layout.fingerprint
    )
    pair.p.obey(m.Offers(offers=[offer]))
    assert pair.p.transport.ledger()["grants_open"] == 1
    assert pair.p.transport.ledger()["grants_given"] == 0
    pair.settle()
    pair.assert_empty()


def test_a_landed_reservation_without_its_first_token_leaks_no_block() -> None:
    pair = Pair(fate=lambda kind: Fate.GOOD if kind == "offer" else Fate.LOST)
    pair.submit(ask())
    pair.run(lambda: bool(pair.verdicts))
    assert pair.verdicts == {"a": ["lost"]}
    assert pair.d.scheduler.ledger()["staged"] == 3
    assert pair.unused == []
    pair.settle()
    assert pair.unused == [("a", 1)]  # D's API process forgets it, though no Cancel ever came
    assert pair.ends["a"] == ["instance_lost"]
    pair.assert_empty()


def test_reservations_of_a_giver_that_is_gone_end_at_once() -> None:
    pair = Pair(p={"max_tokens_per_chunk": 4})
    pair.submit(ask(length=40))
    pair.run(lambda: pair.d.scheduler.ledger()["requests_reserved"] == 1)
    pair.post(pair.d, m.PeerGone(incarnation="somebody else"))
    pair.turn()
    assert pair.d.scheduler.ledger()["requests_reserved"] == 1
    pair.post(pair.d, m.PeerGone(incarnation="p-1"))
    pair.turn()
    pair.turn()
    counts = pair.d.scheduler.ledger()
    assert (counts["requests_reserved"], counts["free"]) == (0, 24)
    pair.settle()
    pair.assert_empty()


@pytest.mark.parametrize("turns", range(12))
def test_a_client_that_leaves_at_any_moment_frees_both_sides_at_once(turns: int) -> None:
    pair = Pair(p={"max_tokens_per_chunk": 4}, d={"max_seqs_per_batch": 2})
    pair.submit(ask(length=20, count=30))
    for _ in range(turns):
        pair.turn()
    pair.abort("a")
    for _ in range(3):
        pair.turn()
    pair.assert_empty()


@pytest.mark.parametrize("cut_at_byte", range(0, 900, 30))
def test_a_link_cut_at_any_byte_ends_with_the_text_or_an_error(cut_at_byte: int) -> None:
    links = itertools.count()
    pair = Pair(
        faults=lambda _giver, _taker: (
            Faults(cut_at_byte=cut_at_byte) if next(links) == 0 else Faults()
        )
    )
    asked = [ask(name, salt=salt) for salt, name in enumerate("ab")]
    for one in asked:
        pair.submit(one)
    pair.settle()
    for one in asked:
        text, reason = expected(one)
        (end,) = pair.ends[one.request_id]
        assert end in (reason, "instance_lost")
        assert pair.text(one.request_id) == text[: len(pair.text(one.request_id))]
        assert (end == reason) == (len(pair.text(one.request_id)) == len(text))
        assert len(pair.verdicts[one.request_id]) == 1
    pair.assert_empty()


@pytest.mark.parametrize("length", [12, 13])
@pytest.mark.parametrize("chunk", [4, 100])
def test_only_what_d_lacks_is_pushed(length: int, chunk: int) -> None:
    pair = Pair(p={"max_tokens_per_chunk": chunk, "prefix_root": ROOT}, d={"prefix_root": ROOT})
    sent = []
    for name in "ab":
        one = ask(name, length)
        pair.submit(one)
        pair.run(lambda name=name: name in pair.ends)
        assert pair.text(name) == expected(one)[0]
        sent.append(pair.p.transport.ledger()["bytes_sent"])
    block_bytes = pair.p.executor.kv_memory().layout.block_bytes * 4  # two layers, K and V
    assert sent[1] - sent[0] == (length % 4 > 0) * block_bytes
    assert pair.verdicts == {"a": ["landed"], "b": ["landed"]}
    pair.settle()
    pair.assert_empty()


KINDS = ("offer", "first", "cancel")
requests = st.lists(
    st.tuples(
        st.integers(0, 60),  # submitted in which turn
        st.integers(1, 30),  # prompt
        st.integers(1, 20),  # answer
        st.integers(0, 2),  # seed
        st.integers(0, 3),  # prompts of one text begin alike
        st.sampled_from(
            [None, None, None, 1, 5, 10, 20, 40]
        ),  # the client leaves so many turns later
    ),
    min_size=1,
    max_size=10,
)
links = st.builds(
    Faults,
    delay_s=st.sampled_from([0.0, 0.0, 0.004, 0.02]),
    cut_at_byte=st.none() | st.integers(0, 6000),
    lose_frames=st.frozensets(st.integers(0, 60), max_size=1),
    flip_at_byte=st.none() | st.integers(0, 6000),
    lose_replies=st.sampled_from([False, False, False, True]),  # landed, and P never hears of it
)


@settings(max_examples=60, deadline=None)
@given(
    requests=requests,
    fates=st.lists(st.sampled_from([Fate.GOOD, *Fate]), max_size=40),
    faults=st.lists(links, max_size=3),
    chunk=st.sampled_from([3, 4, 100]),
    num_blocks=st.tuples(st.sampled_from([13, 16, 30]), st.sampled_from([13, 16, 30])),
    roots=st.tuples(st.sampled_from([b"", ROOT]), st.sampled_from([b"", ROOT])),
    pull=st.booleans(),
)
def test_many_requests_over_bad_links_end_once_with_the_right_text_and_leave_nothing(
    requests: list[tuple[int, int, int, int, int, int | None]],
    fates: list[Fate],
    faults: list[Faults],
    chunk: int,
    num_blocks: tuple[int, int],
    roots: tuple[bytes, bytes],
    pull: bool,
) -> None:
    fate, fault = iter(fates), iter(faults)
    pair = Pair(
        fate=lambda _kind: next(fate, Fate.GOOD),
        faults=lambda _giver, _taker: next(fault, Faults()),
        p={"num_blocks": num_blocks[0], "max_tokens_per_chunk": chunk, "prefix_root": roots[0]},
        d={"num_blocks": num_blocks[1], "prefix_root": roots[1]},
        pull=pull,
    )
    asked = {}
    for turn in range(105):
        for number, (at, length, count, seed, text, leaves) in enumerate(requests):
            name = str(number)
            if at == turn:
                asked[name] = ask(name, length, count, text, seed=seed, timeout_s=100.0)
                pair.submit(asked[name])
            if leaves is not None and at + leaves == turn:
                pair.abort(name, 1)
        pair.turn()
    pair.settle()
    for name, one in asked.items():
        text, reason = expected(one)
        said = pair.text(name)
        assert said == text[: len(said)]
        ends = pair.ends[name]
        if len(said) == len(text):
            assert ends[0] == reason or "lost" in pair.verdicts[name] or requests[int(name)][5]
        else:
            assert set(ends) <= {"abort", "instance_lost", "deadline_exceeded"}
        assert len(ends) == 1 or "lost" in pair.verdicts[name] or "abort" in ends
        assert len(pair.verdicts.get(name, [])) <= 1
    pair.assert_empty()
