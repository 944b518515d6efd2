"""Which of the options each policy takes, and why."""

from __future__ import annotations

import dataclasses
from collections import Counter
from random import Random

import pytest

from tests.cluster.test_routing import candidate
from xllm_py.base.errors import QueueTimeout
from xllm_py.cluster.costs import Costs
from xllm_py.cluster.instance_info import Role
from xllm_py.cluster.policies import MANY, SHORT_TAIL, Known, choose
from xllm_py.cluster.routing import Candidate, Facts, Options, Route

FACTS = Facts(num_prompt=1000, max_tokens=100)
POLICIES = ("LOAD", "CAR", "SLO_AWARE")


def pairs(num_p: int = 2, num_d: int = 2) -> Options:
    sizes = {"block_size": 16, "max_seqs": 8, "kv_token_bytes": 1000}
    givers = [candidate(f"p{n}", Role.PREFILL, **sizes) for n in range(num_p)]
    takers = tuple(candidate(f"d{n}", Role.DECODE, **sizes) for n in range(num_d))
    return Options(mode="pd", pairs=tuple((giver, takers) for giver in givers))


def alone(count: int = 2) -> Options:
    each = [candidate(f"x{n}", Role.DEFAULT, block_size=16, max_seqs=8) for n in range(count)]
    return Options(mode="default", alone=tuple(each))


def everyone(found: Options) -> list[Candidate]:
    return [
        *found.alone,
        *(giver for giver, _ in found.pairs),
        *(found.pairs[0][1] if found.pairs else ()),
    ]


def known(found: Options, **more: object) -> Known:
    return Known(costs={each.key: Costs() for each in everyone(found)}, **more)  # type: ignore[arg-type]


def names(route: Route) -> tuple[str, str]:
    return route.first.name, route.decode.name if route.decode else ""


@pytest.mark.parametrize("policy", POLICIES)
def test_a_long_queue_and_a_full_decode_are_avoided(policy: str) -> None:
    found = pairs()
    told = known(found)
    told.costs["life-p0"].enqueue("a", 5000)
    told.costs["life-d0"].decode(6)
    route = choose(policy, found, FACTS, told)
    assert names(route) == ("p1", "d1")
    assert policy in route.reason


@pytest.mark.parametrize("policy", POLICIES)
def test_one_that_does_everything_is_chosen_by_its_queue_too(policy: str) -> None:
    found = alone()
    told = known(found)
    told.costs["life-x0"].enqueue("a", 5000)
    assert names(choose(policy, found, FACTS, told)) == ("x1", "")


@pytest.mark.parametrize("policy", ["CAR", "SLO_AWARE"])
def test_a_cached_prefix_is_worth_a_queue_that_is_shorter_than_it(policy: str) -> None:
    found = pairs()
    told = known(found, held={"life-p0": 900}, ttft_s=60.0)
    told.costs["life-p0"].enqueue("a", 500)
    route = choose(policy, found, FACTS, told)
    assert route.first.name == "p0"
    assert route.why == "prefix"
    told.costs["life-p0"].enqueue("b", 900)
    assert choose(policy, found, FACTS, told).first.name == "p1"


@pytest.mark.parametrize("policy", ["CAR", "SLO_AWARE"])
def test_a_decode_that_holds_the_prompt_serves_it_alone(policy: str) -> None:
    found = pairs()
    told = known(found, held={"life-d1": FACTS.num_prompt - SHORT_TAIL})
    route = choose(policy, found, FACTS, told)
    assert names(route) == ("d1", "")
    assert route.why == "held_by_decode"
    told = known(found, held={"life-d1": FACTS.num_prompt - SHORT_TAIL - 1})
    assert choose(policy, found, FACTS, told).decode is not None


def test_a_short_prompt_that_nobody_holds_is_not_taken_for_a_short_tail() -> None:
    found = pairs()
    route = choose("CAR", found, Facts(num_prompt=10, max_tokens=10), known(found))
    assert route.decode is not None


def test_what_a_decode_lacks_is_moved_by_the_faster_pair() -> None:
    found = pairs()
    rates = {
        ("life-p0", "life-d0"): 1e4,
        ("life-p0", "life-d1"): 1e9,
        ("life-p1", "life-d0"): 1e4,
        ("life-p1", "life-d1"): 1e4,
    }
    assert names(choose("CAR", found, FACTS, known(found, rates=rates))) == ("p0", "d1")


def test_a_decode_without_room_for_the_prompt_is_the_last_choice() -> None:
    found = pairs()
    told = known(found)
    told.costs["life-d0"].report(0, 0, 10, 1000)
    told.costs["life-d1"].report(0, 6, 500, 1000)
    assert names(choose("CAR", found, FACTS, told))[1] == "d1"


def test_a_giver_whose_best_takers_are_not_linked_to_it_uses_those_that_are() -> None:
    full = pairs(2, 2)
    (p0, takers), (p1, _) = full.pairs
    found = Options(mode="pd", pairs=((p0, takers[:1]), (p1, takers[1:])))
    told = known(full)
    told.costs["life-d0"].decode(7)
    told.costs["life-p1"].enqueue("a", 200)
    assert names(choose("CAR", found, FACTS, told)) in {("p0", "d0"), ("p1", "d1")}


@pytest.mark.parametrize("policy", POLICIES)
def test_requests_that_come_together_do_not_herd(policy: str) -> None:
    """Each is counted as it is placed, long before any report."""
    found = pairs(4, 4)
    told = known(found, ttft_s=60.0)
    chosen: Counter[str] = Counter()
    for number in range(40):
        route = choose(policy, found, FACTS, told)
        chosen[route.first.name] += 1
        told.costs[route.first.incarnation_id].enqueue(str(number), FACTS.num_prompt)
    assert set(chosen.values()) == {10}


def test_where_there_are_many_load_takes_the_better_of_two() -> None:
    found = alone(MANY + 8)
    random = Random(1)
    told = known(found, draw=random.randrange)
    chosen: Counter[str] = Counter()
    for number in range(40 * 20):
        route = choose("LOAD", found, FACTS, told)
        told.costs[route.first.incarnation_id].enqueue(str(number), 100)
        chosen[route.first.name] += 1
    assert len(chosen) == MANY + 8
    assert max(chosen.values()) <= 26  # log log n above the mean of 20


def test_when_nobody_can_keep_the_target_the_request_is_refused_with_the_time_to_come_back() -> (
    None
):
    found = pairs(2, 1)
    told = known(found, ttft_s=2.0)
    for name in ("life-p0", "life-p1"):
        told.costs[name].enqueue("a", 40_000)
    with pytest.raises(QueueTimeout) as raised:
        choose("SLO_AWARE", found, FACTS, told)
    late_s = told.costs["life-p0"].first_token_s(FACTS.num_prompt) - 2.0
    assert raised.value.retry_after_s == pytest.approx(late_s)
    assert choose("CAR", found, FACTS, told)
    assert choose("SLO_AWARE", found, FACTS, dataclasses.replace(told, may_refuse=False))


def test_a_target_that_nobody_could_keep_even_idle_is_no_reason_to_refuse() -> None:
    found = pairs(1, 1)
    told = known(found, ttft_s=0.001)
    told.costs["life-p0"].enqueue("a", 40_000)
    assert choose("SLO_AWARE", found, FACTS, told)
