"""A request whose computation raises fails alone; the others say what they would have said; a broken executor is found out."""

from __future__ import annotations

import pytest

from tests.core.toy_rig import ToyRig, expected, submission
from xllm_py.core.plan import StepPlan

POISON = 77


class CrashingRig(ToyRig):
    """Its executor raises, after writing half of a step, when the poisonous token is in it; `broken`: always."""

    broken = False
    error: type[Exception] = RuntimeError
    alive = True

    def step(self, seconds: float = 0.001) -> StepPlan:
        now = self.clock.turn(seconds)
        plan = self.scheduler.schedule(now)
        self._check_plan(plan)
        if plan.empty:
            self.collect()
            return plan
        try:
            result = self.executor.execute(plan, lambda layer: self.check(plan))
        except self.error:
            self.alive = self.scheduler.on_crash(plan, "it raised", now)
        else:
            self.scheduler.apply(plan, result, now)
        self.collect()
        return plan

    def check(self, plan: StepPlan) -> None:
        if self.broken or POISON in plan.token_ids:
            raise self.error


def prompt(count: int, salt: int = 0) -> list[int]:
    return [(salt * 37 + index * 5) % 70 + 1 for index in range(count)]


def check(rig: ToyRig, *names: str, count: int) -> None:
    for salt, name in enumerate(names):
        wanted = expected(submission(name, prompt(7, salt), count, seed=salt, ignore_eos=True))
        assert (rig.tokens[name], rig.ends[name]) == (wanted[0], [wanted[1]])


def good(rig: ToyRig, *names: str, count: int) -> None:
    for salt, name in enumerate(names):
        rig.add(submission(name, prompt(7, salt), count, seed=salt, ignore_eos=True))


@pytest.mark.parametrize("error", [RuntimeError, MemoryError, IndexError])
@pytest.mark.parametrize("after", [0, 1, 4])
def test_the_one_that_raises_fails_alone(error: type[Exception], after: int) -> None:
    rig = CrashingRig(num_blocks=32)
    rig.error = error
    # the salt keeps the poison out of what the others generate before the end
    good(rig, "a", "b", "c", count=6)
    texts = [
        expected(submission(n, prompt(7, s), 6, seed=s, ignore_eos=True))[0]
        for s, n in enumerate("abc")
    ]
    assert all(POISON not in text[:-1] for text in texts)
    for _ in range(after):
        rig.step()
    rig.add(submission("bad", [1, 2, POISON, 3], 6))
    rig.run()
    assert (rig.ends["bad"], rig.messages["bad"]) == (["internal_error"], "it raised")
    assert rig.alive
    check(rig, "a", "b", "c", count=6)
    rig.scheduler.assert_empty()


def test_a_lone_request_that_raises_leaves_a_living_engine() -> None:
    rig = CrashingRig()
    rig.add(submission("bad", [1, 2, POISON, 3], 6))
    rig.run()
    assert rig.alive and rig.ends["bad"] == ["internal_error"]
    good(rig, "a", count=6)
    rig.run()
    check(rig, "a", count=6)
    assert rig.scheduler.ledger()["crashed_steps"] == 1
    rig.scheduler.assert_empty()


@pytest.mark.parametrize("names", ["a", "abc"])
def test_an_executor_that_always_raises_is_broken(names: str) -> None:
    rig = CrashingRig(num_blocks=32)
    good(rig, *names, count=6)
    rig.step()
    rig.broken = True
    for _ in range(len(names) + 2):
        if rig.alive:
            rig.step()
    assert not rig.alive
    assert rig.ends == {name: ["internal_error"] for name in names}


def test_choices_of_one_request_survive_a_neighbour_that_raises_while_they_part() -> None:
    rig = CrashingRig(num_blocks=32)
    rig.add(submission("a", prompt(6), 6, seed=3, best_of=3, ignore_eos=True))
    rig.step()
    rig.add(submission("bad", [1, 2, POISON, 3], 6))
    rig.run()
    assert rig.ends["bad"] == ["internal_error"]
    for choice in range(3):
        given = submission("a", prompt(6), 6, seed=3, ignore_eos=True)
        name = f"a#{choice}" if choice else "a"
        assert rig.tokens[name] == expected(given, choice=choice)[0]
    rig.scheduler.assert_empty()


def test_a_suspect_may_be_cancelled_before_its_turn() -> None:
    rig = CrashingRig(num_blocks=32)
    good(rig, "a", "b", count=6)
    rig.add(submission("bad", [1, 2, POISON, 3], 6))
    rig.step()
    rig.scheduler.abort("a", 1, rig.now)
    rig.scheduler.abort("bad", 1, rig.now)
    rig.run()
    assert (rig.ends["a"], rig.ends["bad"]) == (["abort"], ["abort"])
    assert rig.ends["b"] == ["length"]
    rig.scheduler.assert_empty()


def test_a_request_that_is_given_away_fails_alone_too() -> None:
    rig = CrashingRig(num_blocks=32)
    good(rig, "a", count=6)
    rig.add(submission("bad", [1, 2, POISON, 3], 6, give=True))
    rig.add(submission("given", prompt(5), 6, give=True))
    rig.run()
    assert rig.ends["bad"] == ["internal_error"]
    check(rig, "a", count=6)
    rig.scheduler.on_given("given", 1, rig.now)
    rig.scheduler.assert_empty()
