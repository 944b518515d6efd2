"""Runs one order against the backend and writes the answer, as one JSON object or as an event stream.

Called by App once per generation request. Whatever ends it (the last token, a stop string, an error, the client's
leaving, the deadline), the backend's generators are closed before it returns.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from xllm_py.base.clock import Clock
from xllm_py.base.errors import InternalServerError
from xllm_py.base.tasks import TaskFamily
from xllm_py.openai import sse
from xllm_py.openai.answer import Answer
from xllm_py.openai.backend import Backend
from xllm_py.openai.detokenizer import Vocabulary
from xllm_py.openai.exchange import Exchange
from xllm_py.openai.intake import Order
from xllm_py.openai.measures import Measures
from xllm_py.openai.sources import Sources, open_sources


class Generation:
    """One order on its way to its client."""

    def __init__(
        self,
        exchange: Exchange,
        order: Order,
        *,
        vocabulary: Vocabulary,
        measures: Measures,
        clock: Clock,
    ) -> None:
        self._exchange = exchange
        self._order = order
        self._measures = measures
        self._clock = clock
        self._answers = [Answer(vocabulary, each.sampling) for each in order.submissions]
        self._num_open = len(self._answers)
        self._last_at: list[float | None] = [None] * len(self._answers)

    async def run(self, backend: Backend, tasks: TaskFamily) -> None:
        """Generate and answer; raises RequestError leaves, before or after the first byte."""
        sources = open_sources(backend, self._order.submissions, tasks)
        self._measures.prompt_tokens(self._num_prompt_tokens)
        try:
            if self._order.stream:
                await self._stream(sources)
            else:
                await self._whole(sources)
        finally:
            await sources.aclose()
            self._measures.generation_tokens(self._num_tokens)
            self._measures.cached_tokens(self._num_cached)
        self._measures.end_to_end(self._clock.now() - self._exchange.arrived)

    async def _stream(self, sources: Sources) -> None:
        order = self._order
        object_name = "chat.completion.chunk" if order.chat else "text_completion"
        chunks = sse.Chunks(
            chat=order.chat, head=self._head(object_name), with_usage=order.include_usage
        )
        begun = [False] * len(self._answers)
        while self._num_open:
            parts: list[bytes] = []
            for index, text in await self._next(sources):
                answer = self._answers[index]
                if not begun[index]:
                    begun[index] = True
                    parts.append(chunks.role(index))
                if text:
                    parts.append(chunks.text(index, answer.num_tokens - 1, text))
                if answer.finish_reason:
                    parts.append(chunks.finish(index, answer.finish_reason))
            await self._exchange.write(b"".join(parts))
        last = chunks.usage(self._usage()) if order.include_usage else b""
        await self._exchange.write(last + sse.DONE, last=True)

    async def _whole(self, sources: Sources) -> None:
        texts: list[list[str]] = [[] for _ in self._answers]
        while self._num_open:
            for index, text in await self._next(sources):
                texts[index].append(text)
        head = self._head("chat.completion" if self._order.chat else "text_completion")
        choices = [
            self._choice(index, "".join(parts), self._answers[index].finish_reason)
            for index, parts in enumerate(texts)
        ]
        body = {**head, "choices": choices, "usage": self._usage()}
        await self._exchange.respond(200, msgspec.json.encode(body))

    async def _next(self, sources: Sources) -> list[tuple[int, str]]:
        """New text per prompt index; a prompt that has finished is closed before its text is handed out."""
        news = await sources.next()
        if not news:
            raise InternalServerError("the answer ended without a reason; try again")
        now = self._clock.now()
        texts: list[tuple[int, str]] = []
        for index, delta in news:
            answer = self._answers[index]
            if answer.has_ended():
                continue
            num_before = answer.num_tokens
            texts.append((index, answer.take(delta)))
            self._observe(index, now, answer.num_tokens - num_before)
            if answer.has_ended():
                self._num_open -= 1
                await sources.close(index)
        return texts

    def _observe(self, index: int, now: float, num_new: int) -> None:
        last_at = self._last_at[index]
        self._last_at[index] = now
        if last_at is None:
            self._measures.first_token(now - self._exchange.arrived)
        elif num_new:
            self._measures.between_tokens((now - last_at) / num_new)

    def _head(self, object_name: str) -> dict[str, object]:
        model = self._order.model
        return {
            "id": self._order.response_id,
            "object": object_name,
            "created": self._exchange.arrived_wall,
            "model": model.name,
            "system_fingerprint": model.fingerprint,
        }

    def _choice(self, index: int, text: str, reason: str) -> Mapping[str, object]:
        said: dict[str, object] = (
            {"message": {"role": "assistant", "content": text}}
            if self._order.chat
            else {"text": text}
        )
        return {"index": index, **said, "logprobs": None, "finish_reason": reason}

    def _usage(self) -> Mapping[str, object]:
        return {
            "prompt_tokens": self._num_prompt_tokens,
            "completion_tokens": self._num_tokens,
            "total_tokens": self._num_prompt_tokens + self._num_tokens,
            "prompt_tokens_details": {"cached_tokens": self._num_cached},
        }

    @property
    def _num_prompt_tokens(self) -> int:
        return sum(len(each.prompt_ids) for each in self._order.submissions)

    @property
    def _num_tokens(self) -> int:
        return sum(answer.num_tokens for answer in self._answers)

    @property
    def _num_cached(self) -> int:
        return sum(answer.cached_tokens for answer in self._answers)
