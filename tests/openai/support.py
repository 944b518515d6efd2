"""What the door's tests share: a byte-level tokenizer in a folder, an echo backend, an ASGI client."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from xllm_py.base.clock import RealClock
from xllm_py.base.logprob import TokenLogprob
from xllm_py.base.metrics import Metrics
from xllm_py.core.request import Submission
from xllm_py.openai.app import App
from xllm_py.openai.backend import Delta, Readiness, ServedModel, Told
from xllm_py.openai.chat_template import load_chat_template
from xllm_py.openai.settings import HttpSettings
from xllm_py.openai.tokenizer import Tokenizer, load_tokenizer

TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
MODEL = ServedModel(name="tiny", max_model_len=256, vocab_size=300, created=7, fingerprint="fp_1")


def write_model_folder(folder: Path, template: str | None = TEMPLATE) -> Path:
    """256 byte tokens, two specials, one added word of several bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = tokenizers.Tokenizer(
        models.BPE(vocab={char: index for index, char in enumerate(alphabet)}, merges=[])
    )
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(["<|start|>", "<|end|>"])
    inner.add_tokens(["a wide word", "wörld!"])
    inner.save(str(folder / "tokenizer.json"))
    config: dict[str, Any] = {"eos_token": {"content": "<|end|>"}}
    if template is not None:
        config["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def logprob_of(token: int, num_top: int, choice: int = 0) -> TokenLogprob:
    """What the echo says of a token: the higher its id the less likely, and others below it likelier still."""
    return TokenLogprob(
        logprob=-token / 8 - choice,
        top_ids=tuple(range(num_top)),
        top_logprobs=tuple(-index / 8 for index in range(num_top)),
    )


@dataclass
class EchoBackend:
    """Says the prompt back; every switch a test needs is a field."""

    served: tuple[ServedModel, ...] = (MODEL,)
    state: Readiness = field(default_factory=lambda: Readiness(ready=True))
    piece: int = 1  # tokens per delta
    say: Callable[[Submission], tuple[int, ...]] = lambda submission: submission.prompt_ids
    # what each candidate says, when they are to differ
    candidates: Callable[[Submission, int], tuple[int, ...]] | None = None
    backwards: bool = False  # the last candidate speaks first
    score: Callable[..., TokenLogprob] = logprob_of
    unscored: bool = False  # leaves out logprobs it was asked for
    cached_tokens: int = 0
    finish: str = "stop"
    fail_at: int = -1  # token before which `failure` is raised
    failure: Exception | None = None
    hold_at: int = -1  # token before which it waits for `release`
    release: asyncio.Event = field(default_factory=asyncio.Event)
    submissions: list[Submission] = field(default_factory=list)
    num_open: int = 0
    num_tokens: int = 0
    closed_early: list[str] = field(default_factory=list)
    known: dict[str, Told] = field(default_factory=dict)  # by stream id, of another master
    recalled: list[str] = field(default_factory=list)

    async def recall(self, stream_id: str) -> Told | None:
        self.recalled.append(stream_id)
        return self.known.get(stream_id)

    async def until(self, good: Callable[[], bool], what: str) -> None:
        """Wait for a condition over this backend's fields."""
        for _ in range(5000):
            if good():
                return
            await asyncio.sleep(0.002)
        raise AssertionError(f"waited 10 s for: {what}")

    async def generate(
        self, submission: Submission, told: Told | None = None
    ) -> AsyncGenerator[Delta, None]:
        self.submissions.append(submission)
        start = len(told.ids) if told is not None else 0
        if told is not None and told.ids:
            yield Delta(position=0, token_ids=told.ids)
        self.num_open += 1
        finished = False
        best_of = submission.sampling.best_of
        order = range(best_of)[::-1] if self.backwards else range(best_of)
        limit = submission.sampling.max_tokens
        said = [self._said(submission, choice) for choice in range(best_of)]
        lengths = [min(len(each), limit) for each in said]
        num_going_on = best_of
        try:
            for at in range(start, max(lengths), self.piece):
                if at <= self.hold_at < at + self.piece:
                    await self.release.wait()
                if at <= self.fail_at < at + self.piece and self.failure is not None:
                    finished = True
                    raise self.failure
                for choice in order:
                    if at >= lengths[choice]:
                        continue
                    delta = self._delta(submission, choice, said[choice], at)
                    num_going_on -= at + self.piece >= lengths[choice]
                    finished = not num_going_on
                    self.num_tokens += len(delta.token_ids)
                    yield delta
                    if not finished:
                        await asyncio.sleep(0)
        finally:
            self.num_open -= 1
            if not finished:
                self.closed_early.append(submission.request_id)

    def _said(self, submission: Submission, choice: int) -> tuple[int, ...]:
        if self.candidates is not None:
            return self.candidates(submission, choice)
        return self.say(submission)

    def _delta(self, submission: Submission, choice: int, whole: tuple[int, ...], at: int) -> Delta:
        sampling = submission.sampling
        said = whole[: sampling.max_tokens]
        piece = said[at : at + self.piece]
        last = at + self.piece >= len(said)
        scores, of_prompt = (), ()
        if sampling.logprobs >= 0 and not self.unscored:
            scores = tuple(self.score(each, sampling.logprobs, choice) for each in piece)
        if sampling.prompt_logprobs >= 0 and not at and not choice and not self.unscored:
            num_top = sampling.prompt_logprobs
            of_prompt = tuple(logprob_of(each, num_top) for each in submission.prompt_ids[1:])
        return Delta(
            choice=choice,
            position=at,
            token_ids=piece,
            finish_reason=(self.finish if len(said) == len(whole) else "length") if last else "",
            cached_tokens=self.cached_tokens if last else 0,
            logprobs=scores,
            prompt_logprobs=of_prompt,
        )

    def models(self) -> tuple[ServedModel, ...]:
        return self.served

    def explain(self, request_id: str) -> str:
        return f"echo of {request_id}"

    def ready(self) -> Readiness:
        return self.state


@dataclass
class Answer:
    """What came back over ASGI."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    complete: bool = False
    sends: int = 0

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        return dict(self.json()["error"])

    @property
    def events(self) -> list[Any]:
        """Data of each event, decoded; "[DONE]" as it is."""
        found = []
        for block in self.body.decode().split("\n\n"):
            for line in block.split("\n"):
                if line.startswith("data: "):
                    data = line.removeprefix("data: ")
                    found.append(data if data == "[DONE]" else json.loads(data))
        return found

    def text(self, index: int = 0) -> str:
        """All text of one choice of a stream."""
        return "".join(
            choice.get("text") or choice.get("delta", {}).get("content", "")
            for event in self.events
            if isinstance(event, dict)
            for choice in event.get("choices", ())
            if choice["index"] == index
        )

    def finishes(self) -> dict[int, str]:
        return {
            choice["index"]: choice["finish_reason"]
            for event in self.events
            if isinstance(event, dict)
            for choice in event.get("choices", ())
            if choice["finish_reason"]
        }


class Call:
    """One request made straight into the app; `leave` is the client going away."""

    def __init__(
        self,
        app: App,
        method: str,
        path: str,
        body: object = None,
        headers: Mapping[str, str] | None = None,
        pieces: list[bytes] | None = None,
    ) -> None:
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        if body is None:
            raw = b""
        known = {"host": "localhost"}
        if body is not None:
            known |= {"content-type": "application/json", "content-length": str(len(raw))}
        known |= dict(headers or {})
        self.scope = {
            "type": "http",
            "method": method,
            "path": path,
            "raw_path": path.partition("?")[0].encode(),
            "query_string": path.partition("?")[2].encode(),
            "headers": [(k.encode(), v.encode()) for k, v in known.items()],
        }
        self._pieces = list(pieces) if pieces is not None else [raw]
        self._left = asyncio.Event()
        self.answer = Answer()
        self.hold_sends = asyncio.Event()
        self.hold_sends.set()
        self.task = asyncio.get_running_loop().create_task(
            app(self.scope, self._receive, self._send)
        )

    async def _receive(self) -> dict[str, Any]:
        if self._pieces:
            piece = self._pieces.pop(0)
            return {"type": "http.request", "body": piece, "more_body": bool(self._pieces)}
        await self._left.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: dict[str, Any]) -> None:
        await self.hold_sends.wait()
        self.answer.sends += 1
        if message["type"] == "http.response.start":
            self.answer.status = message["status"]
            self.answer.headers = {k.decode(): v.decode() for k, v in message["headers"]}
        else:
            self.answer.body += message["body"]
            self.answer.complete = not message["more_body"]

    def leave(self) -> None:
        self._left.set()
        self.hold_sends.set()

    async def done(self) -> Answer:
        await asyncio.wait_for(self.task, 20)
        return self.answer


@dataclass
class Door:
    """An app over an echo backend."""

    app: App
    backend: EchoBackend
    metrics: Metrics
    tokenizer: Tokenizer

    def call(self, method: str, path: str, body: object = None, **more: Any) -> Call:
        return Call(self.app, method, path, body, **more)

    async def ask(self, method: str, path: str, body: object = None, **more: Any) -> Answer:
        return await self.call(method, path, body, **more).done()

    async def complete(self, prompt: object, **fields: Any) -> Answer:
        body = {"model": "tiny", "prompt": prompt, **fields}
        return await self.ask("POST", "/v1/completions", body)

    async def chat(self, content: str = "hi", **fields: Any) -> Answer:
        body = {"model": "tiny", "messages": [{"role": "user", "content": content}], **fields}
        return await self.ask("POST", "/v1/chat/completions", body)

    def metric(self, name: str) -> float:
        """A sample of /metrics by its full name with labels; 0 when absent."""
        for line in self.metrics.text().decode().splitlines():
            if line.startswith(name + " "):
                return float(line.rpartition(" ")[2])
        return 0.0


def make_door(
    folder: Path,
    backend: EchoBackend | None = None,
    template: Any = None,
    **settings: Any,
) -> Door:
    backend = backend or EchoBackend()
    tokenizer = load_tokenizer(folder)
    metrics = Metrics()
    extra = settings.pop("extra_routes", None)
    app = App(
        backend,
        tokenizer,
        template,
        settings=HttpSettings(**settings),
        metrics=metrics,
        clock=RealClock(),
        extra_routes=extra,
    )
    return Door(app, backend, metrics, tokenizer)


def load_template(folder: Path) -> Any:
    return load_chat_template(folder, special_tokens=load_tokenizer(folder).special_tokens)


def check_error(answer: Answer, status: int, code: str, param: str | None) -> None:
    """An OpenAI error object with this status, code and param."""
    assert answer.status == status, answer.body
    error = answer.error
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["code"], error["param"]) == (code, param)
    assert error["message"]
    assert answer.headers["content-type"] == "application/json"


def ascii_ids(text: str) -> tuple[int, ...]:
    """Token ids of printable ASCII without spaces: the vocabulary's alphabet begins with "!"."""
    return tuple(ord(char) - ord("!") for char in text)
