"""A little of the long runs of tests/wire/campaign."""

from __future__ import annotations

from tests.wire import campaign


def test_every_flipped_bit_of_a_handoff_is_seen_and_mended() -> None:
    assert campaign.flips(campaign.places(), seed=1)["unseen"] == 0


def test_a_peer_that_says_anything_stays_inside_its_grants() -> None:
    assert campaign.frames(20_000, seed=2)["blocks_written"] > 0


def test_over_sockets_too() -> None:
    assert campaign.socket_frames(3_000, seed=3)["links"] > 10
