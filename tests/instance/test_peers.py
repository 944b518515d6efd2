"""P's calls to decode instances: what a dead one is answered with, and that its next life is reached at once."""

from __future__ import annotations

import dataclasses
from typing import Any

from tests.instance.support import submission, until
from xllm_py.base.tasks import TaskFamily
from xllm_py.control.server import InstanceHandlers, serve_instance
from xllm_py.core.request import Offer, OfferAnswer, Receiver
from xllm_py.instance.peers import Peers, identified

KEY = b"k" * 32


class Engine:
    """Hears what the peers said."""

    def __init__(self) -> None:
        self.answers: list[OfferAnswer] = []

    def answer_offers(self, answers: list[OfferAnswer]) -> None:
        self.answers += answers


class Taker(InstanceHandlers):
    """A decode instance that grants everything."""

    async def add_new_requests(self, offers: list[Offer]) -> list[OfferAnswer]:
        return [
            OfferAnswer(
                request_id=o.submission.request_id,
                attempt=1,
                grant=b"g" * 16,
                endpoints=("127.0.0.1:1",),
            )
            for o in offers
        ]


def offer(name: str, address: str, incarnation: str) -> Offer:
    receiver = Receiver(name="d", address=address, incarnation=incarnation)
    order = dataclasses.replace(submission(name), attempt=1, receiver=receiver)
    names = dict.fromkeys(("giver_name", "giver_address", "giver_incarnation"), "")
    return Offer(
        submission=order, model_fingerprint="m", layout_fingerprint="l", block_size=4, **names
    )


async def serve(port: int, incarnation: str) -> Any:
    return await serve_instance(
        Taker(),
        host="127.0.0.1",
        port=port,
        may_move=False,
        cluster_key=KEY,
        incarnation=incarnation,
    )


async def test_the_next_life_of_a_dead_receiver_is_reached_at_once() -> None:
    engine, tasks = Engine(), TaskFamily("test")
    peers = Peers(
        engine=lambda: engine,  # type: ignore[arg-type, return-value]
        card_json=lambda: b"",
        identify=lambda each: identified(each, name="p", address="", incarnation="P"),
        cluster_key=KEY,
        incarnation="P",
        timeout_s=5.0,
        tls=None,
        tasks=tasks,
    )

    async def asked(name: str, incarnation: str) -> OfferAnswer:
        before = len(engine.answers)
        peers.on_offers([offer(name, address, incarnation)])
        await until("an answer", lambda: len(engine.answers) > before)
        return engine.answers[-1]

    first = await serve(0, "A")
    address = first.address
    assert (await asked("r1", "A")).grant
    await first.close()
    assert (await asked("r2", "A")).refusal == "unreachable"  # from now on the channel waits
    second = await serve(first.port, "B")
    assert (await asked("r3", "B")).grant
    await peers.close()
    await second.close()
    await tasks.close()
