"""A family of tasks: nobody is lost, nobody stays, and a vital one that ends is noticed."""

from __future__ import annotations

import asyncio
import logging

import pytest

from xllm_py.base.tasks import TaskFamily


@pytest.fixture
async def family() -> TaskFamily:
    return TaskFamily("test")


async def forever(started: asyncio.Event | None = None) -> None:
    if started is not None:
        started.set()
    await asyncio.Event().wait()


async def fail() -> None:
    raise ValueError("broken")


async def nothing() -> None:
    return None


async def test_close_ends_everything(family: TaskFamily) -> None:
    tasks = [family.start(forever(), name=f"t{n}") for n in range(5)]
    assert family.size == 5
    await family.close()
    assert all(task.cancelled() for task in tasks)
    assert family.size == 0


async def test_what_ended_is_counted_no_more(family: TaskFamily) -> None:
    await family.start(nothing(), name="short")
    await asyncio.sleep(0)
    assert family.size == 0
    await family.close()


async def test_a_failure_is_logged_once_with_its_name_and_ends_nobody_else(
    family: TaskFamily, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR, logger="xllm_py")
    other = family.start(forever(), name="other")
    failing = family.start(fail(), name="failing")
    await asyncio.wait([failing])
    await asyncio.sleep(0)
    found = [one for one in caplog.records if one.getMessage() == "task failed"]
    assert [one.fields for one in found] == [{"task": "test/failing"}]
    assert "broken" in str(found[0].exc_info)
    assert not other.done()
    await family.close()


async def waiting(family: TaskFamily) -> asyncio.Task[BaseException]:
    failed = family.start(family.wait_failed(), name="failure")
    await asyncio.sleep(0)
    return failed


async def test_a_vital_task_that_fails_is_what_wait_failed_returns(family: TaskFamily) -> None:
    failed = await waiting(family)
    family.start(fail(), name="vital", vital=True)
    error = await asyncio.wait_for(failed, 5)
    assert isinstance(error, ValueError)
    await family.close()


async def test_a_vital_task_that_just_ends_is_a_failure_too(family: TaskFamily) -> None:
    failed = await waiting(family)
    family.start(nothing(), name="vital", vital=True)
    assert "vital" in str(await asyncio.wait_for(failed, 5))
    await family.close()


async def test_a_failure_before_anybody_waits_for_one_is_not_forgotten(
    family: TaskFamily,
) -> None:
    vital = family.start(fail(), name="vital", vital=True)
    await asyncio.wait([vital])
    await asyncio.sleep(0)
    error = await asyncio.wait_for(family.wait_failed(), 5)
    assert isinstance(error, ValueError)
    await family.close()


async def test_only_the_first_failure_counts_and_others_end_nothing(family: TaskFamily) -> None:
    failed = await waiting(family)
    family.start(fail(), name="harmless")
    await asyncio.sleep(0.01)
    assert not failed.done()
    family.start(nothing(), name="first", vital=True)
    family.start(fail(), name="second", vital=True)
    assert "first" in str(await asyncio.wait_for(failed, 5))
    await family.close()


async def test_a_vital_task_that_close_ends_is_no_failure(family: TaskFamily) -> None:
    failed = await waiting(family)
    family.start(forever(), name="vital", vital=True)
    await family.close()
    assert failed.cancelled()


async def test_a_member_may_close_its_family(family: TaskFamily) -> None:
    other = family.start(forever(), name="other")

    async def closing() -> str:
        await family.close()
        return "alive"

    assert await family.start(closing(), name="closing") == "alive"
    assert other.cancelled()


async def test_one_that_does_not_stop_is_named_and_close_returns(
    family: TaskFamily, caplog: pytest.LogCaptureFixture
) -> None:
    release, started = asyncio.Event(), asyncio.Event()

    async def stubborn() -> None:
        while not release.is_set():
            try:
                await forever(started)
            except asyncio.CancelledError:
                await release.wait()

    task = family.start(stubborn(), name="stubborn")
    await started.wait()
    await family.close(timeout_s=0.01)
    [found] = [one for one in caplog.records if one.getMessage() == "task did not stop"]
    assert found.fields["task"] == "test/stubborn"
    release.set()
    await asyncio.wait([task], timeout=5)
    assert task.done()
