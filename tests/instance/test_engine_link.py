"""The API process's end of an engine, against a real toy engine process: its answers, its silence and its death."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import psutil
import pytest

from tests.instance.support import settle, submission, until
from xllm_py.base.clock import RealClock
from xllm_py.base.errors import DeadlineExceeded, EngineDied, EngineDown, ModelLoadError
from xllm_py.base.tasks import TaskFamily
from xllm_py.core.config import CacheConfig, EngineConfig, SchedulerConfig
from xllm_py.core.plan import Outputs
from xllm_py.core.request import FirstToken, Offer, OfferAnswer
from xllm_py.engine.toy import EOS, VOCAB_SIZE, ToyExecutor, lone_answer
from xllm_py.instance.engine_link import EngineHandlers, EngineLink
from xllm_py.wire import messages as m

TOY = EngineConfig(
    executor="toy",
    cache=CacheConfig(block_size=4),
    scheduler=SchedulerConfig(max_seqs_per_batch=4),
    log_level="error",
)


class Owner:
    """Holds an engine link and notes what the engine says."""

    def __init__(self) -> None:
        self.tasks = TaskFamily("owner")
        self.tokens: dict[str, list[int]] = {}
        self.ends: dict[str, str] = {}
        handlers = EngineHandlers(
            on_outputs=self._on_outputs,
            on_offers=_unexpected,
            on_first_tokens=_unexpected,
            on_cancels=_unexpected,
            on_verdicts=_unexpected,
            on_reservations_ended=_unexpected,
            on_progress=lambda progress: None,
        )
        self.link = EngineLink(handlers=handlers, tasks=self.tasks, clock=RealClock())

    def _on_outputs(self, outputs: Outputs) -> None:
        for index, request_id in enumerate(outputs.request_ids):
            if outputs.token_ids[index] >= 0:
                self.tokens.setdefault(request_id, []).append(outputs.token_ids[index])
            if outputs.finish_reasons[index]:
                self.ends[request_id] = outputs.finish_reasons[index]

    async def start(self, config: EngineConfig = TOY, timeout_s: float = 60.0) -> m.Ready:
        return await self.link.start(config, timeout_s=timeout_s)

    @contextlib.contextmanager
    def silent(self) -> Iterator[None]:
        """The engine is stopped, as in a step that takes long."""
        os.kill(self.link.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(self.link.pid, signal.SIGCONT)

    def send(self, number: signal.Signals) -> None:
        os.kill(self.link.pid, number)

    def kill(self) -> None:
        """The engine is dead; our event loop has not noticed yet."""
        os.kill(self.link.pid, signal.SIGKILL)
        os.waitid(os.P_PID, self.link.pid, os.WEXITED | os.WNOWAIT)


def _unexpected(*words: object) -> None:
    raise AssertionError(f"nobody asked for {words}")


@pytest.fixture
async def owner() -> AsyncIterator[Owner]:
    made = Owner()
    yield made
    await made.link.close()
    await made.tasks.close()


def offer(request_id: str, attempt: int = 1) -> Offer:
    return Offer(
        submission=submission(request_id, attempt=attempt),
        giver_name="p",
        giver_address="p:1",
        giver_incarnation="pp",
        model_fingerprint="x",
        layout_fingerprint="x",
        block_size=4,
    )


def first(request_id: str) -> FirstToken:
    return FirstToken(request_id=request_id, attempt=1, grant=b"g" * 16, token_ids=(3,))


async def test_a_submission_gives_the_text_of_a_lone_run_and_the_ledger_is_empty_after(
    owner: Owner,
) -> None:
    ready = await owner.start()
    assert (ready.vocab_size, ready.eos_token_ids, ready.kv_endpoints) == (VOCAB_SIZE, (EOS,), ())
    assert ready.num_blocks == TOY.toy_num_blocks
    for number in range(3):
        owner.link.submit(
            submission(f"r{number}", prompt_ids=(number, 5), max_tokens=20, ignore_eos=True)
        )
    await until("three ends", lambda: len(owner.ends) == 3)
    for number in range(3):
        assert owner.tokens[f"r{number}"] == lone_answer(ToyExecutor(TOY), [number, 5], 20)
    assert set(owner.ends.values()) == {"length"}
    counts = await owner.link.ledger()
    assert counts["requests_open"] == 0
    assert counts["free"] + counts["cached"] == TOY.toy_num_blocks
    await until("progress", lambda: owner.link.progress.tokens == 60)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_a_signal_to_the_whole_group_leaves_the_engine_to_its_owner(
    owner: Owner, number: signal.Signals
) -> None:
    """systemctl stop sends SIGTERM to every process; what runs has to end well all the same."""
    await owner.start()
    owner.link.submit(submission("r", max_tokens=20, ignore_eos=True))
    owner.send(number)
    await until("the end", lambda: owner.ends)
    assert owner.ends == {"r": "length"}


async def test_an_abort_ends_a_request_and_a_refusal_comes_as_an_output(owner: Owner) -> None:
    await owner.start()
    owner.link.submit(submission("long", max_tokens=600, ignore_eos=True))
    owner.link.abort(["long", "unknown"], [1, 0])
    owner.link.submit(submission("bad", prompt_ids=(VOCAB_SIZE,)))
    await until("both ends", lambda: len(owner.ends) == 2)
    assert owner.ends == {"long": "abort", "bad": "invalid_value"}


async def test_a_draining_engine_refuses_new_work(owner: Owner) -> None:
    await owner.start()
    owner.link.drain()
    owner.link.submit(submission("late"))
    await until("the refusal", lambda: owner.ends == {"late": "draining"})


async def test_questions_are_answered_in_their_own_order(owner: Owner) -> None:
    await owner.start()
    offers = [offer("b"), offer("a"), offer("a", 2)]
    answers = await owner.link.offer(offers, timeout_s=10.0)
    assert [(answer.request_id, answer.attempt) for answer in answers] == [
        ("b", 1),
        ("a", 1),
        ("a", 2),
    ]
    assert {answer.refusal for answer in answers} == {"not_linked"}
    assert await owner.link.first_tokens([first("a"), first("b")], timeout_s=10.0) == [False, False]
    ledgers = await asyncio.gather(*(owner.link.ledger() for _ in range(10)))
    assert all(counts["requests_open"] == 0 for counts in ledgers)


async def test_a_silent_engine_is_an_error_in_time_and_its_late_answer_harms_nobody(
    owner: Owner,
) -> None:
    await owner.start()
    with owner.silent():
        with pytest.raises(DeadlineExceeded):
            await owner.link.ledger(timeout_s=0.05)
        with pytest.raises(DeadlineExceeded):
            await owner.link.offer([offer("a")], timeout_s=0.05)
    assert (await owner.link.ledger())["requests_open"] == 0
    assert (await owner.link.offer([offer("a")], timeout_s=10.0))[0].refusal == "not_linked"


@pytest.mark.parametrize("how", ["late", "cancelled"])
async def test_who_asks_the_same_again_gets_the_answer_though_the_first_one_gave_up(
    owner: Owner, how: str
) -> None:
    await owner.start()
    with owner.silent():
        asked = owner.tasks.start(
            owner.link.offer([offer("a")], timeout_s=0.05 if how == "late" else 30.0), name="first"
        )
        await settle()
        again = owner.tasks.start(owner.link.offer([offer("a")], timeout_s=5.0), name="second")
        await settle()
        if how == "cancelled":
            asked.cancel()
        await asyncio.wait([asked])
    answers: list[OfferAnswer] = await again
    assert answers[0].refusal == "not_linked"


async def test_the_engines_death_is_told_to_all_who_wait_and_ends_the_family(owner: Owner) -> None:
    await owner.start()
    with owner.silent():
        waiting = [
            owner.tasks.start(owner.link.ledger(timeout_s=30.0), name="ledger"),
            owner.tasks.start(
                owner.link.offer([offer("a"), offer("b")], timeout_s=30.0), name="offers"
            ),
            owner.tasks.start(owner.link.first_tokens([first("a")], timeout_s=30.0), name="first"),
        ]
        await settle()
        failed = owner.tasks.start(owner.tasks.wait_failed(), name="failure")
        await settle()
        owner.kill()
    error = await asyncio.wait_for(failed, 10)
    assert isinstance(error, EngineDied)
    await asyncio.wait(waiting, timeout=10)
    assert [type(task.exception()) for task in waiting] == [EngineDown] * 3
    assert owner.link.down
    with pytest.raises(EngineDown):
        owner.link.submit(submission("after"))
    with pytest.raises(EngineDown):
        await owner.link.ledger()


async def test_commands_to_an_engine_that_just_died_are_engine_down_or_harmless(
    owner: Owner,
) -> None:
    """Before the loop sees the end of the pipe, a write may find it already."""
    await owner.start()
    owner.kill()
    with pytest.raises(EngineDown):
        for number in range(3):
            owner.link.submit(submission(f"r{number}"))
    owner.link.abort(["r0"], [0])
    owner.link.peer_gone("pp")
    owner.link.drain()
    owner.link.answer_offers([])
    owner.link.first_taken(m.FirstTaken(request_ids=[], attempts=[], accepted=[]))
    with pytest.raises(EngineDown):
        await owner.link.ledger()


async def test_nothing_can_be_asked_before_the_start(owner: Owner) -> None:
    with pytest.raises(EngineDown):
        owner.link.submit(submission("early"))
    assert owner.link.pid == 0


async def test_what_is_asked_while_it_starts_is_refused_and_does_it_no_harm(owner: Owner) -> None:
    starting = owner.tasks.start(owner.start(), name="start")
    await until("the process", lambda: owner.link.pid)
    while not starting.done():
        with contextlib.suppress(EngineDown):
            await owner.link.ledger()
        await asyncio.sleep(0.01)
    assert starting.result().num_blocks
    assert (await owner.link.ledger())["requests_open"] == 0


async def test_an_engine_that_cannot_start_ends_with_its_own_error(
    owner: Owner, tmp_path: Path
) -> None:
    with pytest.raises(ModelLoadError, match=r"config\.json"):
        await owner.start(EngineConfig(model_path=str(tmp_path)))


async def test_an_engine_that_is_not_ready_in_time_is_an_error(owner: Owner) -> None:
    with pytest.raises(EngineDied, match="not ready after 0 s"):
        await owner.start(timeout_s=0.0)


async def test_close_ends_the_process_also_when_it_does_not_listen(owner: Owner) -> None:
    await owner.start()
    pid = owner.link.pid
    os.kill(pid, signal.SIGSTOP)
    await owner.link.close()
    assert not psutil.pid_exists(pid)
    assert owner.link.down
    owner.link.abort(["x"], [0])
    await owner.link.close()


async def test_close_in_peace_is_no_failure(owner: Owner) -> None:
    await owner.start()
    failed = owner.tasks.start(owner.tasks.wait_failed(), name="failure")
    await settle()
    pid = owner.link.pid
    await owner.link.close()
    await settle()
    assert not psutil.pid_exists(pid)
    assert not failed.done() or not isinstance(failed.result(), EngineDied)
