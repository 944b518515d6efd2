"""The two request bodies as strict msgspec Structs, and what is wrong with a body in OpenAI's words.

Called by `intake` with raw bytes; returns values or raises RequestError leaves with the path in `param`. Knows no
tokenizer, no model and no limits that depend on either.
"""

from __future__ import annotations

import re
from typing import Any, TypeVar

import msgspec

from xllm_py.base.errors import (
    InvalidJson,
    InvalidType,
    InvalidValue,
    MissingField,
    RequestError,
    UnsupportedField,
)

MAX_DEPTH = 32
MAX_LABEL_CHARS = 128


class StreamOptions(msgspec.Struct, frozen=True):
    """`stream_options`."""

    include_usage: bool | None = None


class JsonSchemaFormat(msgspec.Struct, frozen=True):
    """`response_format.json_schema`. What is honoured is always honoured strictly."""

    schema: dict[str, Any]
    name: str | None = None
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(msgspec.Struct, frozen=True):
    """`response_format`: text, json_object or json_schema."""

    type: str
    json_schema: JsonSchemaFormat | None = None


class Common(msgspec.Struct, frozen=True, kw_only=True):
    """What both bodies share. None is what absence is."""

    model: str
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    add_special_tokens: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = None
    best_of: int | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    min_tokens: int | None = None
    prompt_logprobs: int | None = None
    response_format: ResponseFormat | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    beam_width: int | None = None
    user: str | None = None
    request_id: str | None = None
    cache_salt: str | None = None
    priority: int | None = None
    offline: bool | None = None
    ttft_slo_ms: float | None = None
    tpot_slo_ms: float | None = None


class CompletionBody(Common, frozen=True, kw_only=True):
    """POST /v1/completions."""

    prompt: str | list[str | int | list[int]]
    echo: bool | None = None
    logprobs: int | None = None


class Part(msgspec.Struct, frozen=True):
    """One part of a message's content; only text for now."""

    type: str
    text: str | None = None


class FunctionCall(msgspec.Struct, frozen=True):
    """What an assistant message called; arguments are JSON in a string."""

    name: str
    arguments: str = ""


class ToolCall(msgspec.Struct, frozen=True):
    """One entry of an assistant message's tool_calls."""

    function: FunctionCall
    id: str = ""
    type: str = "function"


class Message(msgspec.Struct, frozen=True):
    """One turn of a conversation."""

    role: str
    content: str | list[Part] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None


class ChatBody(Common, frozen=True, kw_only=True):
    """POST /v1/chat/completions."""

    messages: list[Message]
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    modalities: list[str] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: str | None = None


class TokenizeBody(msgspec.Struct, frozen=True):
    """POST /tokenize."""

    prompt: str
    model: str | None = None
    add_special_tokens: bool | None = None


class DetokenizeBody(msgspec.Struct, frozen=True):
    """POST /detokenize."""

    tokens: list[int]
    model: str | None = None
    skip_special_tokens: bool | None = None


B = TypeVar("B", CompletionBody, ChatBody, TokenizeBody, DetokenizeBody)

# known to other servers, refused by name so that nobody believes they had an effect
_REFUSED = frozenset(
    {
        "num_return_sequences",
        "suffix",
        "input_tensors",
        "audio",
        "functions",
        "function_call",
        "prompt_embeds",
        "chat_template",
        "tokens_embeds",
    }
)
_MESSAGE = re.compile(r"(?P<cause>.*?)(?: - at `\$(?P<path>.*)`)?", re.DOTALL)
_MISSING = re.compile(r"Object missing required field `(?P<name>[^`]*)`")
_STRING = re.compile(rb'"(?:[^"\\]|\\.)*"', re.DOTALL)
_NOT_BRACKETS = bytes(byte for byte in range(256) if byte not in b"[]{}")


def parse(data: bytes, kind: type[B]) -> tuple[B, list[str]]:
    """The body and the names of top-level fields that were ignored.

    Raises InvalidJson, InvalidType, MissingField or UnsupportedField.
    """
    try:
        body = msgspec.json.decode(data, type=kind)
        names = msgspec.json.decode(data, type=dict[str, msgspec.Raw])
    except msgspec.ValidationError as error:
        raise _validation_error(str(error)) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidJson("the body is not valid JSON in UTF-8; check quotes and commas") from error
    _check_depth(data)
    ignored = sorted(set(names).difference(kind.__struct_fields__))
    for name in ignored:
        if name in _REFUSED and bytes(names[name]) != b"null":
            raise UnsupportedField(f"{name} is not supported; leave it out", param=name)
    return body, ignored


def _check_depth(data: bytes) -> None:
    """For well-formed JSON only: on anything else the search for strings could take quadratic time."""
    if data.count(b"[") + data.count(b"{") <= MAX_DEPTH:
        return
    depth = 0
    for byte in _STRING.sub(b"", data).translate(None, _NOT_BRACKETS):
        depth += 1 if byte in b"[{" else -1
        if depth > MAX_DEPTH:
            raise InvalidJson(f"the body is nested deeper than {MAX_DEPTH} levels")


def _validation_error(text: str) -> RequestError:
    """msgspec's sentence as ours: names and types of the schema, a path, never a value."""
    found = _MESSAGE.fullmatch(text)
    cause, path = (found["cause"], found["path"] or "") if found else (text, "")
    path = path.removeprefix(".")
    missing = _MISSING.match(cause)
    if missing:
        name = f"{path}.{missing['name']}" if path else missing["name"]
        return MissingField(f"{name} is missing; it is required", param=name)
    if path == "[...]" or not path:
        return InvalidType(f"the body is wrong: {cause.replace('`', '')}", param=path or None)
    return InvalidType(f"{path}: {cause.replace('`', '')}", param=path)


def check_labels(body: Common) -> None:
    """Lengths of the fields that are only labels; raises InvalidValue."""
    for name in ("user", "request_id", "cache_salt"):
        value = getattr(body, name)
        if value is not None and len(value) > MAX_LABEL_CHARS:
            raise InvalidValue(f"{name} is longer than {MAX_LABEL_CHARS} characters", param=name)
