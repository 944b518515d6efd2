"""Round robin over linked pairs, and what serves when there are none."""

from __future__ import annotations

from collections import Counter

import pytest

from xllm_py.base.errors import (
    BestOfRequiresPrefixCache,
    ContextLengthExceeded,
    NoCompatibleDecode,
    NoInstances,
)
from xllm_py.cluster.instance_info import Card, Role
from xllm_py.cluster.routing import (
    LONE_AFTER_S,
    Candidate,
    ClusterView,
    Facts,
    Route,
    able,
    kept_by,
    options,
    round_robin,
)

FACTS = Facts(num_prompt=10, max_tokens=10)


def routed(view: ClusterView, model: str, facts: Facts, turns: tuple[int, int]) -> Route:
    return round_robin(able(view, model, facts), turns, facts.num_prompt)


def candidate(
    name: str, role: Role, *, ready: bool = True, alive_s: float = 1.0, **fields: object
) -> Candidate:
    card = Card(
        name=name,
        rpc_address=f"{name}:1",
        type=role.value,
        incarnation_id=f"life-{name}",
        served_names=("m",),
        max_model_len=1000,
        **fields,  # type: ignore[arg-type]
    )
    return Candidate(card=card, ready=ready, alive_s=alive_s)


def view(*candidates: Candidate, links: str = "", refused: tuple[str, ...] = ()) -> ClusterView:
    """links: `p1-d1 p2-d1`."""
    pairs = (pair.split("-") for pair in links.split())
    linked = frozenset((f"life-{p}", f"life-{d}") for p, d in pairs)
    return ClusterView(candidates=candidates, linked=linked, refused=refused)


P1, P2 = candidate("p1", Role.PREFILL), candidate("p2", Role.PREFILL)
D1, D2, D3 = (candidate(f"d{n}", Role.DECODE) for n in (1, 2, 3))


def places(cluster: ClusterView, count: int) -> list[tuple[str, str]]:
    found = []
    for turn in range(count):
        route = routed(cluster, "m", FACTS, (turn, turn))
        found.append((route.first.name, route.decode.name if route.decode else ""))
    return found


def test_both_sides_take_turns() -> None:
    cluster = view(D2, P2, D1, P1, D3, links="p1-d1 p1-d2 p1-d3 p2-d1 p2-d2 p2-d3")
    found = places(cluster, 12)
    assert Counter(p for p, _ in found) == {"p1": 6, "p2": 6}
    assert Counter(d for _, d in found) == {"d1": 4, "d2": 4, "d3": 4}
    assert len(set(found)) == 6


def test_only_linked_pairs_are_used() -> None:
    cluster = view(P1, P2, D1, D2, links="p1-d1 p2-d2")
    assert set(places(cluster, 8)) == {("p1", "d1"), ("p2", "d2")}
    assert set(places(view(P1, P2, D1, links="p2-d1"), 4)) == {("p2", "d1")}


def test_what_a_giver_has_computed_is_given_by_it_again() -> None:
    keeping = candidate("p3", Role.PREFILL, enable_prefix_cache=True)
    found = able(view(P1, P2, keeping, D1, D2, links="p1-d1 p2-d2 p3-d1 p3-d2"), "m", FACTS)
    assert [giver.key for giver, _ in kept_by(found, keeping.key).pairs] == [keeping.key]
    assert kept_by(found, P1.key) is found, "it keeps nothing"
    assert kept_by(found, "somebody else") is found


def test_a_slow_instance_is_taken_only_when_nobody_is_ready() -> None:
    slow = candidate("d0", Role.DECODE, ready=False)
    assert set(places(view(P1, slow, D1, links="p1-d0 p1-d1"), 4)) == {("p1", "d1")}
    assert set(places(view(P1, slow, links="p1-d0"), 2)) == {("p1", "d0")}
    slow_giver = candidate("p0", Role.PREFILL, ready=False)
    assert set(places(view(slow_giver, P1, D1, links="p0-d1 p1-d1"), 4)) == {("p1", "d1")}


def test_a_mixed_instance_is_either() -> None:
    m1, m2 = candidate("m1", Role.MIX), candidate("m2", Role.MIX)
    assert set(places(view(m1, m2, links="m1-m2 m2-m1"), 4)) == {("m1", "m2"), ("m2", "m1")}


def test_default_instances_serve_when_there_is_no_pair() -> None:
    a, b = candidate("a", Role.DEFAULT), candidate("b", Role.DEFAULT)
    assert places(view(a, b, P1), 4) == [("a", ""), ("b", ""), ("a", ""), ("b", "")]
    assert options(view(a, P1, D1, links="p1-d1")).mode == "pd"


def test_a_lone_mix_instance_is_its_own_counterpart() -> None:
    mix = candidate("m1", Role.MIX, alive_s=0.0)
    assert routed(view(mix), "m", FACTS, (0, 0)).first.name == "m1"
    assert options(view(mix, candidate("m2", Role.MIX))).mode == "degraded"
    assert options(view(mix, candidate("m2", Role.MIX), links="m1-m2")).mode == "pd"
    assert options(view(mix, D1)).mode == ""  # their link is on its way


def test_a_lone_instance_serves_once_its_counterpart_has_stayed_away() -> None:
    young = candidate("p9", Role.PREFILL, alive_s=LONE_AFTER_S - 0.1)
    assert options(view(young)).mode == ""
    old = candidate("p9", Role.PREFILL, alive_s=LONE_AFTER_S)
    assert routed(view(old), "m", FACTS, (0, 0)).mode == "degraded"
    assert options(view(candidate("d9", Role.DECODE, alive_s=60.0))).mode == "degraded"
    assert options(view(old, D1)).mode == ""


def test_nothing_and_nothing_that_fits_are_told_apart() -> None:
    with pytest.raises(NoInstances) as caught:
        routed(view(P1), "m", FACTS, (0, 0))
    assert caught.value.retry_after_s
    with pytest.raises(NoCompatibleDecode):
        routed(view(P1, D1, refused=("block size",)), "m", FACTS, (0, 0))


def test_another_model_is_not_served_by_these() -> None:
    cluster = view(P1, D1, links="p1-d1")
    with pytest.raises(NoInstances):
        routed(cluster, "other", FACTS, (0, 0))
    assert routed(cluster, "", FACTS, (0, 0)).mode == "pd"


def test_a_request_that_only_the_larger_decode_holds_goes_there() -> None:
    small = candidate("d1", Role.DECODE, num_blocks=1, block_size=16)
    large = candidate("d2", Role.DECODE, num_blocks=2, block_size=16)
    cluster = view(P1, small, large, links="p1-d1 p1-d2")
    assert set(places(cluster, 4)) == {("p1", "d2")}
    fits_exactly = Facts(num_prompt=30, max_tokens=3)
    assert routed(cluster, "m", fits_exactly, (0, 0)).decode is large.card
    with pytest.raises(ContextLengthExceeded, match="32 tokens"):
        routed(cluster, "m", Facts(num_prompt=30, max_tokens=4), (0, 0))
    alone = candidate("a", Role.DEFAULT, num_blocks=1, block_size=16)
    with pytest.raises(ContextLengthExceeded, match="16 tokens"):
        routed(view(alone), "m", FACTS, (0, 0))


def test_several_choices_go_to_a_decode_instance_that_keeps_prompts() -> None:
    keeps = candidate("d2", Role.DECODE, enable_prefix_cache=True)
    cluster = view(P1, D1, keeps, D3, links="p1-d1 p1-d2 p1-d3")
    facts = Facts(num_prompt=10, max_tokens=10, best_of=2)
    for turn in range(4):
        route = routed(cluster, "m", facts, (turn, turn))
        assert route.decode is not None
        assert route.decode.name == "d2"


def test_several_choices_without_such_a_one_go_to_an_instance_that_does_everything() -> None:
    whole = candidate("x", Role.DEFAULT)
    facts = Facts(num_prompt=10, max_tokens=10, best_of=2)
    route = routed(view(P1, D1, whole, links="p1-d1"), "m", facts, (0, 0))
    assert (route.first.name, route.decode) == ("x", None)
    with pytest.raises(BestOfRequiresPrefixCache, match="--enable_prefix_cache=true"):
        routed(view(P1, D1, links="p1-d1"), "m", facts, (0, 0))
