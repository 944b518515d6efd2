"""Which heads of which rank of P go to which rank of D when the two have another number of ranks.

Rank r of n owns a contiguous share of the model's KV heads, or, when there are more ranks than heads, the one head that it has
together with others (as Megatron-LM shards grouped-query attention: Shoeybi et al. 2019, Ainslie et al. 2023). Every head that a
rank of D owns comes from exactly one rank of P. Blocks of other sizes are core/kv_memory's; the two are independent, since a
token's heads lie one after the other.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadRoute:
    """`count` heads from one rank to another; `source` and `target` are the first one's index among the heads of its rank."""

    giver_rank: int
    taker_rank: int
    source: int
    target: int
    count: int


def heads_of(rank: int, num_ranks: int, num_heads: int) -> range:
    """The KV heads that a rank owns. Raises ValueError when they cannot be shared out evenly."""
    if num_heads % num_ranks and num_ranks % num_heads:
        raise ValueError(f"{num_heads} KV heads cannot be shared out among {num_ranks} ranks")
    if num_ranks >= num_heads:
        head = rank * num_heads // num_ranks
        return range(head, head + 1)
    share = num_heads // num_ranks
    return range(rank * share, (rank + 1) * share)


MAX_RANKS = 1024  # a peer may say what it likes


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """Which rank a process is, of how many, and how many KV heads the model has in all."""

    rank: int = 0
    num_ranks: int = 1
    num_heads: int = 1

    def route_to(self, rank: int, num_ranks: int) -> HeadRoute | None:
        """What this rank of P gives to a rank of D; None when that gets nothing from it."""
        routes = routes_to(rank, num_ranks, self.num_ranks, self.num_heads)
        return next((route for route in routes if route.giver_rank == self.rank), None)

    def route_from(self, rank: int, num_ranks: int) -> HeadRoute | None:
        """What this rank of D gets from a rank of P; likewise."""
        routes = routes_to(self.rank, self.num_ranks, num_ranks, self.num_heads)
        return next((route for route in routes if route.giver_rank == rank), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """What handing over has to know of an instance's ranks: whose share the one that plans has, and where each is reached by peers."""

    share: Share = field(default_factory=Share)
    endpoints: tuple[str, ...] = ()  # none: where the transport listens


def can_share(share: Share, num_ranks: int) -> bool:
    """Whether every rank of a peer that has so many can exchange heads with our ranks."""
    return bool(routes_to(0, share.num_ranks, num_ranks, share.num_heads))


def head_routes(num_giver_ranks: int, num_taker_ranks: int, num_heads: int) -> list[HeadRoute]:
    """Every route, by rank of D. Where several ranks of P have a head, ranks of D are spread over them. Raises ValueError."""
    if num_giver_ranks < 1 or num_taker_ranks < 1:
        raise ValueError("KV heads cannot be shared out among no ranks")
    return [
        route
        for taker_rank in range(num_taker_ranks)
        for route in _routes(taker_rank, num_taker_ranks, num_giver_ranks, num_heads)
    ]


def routes_to(
    taker_rank: int, num_taker_ranks: int, num_giver_ranks: int, num_heads: int
) -> list[HeadRoute]:
    """Those to one rank of D; none where ranks are not such as can share."""
    counts = (num_taker_ranks, num_giver_ranks)
    if not (0 <= taker_rank < num_taker_ranks and 1 <= min(counts) <= max(counts) <= MAX_RANKS):
        return []
    try:
        return _routes(taker_rank, num_taker_ranks, num_giver_ranks, num_heads)
    except ValueError:
        return []


def _owners(head: int, num_ranks: int, num_heads: int) -> range:
    """The ranks that have this head."""
    if num_ranks >= num_heads:
        copies = num_ranks // num_heads
        return range(head * copies, (head + 1) * copies)
    rank = head // (num_heads // num_ranks)
    return range(rank, rank + 1)


def _routes(
    taker_rank: int, num_taker_ranks: int, num_giver_ranks: int, num_heads: int
) -> list[HeadRoute]:
    wanted = heads_of(taker_rank, num_taker_ranks, num_heads)
    routes, head = [], wanted.start
    while head < wanted.stop:
        able = _owners(head, num_giver_ranks, num_heads)
        rank = able[taker_rank % len(able)]
        owned = heads_of(rank, num_giver_ranks, num_heads)
        count = min(owned.stop, wanted.stop) - head
        routes.append(
            HeadRoute(
                giver_rank=rank,
                taker_rank=taker_rank,
                source=head - owned.start,
                target=head - wanted.start,
                count=count,
            )
        )
        head += count
    return routes
