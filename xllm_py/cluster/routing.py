"""Which instances serve a request: a function of a frozen view of the cluster and the facts of the request.

    pd        a linked pair: P prefills, D decodes
    default   one instance that does both
    degraded  a lone P or D serves whole requests, because its counterpart is not there at all; so do MIX instances of which
              no two are linked yet

Who may do either does what its duty says (cluster/duties), unless nobody is linked who would.

The router (master/router.py) holds the counters and gives the view; ties break by name. A lone instance waits a while for
its counterpart before it serves alone, so that a starting cluster is not taken for a broken one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from xllm_py.base.errors import (
    BestOfRequiresPrefixCache,
    ContextLengthExceeded,
    NoCompatibleDecode,
    NoInstances,
    RequestError,
)
from xllm_py.cluster.duties import Duty, Half, abilities, halves, movable
from xllm_py.cluster.instance_info import Card, Role

LONE_AFTER_S = 10.0
RETRY_AFTER_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """An instance that may get work."""

    card: Card
    ready: bool  # False: only slow, taken when nobody is ready
    alive_s: float  # since it first became ready
    duty: Duty | None = None

    @property
    def key(self) -> str:
        """The incarnation."""
        return self.card.incarnation_id


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterView:
    """All candidates by name, the pairs (P, D) that are linked by incarnation, and why others are not."""

    candidates: tuple[Candidate, ...] = ()
    linked: frozenset[tuple[str, str]] = frozenset()
    refused: tuple[str, ...] = ()  # sentences


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What routing knows of a request."""

    num_prompt: int
    max_tokens: int
    best_of: int = 1  # above 1, a decode instance must keep the prompt for all choices


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """Where a request goes; decode None: the first instance does everything."""

    mode: str  # pd, default or degraded
    first: Card
    decode: Card | None = None
    reason: str = ""
    why: str = "turn"  # in a word, for metrics
    num_to_compute: int = (
        0  # tokens of the prompt that the first instance lacks, as far as is known
    )
    ttft_s: float = 0.0  # as predicted; 0: nothing was
    tpot_s: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Options:
    """What could serve now, best mode only. pairs: for each P its linked Ds. What is found by looking at all pairs is kept."""

    mode: str = ""  # empty: nothing can
    pairs: tuple[tuple[Candidate, tuple[Candidate, ...]], ...] = ()
    alone: tuple[Candidate, ...] = ()

    @cached_property
    def giver_keys(self) -> tuple[str, ...]:
        """Of every P."""
        return tuple(giver.key for giver, _ in self.pairs)

    @cached_property
    def takers(self) -> tuple[Candidate, ...]:
        """Every D, once."""
        return tuple({each.key: each for _, decodes in self.pairs for each in decodes}.values())

    @cached_property
    def taker_keys(self) -> tuple[tuple[str, int], ...]:
        """Of every D, with the tokens of a block of it."""
        return tuple((each.key, each.card.block_size or 1) for each in self.takers)

    @cached_property
    def linked(self) -> dict[str, frozenset[str]]:
        """For each P the incarnations of its Ds."""
        return {giver.key: frozenset(each.key for each in takers) for giver, takers in self.pairs}

    @cached_property
    def cards(self) -> tuple[Card, ...]:
        """Every instance of it, once."""
        everyone = (*self.alone, *(giver for giver, _ in self.pairs), *self.takers)
        return tuple({each.key: each.card for each in everyone}.values())

    @cached_property
    def kinds(self) -> frozenset[tuple[str, int]]:
        """Model fingerprints and block sizes: what block hashes depend on."""
        return frozenset((card.model_fingerprint, card.block_size) for card in self.cards)

    @cached_property
    def all_keep_prompts(self) -> bool:
        """Whether every D has a prefix cache, which several choices of one prompt need."""
        return all(each.card.enable_prefix_cache for each in self.takers)

    @cached_property
    def same_names(self) -> bool:
        """Whether all serve the same models."""
        return len({card.served_names for card in self.cards}) == 1

    @cached_property
    def least_tokens(self) -> float:
        """What the smallest cache of those that decode holds."""
        sizes = [each.card.num_blocks * each.card.block_size for each in self.takers or self.alone]
        return min((size for size in sizes if size), default=float("inf"))

    def suits(self, model: str, facts: Facts) -> bool:
        """Whether any of it will do, without a look at each."""
        served = self.same_names and (not model or model in self.cards[0].served_names)
        kept = facts.best_of == 1 or self.all_keep_prompts
        return served and kept and facts.num_prompt + facts.max_tokens <= self.least_tokens


def options(view: ClusterView) -> Options:
    """The best mode the cluster can serve in. A slow instance counts only where none is ready."""
    everyone = sorted(view.candidates, key=lambda candidate: candidate.card.name)
    pairs = _pairs(
        tuple(each for each in everyone if Half.PREFILL in halves(each.card, each.duty)),
        tuple(each for each in everyone if Half.DECODE in halves(each.card, each.duty)),
        view,
    )
    prefills = tuple(each for each in everyone if Half.PREFILL in abilities(each.card))
    decodes = tuple(each for each in everyone if Half.DECODE in abilities(each.card))
    pairs = pairs or _pairs(prefills, decodes, view)
    if pairs:
        return Options(mode="pd", pairs=_ready_pairs(pairs))
    alone = _of(everyone, Role.DEFAULT)
    if alone:
        return Options(mode="default", alone=_ready_first(alone))
    lone = _lone(prefills, decodes)
    return Options(mode="degraded", alone=_ready_first(lone)) if lone else Options()


def _pairs(
    prefills: Sequence[Candidate], decodes: Sequence[Candidate], view: ClusterView
) -> tuple[tuple[Candidate, tuple[Candidate, ...]], ...]:
    """For each P its linked Ds, of those that have any."""
    return tuple(
        (prefill, linked) for prefill in prefills if (linked := _linked(prefill, decodes, view))
    )


def _lone(prefills: tuple[Candidate, ...], decodes: tuple[Candidate, ...]) -> tuple[Candidate, ...]:
    """Those without a counterpart for a while now. MIX instances that are among themselves need none and do not wait."""
    if not prefills or not decodes:
        return tuple(each for each in prefills or decodes if each.alive_s >= LONE_AFTER_S)
    mixed = all(movable(each.card) for each in (*prefills, *decodes))
    return prefills if mixed else ()


def _of(everyone: Sequence[Candidate], *roles: Role) -> tuple[Candidate, ...]:
    return tuple(candidate for candidate in everyone if candidate.card.role in roles)


def _linked(
    prefill: Candidate, decodes: Sequence[Candidate], view: ClusterView
) -> tuple[Candidate, ...]:
    return _ready_first(
        tuple(decode for decode in decodes if (prefill.key, decode.key) in view.linked)
    )


def _ready_first(candidates: tuple[Candidate, ...]) -> tuple[Candidate, ...]:
    """The ready ones, or all when none is."""
    return tuple(candidate for candidate in candidates if candidate.ready) or candidates


def _ready_pairs(
    pairs: tuple[tuple[Candidate, tuple[Candidate, ...]], ...],
) -> tuple[tuple[Candidate, tuple[Candidate, ...]], ...]:
    whole = tuple(pair for pair in pairs if pair[0].ready and pair[1][0].ready)
    return whole or pairs


def round_robin(found: Options, turns: tuple[int, int], num_prompt: int) -> Route:
    """The next P and the next D in turn, of options that are not empty. turns: how many requests were placed so far, for P and for D.

    num_prompt: tokens that the first instance computes.
    """
    if found.mode != "pd":
        first = found.alone[turns[0] % len(found.alone)]
        reason = f"{found.mode}: instance {turns[0] % len(found.alone) + 1} of {len(found.alone)} in turn"
        return Route(mode=found.mode, first=first.card, reason=reason, num_to_compute=num_prompt)
    prefill, decodes = found.pairs[turns[0] % len(found.pairs)]
    decode = decodes[turns[1] % len(decodes)]
    reason = (
        f"pd: prefill {turns[0] % len(found.pairs) + 1} of {len(found.pairs)}, "
        f"decode {turns[1] % len(decodes) + 1} of {len(decodes)} in turn"
    )
    return Route(
        mode="pd",
        first=prefill.card,
        decode=decode.card,
        reason=reason,
        num_to_compute=num_prompt,
    )


def able(view: ClusterView, model: str, facts: Facts) -> Options:
    """What could serve this request; never empty. model "": any.

    Raises NoInstances, NoCompatibleDecode, ContextLengthExceeded when no D could ever hold the request, or
    BestOfRequiresPrefixCache when it has several choices and no D keeps prompts.
    """
    view = of_model(view, model)
    found = options(view)
    if not found.mode:
        raise _nothing(view)
    if facts.best_of > 1 and found.mode == "pd":
        found = _keeping_prompts(found, view)
    if found.mode != "pd":
        alone = tuple(each for each in found.alone if _holds(each.card, facts))
        if not alone:
            raise _too_long(tuple(each.card for each in found.alone), facts)
        return Options(mode=found.mode, alone=alone)
    pairs = tuple(
        (prefill, holding)
        for prefill, decodes in found.pairs
        if (holding := tuple(each for each in decodes if _holds(each.card, facts)))
    )
    if not pairs:
        raise _too_long(tuple(each.card for _, ds in found.pairs for each in ds), facts)
    return Options(mode="pd", pairs=pairs)


def _keeping_prompts(found: Options, view: ClusterView) -> Options:
    """Only pairs whose D has a prefix cache; without any, the instances that do everything themselves (SPEC 6.8)."""
    pairs = tuple(
        (prefill, able)
        for prefill, decodes in found.pairs
        if (able := tuple(each for each in decodes if each.card.enable_prefix_cache))
    )
    if pairs:
        return Options(mode="pd", pairs=pairs)
    everyone = sorted(view.candidates, key=lambda candidate: candidate.card.name)
    alone = _of(everyone, Role.DEFAULT)
    if not alone:
        raise BestOfRequiresPrefixCache(
            "n or best_of above 1 needs a decode instance with a prefix cache and none has one; "
            "start it with --enable_prefix_cache=true, or ask for one choice",
            param="best_of",
        )
    return Options(mode="default", alone=_ready_first(alone))


def narrowed(view: ClusterView, passed_over: frozenset[str], numerics: str) -> ClusterView:
    """Without some incarnations, and without those whose numerics fingerprint is another one, when one is given."""
    if not passed_over and not numerics:
        return view
    kept = tuple(
        each
        for each in view.candidates
        if each.key not in passed_over
        and (not numerics or each.card.numerics_fingerprint == numerics)
    )
    return ClusterView(candidates=kept, linked=view.linked, refused=view.refused)


def kept_by(found: Options, giver: str) -> Options:
    """Only pairs of this P, whose prefix cache still has what it computed; all of them when it is not among those that may give."""
    pairs = tuple(pair for pair in found.pairs if pair[0].key == giver)
    if not pairs or not pairs[0][0].card.enable_prefix_cache:
        return found
    return Options(mode=found.mode, pairs=pairs)


def of_model(view: ClusterView, model: str) -> ClusterView:
    """The part of the cluster that serves a model."""
    if not model:
        return view
    kept = tuple(each for each in view.candidates if model in each.card.served_names)
    return ClusterView(candidates=kept, linked=view.linked, refused=view.refused)


def _holds(card: Card, facts: Facts) -> bool:
    """Whether this instance's cache could hold prompt and answer when it is empty (the last token is never computed)."""
    if not card.num_blocks:
        return True
    length = facts.num_prompt + facts.max_tokens
    if card.max_model_len:
        length = min(length, card.max_model_len)
    return length - 1 <= card.num_blocks * card.block_size


def _too_long(cards: Sequence[Card], facts: Facts) -> RequestError:
    most = max(card.num_blocks * card.block_size for card in cards)
    return ContextLengthExceeded(
        f"{facts.num_prompt} prompt tokens and max_tokens={facts.max_tokens} need more KV cache "
        f"than any decode instance has ({most} tokens). Lower max_tokens or shorten the prompt"
    )


def _nothing(view: ClusterView) -> RequestError:
    if view.refused:
        return NoCompatibleDecode(
            "no decode instance fits the prefill instances; /ready says what differs",
            retry_after_s=RETRY_AFTER_S,
        )
    return NoInstances(
        "no instance can serve a request now; try again soon", retry_after_s=RETRY_AFTER_S
    )
