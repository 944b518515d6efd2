"""Instances come, are linked, fall silent, return: what the master believes and does."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from tests.master.support import FakeInstance, RunningMaster, running_master, submission, until
from xllm_py.base.errors import LayoutMismatch, PeerUnavailable, RequestNotFound
from xllm_py.cluster import keys
from xllm_py.cluster.instance_info import Role, card_key, card_to_json
from xllm_py.control.client import MasterClient
from xllm_py.wire.control_messages import LinkHealth


async def test_a_pair_is_linked_with_the_givers_signed_card() -> None:
    async with running_master() as master:
        prefill, decode = await master.pair()
        assert decode.linked == [card_to_json(prefill.card, card_key(b"k" * 32))]
        assert prefill.linked == []
        ready = master.parts.backend.ready()
        assert (ready.ready, ready.mode) == (True, "pd")


async def test_an_instance_without_heartbeats_is_never_ready() -> None:
    async with running_master() as master:
        silent = await master.add("p", Role.PREFILL, beating=False)
        await master.add("d", Role.DECODE)
        assert master.state(silent) == "JOINING"
        ready = master.parts.backend.ready()
        assert ready.reasons == ("no_instances",)
        assert "PREFILL p is JOINING" in ready.details


async def test_a_refused_pair_says_why_and_is_linked_when_it_fits() -> None:
    async with running_master() as master:
        decode = await master.add("d", Role.DECODE)
        decode.link_error = LayoutMismatch("block_size: 16 there, 32 here")
        await master.add("p", Role.PREFILL)
        ready = await until("the refusal", _refusal(master))
        assert not ready.ready
        assert ready.reasons == ("no_compatible_decode",)
        assert "block_size: 16 there, 32 here" in ready.details[0]
        (row,) = [r for r in (await rows(master)) if r["name"] == "d"]
        assert row["links"] == [
            {"peer": "p", "state": "differs", "reason": "block_size: 16 there, 32 here"}
        ]
        decode.link_error = None
        await master.mode("pd")


async def test_a_pair_that_may_not_be_exact_serves_and_says_so() -> None:
    async with running_master() as master:
        await master.add("d", Role.DECODE, numerics_fingerprint="one")
        await master.add("p", Role.PREFILL, numerics_fingerprint="other")
        await master.mode("pd")
        (row,) = [r for r in (await rows(master)) if r["name"] == "d"]
        (link,) = row["links"]
        assert link["state"] == "linked"
        assert "numerics fingerprints differ" in link["reason"]


async def test_a_pair_serves_once_kv_has_got_through() -> None:
    async with running_master() as master:
        await master.add("d", Role.DECODE)
        prefill = await master.add("p", Role.PREFILL)
        prefill.health = LinkHealth(works=False, reason="no KV link can be made")
        await until("the reason", lambda: "no KV link" in str(master.parts.links.unlinked()))
        (row,) = [r for r in (await rows(master)) if r["name"] == "p"]
        assert row["links"] == [
            {"peer": "d", "state": "broken", "reason": "no KV link can be made"}
        ]
        assert not master.parts.links.linked()
        prefill.health = LinkHealth(works=True, round_trip_s=0.0015, bytes_per_s=2.5e9)
        await master.mode("pd")
        (row,) = [r for r in (await rows(master)) if r["name"] == "p"]
        (link,) = row["links"]
        assert (link["round_trip_ms"], link["megabytes_per_s"]) == (1.5, 2500.0)
        assert 'xllm_pair_round_trip_seconds{decode="d",prefill="p"} 0.0015' in (
            master.metrics.text().decode()
        )


async def test_a_pair_whose_decode_side_fetches_is_probed_from_there() -> None:
    async with running_master() as master:
        decode = await master.add("d", Role.DECODE)
        prefill = await master.add("p", Role.PREFILL, kv_cache_transfer_mode="PULL")
        await master.mode("pd")
        assert decode.fetched == [card_to_json(prefill.card, card_key(b"k" * 32))]
        assert (decode.probed, prefill.probed, prefill.fetched) == ([], [], [])


async def test_a_lost_handoff_has_its_pair_looked_at_and_a_wedged_link_leaves_routing_alone() -> (
    None
):
    """The instances stay READY; the pair comes back by itself."""
    async with running_master() as master:
        prefill, decode = await master.pair()
        looks = len(prefill.probed)
        prefill.health = LinkHealth(works=False, reason="no answer to COMMIT")
        master.parts.links.doubt(prefill.incarnation, decode.incarnation)
        await until("the pair to leave", lambda: not master.parts.links.linked())
        assert len(prefill.probed) > looks
        assert (master.state(prefill), master.state(decode)) == ("READY", "READY")
        prefill.health = LinkHealth(works=True)
        await master.mode("pd")


async def test_a_giver_too_busy_to_say_is_not_taken_for_a_broken_link() -> None:
    async with running_master() as master:
        prefill, decode = await master.pair()
        looks = len(prefill.probed)
        prefill.probe_error = PeerUnavailable("a long step")
        master.parts.links.doubt(prefill.incarnation, decode.incarnation)
        await until("a look", lambda: len(prefill.probed) > looks)
        assert len(master.parts.links.linked()) == 1


def _refusal(master: RunningMaster) -> Any:
    def look() -> Any:
        ready = master.parts.backend.ready()
        return ready if any("differs" in text for text in ready.details) else None

    return look


async def rows(master: RunningMaster) -> list[dict[str, Any]]:
    _, body = await master.parts.routes.instances(None)  # type: ignore[arg-type]
    assert isinstance(body, dict)
    found: list[dict[str, Any]] = body["instances"]
    return found


async def test_one_unreachable_peer_keeps_no_other_pair_waiting() -> None:
    async with running_master() as master:
        broken = await master.add("d0", Role.DECODE)
        broken.link_error = PeerUnavailable("not now")
        await master.add("d1", Role.DECODE)
        await master.add("p", Role.PREFILL)
        await master.mode("pd")
        assert len(master.parts.links.linked()) == 1


async def test_losing_a_giver_unlinks_it() -> None:
    async with running_master() as master:
        prefill, decode = await master.pair()
        await prefill.cut_stream()
        await until("the loss", lambda: master.state(prefill) == "GONE")
        await until("the unlink", lambda: decode.unlinked == [("p", prefill.incarnation)])
        assert not master.parts.backend.ready().ready


async def test_an_instance_that_reconnects_is_linked_again() -> None:
    async with running_master() as master:
        _, decode = await master.pair()
        await decode.cut_stream()
        await until("the loss", lambda: master.state(decode) != "READY")
        await decode.open_stream()
        await until("the second link", lambda: len(decode.linked) > 1)
        await master.mode("pd")


async def test_a_new_life_of_a_name_replaces_the_old_one() -> None:
    async with running_master() as master:
        prefill, decode = await master.pair()
        reborn = await master.add("p", Role.PREFILL)
        await until("the new pair", lambda: len(decode.linked) == 2)
        await master.mode("pd")
        assert master.state(prefill) == ""
        assert {row["name"] for row in await rows(master)} == {"p", "d"}
        assert master.state(reborn) == "READY"


async def test_silence_makes_suspect_then_gone_then_forgotten() -> None:
    async with running_master(
        suspect_after_s=0.3, gone_after_s=0.6, forget_gone_after_s=0.1
    ) as master:
        alone = await master.add("a", Role.DEFAULT)
        await master.mode("default")
        alone.beating = False
        await until("suspicion", lambda: master.state(alone) == "SUSPECT")
        assert master.parts.backend.ready().mode == "default"
        await until("the end", lambda: master.state(alone) == "GONE")
        assert not master.parts.backend.ready().ready
        await master.registry.delete(keys.instance(Role.DEFAULT, "a"))
        await until("oblivion", lambda: master.state(alone) == "")


async def test_the_client_of_a_forgotten_life_is_dropped() -> None:
    async with running_master() as master:
        prefill, _ = await master.pair()
        client = master.parts.peers.of(prefill.card)
        assert master.parts.peers.of(prefill.card) is client
        await master.add("p", Role.PREFILL)
        await until("oblivion", lambda: master.parts.peers.of(prefill.card) is not client)


async def test_what_a_dead_life_leaves_open_brings_no_client_of_it_back() -> None:
    async with running_master() as master:
        prefill, decode = await master.pair()
        reader = master.read(submission())
        await until("the submission", lambda: prefill.submissions)
        reborn = await master.add("p", Role.PREFILL)
        await until("the cancel at the other one", lambda: decode.cancelled)
        await until("the new pair", lambda: len(decode.linked) == 2)
        await until("the next attempt", lambda: reborn.submissions)
        await reader.leave()
        lives = {decode.incarnation, reborn.incarnation}
        assert master.parts.peers._clients.keys() <= lives


async def test_a_vanished_card_of_a_living_instance_is_asked_for_again() -> None:
    async with running_master() as master:
        alone = await master.add("a", Role.DEFAULT)
        await master.mode("default")
        await master.registry.delete(keys.instance(Role.DEFAULT, "a"))
        await until("an unknown heartbeat", lambda: alone.known and not alone.known[-1])
        assert master.parts.backend.ready().mode == "default"
        await alone.put_card()
        await until("a known heartbeat", lambda: alone.known[-1])


async def test_a_draining_instance_gets_no_new_work() -> None:
    async with running_master() as master:
        alone = await master.add("a", Role.DEFAULT)
        await master.mode("default")
        alone.card = dataclasses.replace(alone.card, state="DRAINING")
        await until("draining", lambda: master.state(alone) == "DRAINING")
        assert not master.parts.backend.ready().ready


@pytest.mark.parametrize(
    "spoil",
    [
        lambda raw: b"not json",
        lambda raw: raw.replace(b'"name":"a"', b'"name":"b"'),
        lambda raw: b"{}",
    ],
)
async def test_a_card_that_cannot_be_believed_is_counted_and_ignored(spoil: Any) -> None:
    async with running_master() as master:
        instance = FakeInstance(master, "a", Role.DEFAULT)
        raw = spoil(card_to_json(instance.card, card_key(b"k" * 32)))
        await master.registry.put("XLLM:DEFAULT:a", raw)
        await until(
            "the count",
            lambda: b'cards_ignored_total{reason="unreadable"} 1.0' in master.metrics.text(),
        )
        assert master.parts.manager.members() == []


async def test_a_card_under_a_foreign_key_is_ignored() -> None:
    async with running_master() as master:
        instance = FakeInstance(master, "a", Role.DEFAULT)
        raw = card_to_json(instance.card, card_key(b"k" * 32))
        await master.registry.put("XLLM:PREFILL:a", raw)
        await until("the count", lambda: b"cards_ignored_total{" in master.metrics.text())
        assert master.parts.manager.members() == []


async def test_cards_of_others_can_be_asked_for() -> None:
    async with running_master() as master:
        prefill = await master.add("p", Role.PREFILL)
        client = MasterClient(master.address, cluster_key=b"k" * 32, sender="x", timeout_s=5.0)
        raw = await client.get_instance_info("p")
        assert raw == card_to_json(prefill.card, card_key(b"k" * 32))
        with pytest.raises(RequestNotFound):
            await client.get_instance_info("q")
        await client.close()


async def test_the_metrics_name_instances_and_pairs() -> None:
    async with running_master() as master:
        await master.pair()
        text = master.metrics.text().decode()
        assert 'xllm_instances{role="PREFILL",state="READY"} 1.0' in text
        assert 'xllm_pair_linked{decode="d",prefill="p"} 1.0' in text
        assert "xllm_etcd_up 1.0" in text


async def test_a_silent_registry_takes_nothing_away() -> None:
    async with running_master() as master:
        prefill, decode = await master.pair()
        master.registry.up = False
        await until("the metric", lambda: b"xllm_etcd_up 0.0" in master.metrics.text())
        reader = master.read(submission())
        await until("the submission", lambda: prefill.submissions)
        await prefill.say(0, 11)
        await decode.say(1, 12, "stop")
        await reader.ended()
        assert reader.ids == [11, 12]
