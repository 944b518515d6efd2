"""Steps that are planned before the one before them is taken in: the same tokens, whatever happens meanwhile, and no block given away too early."""

from __future__ import annotations

import random

import pytest

from tests.core.toy_rig import ToyRig, expected, offer_of, submission
from xllm_py.core.block_manager import BlockManager
from xllm_py.core.plan import StepPlan
from xllm_py.core.request import Submission
from xllm_py.engine.toy import EOS

GRANT = bytes(16)


def load(seed: int, count: int = 16) -> list[Submission]:
    """Answers of all lengths; a few that ask for more than the highest logit."""
    draw = random.Random(seed)
    choosy = (
        {"seed": 7},
        {"logprobs": 1},
        {"repetition_penalty": 1.2},
        {"min_tokens": 3},
        {"best_of": 2, "seed": 3},
    )
    return [
        submission(
            f"r{number}",
            [draw.randrange(300) for _ in range(draw.randint(1, 12))],
            draw.randint(1, 30),
            **(draw.choice(choosy) if draw.random() < 0.08 else {}),
            stop_token_ids=tuple(draw.randrange(320) for _ in range(draw.choice((0, 0, 40)))),
        )
        for number in range(count)
    ]


def check(rig: ToyRig, each: Submission) -> None:
    told, reason = expected(each)
    assert rig.tokens[each.request_id] == told and rig.ends[each.request_id] == [reason]


@pytest.mark.parametrize("ahead", ["at once", "late"])
@pytest.mark.parametrize("prefix_root", [b"", b"root"])
@pytest.mark.parametrize("seed", range(12))
def test_every_answer_is_what_it_is_alone(seed: int, prefix_root: bytes, ahead: str) -> None:
    draw = random.Random(seed)
    rig = ToyRig(
        num_blocks=draw.choice((20, 40, 80)),
        prefix_root=prefix_root,
        ahead=ahead,
        max_seqs_per_batch=draw.choice((2, 4, 8)),
        mix_batch=draw.random() < 0.7,
    )
    plain = [each for each in load(seed) if each.sampling.takes_highest or draw.random() < 0.5]
    left: set[str] = set()
    for each in plain:
        rig.add(each)
        for _ in range(draw.choice((0, 1, 3, 8))):
            rig.step()
        if draw.random() < 0.2:
            rig.scheduler.abort(each.request_id, 0, rig.now)
            left.add(each.request_id)
    rig.run()
    for each in plain:
        sampling = each.sampling
        if each.request_id in left:
            told, _ = expected(each) if sampling.takes_highest else (None, "")
            said = rig.tokens[each.request_id]
            assert told is None or said == told[: len(said)]
        elif sampling.takes_highest or (sampling.seed and sampling.best_of == 1):
            check(rig, each)
        else:
            assert rig.ends[each.request_id][0] in ("stop", "length")
    assert rig.num_ahead > 3
    rig.scheduler.flush_cache()
    rig.scheduler.assert_empty()


def decoding(ahead: str = "late", names: str = "ab", **fields: object) -> ToyRig:
    """Some decode, with a step begun ahead."""
    rig = ToyRig(num_blocks=40, ahead=ahead)
    for name in names:
        rig.add(submission(name, [5, 6, 7], 9, ignore_eos=True, **fields))
    for _ in range(3):
        rig.step()
    assert len(rig.under_way) == 1 and rig.under_way[0][0].carried
    return rig


def held(rig: ToyRig, name: str) -> list[int]:
    (request,) = rig.scheduler._open.choices(name)
    return list(request.block_ids)


def test_a_step_ahead_has_the_rows_of_the_one_before_and_no_tokens() -> None:
    rig = decoding()
    plan: StepPlan = rig.under_way[0][0]
    before = rig.scheduler._batch._decodes
    assert plan.rows == before._rows and plan.token_ids == []
    assert plan.num_computed == before._computed and plan.positions == before._positions


def test_blocks_of_one_that_ended_are_not_given_away_while_a_step_that_may_write_them_is_computed() -> (
    None
):
    rig = decoding()
    blocks = held(rig, "a")
    rig.scheduler.abort("a", 0, rig.now)
    rig.collect()
    free = rig.scheduler.ledger()["free"]
    given = offer_of(submission("c", list(range(3)), 4))
    assert rig.scheduler.reserve(given, GRANT, rig.now).grant
    assert not set(rig.scheduler.reserved_blocks("c")) & set(blocks)
    rig.scheduler.abort("c", 0, rig.now)
    rig.scheduler.released("c", 1)
    rig.step()
    assert rig.scheduler.ledger()["free"] == free + len(blocks)
    rig.run()
    check(rig, submission("b", [5, 6, 7], 9, ignore_eos=True))


def test_without_that_the_late_step_writes_what_another_one_holds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """That the test above can fail."""
    monkeypatch.setattr(BlockManager, "detain", lambda self: None)
    rig = decoding()
    blocks = held(rig, "a")
    rig.scheduler.abort("a", 0, rig.now)
    given = offer_of(submission("c", list(range(3)), 4))
    assert rig.scheduler.reserve(given, GRANT, rig.now).grant
    assert set(rig.scheduler.reserved_blocks("c")) & set(blocks)


@pytest.mark.parametrize(
    "fields", [{"seed": 4}, {"logprobs": 0}, {"frequency_penalty": 0.5}, {"min_tokens": 2}]
)
def test_nothing_is_planned_ahead_of_one_whose_token_takes_more_than_the_highest_logit(
    fields: dict[str, object],
) -> None:
    rig = ToyRig(num_blocks=40, ahead="late")
    rig.add(submission("a", [5, 6, 7], 9, ignore_eos=True))
    rig.add(submission("b", [5, 6, 7], 9, ignore_eos=True, **fields))
    rig.run()
    assert rig.num_ahead == 0


def test_nothing_is_planned_ahead_when_somebody_ends_for_sure_or_comes_in_or_blocks_lack() -> None:
    rig = ToyRig(num_blocks=40, ahead="late")
    rig.add(submission("a", [5, 6, 7], 3, ignore_eos=True))
    rig.step()
    rig.step()
    assert rig.num_ahead == 0  # the third token is the last
    rig.run()
    rig = decoding(names="a")
    rig.add(submission("b", [1] * 6, 4, ignore_eos=True))
    rig.step()
    assert rig.under_way == []
    rig.run()
    tight = ToyRig(num_blocks=2, block_size=4, ahead="late")
    tight.add(submission("a", [5, 6, 7], 6, ignore_eos=True))
    tight.run()
    check(tight, submission("a", [5, 6, 7], 6, ignore_eos=True))


def test_a_step_that_raises_takes_the_one_ahead_with_it_and_nothing_is_lost() -> None:
    rig = decoding()
    assert rig.scheduler.schedule_ahead(rig.now) is not None
    assert rig.scheduler.schedule_ahead(rig.now) is None  # two at a time
    (plan, _), rig.under_way = rig.under_way[0], []
    assert rig.scheduler.on_crash(plan, "it raised", rig.now)
    rig.run()
    for name in "ab":
        check(rig, submission(name, [5, 6, 7], 9, ignore_eos=True))
    rig.scheduler.assert_empty()


def test_an_end_that_only_the_token_tells_throws_the_step_ahead_away() -> None:
    answer, _ = expected(submission("a", [5, 6, 7], 9, ignore_eos=True))
    rig = ToyRig(num_blocks=40, ahead="late")
    given = rig.add(submission("a", [5, 6, 7], 9, ignore_eos=True, stop_token_ids=(answer[3],)))
    rig.run()
    assert EOS not in answer and rig.num_ahead > 1
    check(rig, given)
    assert rig.scheduler.ledger()["free"] == 40
