"""Ranks of another number on the two sides, and blocks of another size: every head of every token arrives at its place."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from xllm_py.core.kv_memory import in_pieces
from xllm_py.core.kv_plan import MAX_RANKS, Share, can_share, head_routes, heads_of

TOKENS, HEAD_DIM = 150, 2
SIZES = (16, 32, 128)
RANKS = (1, 2, 4)
HEADS = (1, 2, 4, 8)


def cache(heads: range, block_size: int, blocks: tuple[int, ...]) -> np.ndarray:
    """One rank's cache [block, token, head, dim] of `TOKENS` tokens whose values say where they belong; elsewhere -1."""
    made = np.full((12, block_size, len(heads), HEAD_DIM), -1, np.int64)
    for token in range(TOKENS):
        for index, head in enumerate(heads):
            place = made[blocks[token // block_size], token % block_size, index]
            place[:] = [token * 100 + head * 10 + dim for dim in range(HEAD_DIM)]
    return made


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize(("p_size", "d_size"), list(itertools.product(SIZES, SIZES)))
@pytest.mark.parametrize(("p_ranks", "d_ranks"), list(itertools.product(RANKS, RANKS)))
def test_every_head_of_every_token_arrives(
    heads: int, p_size: int, d_size: int, p_ranks: int, d_ranks: int
) -> None:
    p_blocks, d_blocks = (4, 0, 9, 2, 7, 1, 3, 5, 6, 8), (9, 3, 0, 1, 8, 2, 5, 4, 7, 6)
    given = [cache(heads_of(rank, p_ranks, heads), p_size, p_blocks) for rank in range(p_ranks)]
    owned = [heads_of(rank, d_ranks, heads) for rank in range(d_ranks)]
    taken = [np.full((12, d_size, len(mine), HEAD_DIM), -1, np.int64) for mine in owned]
    size = min(p_size, d_size)
    count = -(-TOKENS // size)
    sources = in_pieces(p_blocks, p_size // size)[:count]
    targets = in_pieces(d_blocks, d_size // size)[:count]
    for route in head_routes(p_ranks, d_ranks, heads):
        source = given[route.giver_rank].reshape(
            -1, size, given[route.giver_rank].shape[2], HEAD_DIM
        )
        target = taken[route.taker_rank].reshape(-1, size, len(owned[route.taker_rank]), HEAD_DIM)
        piece = source[list(sources), :, route.source : route.source + route.count]
        place = target[list(targets), :, route.target : route.target + route.count]
        assert (place == -1).all(), "every head of D comes once"
        target[list(targets), :, route.target : route.target + route.count] = piece
    for mine, found in zip(owned, taken, strict=True):
        assert np.array_equal(found, cache(mine, d_size, d_blocks))


def test_replicas_of_a_head_share_the_work() -> None:
    routes = head_routes(4, 4, 2)
    assert [(route.giver_rank, route.taker_rank) for route in routes] == [
        (0, 0),
        (1, 1),
        (2, 2),
        (3, 3),
    ]


@pytest.mark.parametrize(("ranks", "heads"), [(3, 4), (4, 6), (0, 2)])
def test_heads_that_cannot_be_shared_out_are_refused(ranks: int, heads: int) -> None:
    with pytest.raises(ValueError, match="cannot be shared out"):
        head_routes(ranks, 1, heads)


@pytest.mark.parametrize(
    ("p_ranks", "d_ranks"), list(itertools.product((1, 2, 4, 8, 16), repeat=2))
)
@pytest.mark.parametrize("heads", HEADS)
def test_both_ends_of_a_route_find_it(heads: int, p_ranks: int, d_ranks: int) -> None:
    """And ranks that exchange nothing find none."""
    routes = {
        (each.giver_rank, each.taker_rank): each for each in head_routes(p_ranks, d_ranks, heads)
    }
    for given, taken in itertools.product(range(p_ranks), range(d_ranks)):
        giver = Share(rank=given, num_ranks=p_ranks, num_heads=heads)
        taker = Share(rank=taken, num_ranks=d_ranks, num_heads=heads)
        found = giver.route_to(taken, d_ranks)
        assert found == taker.route_from(given, p_ranks) == routes.get((given, taken))


@pytest.mark.parametrize(
    ("rank", "num_ranks"), [(0, 0), (2, 2), (-1, 2), (0, 3), (0, MAX_RANKS + 1), (0, 65_535)]
)
def test_a_peer_that_says_what_cannot_be_exchanges_nothing(rank: int, num_ranks: int) -> None:
    share = Share(rank=0, num_ranks=1, num_heads=4)
    assert share.route_to(rank, num_ranks) is None
    assert share.route_from(rank, num_ranks) is None
    assert can_share(share, num_ranks) == (num_ranks == 2)
