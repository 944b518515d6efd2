"""Moments of three clocks on one: in order, and no earlier than what they follow from."""

from __future__ import annotations

import pytest

from xllm_py.cluster.instance_info import Card, Role
from xllm_py.cluster.routing import Route
from xllm_py.core.journey import Moment
from xllm_py.master.journeys import Record


def card(name: str, role: Role) -> Card:
    return Card(name=name, rpc_address=name, type=role.value, incarnation_id=f"life-{name}")


def record() -> Record:
    route = Route(mode="pd", first=card("p", Role.PREFILL), decode=card("d", Role.DECODE))
    return Record(request_id="r", received_at=100.0, submitted_at=100.1, route=route)


def moments(told: Record) -> dict[str, float]:
    found = told.row()["moments"]
    assert isinstance(found, dict)
    return found


def test_p_is_laid_on_the_submission_and_d_between_offer_and_answer() -> None:
    told = record()
    told.lay("life-p", {"admitted": 0.1, "offered": 0.1, "granted": 0.3, "first_token": 0.5})
    told.lay("life-d", {"landed": 0.4, "decoding": 0.45})
    assert moments(told) == pytest.approx(
        {
            "admitted": 0.2,
            "offered": 0.2,
            "granted": 0.4,
            "first_token": 0.6,
            "landed": 0.7,
            "decoding": 0.75,
        }
    )


def test_nothing_lands_before_its_first_token_and_what_follows_keeps_its_order() -> None:
    told = record()
    told.lay("life-p", {"offered": 0.1, "first_token": 0.5})
    told.lay("life-d", {"landed": 0.1, "decoding": 0.2})
    told.stamp(Moment.FINISHED, 100.65)
    found = moments(told)
    assert found["landed"] == found["decoding"] == pytest.approx(0.6)
    assert found["finished"] == pytest.approx(0.65)


def test_the_first_word_on_a_moment_counts() -> None:
    told = record()
    told.lay("life-p", {"offered": 0.1, "granted": 0.1})
    told.lay("life-d", {"landed": 0.4})
    told.lay("life-d", {"landed": 9.0})
    assert moments(told)["landed"] == pytest.approx(0.6)
