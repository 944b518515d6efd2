"""Relayed mode on P (ENABLE_DECODE_RESPONSE_TO_SERVICE=false): D's stream ends here, its messages go on to the master unchanged.

What the master says of a relayed request comes back on our own stream to it and is handed down to D.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator

from xllm_py.base.clock import Clock
from xllm_py.base.tasks import TaskFamily
from xllm_py.core.plan import FINISH_LENGTH, FINISH_STOP, Outputs
from xllm_py.instance.generations import Generations
from xllm_py.instance.outlets import Destination
from xllm_py.wire.control_messages import Cancels, GenerationsDown, GenerationsUp, Positions

_MOST_REQUESTS = 10_000
_TIMEOUT_S = 600.0
Downs = asyncio.Queue[GenerationsDown | None]  # None ends the stream


class Relay:
    """All streams of decode instances that end here."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._deadlines: dict[
            str, float
        ] = {}  # relayed request -> when nobody waits for it any more
        self._masters: dict[str, Destination] = {}  # relayed request -> its master
        self._attempts: dict[str, int] = {}  # relayed request -> the attempt that is relayed
        self._takers: dict[str, Downs] = {}  # relayed request -> the stream its D speaks on
        self._going_on: dict[str, set[int]] = {}  # choices whose end is not acknowledged
        self._finished: dict[
            str, dict[int, int]
        ] = {}  # choice -> where its finish stood that has passed through

    def open(
        self,
        request_id: str,
        master: Destination,
        num_choices: int = 1,
        *,
        attempt: int = 1,
        timeout_s: float = _TIMEOUT_S,
    ) -> None:
        """A request whose answer will come through here, in place of an earlier attempt. The oldest are forgotten when there are too many."""
        before = self._attempts.get(request_id, attempt)
        if before != attempt:
            self.cancel(request_id, before)  # its D may wait for words on what it said
        self.close(request_id)
        self._masters[request_id], self._attempts[request_id] = master, attempt
        self._deadlines[request_id] = self._clock.now() + timeout_s
        self._going_on[request_id] = set(range(num_choices))
        self._finished[request_id] = {}
        while len(self._masters) > _MOST_REQUESTS:
            self.close(next(iter(self._masters)))

    def close(self, request_id: str) -> None:
        """Nothing more will come."""
        self._masters.pop(request_id, None)
        self._attempts.pop(request_id, None)
        self._deadlines.pop(request_id, None)
        self._takers.pop(request_id, None)
        self._going_on.pop(request_id, None)
        self._finished.pop(request_id, None)

    def expire(self) -> None:
        """Forget what is past its deadline: its D went straight to the master before it spoke here even once, or is gone."""
        now = self._clock.now()
        for request_id in [name for name, at in self._deadlines.items() if at <= now]:
            self.cancel(request_id)

    def cancel(self, request_id: str, attempt: int = 0) -> None:
        """Nobody waits for this attempt any more; 0: for none. A D that spoke here is told: it may have said all it has to, and wait for words
        on that.
        """
        if attempt not in (0, self._attempts.get(request_id)):
            return
        taker = self._takers.get(request_id)
        self.close(request_id)
        if taker is not None:
            taker.put_nowait(_cancel([(request_id, attempt)]))

    def on_own_outputs(self, outputs: Outputs) -> None:
        """What our own engine said: choices that it finished itself are not handed over, so nothing of them will come through here."""
        columns = zip(
            outputs.request_ids,
            outputs.attempts,
            outputs.choices,
            outputs.finish_reasons,
            strict=True,
        )
        for request_id, attempt, choice, reason in columns:
            if attempt != self._attempts.get(request_id):
                continue
            if reason in (FINISH_STOP, FINISH_LENGTH):
                self._end(request_id, choice)
            elif reason:
                self.close(request_id)

    def _end(self, request_id: str, choice: int) -> None:
        """Nothing more will come of one choice; with the last one the request is over."""
        going_on = self._going_on.get(request_id)
        if going_on is not None:
            going_on.discard(choice)
            if not going_on:
                self.close(request_id)

    @property
    def num_open(self) -> int:
        """Relayed requests, for the ledger."""
        return len(self._masters)

    async def serve(
        self, ups: AsyncIterator[GenerationsUp], generations: Generations
    ) -> AsyncGenerator[GenerationsDown, None]:
        """One D's stream: pass its messages on, yield what its masters answer."""
        queue: Downs = asyncio.Queue()
        tasks = TaskFamily("relay")
        reader = tasks.start(self._read(ups, queue, generations), name="read")
        reader.add_done_callback(lambda _: queue.put_nowait(None))
        try:
            while (down := await queue.get()) is not None:
                yield down
        finally:
            self._on_left(queue)
            await tasks.close()

    async def _read(
        self,
        ups: AsyncIterator[GenerationsUp],
        queue: Downs,
        generations: Generations,
    ) -> None:
        async for up in ups:
            masters = {self._masters.get(name) for name in up.outputs.request_ids}
            unknown = []
            for index, key in enumerate(
                zip(up.outputs.request_ids, up.outputs.attempts, strict=True)
            ):
                request_id, attempt = key
                if attempt != self._attempts.get(request_id):
                    unknown.append(key)
                    continue
                self._takers[request_id] = queue
                self._on_finish(up.outputs, index)
            for master in masters:
                if master is not None:
                    generations.forward(master, up)
            if unknown:
                queue.put_nowait(_cancel(unknown))

    def _on_finish(self, outputs: Outputs, index: int) -> None:
        """An entry passes through. An error, told of one choice, ends them all."""
        request_id, choice = outputs.request_ids[index], outputs.choices[index]
        reason = outputs.finish_reasons[index]
        if reason:
            self._finished[request_id][choice] = outputs.positions[index]
            if reason not in (FINISH_STOP, FINISH_LENGTH):
                self._going_on[request_id] = {choice}

    def _on_left(self, queue: Downs) -> None:
        """A taker's stream is over: what it said there comes from it to the master directly from now on."""
        for request_id in [name for name, held in self._takers.items() if held is queue]:
            self.close(request_id)

    def cut(self, master: Destination) -> None:
        """The stream to a master broke: end those of the takers concerned, so that they say what is lost to it themselves."""
        for request_id, queue in self._takers.items():
            if self._masters.get(request_id) == master:
                queue.put_nowait(None)

    def take(self, down: GenerationsDown) -> GenerationsDown:
        """Hand a master's words on relayed requests down to their D; returns what is meant for ourselves."""
        if not self._masters:
            return down
        ours = GenerationsDown()
        for name in ("acks", "again"):
            column: Positions = getattr(down, name)
            rows = zip(
                column.request_ids, column.attempts, column.choices, column.nexts, strict=True
            )
            for request_id, attempt, choice, position in rows:
                # the first token was our own, so every word about positions is ours too; position 1 is about nothing else
                getattr(ours, name).add(request_id, attempt, choice, position)
                first = name == "acks" and position == 1
                target = ours if first else self._to(request_id, attempt, ours)
                if target is not ours:
                    getattr(target, name).add(request_id, attempt, choice, position)
                    self._flush(request_id, target)
        cancels = zip(down.cancels.request_ids, down.cancels.attempts, strict=True)
        for request_id, attempt in cancels:
            target = self._to(request_id, attempt, ours)
            target.cancels.request_ids.append(request_id)
            target.cancels.attempts.append(attempt)
            if target is not ours:
                self._flush(request_id, target)
        return ours

    def _to(self, request_id: str, attempt: int, ours: GenerationsDown) -> GenerationsDown:
        relayed = request_id in self._takers and attempt in (0, self._attempts.get(request_id))
        return GenerationsDown() if relayed else ours

    def _flush(self, request_id: str, target: GenerationsDown) -> None:
        self._takers[request_id].put_nowait(target)
        if target.cancels.request_ids:
            self.close(request_id)
        for choice, known in zip(target.acks.choices, target.acks.nexts, strict=True):
            # words on our own first token, told again after a break, may come after the finish went by
            if known > self._finished.get(request_id, {}).get(choice, known):
                self._end(request_id, choice)


def _cancel(keys: list[tuple[str, int]]) -> GenerationsDown:
    """Nobody waits for these requests and attempts, 0 for all."""
    request_ids, attempts = map(list, zip(*keys, strict=True))
    return GenerationsDown(cancels=Cancels(request_ids=request_ids, attempts=attempts))
