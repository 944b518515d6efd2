"""Deaths at the moments between which a handoff changes hands, and a request that kills whoever works on it. More by tests/faults/points."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.faults.points import House, house, kill_at, query_of_death

SOME = (
    "p.prefill.chunk.2",
    "p.kv.post_commit",
    "d.grant.post",
    "d.kv.post_commit",
    "d.first_generation.post",
    "d.delta.post_send",
    "m.delta.post_accept.3",
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    with house(tmp_path_factory.mktemp("points")) as found:
        yield found


@pytest.mark.parametrize("point", SOME)
def test_a_death_at_this_moment_changes_no_text(made: House, point: str) -> None:
    kill_at(made, point)


def test_a_request_that_kills_is_given_up_and_the_others_are_answered(made: House) -> None:
    query_of_death(made)
