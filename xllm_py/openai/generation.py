"""Runs one order against the backend and writes the answer, as one JSON object or as an event stream.

Called by App once per generation request. Whatever ends it (the last token, a stop string, an error, the client's
leaving, the deadline), the backend's generators are closed before it returns.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Protocol

import msgspec

from xllm_py.base.clock import Clock
from xllm_py.base.errors import InternalServerError
from xllm_py.base.tasks import TaskFamily
from xllm_py.openai import logprobs, sse
from xllm_py.openai.backend import Backend
from xllm_py.openai.choices import Choices, Piece
from xllm_py.openai.detokenizer import Vocabulary
from xllm_py.openai.intake import Order
from xllm_py.openai.logprobs import Scored
from xllm_py.openai.measures import Measures
from xllm_py.openai.ranking import ranked
from xllm_py.openai.sources import Sources, open_sources

_NO_STREAM = (b"x-xllm-stream", b"off; reason=best_of")
_ON_LOOP_LOGPROBS = 500  # writing so many takes about a millisecond

# runs a piece of work at once or, when told that it is long, in a thread
Do = Callable[[bool, Callable[[], bytes]], Awaitable[bytes]]


class Outlet(Protocol):
    """Where an answer goes: Exchange, to a client; kept.Kept, to whoever follows it."""

    arrived: float
    arrived_wall: int

    async def write(self, data: bytes, *, last: bool = False) -> None:
        """A piece of an event stream."""
        ...

    async def respond(
        self, status: int, body: bytes, *, headers: Iterable[tuple[bytes, bytes]] = ()
    ) -> None:
        """A whole answer at once, as JSON."""
        ...


class Generation:
    """One order on its way to its client."""

    def __init__(
        self,
        exchange: Outlet,
        order: Order,
        *,
        vocabulary: Vocabulary,
        measures: Measures,
        clock: Clock,
        do: Do,
    ) -> None:
        self._exchange = exchange
        self._order = order
        self._vocabulary = vocabulary
        self._measures = measures
        self._clock = clock
        self._do = do
        self._choices = Choices(order, vocabulary)
        self._last_at: list[float | None] = [None] * len(self._choices.answers)

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
            self._measures.generation_tokens(self._choices.num_tokens)
            self._measures.cached_tokens(self._choices.num_cached)
        self._measures.end_to_end(self._clock.now() - self._exchange.arrived)

    # --- a stream

    async def _stream(self, sources: Sources) -> None:
        order = self._order
        object_name = "chat.completion.chunk" if order.chat else "text_completion"
        chunks = sse.Chunks(
            chat=order.chat, head=self._head(object_name), with_usage=order.include_usage
        )
        begun = [False] * len(self._choices.answers)
        while self._choices.num_open:
            parts: list[bytes] = []
            for piece in await self._next(sources):
                if not begun[piece.index]:
                    begun[piece.index] = True
                    parts.append(await self._opening(chunks, piece.index))
                parts.append(self._news(chunks, piece))
            if parts:
                await self._exchange.write(b"".join(parts))
        last = chunks.usage(self._usage()) if order.include_usage else b""
        await self._exchange.write(last + sse.DONE, last=True)

    async def _opening(self, chunks: sse.Chunks, index: int) -> bytes:
        """What a choice says before its first token."""
        prompt = index // self._order.best_of
        if not self._order.shown.echo:
            return chunks.role(index)
        return await self._do(
            self._is_long(prompt),
            lambda: chunks.echo(
                index,
                self._order.prompt_texts[prompt],
                msgspec.json.encode(self._logprobs(self._echoed(prompt))),
            ),
        )

    def _news(self, chunks: sse.Chunks, piece: Piece) -> bytes:
        """Tokens whose text is empty to the end go with the last chunk."""
        written = b"null"
        if piece.scored:
            written = msgspec.json.encode(self._logprobs(self._moved(piece.index, piece.scored)))
        data = b""
        if piece.text:
            position = self._choices.answers[piece.index].num_tokens - 1
            data = chunks.text(piece.index, position, piece.text, written)
            written = b"null"
        if piece.finish_reason:
            data += chunks.finish(piece.index, piece.finish_reason, written)
        return data

    # --- a whole answer

    async def _whole(self, sources: Sources) -> None:
        texts: list[list[str]] = [[] for _ in self._choices.answers]
        scored: list[list[Scored]] = [[] for _ in self._choices.answers]
        while self._choices.num_open:
            for piece in await self._next(sources):
                texts[piece.index].append(piece.text)
                scored[piece.index] += piece.scored
        order = self._order

        def body() -> bytes:
            head = self._head("chat.completion" if order.chat else "text_completion")
            choices = [
                self._choice(index, kept, "".join(texts[kept]), scored[kept])
                for index, kept in enumerate(self._kept())
            ]
            return msgspec.json.encode({**head, "choices": choices, "usage": self._usage()})

        is_long = any(self._is_long(prompt) for prompt in range(len(order.submissions)))
        data = await self._do(is_long, body)
        headers = (_NO_STREAM,) if order.stream_refused else ()
        await self._exchange.respond(200, data, headers=headers)

    def _kept(self) -> list[int]:
        """Indices of the candidates that are shown, in the order of the answer's choices."""
        wanted = self._order.shown
        if not wanted.ranked:
            return list(range(len(self._choices.answers)))
        kept = []
        for prompt in range(len(self._order.submissions)):
            scores = [answer.score for answer in self._choices.of(prompt)]
            kept += [prompt * wanted.best_of + choice for choice in ranked(scores, wanted.n)]
        return kept

    def _choice(
        self, index: int, kept: int, text: str, scored: Sequence[Scored]
    ) -> Mapping[str, object]:
        wanted = self._order.shown
        prompt = kept // wanted.best_of
        scored = self._moved(kept, scored)
        if wanted.echo:
            text = self._order.prompt_texts[prompt] + text
            scored = [*self._echoed(prompt), *scored]
        said: dict[str, object] = (
            {"message": {"role": "assistant", "content": text}}
            if self._order.chat
            else {"text": text}
        )
        choice = {"index": index, **said, "logprobs": self._logprobs(scored)}
        if wanted.prompt_logprobs >= 0:
            choice["prompt_logprobs"] = logprobs.prompt_shape(
                self._vocabulary,
                self._order.submissions[prompt].prompt_ids,
                self._choices.prompt_logprobs(prompt),
                wanted.prompt_logprobs,
            )
        return {**choice, "finish_reason": self._choices.answers[kept].finish_reason}

    # --- both

    async def _next(self, sources: Sources) -> list[Piece]:
        """What is new; a prompt whose choices have all ended is closed before its text is handed out."""
        news = await sources.next()
        if not news:
            raise InternalServerError("the answer ended without a reason; try again")
        now = self._clock.now()
        found: list[Piece] = []
        for prompt, delta in news:
            pieces = self._choices.take(prompt, delta)
            for piece in pieces:
                self._observe(piece.index, now, piece.num_new)
            if pieces and self._choices.has_ended(prompt):
                await sources.close(prompt)
            found += pieces
        return found

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

    def _logprobs(self, scored: Sequence[Scored]) -> object:
        """In the shape of the route; None when nobody asked."""
        num_top = self._order.shown.logprobs
        if num_top < 0:
            return None
        shape = logprobs.chat_shape if self._order.chat else logprobs.completion_shape
        return shape(self._vocabulary, scored, num_top)

    def _echoed(self, prompt: int) -> list[Scored]:
        """The prompt's tokens, when its text and logprobs are both shown."""
        if self._order.shown.logprobs < 0:
            return []
        return logprobs.of_prompt(
            self._vocabulary,
            self._order.submissions[prompt].prompt_ids,
            self._choices.prompt_logprobs(prompt),
            self._order.prompt_texts[prompt],
        )

    def _moved(self, index: int, scored: Sequence[Scored]) -> Sequence[Scored]:
        """With offsets that count from the beginning of an echoed prompt."""
        if not self._order.shown.echo:
            return scored
        num_before = len(self._order.prompt_texts[index // self._order.best_of])
        return [Scored(each.token_id, each.logprob, each.offset + num_before) for each in scored]

    def _is_long(self, prompt: int) -> bool:
        """Whether writing the logprobs of one prompt and its answers would stop the event loop for long."""
        wanted = self._order.shown
        sampling = self._order.submissions[prompt].sampling
        num_prompt = len(self._order.submissions[prompt].prompt_ids)
        num_tokens = num_prompt if sampling.prompt_logprobs >= 0 else 0
        if wanted.logprobs >= 0:
            num_tokens += sum(answer.num_tokens for answer in self._choices.of(prompt))
        num_top = max(wanted.logprobs, wanted.prompt_logprobs, 0)
        return num_tokens * (1 + num_top) > _ON_LOOP_LOGPROBS

    def _usage(self) -> Mapping[str, object]:
        num_prompt, num_tokens = self._num_prompt_tokens, self._choices.num_tokens
        return {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_tokens,
            "total_tokens": num_prompt + num_tokens,
            "prompt_tokens_details": {"cached_tokens": self._choices.num_cached},
        }

    @property
    def _num_prompt_tokens(self) -> int:
        return sum(len(each.prompt_ids) for each in self._order.submissions)
