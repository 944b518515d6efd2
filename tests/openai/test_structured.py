"""What clients may ask of the form of an answer, and what is made of it for engines; the child that tries grammars is a real one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import llguidance
import pytest

from xllm_py.base.errors import UnsupportedValue
from xllm_py.openai import structured
from xllm_py.openai.child import WORK_TIMEOUT_S, Child
from xllm_py.openai.grammar_child import Bytes
from xllm_py.openai.schema import CompletionBody, parse
from xllm_py.openai.structured import Grammars

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 5}, "age": {"type": "integer"}},
    "required": ["name"],
    "additionalProperties": False,
}


def of_schema(schema: Any) -> dict[str, Any]:
    form = {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": schema}}
    return {"response_format": form}


async def grammar_of(door: Any, fields: dict[str, Any]) -> str:
    answer = await door.complete("abc", **fields)
    assert answer.status == 200, answer.body
    grammar = door.backend.submissions[-1].sampling.grammar
    assert isinstance(grammar, str)
    return grammar


def matches(grammar: str, text: str) -> bool:
    """Whether an engine that follows the grammar may say the text and end there."""
    tokenizer = llguidance.LLTokenizer(llguidance.TokenizerWrapper(Bytes()))
    matcher = llguidance.LLMatcher(tokenizer, grammar)
    assert not matcher.is_error(), matcher.get_error()
    return bool(matcher.consume_tokens(list(text.encode())) and matcher.is_accepting())


GOOD = [
    ({"response_format": {"type": "json_object"}}, '{"a": [1, null]}', "[1]"),
    (of_schema(SCHEMA), '{"name": "Ada", "age": 36}', '{"age": 36}'),
    ({"guided_json": SCHEMA}, '{"name":"Ada"}', '{"name":"Adelaide"}'),
    ({"guided_json": json.dumps(SCHEMA)}, '{"name":"Ada"}', '{"name":1}'),
    ({"guided_regex": r"[ab]+/\d{2}"}, "abba/12", "abba/1"),
    ({"guided_choice": ["yes", 'n"o', "ö\x7f"]}, 'n"o', "no"),
    ({"guided_choice": ["yes", 'n"o', "ö\x7f"]}, "ö\x7f", "maybe"),
    ({"guided_grammar": 'start: "a" more\nmore: "b" more | "c"'}, "abbc", "abb"),
]


@pytest.mark.parametrize(("fields", "good", "bad"), GOOD)
async def test_a_form_becomes_a_grammar_that_takes_what_fits(door, fields, good, bad) -> None:
    grammar = await grammar_of(door, fields)
    assert matches(grammar, good)
    assert not matches(grammar, bad)


async def test_chats_have_forms_too(door) -> None:
    assert (await door.chat(guided_choice=["a", "b"])).status == 200
    assert matches(door.backend.submissions[-1].sampling.grammar, "b")


async def test_text_is_no_form(door) -> None:
    assert await grammar_of(door, {"response_format": {"type": "text"}}) == ""


DEEP: dict[str, Any] = {"type": "null"}
for _ in range(17):
    DEEP = {"type": "array", "items": DEEP}
BAD = [
    ({"response_format": {"type": "json_schema"}}, "invalid_value", "response_format.json_schema"),
    ({"response_format": {"type": "grammar"}}, "unsupported_value", "response_format.type"),
    (of_schema({"type": "object", "if": {}}), "unsupported_value", "'if'"),
    (of_schema({"items": {"uniqueItems": True}}), "unsupported_value", "'uniqueItems'"),
    (of_schema({"type": "strange"}), "unsupported_value", "strange"),
    (of_schema({"$ref": "http://example.org/x"}), "unsupported_value", "cannot be honoured"),
    (of_schema(DEEP), "invalid_value", "16"),
    (of_schema({"enum": ["x"] * 1001}), "invalid_value", "1000"),
    (of_schema({"const": "x" * 40_000}), "invalid_value", "32768"),
    ({"guided_json": "{"}, "invalid_value", "guided_json"),
    ({"guided_json": "[1]"}, "invalid_type", "guided_json"),
    ({"guided_regex": "("}, "unsupported_value", "guided_regex"),
    ({"guided_regex": ""}, "invalid_value", "guided_regex"),
    ({"guided_regex": "a" * 513}, "invalid_value", "512"),
    ({"guided_regex": r"(?=a)b"}, "unsupported_value", "guided_regex"),
    ({"guided_choice": []}, "invalid_value", "guided_choice"),
    ({"guided_choice": ["a", ""]}, "invalid_value", "guided_choice"),
    ({"guided_choice": ["a"] * 1001}, "invalid_value", "guided_choice"),
    ({"guided_choice": [1]}, "invalid_type", "guided_choice[0]"),
    ({"guided_grammar": "start: nothing"}, "unsupported_value", "guided_grammar"),
    ({"guided_grammar": "x" * 40_000}, "invalid_value", "32768"),
    (
        of_schema({"type": "integer", "minimum": 5, "maximum": 3}),
        "unsupported_value",
        "cannot be honoured",
    ),
    ({"guided_regex": "a", "guided_choice": ["a"]}, "invalid_value", "guided_choice"),
    ({"guided_regex": "a", "ignore_eos": True}, "invalid_value", "ignore_eos"),
]


@pytest.mark.parametrize(("fields", "code", "named"), BAD)
async def test_what_cannot_be_honoured_is_a_400_that_names_it(door, fields, code, named) -> None:
    answer = await door.complete("abc", **fields)
    assert answer.status == 400
    error = answer.error
    assert error["code"] == code, error
    assert named in f"{error['param']} {error['message']}"
    assert not door.backend.submissions


def body(**fields: Any) -> CompletionBody:
    return parse(json.dumps({"model": "tiny", "prompt": "x", **fields}).encode(), CompletionBody)[0]


@pytest.fixture
def grammars() -> Iterator[Grammars]:
    made = Grammars()
    yield made
    made.close()


async def test_a_grammar_that_takes_too_long_is_cut_off_and_the_next_one_is_read(
    grammars, monkeypatch
) -> None:
    ask = Child.ask

    def impatient(self: Child[Any], message: Any, timeout_s: float) -> Any:
        if "slow" in message.grammar:
            assert timeout_s == WORK_TIMEOUT_S
            raise TimeoutError
        return ask(self, message, timeout_s)

    monkeypatch.setattr(Child, "ask", impatient)
    await grammars.grammar(body(guided_regex="a"))
    first = grammars._child
    with pytest.raises(UnsupportedValue, match="too complex"):
        await grammars.grammar(body(guided_regex="slow"))
    assert not first.is_alive()
    assert await grammars.grammar(body(guided_regex="c"))


async def test_a_child_that_dies_is_replaced(grammars) -> None:
    assert await grammars.grammar(body(guided_regex="a"))
    grammars._child.close()
    assert await grammars.grammar(body(guided_regex="b"))


async def test_what_was_tried_is_known_and_what_is_known_is_bounded(grammars, monkeypatch) -> None:
    asked: list[str] = []
    ask = Child.ask

    def counted(self: Child[Any], message: Any, timeout_s: float) -> Any:
        asked.append(message.grammar)
        return ask(self, message, timeout_s)

    monkeypatch.setattr(Child, "ask", counted)
    monkeypatch.setattr(structured, "_CACHE_BYTES", 4000)
    for regex in ("a", "b", "a"):
        await grammars.grammar(body(guided_regex=regex))
    assert len([each for each in asked if each]) == 2
    for number in range(30):
        await grammars.grammar(body(guided_regex=f"a{number}"))
    assert grammars._num_bytes <= 4000
    assert len(grammars._known) < 20
    before = len(asked)
    await grammars.grammar(body(guided_regex="b"))
    assert len(asked) == before + 1
