"""A request through a real master and scripted instances: the way there, the way back, and every early end."""

from __future__ import annotations

import asyncio

import pytest

from tests.master.support import FakeInstance, RunningMaster, running_master, submission, until
from xllm_py.base.errors import (
    ContextLengthExceeded,
    DeadlineExceeded,
    InstanceLost,
    InternalServerError,
    InvalidApiKey,
    NoInstances,
    QueueFull,
    RequestQuarantined,
    StaleIncarnation,
)
from xllm_py.cluster.attempts import TOGETHER_S
from xllm_py.cluster.instance_info import Role
from xllm_py.core.request import Submission
from xllm_py.wire.control_messages import GenerationsDown


async def test_a_pair_answers_and_the_receiver_is_named() -> None:
    async with running_master() as master:
        prefill, decode = await master.pair()
        reader = master.read(submission())
        order = (await until("the submission", lambda: prefill.submissions))[0]
        assert order.receiver is not None
        assert order.receiver.incarnation == decode.incarnation
        assert order.receiver.address == decode.card.rpc_address
        assert (order.master, order.relay, order.attempt) == (master.address, False, 1)
        assert 0 < order.timeout_s <= submission().timeout_s
        await prefill.say(0, 11)
        await until("the first token", lambda: reader.ids == [11])
        await decode.say(1, 12)
        await decode.say(2, 13, "length")
        await reader.ended()
        assert reader.error is None
        assert reader.ids == [11, 12, 13]
        assert [delta.finish_reason for delta in reader.deltas if delta.finish_reason] == ["length"]
        assert master.ledger() == {"open_requests": 0, "attempts": 0, "log_tokens": 0}
        assert prefill.cancelled == decode.cancelled == []
        await until("the acknowledged finish", lambda: _acked(decode.downs, 3))
        await until("the acknowledged first token", lambda: _acked(prefill.downs, 1))


def _counted(master: RunningMaster, name: str) -> bool:
    return f"{name} 1.0" in master.metrics.text().decode()


def _acked(downs: list[GenerationsDown], position: int) -> bool:
    return any(position in down.acks.nexts for down in downs)


async def test_relayed_tokens_carry_the_takers_name() -> None:
    async with running_master(decode_response_to_service=False) as master:
        prefill, decode = await master.pair()
        reader = master.read(submission())
        order = (await until("the submission", lambda: prefill.submissions))[0]
        assert order.relay
        await prefill.say(0, 11)
        await prefill.say(1, 12, relayed_for=decode)
        await prefill.say(
            1, 12
        )  # P's own word on a position D reported: the same, so it is harmless
        await prefill.say(2, 13, "stop", relayed_for=decode)
        await reader.ended()
        assert reader.ids == [11, 12, 13]


async def test_tokens_out_of_order_twice_and_of_other_attempts_give_one_answer() -> None:
    async with running_master() as master:
        prefill, decode = await master.pair()
        reader = master.read(submission())
        await until("the submission", lambda: prefill.submissions)
        await decode.say(1, 12)
        await decode.say(2, 13, attempt=2)
        await decode.say(0, 99, attempt=0)
        await decode.say(2, 13)
        await prefill.say(0, 11)
        await until("three tokens", lambda: reader.ids == [11, 12, 13])
        await decode.say(1, 12)
        await decode.say(4, 15, "length")
        down = await until(
            "a request to send again", lambda: [d for d in decode.downs if d.again.nexts]
        )
        assert (down[0].again.request_ids, down[0].again.nexts) == (["r1"], [3])
        await decode.say(3, 14)
        await reader.ended()
        assert reader.ids == [11, 12, 13, 14, 15]


async def test_a_contradiction_ends_the_request_at_both() -> None:
    async with running_master() as master:
        prefill, decode = await master.pair()
        reader = master.read(submission())
        await until("the submission", lambda: prefill.submissions)
        await prefill.say(0, 11)
        await decode.say(0, 12)
        await reader.ended()
        assert isinstance(reader.error, InternalServerError)
        await until("cancels", lambda: prefill.cancelled and decode.cancelled)


@pytest.mark.parametrize("num_tokens", [0, 1, 3])
async def test_a_client_that_leaves_ends_the_request_at_both(num_tokens: int) -> None:
    async with running_master() as master:
        prefill, decode = await master.pair()
        reader = master.read(submission())
        await until("the submission", lambda: prefill.submissions)
        for position in range(num_tokens):
            await (prefill if position == 0 else decode).say(position, 11 + position)
        await until("the tokens", lambda: len(reader.ids) == num_tokens)
        await reader.leave()
        await until("both cancels", lambda: prefill.cancelled and decode.cancelled)
        assert prefill.cancelled == decode.cancelled == [("r1", 1)]
        assert master.ledger()["open_requests"] == 0
        await decode.say(num_tokens + 1, 30)
        await until(
            "a cancel on the stream", lambda: any(d.cancels.request_ids for d in decode.downs)
        )


async def test_a_client_that_leaves_during_submit_ends_the_request_too() -> None:
    async with running_master() as master:
        prefill, decode = await master.pair()
        prefill.hang_on_submit = True
        reader = master.read(submission())
        await until("the submission", lambda: prefill.submissions)
        await reader.leave()
        await until("both cancels", lambda: prefill.cancelled and decode.cancelled)
        assert master.ledger()["open_requests"] == 0


@pytest.mark.parametrize("who", ["prefill", "decode"])
async def test_when_an_instance_is_lost_the_next_attempt_goes_on_where_the_log_ends(
    who: str,
) -> None:
    async with running_master() as master:
        prefill, decode = await master.pair()
        reader = master.read(submission())
        await until("the submission", lambda: prefill.submissions)
        if who == "decode":
            await prefill.say(0, 11)
            await decode.say(1, 12)
            await until("two tokens", lambda: len(reader.ids) == 2)
        lost, other = (prefill, decode) if who == "prefill" else (decode, prefill)
        fresh = await master.add(
            "fresh", Role.PREFILL if who == "prefill" else Role.DECODE, beating=True
        )
        await until("the new pair", lambda: len(master.parts.links.linked()) == 2)
        await lost.cut_stream()
        giver, taker = (fresh, decode) if who == "prefill" else (prefill, fresh)
        order = (await until("the second attempt", lambda: _orders(giver, attempt=2)))[0]
        assert order.generated_ids == ((11, 12) if who == "decode" else ())
        assert order.receiver is not None
        assert order.receiver.incarnation == taker.incarnation
        await until("the other's cancel", lambda: ("r1", 1) in other.cancelled)
        await taker.say(0, 99, attempt=1)  # the first attempt is over: whatever it says is stale
        known = len(order.generated_ids)
        await giver.say(known, 11 + known, attempt=2)
        for position in range(known + 1, 4):
            await taker.say(position, 11 + position, attempt=2)
        await taker.say(4, 15, "length", attempt=2)
        await reader.ended()
        assert reader.error is None
        assert reader.ids == [11, 12, 13, 14, 15]
        assert [delta.position for delta in reader.deltas] == sorted(
            {delta.position for delta in reader.deltas}
        )
        assert master.ledger()["open_requests"] == 0
        record = master.parts.journeys.get("r1")
        assert record is not None
        assert record.row()["attempt"] == 2


def _orders(instance: FakeInstance, attempt: int) -> list[Submission]:
    return [order for order in instance.submissions if order.attempt == attempt]


async def test_a_request_waits_for_an_instance_that_comes() -> None:
    async with running_master() as master:
        reader = master.read(submission())
        alone = await master.add("a", Role.DEFAULT)
        order = (await until("the submission", lambda: alone.submissions))[0]
        await alone.say(0, 11, "stop", attempt=order.attempt)
        await reader.ended()
        assert reader.ids == [11]


async def test_a_submission_whose_answer_is_lost_is_taken_once_its_tokens_come() -> None:
    """It would be submitted again otherwise, be its answer complete."""
    async with running_master(rpc_timeout_s=1.0) as master:
        prefill, decode = await master.pair()
        prefill.hang_on_submit = True
        reader = master.read(submission())
        await until("the submission", lambda: prefill.submissions)
        await prefill.say(0, 11)
        await until("its token", lambda: reader.ids == [11])
        await decode.say(1, 12, "stop")
        await reader.ended()
        assert reader.error is None
        assert len(prefill.submissions) == 1


async def test_what_one_instance_has_no_room_for_goes_to_another() -> None:
    async with running_master() as master:
        one = await master.add("a", Role.DEFAULT)
        other = await master.add("b", Role.DEFAULT)
        await until("both", lambda: len(master.parts.router.cards()) == 2)
        one.submit_error = QueueFull("the queue is full")
        reader = master.read(submission())
        order = (await until("the submission", lambda: other.submissions))[0]
        await other.say(0, 11, "stop", attempt=order.attempt)
        await reader.ended()
        assert reader.ids == [11]


async def test_a_request_that_two_instances_die_of_ends_and_its_like_is_refused() -> None:
    async with running_master() as master:
        names = ("a", "b", "c")
        crowd = [await master.add(name, Role.DEFAULT) for name in names]
        await until("all", lambda: len(master.parts.router.cards()) == 3)
        reader = master.read(submission())
        for _ in range(2):
            victim = await until("somebody to have it", lambda: _holder(crowd))
            await asyncio.sleep(2 * TOGETHER_S)
            await victim.cut_stream()
            crowd.remove(victim)
        await reader.ended()
        assert isinstance(reader.error, RequestQuarantined)
        again = master.read(submission("r2"))
        await again.ended()
        assert isinstance(again.error, RequestQuarantined)
        assert crowd[0].submissions == []
        another = master.read(submission("r3", prompt_ids=(4, 5)))
        await until("another one", lambda: crowd[0].submissions)
        await another.leave()


def _holder(crowd: list[FakeInstance]) -> FakeInstance | None:
    return next((each for each in crowd if each.submissions), None)


async def test_an_instance_with_other_numerics_does_not_go_on_with_an_answer() -> None:
    async with running_master(queue_timeout_s=0.5) as master:
        one = await master.add("a", Role.DEFAULT, numerics_fingerprint="x")
        other = await master.add("b", Role.DEFAULT, numerics_fingerprint="y")
        await until("both", lambda: len(master.parts.router.cards()) == 2)
        reader = master.read(submission())
        await until("the submission", lambda: one.submissions or other.submissions)
        holder, idle = (one, other) if one.submissions else (other, one)
        await holder.say(0, 11)
        await until("a token", lambda: reader.ids == [11])
        await holder.cut_stream()
        await reader.ended()
        assert isinstance(reader.error, NoInstances)
        assert idle.submissions == []


async def test_losing_the_giver_after_the_handoff_changes_nothing() -> None:
    async with running_master() as master:
        prefill, decode = await master.pair()
        reader = master.read(submission())
        await until("the submission", lambda: prefill.submissions)
        await prefill.say(0, 11)
        await prefill.judge("landed")
        await until("the verdict", lambda: _counted(master, 'offers_total{result="landed"}'))
        await prefill.cut_stream()
        await until("the loss", lambda: master.state(prefill) == "GONE")
        await decode.say(1, 12, "stop")
        await reader.ended()
        assert reader.error is None
        assert reader.ids == [11, 12]
        record = master.parts.journeys.get("r1")
        assert record is not None
        moved = {"bytes": 4096, "seconds": 0.01, "exposed_seconds": 0.002}
        assert record.row()["transfer"] == moved


async def test_a_giver_that_keeps_the_request_needs_no_taker() -> None:
    async with running_master() as master:
        prefill, decode = await master.pair()
        reader = master.read(submission())
        await until("the submission", lambda: prefill.submissions)
        await prefill.say(0, 11)
        await prefill.judge("refused")
        await until("the verdict", lambda: _counted(master, 'offers_total{result="refused"}'))
        await decode.cut_stream()
        await until("the loss", lambda: master.state(decode) == "GONE")
        await prefill.say(1, 12)
        await prefill.say(2, 13, "length")
        await reader.ended()
        assert reader.ids == [11, 12, 13]


async def test_a_refusal_for_want_of_room_is_the_clients_error_once_patience_ends() -> None:
    async with running_master(queue_timeout_s=0.0) as master:
        prefill, _ = await master.pair()
        prefill.submit_error = QueueFull("the queue is full", retry_after_s=2.0)
        reader = master.read(submission())
        await reader.ended()
        assert isinstance(reader.error, QueueFull)
        assert reader.error.retry_after_s == 2.0
        assert master.ledger()["open_requests"] == 0


@pytest.mark.parametrize("error", [StaleIncarnation("another life"), InvalidApiKey("key")])
async def test_a_submission_that_does_not_arrive_is_an_error_once_patience_ends(
    error: Exception,
) -> None:
    async with running_master(queue_timeout_s=0.3) as master:
        prefill, _ = await master.pair()
        prefill.submit_error = error
        reader = master.read(submission())
        await reader.ended()
        expected = InstanceLost if isinstance(error, StaleIncarnation) else InvalidApiKey
        assert isinstance(reader.error, expected)


async def test_an_error_reported_by_an_instance_reaches_the_client_after_the_tokens() -> None:
    async with running_master() as master:
        prefill, _ = await master.pair()
        reader = master.read(submission())
        await until("the submission", lambda: prefill.submissions)
        await prefill.say(0, 11)
        await prefill.say(1, -1, "context_length_exceeded", message="too long for every cache")
        await reader.ended()
        assert reader.ids == [11]
        assert isinstance(reader.error, ContextLengthExceeded)
        assert reader.error.message == "too long for every cache"


@pytest.mark.parametrize("hangs", [True, False])
async def test_the_deadline_ends_a_silent_request_everywhere(hangs: bool) -> None:
    async with running_master() as master:
        prefill, decode = await master.pair()
        prefill.hang_on_submit = hangs
        reader = master.read(submission(timeout_s=0.3))
        await reader.ended()
        assert isinstance(reader.error, DeadlineExceeded)
        await until("both cancels", lambda: prefill.cancelled and decode.cancelled)
        assert master.ledger()["open_requests"] == 0


async def test_nothing_registered_is_503_with_a_time_to_come_back() -> None:
    async with running_master(queue_timeout_s=0.1) as master:
        reader = master.read(submission())
        await reader.ended()
        assert isinstance(reader.error, NoInstances)
        assert reader.error.retry_after_s
        assert master.parts.backend.models() == ()


async def test_what_no_decode_can_hold_is_refused_before_any_work() -> None:
    async with running_master() as master:
        prefill = await master.add("p", Role.PREFILL)
        await master.add("d", Role.DECODE, num_blocks=2)
        await master.mode("pd")
        reader = master.read(submission(prompt_ids=(1,) * 26, max_tokens=8))
        await reader.ended()
        assert isinstance(reader.error, ContextLengthExceeded)
        assert prefill.submissions == []
        fits = master.read(submission(prompt_ids=(1,) * 25, max_tokens=8))
        await until("the one that fits", lambda: prefill.submissions)
        await fits.leave()


async def test_a_default_instance_gets_whole_requests() -> None:
    async with running_master() as master:
        alone = await master.add("a", Role.DEFAULT)
        await master.mode("default")
        reader = master.read(submission())
        order = (await until("the submission", lambda: alone.submissions))[0]
        assert order.receiver is None
        assert not order.relay
        for position, token in enumerate((11, 12)):
            await alone.say(position, token)
        await alone.say(2, 13, "stop")
        await reader.ended()
        assert reader.ids == [11, 12, 13]


async def test_two_pairs_take_turns() -> None:
    async with running_master() as master:
        givers = [await master.add(f"p{n}", Role.PREFILL) for n in range(2)]
        takers = [await master.add(f"d{n}", Role.DECODE) for n in range(2)]
        await until("four pairs", lambda: len(master.parts.links.linked()) == 4)
        readers = [master.read(submission(f"r{n}")) for n in range(4)]
        await until("all submitted", lambda: sum(len(p.submissions) for p in givers) == 4)
        assert [len(p.submissions) for p in givers] == [2, 2]
        names = [s.receiver.name for p in givers for s in p.submissions if s.receiver]
        assert sorted(names) == ["d0", "d0", "d1", "d1"]
        for reader in readers:
            await reader.leave()
        for taker in takers:
            await until("its cancels", lambda taker=taker: len(taker.cancelled) == 2)


async def test_the_models_are_those_of_routable_instances() -> None:
    async with running_master() as master:
        await master.add("p", Role.PREFILL, model_fingerprint="abcdef0123456789")
        assert master.parts.backend.models() == ()
        await master.add("d", Role.DECODE, model_fingerprint="abcdef0123456789")
        await master.mode("pd")
        (model,) = master.parts.backend.models()
        assert (model.name, model.max_model_len, model.vocab_size) == ("m", 100, 50)
        assert model.fingerprint == "fp_abcdef012345"


async def test_what_was_cached_is_told_with_the_first_token() -> None:
    """A stop string ends an answer at the door, which then hears no end."""
    async with running_master() as master:
        prefill, decode = await master.pair()
        reader = master.read(submission())
        await until("the submission", lambda: prefill.submissions)
        await prefill.say(0, 11, journey={"received": 0.0})
        await until("the first token", lambda: reader.deltas)
        assert reader.deltas[0].cached_tokens == 2
        await decode.say(1, 12, "stop")
        await reader.ended()


async def test_the_journey_is_laid_on_one_clock_in_order() -> None:
    async with running_master() as master:
        prefill, decode = await master.pair()
        reader = master.read(submission())
        await until("the submission", lambda: prefill.submissions)
        told = {"received": 0.0, "admitted": 0.001, "offered": 0.002, "granted": 0.003}
        await prefill.say(0, 11, journey={**told, "first_token": 0.004})
        moments = {"received": 0.0, "landed": 0.0005, "decoding": 0.0006, "finished": 5.0}
        await decode.say(1, 12, "stop", journey=moments)
        await reader.ended()
        assert reader.deltas[-1].cached_tokens == 2
        record = master.parts.journeys.get("r1")
        assert record is not None
        row = record.row()
        assert (row["state"], row["mode"]) == ("finished", "pd")
        assert (row["prefill_instance"], row["decode_instance"]) == ("p", "d")
        found = row["moments"]
        assert isinstance(found, dict)
        assert list(found) == [
            *("received", "placed", "admitted", "offered", "granted"),
            *("first_token", "landed", "decoding", "finished"),
        ]
        for before, after in [
            *(("received", "placed"), ("placed", "admitted"), ("admitted", "offered")),
            *(("offered", "granted"), ("granted", "landed"), ("landed", "finished")),
        ]:
            assert found[before] <= found[after]


async def test_many_requests_at_once_all_end() -> None:
    async with running_master() as master:
        prefill, decode = await master.pair()
        readers = [master.read(submission(f"r{n}")) for n in range(60)]
        await until("all submitted", lambda: len(prefill.submissions) == 60)
        for number in range(60):
            await prefill.say(0, 1, request_id=f"r{number}")
            await decode.say(1, 2, "stop", request_id=f"r{number}")
        for reader in readers:
            await reader.ended()
            assert reader.ids == [1, 2]
        assert master.ledger()["open_requests"] == 0
