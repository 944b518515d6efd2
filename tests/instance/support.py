"""What the instance's tests share: waiting with a deadline, outputs in one line, and streams that do what a test says."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

from xllm_py.base.clock import RealClock
from xllm_py.base.errors import PeerUnavailable
from xllm_py.core.plan import Outputs
from xllm_py.core.request import Submission
from xllm_py.core.sampling import SamplingParams
from xllm_py.wire.control_messages import Cancels, GenerationsDown, GenerationsUp

WAIT_S = 10.0


async def until(what: str, condition: Callable[[], Any]) -> Any:
    """Wait until the condition is true; the message says what was awaited."""
    clock = RealClock()
    deadline = clock.now() + WAIT_S
    while True:
        value = condition()
        if value:
            return value
        if clock.now() > deadline:
            raise AssertionError(f"waited {WAIT_S} s for {what}")
        await asyncio.sleep(0.002)


async def settle() -> None:
    """Let everything run that is ready to run."""
    for _ in range(20):
        await asyncio.sleep(0)


def submission(request_id: str = "r1", **fields: Any) -> Submission:
    """Three prompt tokens; at most 8 to generate, greedy."""
    sampling = SamplingParams(
        max_tokens=fields.pop("max_tokens", 8),
        seed=1,
        temperature=0.0,
        ignore_eos=fields.pop("ignore_eos", False),
        best_of=fields.pop("best_of", 1),
        logprobs=fields.pop("logprobs", -1),
    )
    values = {"prompt_ids": (1, 2, 3), "timeout_s": WAIT_S, **fields}
    return Submission(request_id=request_id, sampling=sampling, **values)


def outputs(*entries: tuple[Any, ...]) -> Outputs:
    """Entries are (request, position, token), then maybe a finish reason, then maybe a choice."""
    made = Outputs()
    for request_id, position, token_id, *more in entries:
        reason, choice = (*more, *("", 0)[len(more) :])
        made.add(
            request_id,
            1,
            choice=choice,
            position=position,
            token_id=token_id,
            finish_reason=reason,
        )
    return made


def entries(ups: list[GenerationsUp]) -> list[tuple[str, int, int]]:
    """(request, position, token) of every entry, in order."""
    return [
        (request_id, up.outputs.positions[index], up.outputs.token_ids[index])
        for up in ups
        for index, request_id in enumerate(up.outputs.request_ids)
    ]


def ack(request_id: str, position: int, choice: int = 0) -> GenerationsDown:
    down = GenerationsDown()
    down.acks.add(request_id, 1, choice, position)
    return down


def again(request_id: str, position: int) -> GenerationsDown:
    down = GenerationsDown()
    down.again.add(request_id, 1, 0, position)
    return down


def cancel(request_id: str) -> GenerationsDown:
    return GenerationsDown(cancels=Cancels(request_ids=[request_id], attempts=[1]))


class FakeStream:
    """One end of a Generations stream; the test is the other."""

    def __init__(self, address: str, kind: str, *, refuses: bool) -> None:
        self.address = address
        self.kind = kind
        self.addressee = ""
        self.sent: list[GenerationsUp] = []
        self.closed = False
        self.holding = asyncio.Event()  # cleared: a send waits, as on a full connection
        self.holding.set()
        self._broken = refuses
        self._downs: asyncio.Queue[GenerationsDown | None] = asyncio.Queue()
        if refuses:
            self._downs.put_nowait(None)

    async def send(self, up: GenerationsUp) -> None:
        await self.holding.wait()
        if self._broken:
            raise PeerUnavailable("the stream is broken")
        self.sent.append(up)

    def __aiter__(self) -> AsyncIterator[GenerationsDown]:
        return self._read()

    async def _read(self) -> AsyncIterator[GenerationsDown]:
        while (down := await self._downs.get()) is not None:
            yield down
        if self._broken:
            raise PeerUnavailable("the stream is broken")

    async def close(self) -> None:
        self.closed = True

    def answer(self, down: GenerationsDown) -> None:
        """The other side speaks."""
        self._downs.put_nowait(down)

    def cut(self) -> None:
        """The connection breaks."""
        self._broken = True
        self.holding.set()
        self._downs.put_nowait(None)

    def end(self) -> None:
        """The other side closes the stream in order."""
        self._downs.put_nowait(None)


class FakeNetwork:
    """Every stream that was opened, by address in order; addresses in `away` refuse."""

    def __init__(self) -> None:
        self.streams: list[FakeStream] = []
        self.away: set[str] = set()

    def connect(self, address: str, kind: str, addressee: str = "") -> FakeStream:
        stream = FakeStream(address, kind, refuses=address in self.away)
        stream.addressee = addressee
        self.streams.append(stream)
        return stream

    def to(self, address: str) -> list[FakeStream]:
        return [stream for stream in self.streams if stream.address == address]

    async def stream(self, address: str, number: int = 0) -> FakeStream:
        """The so many-th stream to an address, once it is open."""
        await until(f"stream {number} to {address}", lambda: len(self.to(address)) > number)
        return self.to(address)[number]
