"""--use_zero_evict: what has begun can grow to its end, so nobody is preempted; and --enable_mix_batch=false: prompts first."""

from __future__ import annotations

import random

import pytest

from tests.core.toy_rig import ToyRig, expected, offer_of, submission
from xllm_py.core.batch import Batch
from xllm_py.core.request import Request, Submission


def load(seed: int) -> list[Submission]:
    """More than the cache can hold at once."""
    chooser = random.Random(seed)
    return [
        submission(
            f"r{number}",
            [chooser.randrange(300) for _ in range(chooser.randint(1, 20))],
            chooser.randint(1, 24),
            seed=number,
            best_of=chooser.choice((1, 1, 3)),
            ignore_eos=True,
        )
        for number in range(20)
    ]


def check(rig: ToyRig, given: list[Submission]) -> None:
    for each in given:
        for choice in range(each.sampling.best_of):
            name = f"{each.request_id}#{choice}" if choice else each.request_id
            assert rig.tokens[name] == expected(each, choice=choice)[0]
            assert rig.ends[name] == ["length"]


@pytest.fixture
def preempted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of requests that were."""
    names: list[str] = []
    preempt = Batch._preempt

    def noted(self: Batch, request: Request) -> None:
        names.append(request.request_id)
        preempt(self, request)

    monkeypatch.setattr(Batch, "_preempt", noted)
    return names


@pytest.mark.parametrize("prefix_root", [b"", b"root"])
@pytest.mark.parametrize("seed", range(4))
def test_with_zero_evict_nobody_is_preempted_and_without_some_are(
    preempted: list[str], seed: int, prefix_root: bytes
) -> None:
    for zero_evict in (True, False):
        rig = ToyRig(num_blocks=36, zero_evict=zero_evict, prefix_root=prefix_root)
        given = [rig.add(each) for each in load(seed)]
        rig.run()
        check(rig, given)
        if zero_evict:
            assert not preempted
    assert preempted


def test_an_offer_whose_answer_may_not_fit_beside_the_others_is_refused() -> None:
    first = submission("a", list(range(4)), 30, give=True)
    second = submission("b", list(range(9, 13)), 30, give=True)
    for zero_evict, refusal in ((False, ""), (True, "full_now")):
        rig = ToyRig(num_blocks=12, zero_evict=zero_evict)
        assert not rig.scheduler.reserve(offer_of(first), b"1" * 16, rig.now).refusal
        answer = rig.scheduler.reserve(offer_of(second), b"2" * 16, rig.now)
        assert answer.refusal == refusal
        assert ("--use_zero_evict" in answer.text) == zero_evict


def test_what_is_to_be_given_away_needs_room_for_its_prompt_only() -> None:
    rig = ToyRig(num_blocks=12, zero_evict=True)
    for name in "ab":
        rig.add(submission(name, list(range(4)), 30, give=True))
    assert len(rig.step().rows) == 2


def test_prompts_go_first_in_steps_of_their_own() -> None:
    rig = ToyRig(num_blocks=64, mix_batch=False, max_tokens_per_batch=8)
    old = rig.add(submission("old", list(range(5)), 6, ignore_eos=True))
    rig.step()
    rig.step()
    young = rig.add(submission("young", list(range(50, 70)), 3, ignore_eos=True))
    steps = []
    while rig.scheduler.has_work():
        steps.append(rig.step().num_tokens)
    assert steps == [[8], [8], [4], [1, 1], [1, 1], [1], [1]]
    check(rig, [old, young])


@pytest.mark.parametrize("chunked", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_answers_are_the_same_in_either_order(seed: int, chunked: bool) -> None:
    for mix_batch in (True, False):
        rig = ToyRig(
            num_blocks=40,
            mix_batch=mix_batch,
            enable_chunked_prefill=chunked,
            max_tokens_per_batch=24,
            prefix_root=b"root",
        )
        given = [rig.add(each) for each in load(seed)]
        rig.run()
        check(rig, given)


def test_the_logprobs_of_a_prompt_are_told_once_though_it_was_preempted_in_its_middle(
    preempted: list[str],
) -> None:
    rig = ToyRig(max_tokens_per_batch=8, max_tokens_per_chunk=2)
    rig.add(submission("old", list(range(8)), 40, ignore_eos=True))
    for _ in range(5):
        rig.step()
    rig.add(submission("young", list(range(50, 90)), 2, prompt_logprobs=0, ignore_eos=True))
    rig.run()
    assert "young" in preempted
    (told,) = [each for outputs in rig.outputs for each in outputs.prompt_logprobs.values()]
    assert len(told) == 39
