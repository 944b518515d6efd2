"""From a request body to submissions: parse, check, render, encode, fill in defaults.

Called by the generation routes. What may take longer than a millisecond (large bodies, long prompts, templates) runs in
the door's own few threads. Never talks to an engine.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TypeVar, cast

from xllm_py.base import ids, log
from xllm_py.base.errors import (
    InvalidType,
    InvalidValue,
    ModelNotFound,
    NoCompatibleDecode,
    NoInstances,
    UnsupportedField,
)
from xllm_py.core.request import Submission
from xllm_py.openai.backend import Backend, ServedModel
from xllm_py.openai.chat_template import ChatTemplate
from xllm_py.openai.conversation import conversation
from xllm_py.openai.neutral import check_neutral
from xllm_py.openai.sampling_fields import Shown, sampling_params, shown, urgency
from xllm_py.openai.schema import (
    B,
    ChatBody,
    Common,
    CompletionBody,
    check_labels,
    parse,
)
from xllm_py.openai.settings import HttpSettings
from xllm_py.openai.structured import Grammars
from xllm_py.openai.tokenizer import Tokenizer

_log = log.get(__name__)

_ON_LOOP_CHARS = 2048  # encoding so much text takes about half a millisecond
_ON_LOOP_BODY_BYTES = 32 << 10
_ENCODE_TIMEOUT_S = 10.0
_ON_LOOP_TOKENS = 1000

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """A checked request: one submission per prompt, and how the answer is wanted."""

    response_id: str
    chat: bool
    model: ServedModel
    submissions: tuple[Submission, ...]
    shown: Shown
    stream: bool
    stream_refused: bool  # the client asked for a stream, but best_of is known only at the end
    include_usage: bool
    label: str | None  # the body's request_id
    prompt_texts: tuple[str, ...] = ()  # of each prompt when it is to be echoed

    @property
    def best_of(self) -> int:
        """Candidates of each prompt."""
        return self.shown.best_of

    def traced(self, trace: str) -> Order:
        """As a part of the client's trace; empty: of none."""
        if not trace:
            return self
        traced = tuple(replace(each, trace=trace) for each in self.submissions)
        return replace(self, submissions=traced)

    def kept_as(self, identity: bytes, origin: bytes) -> Order:
        """Under an id that every master gives it; within the cluster its requests go by names of their own, so that two masters may have it."""
        shown = f"{self.response_id.partition('-')[0]}-{identity.hex()[:24]}"
        life = ids.life_of(shown)
        named = tuple(
            replace(
                each,
                request_id=life if index == 0 else f"{life}-{index}",
                stream_id=shown if index == 0 else f"{shown}-{index}",
                origin=origin if index == 0 else b"",
            )
            for index, each in enumerate(self.submissions)
        )
        return replace(self, response_id=shown, submissions=named)


@dataclass(frozen=True, slots=True)
class _Caller:
    """Who asks, for how long, and what seeds the request gets that it does not bring."""

    tenant: str
    timeout_s: float
    draw_seed: Callable[[], int]


class Intake:
    """Holds what a request is checked against. `close` ends its threads."""

    def __init__(
        self,
        backend: Backend,
        tokenizer: Tokenizer,
        template: ChatTemplate | None,
        *,
        settings: HttpSettings,
        on_ignored: Callable[[int], None],
    ) -> None:
        self._backend = backend
        self._tokenizer = tokenizer
        self._template = template
        self._settings = settings
        self._on_ignored = on_ignored
        self._draw_seed = _seeds(settings.random_seed)
        self._grammars = Grammars()
        self._threads = ThreadPoolExecutor(max_workers=2, thread_name_prefix="text")

    def close(self) -> None:
        """Let the threads end; what they work on is nobody's any more."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._grammars.close()

    async def completion(
        self, data: bytes, timeout_s: float, tenant: str = "", identity: bytes = b""
    ) -> Order:
        """The order of a /v1/completions body; raises RequestError leaves of status 400, 404 or 503.

        tenant: the id of the caller's API key; cached prefixes are not shared between tenants. identity: what seeds that the client does not
        send come from; empty: chance.
        """
        body = await self.read(data, CompletionBody)
        model = self._checked_model(body)
        grammar = await self._grammars.grammar(body)
        special = body.add_special_tokens is not False
        texts, prompts = await self.do(
            len(data) > _ON_LOOP_BODY_BYTES,
            lambda: _split_prompts(body.prompt, self._settings.max_prompts, model.vocab_size),
        )
        prompts += await self.encode(texts, special=special, param="prompt")
        if body.echo and not texts:
            texts = await self._decode(prompts, skip=body.skip_special_tokens is not False)
        caller = _Caller(tenant, timeout_s, _seeds_of(identity) if identity else self._draw_seed)
        order = self._order(body, model, prompts, caller, grammar)
        return replace(order, prompt_texts=tuple(texts)) if body.echo else order

    async def chat(
        self, data: bytes, timeout_s: float, tenant: str = "", identity: bytes = b""
    ) -> Order:
        """The order of a /v1/chat/completions body; raises as `completion` does."""
        body = await self.read(data, ChatBody)
        model = self._checked_model(body)
        if self._template is None:
            raise UnsupportedField(
                "this model has no chat template; use /v1/completions", param="messages"
            )
        grammar = await self._grammars.grammar(body)
        large = len(data) > _ON_LOOP_BODY_BYTES
        messages = await self.do(large, lambda: conversation(body.messages))
        variables = dict(body.chat_template_kwargs or {})
        if body.reasoning_effort is not None:
            variables.setdefault("reasoning_effort", body.reasoning_effort)
        template = self._template
        text = await self.do(True, lambda: template.render(messages, variables))
        special = body.add_special_tokens is True
        prompts = await self.encode([text], special=special, param="messages")
        caller = _Caller(tenant, timeout_s, _seeds_of(identity) if identity else self._draw_seed)
        return self._order(body, model, prompts, caller, grammar)

    async def read(self, data: bytes, kind: type[B]) -> B:
        """Parse one body; fields nobody knows are dropped, counted and logged by name."""
        large = len(data) > _ON_LOOP_BODY_BYTES
        body, ignored = await self.do(large, lambda: parse(data, kind))
        if ignored:
            self._on_ignored(len(ignored))
            _log.debug("fields ignored", names=[name[:40] for name in ignored[:8]])
        return body

    async def encode(
        self, texts: Sequence[str], *, special: bool, param: str
    ) -> list[tuple[int, ...]]:
        """Token ids of each text, in a thread when they are long together; raises InvalidValue for an empty one."""

        def work() -> list[tuple[int, ...]]:
            encode = self._tokenizer.encode
            return [tuple(encode(text, add_special_tokens=special)) for text in texts]

        encoded = await self.do(sum(map(len, texts)) > _ON_LOOP_CHARS, work)
        if not all(encoded):
            raise InvalidValue(f"{param} is empty; give at least one token", param=param)
        return encoded

    async def _decode(self, prompts: Sequence[tuple[int, ...]], *, skip: bool) -> list[str]:
        """The text of prompts that came as ids."""

        def work() -> list[str]:
            decode = self._tokenizer.decode
            return [decode(prompt, skip_special_tokens=skip) for prompt in prompts]

        return await self.do(sum(map(len, prompts)) > _ON_LOOP_TOKENS, work)

    async def do(self, long: bool, work: Callable[[], T]) -> T:
        """Run at once, or, when it may be long, in one of the door's threads.

        Who waits too long gets a 400; the thread ends by itself.
        """
        if not long:
            return work()
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(_ENCODE_TIMEOUT_S):
                return await loop.run_in_executor(self._threads, work)
        except TimeoutError as error:
            raise InvalidValue("the prompt took too long to read; shorten it") from error

    def find_model(self, name: str) -> ServedModel:
        """A routable model by name; raises NoInstances when there is none at all, else ModelNotFound."""
        models = self._backend.models()
        if not models:
            reasons = self._backend.ready().reasons
            if NoCompatibleDecode.code in reasons:
                raise NoCompatibleDecode("no decode instance fits; /ready says what differs")
            why = ", ".join(reasons) or "no_instances"
            raise NoInstances(f"nothing can serve a request yet ({why}); try again soon")
        for model in models:
            if model.name == name:
                return model
        raise ModelNotFound("no such model is served; see /v1/models", param="model")

    def _checked_model(self, body: CompletionBody | ChatBody) -> ServedModel:
        check_neutral(body)
        check_labels(body)
        return self.find_model(body.model)

    def _order(
        self,
        body: Common,
        model: ServedModel,
        prompts: Sequence[tuple[int, ...]],
        caller: _Caller,
        grammar: str,
    ) -> Order:
        chat = isinstance(body, ChatBody)
        response_id = ids.request_id("chatcmpl" if chat else "cmpl")
        options = body.stream_options
        wanted = shown(body, self._settings)
        hurry = urgency(body)
        return Order(
            response_id=response_id,
            chat=chat,
            model=model,
            shown=wanted,
            stream=bool(body.stream) and not wanted.ranked,
            stream_refused=bool(body.stream) and wanted.ranked,
            include_usage=bool(options is not None and options.include_usage),
            label=body.request_id,
            submissions=tuple(
                Submission(
                    request_id=response_id if index == 0 else f"{response_id}-{index}",
                    model=model.name,
                    prompt_ids=prompt,
                    sampling=sampling_params(
                        body,
                        model,
                        wanted,
                        num_prompt=len(prompt),
                        seed=caller.draw_seed() if body.seed is None else body.seed,
                        grammar=grammar,
                    ),
                    timeout_s=caller.timeout_s,
                    cache_salt=_salt(caller.tenant, body.cache_salt),
                    **hurry,
                )
                for index, prompt in enumerate(prompts)
            ),
        )


def _salt(tenant: str, salt: str | None) -> str:
    """Who may share cached prefixes: nobody but this tenant, and of it only those who name the same salt."""
    return f"{tenant}\0{salt or ''}" if tenant or salt else ""


def _seeds_of(identity: bytes) -> Callable[[], int]:
    """The same ones in a row wherever this request is served."""
    generator = random.Random(identity)
    return lambda: generator.getrandbits(63)


def _seeds(base: int) -> Callable[[], int]:
    """Where seeds of requests without one come from; of one base always the same ones in a row."""
    if base < 0:
        return ids.seed
    generator = random.Random(base)
    return lambda: generator.getrandbits(63)


def _split_prompts(
    prompt: str | list[str | int | list[int]], max_prompts: int, vocab_size: int
) -> tuple[list[str], list[tuple[int, ...]]]:
    """Texts, or prompts of checked ids; never both."""
    if isinstance(prompt, str):
        return [prompt], []
    if not prompt:
        raise InvalidValue("prompt is empty; give at least one token", param="prompt")
    kinds = set(map(type, prompt))
    if len(kinds) > 1:
        raise InvalidType("prompt mixes strings and ids; use one kind", param="prompt")
    if kinds == {int}:
        return [], [_checked_ids(cast("list[int]", prompt), vocab_size)]
    if len(prompt) > max_prompts:
        raise InvalidValue(f"more than {max_prompts} prompts in one request", param="prompt")
    if kinds == {str}:
        return cast("list[str]", prompt), []
    return [], [_checked_ids(each, vocab_size) for each in cast("list[list[int]]", prompt)]


def _checked_ids(prompt: Sequence[int], vocab_size: int) -> tuple[int, ...]:
    if not prompt:
        raise InvalidValue("prompt is empty; give at least one token", param="prompt")
    if min(prompt) < 0 or max(prompt) >= vocab_size:
        raise InvalidValue(
            f"prompt holds a token id outside the vocabulary of {vocab_size}", param="prompt"
        )
    return tuple(prompt)
