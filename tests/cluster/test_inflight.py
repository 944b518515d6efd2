"""The token log: whatever order, repetition or gap instances report in, clients see each token once and in order."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xllm_py.cluster.inflight import Entry, Inflight, Judgement, RequestLog

P, D, X = "life-p", "life-d", "life-x"
ANSWER = (11, 12, 13, 14)


def entry(position: int, *, who: str = D, attempt: int = 1, **fields: object) -> Entry:
    """The true entry of a position, P's first token included; fields override."""
    last = position == len(ANSWER) - 1
    values = {
        "attempt": attempt,
        "incarnation": who,
        "choice": 0,
        "position": position,
        "token_id": ANSWER[position] if position < len(ANSWER) else 99,
        "finish_reason": "length" if last else "",
        **fields,
    }
    return Entry(**values)  # type: ignore[arg-type]


def truth() -> list[Entry]:
    return [entry(0, who=P), *(entry(position) for position in range(1, len(ANSWER)))]


def opened(*, decode: str = D, max_tokens: int = len(ANSWER)) -> tuple[Inflight, RequestLog]:
    inflight = Inflight()
    return inflight, inflight.open("r", attempt=1, first=P, decode=decode, max_tokens=max_tokens)


def read_ids(log: RequestLog) -> list[int]:
    return [token for news in log.read() for token in news.token_ids]


def assert_complete(log: RequestLog, ids: Sequence[int]) -> None:
    assert tuple(ids) == ANSWER
    assert log.done
    assert log.error is None
    assert log.choices[0].finish_reason == "length"
    assert log.choices[0].held == {}


@pytest.mark.parametrize("order", list(itertools.permutations(range(len(ANSWER)))))
def test_every_order_gives_the_same_answer_once(order: tuple[int, ...]) -> None:
    inflight, log = opened()
    entries = truth()
    ids: list[int] = []
    for index in order:
        inflight.take("r", entries[index])
        ids += read_ids(log)
        assert tuple(ids) == ANSWER[: len(ids)]
    assert_complete(log, ids)
    assert inflight.num_diverged == 0


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_repeats_old_attempts_and_strangers_change_nothing(seed: int) -> None:
    chooser = random.Random(seed)
    inflight, log = opened()
    reports = truth() * 3
    reports += [entry(p, attempt=0) for p in range(4)] + [entry(p, attempt=2) for p in range(4)]
    reports += [entry(p, who=X, token_id=99) for p in range(4)] + [entry(1, choice=5)]
    chooser.shuffle(reports)
    ids: list[int] = []
    finishes = 0
    for report in reports:
        inflight.take("r", report)
        for news in log.read():
            assert news.position == len(ids)
            ids += news.token_ids
            finishes += bool(news.finish_reason)
    assert_complete(log, ids)
    assert finishes == 1
    assert inflight.num_diverged == 0
    assert inflight.num_stale == 13


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_report_that_contradicts_the_log_ends_the_request(data: st.DataObject) -> None:
    inflight, log = opened()
    known = data.draw(st.integers(1, len(ANSWER)))
    for report in truth()[:known]:
        inflight.take("r", report)
    where = data.draw(st.integers(0, known - 1))
    judged = inflight.take("r", entry(where, token_id=ANSWER[where] + 1))
    assert judged.judgement is Judgement.DIVERGED
    assert log.error is not None
    assert log.error[0] == "internal_error"
    assert inflight.take("r", entry(known % 4)).judgement is Judgement.STALE


def test_a_finish_that_comes_too_early_or_a_token_after_the_finish_diverges() -> None:
    inflight, _ = opened()
    inflight.take("r", entry(0, who=P))
    inflight.take("r", entry(1))
    again = inflight.take("r", entry(0, who=P, finish_reason="stop"))
    assert again.judgement is Judgement.DIVERGED
    inflight, _ = opened(max_tokens=99)
    for report in truth():
        inflight.take("r", report)
    assert inflight.take("r", entry(4)).judgement is Judgement.DIVERGED


def test_more_tokens_than_were_asked_for_diverge() -> None:
    inflight, log = opened(max_tokens=1)
    inflight.take("r", entry(0, who=P))
    assert inflight.take("r", entry(1)).judgement is Judgement.DIVERGED
    assert log.error is not None


def test_the_takers_second_token_may_overtake_the_givers_first() -> None:
    inflight, log = opened()
    assert inflight.take("r", entry(1)).judgement is Judgement.HELD
    assert log.read() == []
    judged = inflight.take("r", entry(0, who=P))
    assert (judged.judgement, judged.next) == (Judgement.APPENDED, 2)
    assert read_ids(log) == [11, 12]


def test_a_gap_that_nobody_else_can_fill_is_asked_for_again() -> None:
    inflight, _ = opened()
    inflight.take("r", entry(0, who=P))
    inflight.take("r", entry(1))
    judged = inflight.take("r", entry(3))
    assert (judged.judgement, judged.next) == (Judgement.GAP, 2)
    inflight, _ = opened(decode="")
    assert inflight.take("r", entry(1, who=P)).judgement is Judgement.GAP


def test_once_held_entries_were_let_in_the_giver_is_needed_no_more() -> None:
    inflight, log = opened(max_tokens=9)
    inflight.take("r", entry(1))
    inflight.take("r", entry(0, who=P))
    assert log.needed == {D}
    judged = inflight.take("r", entry(3, finish_reason=""))
    assert (judged.judgement, judged.next) == (Judgement.GAP, 2)
    assert inflight.on_lost(P, "gone", died=True) == []


def test_an_error_ends_the_request_after_what_was_said() -> None:
    inflight, log = opened()
    inflight.take("r", entry(0, who=P))
    failed = entry(1, token_id=-1, finish_reason="engine_down", message="it broke")
    assert inflight.take("r", failed).judgement is Judgement.ENDED
    assert read_ids(log) == [11]
    assert log.error == ("engine_down", "it broke")
    assert log.done


def test_an_error_after_the_answer_is_complete_changes_nothing() -> None:
    inflight, log = opened()
    for report in truth():
        inflight.take("r", report)
    inflight.take("r", entry(4, token_id=-1, finish_reason="abort"))
    assert log.error is None


def test_an_abort_nobody_here_asked_for_is_a_lost_instance() -> None:
    inflight, log = opened()
    inflight.take("r", entry(0, who=P, token_id=-1, finish_reason="abort"))
    assert log.error is not None
    assert log.error[0] == "instance_lost"


def test_losing_the_giver_matters_until_the_taker_has_it() -> None:
    inflight, log = opened()
    assert inflight.on_lost(X, "gone", died=True) == []
    inflight.take("r", entry(0, who=P))
    inflight.take("r", entry(1))
    assert inflight.on_lost(P, "gone", died=True) == []
    assert inflight.on_lost(D, "gone", died=True) == ["r"]
    assert log.error == ("instance_lost", "gone")
    assert inflight.on_lost(D, "gone", died=True) == []


def test_losing_the_giver_while_its_token_is_missing_ends_the_request() -> None:
    inflight, _ = opened()
    inflight.take("r", entry(1))
    assert inflight.on_lost(P, "gone", died=True) == ["r"]


def test_a_giver_whose_verdict_overtook_its_token_is_needed_for_it() -> None:
    """On a new stream verdicts go out before what is said again; nobody but the giver has the first token."""
    inflight, log = opened()
    assert inflight.on_verdict("r", 1, P, "landed")
    assert inflight.take("r", entry(1)).judgement is Judgement.HELD
    assert log.needed == {P, D}
    inflight, log = opened()
    assert inflight.on_verdict("r", 1, P, "landed")
    inflight.take("r", entry(0, who=P))
    assert log.needed == {D}
    inflight, log = opened()
    assert inflight.on_verdict("r", 1, P, "landed")
    assert inflight.on_lost(P, "gone", died=True) == ["r"]


@pytest.mark.parametrize(
    "kind, still_needed", [("landed", D), ("refused", P), ("lost", P), ("finished_on_p", P)]
)
def test_the_givers_verdict_says_who_is_needed(kind: str, still_needed: str) -> None:
    inflight, log = opened()
    inflight.take("r", entry(0, who=P))
    assert not inflight.on_verdict("r", 2, P, kind)
    assert not inflight.on_verdict("r", 1, X, kind)
    assert inflight.on_verdict("r", 1, P, kind)
    assert log.needed == {still_needed}


def test_closing_forgets_and_leaves_an_empty_ledger() -> None:
    inflight, _ = opened()
    inflight.take("r", entry(0, who=P))
    inflight.take("r", entry(2))
    assert inflight.ledger() == {"open_requests": 1, "attempts": 1, "log_tokens": 2}
    inflight.close("r")
    assert inflight.ledger() == {"open_requests": 0, "attempts": 0, "log_tokens": 0}
    assert inflight.take("r", entry(1)).judgement is Judgement.STALE
    inflight.close("r")


def test_one_id_cannot_be_open_twice() -> None:
    inflight, _ = opened()
    with pytest.raises(ValueError, match="open already"):
        inflight.open("r", attempt=1, first=P, max_tokens=1)


@pytest.mark.parametrize("seed", range(30))
def test_choices_end_each_for_itself_in_whatever_order_they_are_told(seed: int) -> None:
    chooser = random.Random(seed)
    inflight = Inflight()
    log = inflight.open("r", attempt=1, first=P, decode=D, max_tokens=4, num_choices=3)
    # choice 1 ended by its first token on P; D says of it only that nothing more comes
    entries = [entry(0, who=P, choice=0), entry(0, who=P, choice=2)]
    entries.append(entry(0, who=P, choice=1, finish_reason="stop"))
    entries.append(entry(1, choice=1, token_id=-1, finish_reason="stop"))
    entries += [entry(at, choice=choice) for choice in (0, 2) for at in (1, 2, 3)]
    chooser.shuffle(entries)
    got: dict[int, list[int]] = {0: [], 1: [], 2: []}
    for each in entries:
        assert not log.done or each.token_id < 0 or each.choice == 1
        judged = inflight.take("r", each)
        assert judged.judgement not in (Judgement.STALE, Judgement.DIVERGED)
        for news in log.read():
            got[news.choice] += news.token_ids
    assert log.done
    assert log.error is None
    assert got == {0: list(ANSWER), 1: [ANSWER[0]], 2: list(ANSWER)}
