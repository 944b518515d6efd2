"""What an answer must look like: from `response_format` and the guided_ fields to a grammar an engine can follow.

Called by `intake`. The grammar is JSON in llguidance's form, made here alone and followed by engine/grammar. Sizes are checked at
once; whether it compiles is found out by `grammar_child`, a process that is killed when it takes too long. What was found is kept
in a cache that is bounded in bytes. Nothing is compiled in the door's own process.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec

from xllm_py.base import log
from xllm_py.base.errors import InvalidType, InvalidValue, UnsupportedValue
from xllm_py.openai import grammar_child
from xllm_py.openai.child import LIMITS, START_TIMEOUT_S, WORK_TIMEOUT_S, Child
from xllm_py.openai.json_schema import check_schema
from xllm_py.openai.schema import Common

_log = log.get(__name__)

_MAX_SCHEMA_BYTES = 32 << 10
_MAX_REGEX_BYTES = 512
_MAX_GRAMMAR_BYTES = 32 << 10
_MAX_CHOICES = 1000
_MAX_CHOICE_BYTES = 16 << 10  # of all together
_CACHE_BYTES = 4 << 20
_ENTRY_BYTES = 256  # of an entry beside its grammar
_TIMEOUT_S = 10.0  # of the queue in front of the child and its work
_GUIDED = ("guided_json", "guided_regex", "guided_choice", "guided_grammar")
# spaces and line breaks between tokens of JSON are as the model likes, but not for ever
_WHITESPACE = r"[ \n]{1,8}"


class Grammars:
    """Checks grammars. `close` ends the child."""

    def __init__(self) -> None:
        self._child: Child[grammar_child.Checked] | None = None
        self._known: OrderedDict[str, grammar_child.Checked] = OrderedDict()
        self._num_bytes = 0
        # one thread: there is one child, and text is not to wait for grammars
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="grammar")

    async def grammar(self, body: Common) -> str:
        """What the answer must match, "" for anything; raises InvalidType, InvalidValue or UnsupportedValue."""
        param, grammar = wanted(body)
        if not grammar:
            return ""
        if body.ignore_eos:
            raise InvalidValue(
                f"{param} and ignore_eos contradict each other: a complete answer ends; leave one out",
                param="ignore_eos",
            )
        found = self._known.get(grammar)
        if found is None:
            found = await self._check_in_thread(grammar, param)
            self._keep(grammar, found)
        else:
            self._known.move_to_end(grammar)
        if found.cause:
            raise UnsupportedValue(f"{param} cannot be honoured: {found.cause}", param=param)
        return grammar

    async def _check_in_thread(self, grammar: str, param: str) -> grammar_child.Checked:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(_TIMEOUT_S):
                return await loop.run_in_executor(self._thread, self._check, grammar)
        except TimeoutError as error:
            raise InvalidValue(f"{param} took too long to read; try again", param=param) from error

    def _check(self, grammar: str) -> grammar_child.Checked:
        """In the thread."""
        try:
            child = self._living_child()
            return child.ask(grammar_child.Check(grammar), WORK_TIMEOUT_S)
        except (TimeoutError, ConnectionError) as error:
            # the child was alive before: it ran into its limits on this very grammar
            _log.warning("grammar check stopped", reason=type(error).__name__)
            self._drop()
            return grammar_child.Checked(cause=f"it is too complex ({LIMITS}); simplify it")

    def _living_child(self) -> Child[grammar_child.Checked]:
        if self._child is not None and not self._child.is_alive():
            self._drop()
        if self._child is None:
            self._child = Child("xllm_py.openai.grammar_child", grammar_child.Checked)
            self._child.ask(grammar_child.Check(""), START_TIMEOUT_S)
        return self._child

    def _drop(self) -> None:
        if self._child is not None:
            self._child.close()
            self._child = None

    def _keep(self, grammar: str, found: grammar_child.Checked) -> None:
        if grammar in self._known:
            return
        self._known[grammar] = found
        self._num_bytes += _size(grammar)
        while self._num_bytes > _CACHE_BYTES:
            oldest, _ = self._known.popitem(last=False)
            self._num_bytes -= _size(oldest)

    def close(self) -> None:
        """End the child, whatever it works on."""
        self._thread.shutdown(wait=False, cancel_futures=True)
        self._drop()


def _size(grammar: str) -> int:
    return 4 * len(grammar) + _ENTRY_BYTES  # a string takes 1, 2 or 4 bytes a character


def wanted(body: Common) -> tuple[str, str]:
    """(the field that asks for it, the grammar); ("", "") when nothing does. Raises as `Grammars.grammar` does."""
    asked = [name for name in _GUIDED if getattr(body, name) is not None]
    form = body.response_format
    if form is not None and form.type != "text":
        asked.append("response_format")
    if len(asked) > 1:
        raise InvalidValue(
            f"{' and '.join(asked)} are given; an answer follows one of them", param=asked[0]
        )
    if not asked:
        return "", ""
    (name,) = asked
    if name == "response_format":
        return _of_response_format(body)
    value = getattr(body, name)
    if name == "guided_json":
        return name, _of_schema(name, _schema_of_text(value) if isinstance(value, str) else value)
    if name == "guided_choice":
        return name, _of_choices(value)
    limit = _MAX_REGEX_BYTES if name == "guided_regex" else _MAX_GRAMMAR_BYTES
    num_bytes = len(value.encode())
    if not 0 < num_bytes <= limit:
        raise InvalidValue(f"{name} has {num_bytes} bytes; it must have 1 to {limit}", param=name)
    if name == "guided_regex":
        return name, _packed({"lark_grammar": f"start: /{_in_lark(value)}/"})
    return name, _packed({"lark_grammar": value})


def _of_response_format(body: Common) -> tuple[str, str]:
    form = body.response_format
    assert form is not None
    if form.type == "json_object":
        return "response_format", _of_schema("response_format", {"type": "object"})
    if form.type != "json_schema":
        raise UnsupportedValue(
            "this response_format is not supported; type is text, json_object or json_schema",
            param="response_format.type",
        )
    path = "response_format.json_schema"
    if form.json_schema is None:
        raise InvalidValue(f"{path} is missing; json_schema asks for one", param=path)
    return f"{path}.schema", _of_schema(f"{path}.schema", form.json_schema.schema)


def _schema_of_text(text: str) -> Any:
    if len(text.encode()) > _MAX_SCHEMA_BYTES:
        raise InvalidValue(
            f"guided_json is larger than {_MAX_SCHEMA_BYTES} bytes; shorten it", param="guided_json"
        )
    try:
        return msgspec.json.decode(text.encode())
    except (msgspec.DecodeError, RecursionError) as error:
        raise InvalidValue("guided_json holds no valid JSON", param="guided_json") from error


def _of_schema(param: str, schema: Any) -> str:
    if not isinstance(schema, dict):
        raise InvalidType(f"{param} is no JSON object; send a schema", param=param)
    if len(msgspec.json.encode(schema)) > _MAX_SCHEMA_BYTES:
        raise InvalidValue(
            f"{param} is larger than {_MAX_SCHEMA_BYTES} bytes; shorten it", param=param
        )
    check_schema(param, schema)
    return _packed(
        {"json_schema": {**schema, "x-guidance": {"whitespace_pattern": _WHITESPACE}}},
    )


def _of_choices(choices: list[str]) -> str:
    num_bytes = sum(len(choice.encode()) for choice in choices)
    if not 0 < len(choices) <= _MAX_CHOICES or num_bytes > _MAX_CHOICE_BYTES or "" in choices:
        raise InvalidValue(
            f"guided_choice must hold 1 to {_MAX_CHOICES} strings, none of them empty, of at most "
            f"{_MAX_CHOICE_BYTES} bytes together",
            param="guided_choice",
        )
    # strings of Lark are those of JSON, but for DEL, which must be escaped
    texts = (
        json.dumps(choice, ensure_ascii=False).replace("\x7f", "\\u007f") for choice in choices
    )
    return _packed({"lark_grammar": "start: " + " | ".join(texts)})


def _in_lark(regex: str) -> str:
    """Between two slashes: a slash is escaped, unless it was, and a line break has a name."""
    pieces = []
    for found in re.finditer(r"\\.|.|\\$", regex, re.DOTALL):
        piece = found[0]
        if piece.endswith("/"):
            piece = "\\/"
        elif piece.endswith("\n"):
            piece = "\\n"
        pieces.append(piece)
    return "".join(pieces)


def _packed(grammar: dict[str, Any]) -> str:
    return msgspec.json.encode({"grammars": [grammar]}).decode()
