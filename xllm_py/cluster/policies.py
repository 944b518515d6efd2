"""Which pair among those that may serve a request: the policies of --load_balance_policy beside round robin.

    LOAD       the shortest queue of tokens, the emptiest decode; from the better of two drawn ones where there are many
    CAR        the least predicted time: queue + what is not cached of the prompt + moving what D lacks + the pace of decoding
    SLO_AWARE  the best chance to keep both targets; when nobody can, though an idle instance could, the request is refused at once

Under CAR and SLO_AWARE a D that holds all of the prompt but a short tail serves it alone where that is cheaper, P is skipped. All instances are looked at; of pairs only
those of the best few on each side, because a pair's own part, the transfer, is the smallest. Sources: Mitzenmacher 2001, the power of two
choices; Qin et al. 2024, Mooncake, cache-aware scheduling. Pure; `draw(n)` gives a number below n.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from heapq import nsmallest
from itertools import islice
from typing import TypeVar

from xllm_py.base.errors import QueueTimeout
from xllm_py.cluster.costs import Costs
from xllm_py.cluster.routing import Candidate, Facts, Options, Route

T = TypeVar("T")

POLICIES = ("RR", "LOAD", "CAR", "SLO_AWARE")
MANY = 32  # candidates; beyond, LOAD looks at two
SHORT_TAIL = 64  # tokens that D computes itself rather than have them sent
_BEST = 6  # of each side, whose pairs are compared
_HORIZON = 64  # tokens of an answer whose pace counts
_FULL_S = 1.0  # what a D without room for the prompt costs
_HANDOFF_S = 0.02  # what a handoff costs beside the transfer
_BYTES_PER_S = 1e9  # of a pair that was not measured yet
_HOPELESS = 0.05  # chance below which a target is not met


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """What the policies know beside the cluster's view."""

    costs: Mapping[str, Costs]  # by incarnation
    # incarnation -> leading tokens of the prompt in its cache
    held: Mapping[str, int] = field(default_factory=dict)
    rates: Mapping[tuple[str, str], float] = field(default_factory=dict)  # linked pair -> bytes/s
    draw: Callable[[int], int] = lambda n: 0
    ttft_s: float = 1.0  # targets
    tpot_s: float = 0.05
    may_refuse: bool = True  # nothing was promised yet


def choose(policy: str, found: Options, facts: Facts, known: Known) -> Route:
    """The route of a request whose options are not empty. Raises QueueTimeout by SLO_AWARE."""
    if found.mode != "pd":
        return _alone(policy, found, facts, known)
    if policy == "LOAD":
        return _by_load(found, known)
    if policy == "SLO_AWARE":
        _refuse_hopeless([prefill for prefill, _ in found.pairs], facts, known)
    return _best_pair(policy, found, facts, known)


def _best_pair(policy: str, found: Options, facts: Facts, known: Known) -> Route:
    """Of the best few on each side; a giver whose best takers are not linked to it tries the next."""
    by_chance = policy == "SLO_AWARE"
    givers = _givers(found, facts, known, by_chance=by_chance)
    takers = _takers(found, facts, known, by_chance=by_chance)
    takers.sort()
    best: tuple[float, float, int, int] | None = None
    for no_chance, first_s, giver in nsmallest(_BEST, givers):
        prefill = found.pairs[giver][0]
        linked = found.linked[prefill.key]
        some = (each for each in takers if found.takers[each[2]].key in linked)
        for no_pace, pace_s, taker in islice(some, _BEST):
            cost = first_s + _move_s(prefill, found.takers[taker], facts, known) + pace_s
            hope = -round(no_chance * no_pace, 1)
            if best is None or (hope, cost) < best[:2]:
                best = (hope, cost, giver, taker)
    assert best is not None  # every giver has a linked taker
    alone = _holder(found, facts, known)
    if alone is not None and alone[0] <= best[1] + _HANDOFF_S:
        return _holder_route(policy, found.takers[alone[1]], facts, known)
    return _pair_route(policy, found.pairs[best[2]][0], found.takers[best[3]], facts, known)


# less chance, in tenths, so that what is nearly certain is judged by cost; seconds; place in the options
_Ranked = list[tuple[float, float, int]]


def _givers(found: Options, facts: Facts, known: Known, *, by_chance: bool) -> _Ranked:
    """All P. Every decision looks at each of them, so nothing is called that need not be."""
    costs, held, length = known.costs, known.held, facts.num_prompt
    ranked = [
        (
            0.0,
            (c := costs[key]).ahead_s + c.prompt_token_s * max(1, length - held.get(key, 0)),
            place,
        )
        for place, key in enumerate(found.giver_keys)
    ]
    if not by_chance:
        return ranked
    chances = [-round(_first_chance(prefill, facts, known), 1) for prefill, _ in found.pairs]
    return [(chance, *each[1:]) for chance, each in zip(chances, ranked, strict=True)]


def _takers(found: Options, facts: Facts, known: Known, *, by_chance: bool) -> _Ranked:
    """All D, as `_pace_s` has it."""
    costs, held, length = known.costs, known.held, facts.num_prompt
    horizon = min(facts.max_tokens, _HORIZON)
    ranked = [
        (
            0.0,
            (c := costs[key]).token_s * horizon
            + (_FULL_S if c.free_blocks * size < length - held.get(key, 0) else 0.0),
            place,
        )
        for place, (key, size) in enumerate(found.taker_keys)
    ]
    if not by_chance:
        return ranked
    chances = [-round(_pace_chance(taker, known), 1) for taker in found.takers]
    return [(chance, *each[1:]) for chance, each in zip(chances, ranked, strict=True)]


def _pair_route(
    policy: str, prefill: Candidate, decode: Candidate, facts: Facts, known: Known
) -> Route:
    first_s = _first_s(prefill, facts, known)
    held = known.held.get(prefill.key, 0)
    costs, token_s = known.costs[prefill.key], known.costs[decode.key].token_s
    return Route(
        mode="pd",
        first=prefill.card,
        decode=decode.card,
        why="prefix" if held else "queue",
        reason=(
            f"{policy}: first token in {1000 * first_s:.0f} ms ({held} of {facts.num_prompt} tokens cached, "
            f"{costs.tokens_ahead:.0f} ahead), KV moved in {1000 * _move_s(prefill, decode, facts, known):.0f} ms, "
            f"then {1000 * token_s:.1f} ms a token"
        ),
        ttft_s=first_s,
        tpot_s=token_s,
    )


def _first_chance(each: Candidate, facts: Facts, known: Known) -> float:
    """That its first token comes in time."""
    costs = known.costs[each.key]
    return costs.first_token.chance(costs.tokens_ahead + _left(each, facts, known), known.ttft_s)


def _pace_chance(each: Candidate, known: Known) -> float:
    """That its answers keep the pace."""
    costs = known.costs[each.key]
    return costs.token.chance(costs.rows + 1, known.tpot_s)


def _refuse_hopeless(givers: Sequence[Candidate], facts: Facts, known: Known) -> None:
    """Raise when every queue is too long for the target that an idle instance would keep."""
    if not known.may_refuse:
        return
    soonest = None
    for each in givers:
        costs, left = known.costs[each.key], _left(each, facts, known)
        if _first_chance(each, facts, known) >= _HOPELESS:
            return
        if costs.first_token.chance(left, known.ttft_s) >= 0.5:
            late_s = costs.first_token_s(left) - known.ttft_s
            soonest = late_s if soonest is None else min(soonest, late_s)
    if soonest is not None:
        raise QueueTimeout(
            f"no instance can begin to answer within {1000 * known.ttft_s:.0f} ms now",
            retry_after_s=max(1.0, soonest),
        )


def _holder(found: Options, facts: Facts, known: Known) -> tuple[float, int] | None:
    """Cost and place of the best D that lacks so little of the prompt that it computes that itself. Its queue counts like a P's: the D with
    a popular prompt is not the D for everybody who asks it.
    """
    enough = max(1, facts.num_prompt - SHORT_TAIL)
    costs = [
        (_first_s(each, facts, known) + _pace_s(each, facts, known), place)
        for place, each in enumerate(found.takers)
        if known.held.get(each.key, 0) >= enough
    ]
    return min(costs, default=None)


def _holder_route(policy: str, decode: Candidate, facts: Facts, known: Known) -> Route:
    held = known.held[decode.key]
    return Route(
        mode="pd",
        first=decode.card,
        why="held_by_decode",
        reason=f"{policy}: {decode.card.name} holds {held} of {facts.num_prompt} tokens, no prefill instance is needed",
        ttft_s=_first_s(decode, facts, known),
        tpot_s=known.costs[decode.key].token_s,
    )


def _left(each: Candidate, facts: Facts, known: Known) -> int:
    """Tokens of the prompt that it would have to compute."""
    return max(1, facts.num_prompt - known.held.get(each.key, 0))


def _first_s(each: Candidate, facts: Facts, known: Known) -> float:
    return known.costs[each.key].first_token_s(_left(each, facts, known))


def _pace_s(each: Candidate, facts: Facts, known: Known) -> float:
    """What decoding there costs, for as many tokens as count."""
    costs = known.costs[each.key]
    lacked = facts.num_prompt - known.held.get(each.key, 0)
    full = costs.free_blocks * (each.card.block_size or 1) < lacked
    return costs.token_s * min(facts.max_tokens, _HORIZON) + (_FULL_S if full else 0.0)


def _move_s(prefill: Candidate, decode: Candidate, facts: Facts, known: Known) -> float:
    """What D lacks, by the pair's measured rate."""
    lacked = max(0, facts.num_prompt - known.held.get(decode.key, 0))
    rate = known.rates.get((prefill.key, decode.key), _BYTES_PER_S)
    return lacked * prefill.card.kv_token_bytes / rate


def _alone(policy: str, found: Options, facts: Facts, known: Known) -> Route:
    """Instances that do everything."""
    if policy == "SLO_AWARE":
        _refuse_hopeless(found.alone, facts, known)

    def cost(each: Candidate) -> float:
        if policy == "LOAD":
            return _queue(each, known) + _fullness(each, known)
        return _first_s(each, facts, known) + _pace_s(each, facts, known)

    chosen = _least(found.alone, cost, policy, known)
    held = known.held.get(chosen.key, 0)
    costs = known.costs[chosen.key]
    return Route(
        mode=found.mode,
        first=chosen.card,
        why="prefix" if held and policy != "LOAD" else "queue",
        reason=f"{policy}: {chosen.card.name} has {held} of {facts.num_prompt} tokens, {costs.tokens_ahead:.0f} ahead",
        ttft_s=_first_s(chosen, facts, known),
        tpot_s=costs.token_s,
    )


def _by_load(found: Options, known: Known) -> Route:
    prefill, decodes = _least(found.pairs, lambda pair: _queue(pair[0], known), "LOAD", known)
    decode = _least(decodes, lambda each: _fullness(each, known), "LOAD", known)
    costs = known.costs[prefill.key], known.costs[decode.key]
    return Route(
        mode="pd",
        first=prefill.card,
        decode=decode.card,
        why="queue",
        reason=(
            f"LOAD: {costs[0].tokens_ahead:.0f} tokens ahead at {prefill.card.name}, "
            f"{costs[1].rows} requests and {100 * costs[1].kv_usage:.0f} % of KV at {decode.card.name}"
        ),
    )


def _queue(each: Candidate, known: Known) -> float:
    return known.costs[each.key].tokens_ahead


def _fullness(each: Candidate, known: Known) -> float:
    costs = known.costs[each.key]
    return max(costs.rows / max(1, each.card.max_seqs), costs.kv_usage) + 1e-6 * costs.rows


def _least(each_of: Sequence[T], cost: Callable[[T], float], policy: str, known: Known) -> T:
    """The cheapest, the first of equals; by LOAD of two drawn ones where there are many."""
    if policy == "LOAD" and len(each_of) > MANY:
        one, other = known.draw(len(each_of)), known.draw(len(each_of) - 1)
        other += other >= one
        each_of = each_of[min(one, other)], each_of[max(one, other)]
    return min(each_of, key=cost)
