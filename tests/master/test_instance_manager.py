"""The master's own absence: who was stopped or starved for a while heard nobody, and blames nobody for it."""

from __future__ import annotations

import pytest

from tests.master.support import KEY
from xllm_py.base.clock import HandClock
from xllm_py.base.metrics import Metrics
from xllm_py.cluster import keys
from xllm_py.cluster.instance_info import Card, Role, card_key, card_to_json
from xllm_py.cluster.membership import Patience
from xllm_py.master.instance_manager import TICK_S, InstanceManager
from xllm_py.registry.base import Entry
from xllm_py.wire.control_messages import Heartbeat

CARD = Card(name="h:1", rpc_address="h:2", type=Role.DEFAULT.value, incarnation_id="life")


class Watch:
    """A manager on a clock that the test turns, and one instance that is ready."""

    def __init__(self) -> None:
        self.clock = HandClock()
        self.lost: list[str] = []
        self.manager = InstanceManager(
            cluster_key=KEY,
            clock=self.clock,
            metrics=Metrics(),
            patience=Patience(suspect_after_s=0.5, gone_after_s=1.0),
            forget_gone_after_s=15.0,
        )
        self.manager.on_lost.append(lambda card, reason, died: self.lost.append(card.name))
        self.put_card()
        self.beat(0)
        self.manager.tick()

    def put_card(self) -> None:
        key, raw = keys.instance(Role.DEFAULT, CARD.name), card_to_json(CARD, card_key(KEY))
        self.manager.on_entries([Entry(key=key, value=raw, revision=1)])

    def beat(self, sequence: int) -> None:
        self.manager.on_heartbeat(
            Heartbeat(
                name=CARD.name,
                incarnation="life",
                sequence=sequence,
                state="READY",
                role=Role.DEFAULT,
            )
        )

    def live(self, seconds: float) -> None:
        """Time passes and the manager looks, as it does while it runs."""
        for _ in range(round(seconds / TICK_S)):
            self.clock.turn(TICK_S)
            self.manager.tick()

    @property
    def state(self) -> str:
        member = self.manager.member("life")
        return member.view.state.value if member is not None else ""


@pytest.fixture
def watch() -> Watch:
    made = Watch()
    assert made.state == "READY"
    return made


def test_an_instance_that_falls_silent_is_lost(watch: Watch) -> None:
    watch.live(0.9)
    assert watch.lost == []
    watch.live(0.2)
    assert (watch.state, watch.lost) == ("GONE", ["h:1"])


@pytest.mark.parametrize("first", ["tick", "card", "heartbeat"])
def test_after_an_absence_nobody_is_lost_whatever_is_seen_first(watch: Watch, first: str) -> None:
    watch.clock.turn(3.0)
    {"tick": watch.manager.tick, "card": watch.put_card, "heartbeat": lambda: watch.beat(1)}[
        first
    ]()
    assert (watch.state, watch.lost) == ("READY", [])
    watch.live(0.4)
    watch.beat(2)
    watch.live(0.4)
    assert watch.state == "READY"


def test_who_stays_silent_after_an_absence_is_lost_all_the_same(watch: Watch) -> None:
    watch.clock.turn(3.0)
    watch.live(1.1)
    assert (watch.state, watch.lost) == ("GONE", ["h:1"])


@pytest.mark.parametrize("away_s, lost", [(0.3, ["h:1"]), (3.0, [])])
def test_only_a_long_absence_explains_a_connection_that_ends(
    watch: Watch, away_s: float, lost: list[str]
) -> None:
    watch.manager.on_stream_opened("life")
    watch.clock.turn(away_s)
    watch.manager.tick()
    watch.manager.on_stream_ended("life")
    watch.live(0.1)
    assert watch.lost == lost
    watch.manager.on_stream_opened("life")
    watch.beat(1)
    watch.live(0.1)
    assert watch.lost == lost
