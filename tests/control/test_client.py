"""A caller whose call ends otherwise than by an answer: its channel is closed under it, or it is cancelled itself."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any, cast

import pytest

from xllm_py.base.errors import PeerUnavailable
from xllm_py.base.tasks import TaskFamily
from xllm_py.control.channels import Channels
from xllm_py.control.client import InstanceClient
from xllm_py.control.server import InstanceHandlers, serve_instance

KEY = b"k" * 32


class Silent:
    """An instance that answers nothing."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()

    async def describe(self, stream_id: str) -> dict[str, Any]:
        self.asked.set()
        await asyncio.Event().wait()
        raise AssertionError("never")

    async def unlink_instance(self, name: str, incarnation: str) -> None:
        await self.describe("")

    generations = None


class Calling:
    """A call that waits for its answer."""

    def __init__(self, address: str, peer: Silent, tasks: TaskFamily) -> None:
        self.channels = Channels()
        self.address = address
        self.peer = peer
        client = InstanceClient(
            address, cluster_key=KEY, sender="me", timeout_s=20.0, channels=self.channels
        )
        self.task = tasks.start(client.unlink_instance("p", "pp"), name="call")


@pytest.fixture
async def calling() -> AsyncIterator[Calling]:
    peer, tasks = Silent(), TaskFamily("callers")
    server = await serve_instance(
        cast("InstanceHandlers", peer),
        host="127.0.0.1",
        port=0,
        may_move=False,
        cluster_key=KEY,
        incarnation="here",
    )
    made = Calling(server.address, peer, tasks)
    async with asyncio.timeout(10):
        await peer.asked.wait()
    yield made
    await tasks.close()
    await made.channels.close()
    await server.close()


async def test_a_channel_closed_under_a_call_is_a_lost_peer(calling: Calling) -> None:
    """A master drops the channel of an instance it forgets; who waits there must not look cancelled."""
    await calling.channels.drop(calling.address)
    with pytest.raises(PeerUnavailable, match="closed"):
        await calling.task


async def test_a_caller_that_is_cancelled_is_cancelled(calling: Calling) -> None:
    calling.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await calling.task
