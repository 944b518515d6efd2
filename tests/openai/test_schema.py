"""Bodies: every wrong one gets its code and its path, whatever the bytes."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xllm_py.base.errors import RequestError
from xllm_py.openai.schema import ChatBody, CompletionBody, parse

GOOD = {"model": "m", "prompt": "x"}


def error_of(data, kind=CompletionBody):
    with pytest.raises(RequestError) as caught:
        parse(data if isinstance(data, bytes) else json.dumps(data).encode(), kind)
    return caught.value


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        (b"", "invalid_json", None),
        (b"{", "invalid_json", None),
        (b'{"model":"m","prompt":"\xff"}', "invalid_json", None),
        (b'{"model":"m","prompt":"\\ud800"}', "invalid_json", None),
        (b'{"model":"m","prompt":"x","temperature":NaN}', "invalid_json", None),
        (b"[1]", "invalid_type", None),
        ({"prompt": "x"}, "missing_field", "model"),
        ({"model": "m"}, "missing_field", "prompt"),
        ({**GOOD, "temperature": "1"}, "invalid_type", "temperature"),
        ({**GOOD, "max_tokens": 1.5}, "invalid_type", "max_tokens"),
        ({**GOOD, "max_tokens": True}, "invalid_type", "max_tokens"),
        ({**GOOD, "stream": 1}, "invalid_type", "stream"),
        ({**GOOD, "stop": ["a", 1]}, "invalid_type", "stop[1]"),
        (
            {**GOOD, "stream_options": {"include_usage": 1}},
            "invalid_type",
            "stream_options.include_usage",
        ),
        ({**GOOD, "prompt": [[1, "x"]]}, "invalid_type", "prompt[0][1]"),
        ({**GOOD, "suffix": "x"}, "unsupported_field", "suffix"),
        ({**GOOD, "prompt_embeds": "x"}, "unsupported_field", "prompt_embeds"),
    ],
)
def test_a_wrong_completion_body_is_named(body, code, param):
    error = error_of(body)
    assert (error.code, error.param, error.http_status) == (code, param, 400)


@pytest.mark.parametrize(
    ("messages", "code", "param"),
    [
        ([{"content": "x"}], "missing_field", "messages[0].role"),
        ([{"role": "user", "content": 1}], "invalid_type", "messages[0].content"),
        (
            [{"role": "user", "content": [{"text": "x"}]}],
            "missing_field",
            "messages[0].content[0].type",
        ),
        ("x", "invalid_type", "messages"),
    ],
)
def test_a_wrong_message_is_named(messages, code, param):
    error = error_of({"model": "m", "messages": messages}, ChatBody)
    assert (error.code, error.param) == (code, param)


def test_unknown_fields_are_named_and_null_is_absence():
    body, ignored = parse(
        json.dumps(
            {**GOOD, "store": True, "routing": {}, "max_tokens": None, "suffix": None}
        ).encode(),
        CompletionBody,
    )
    assert ignored == ["routing", "store", "suffix"]
    assert body.max_tokens is None


@pytest.mark.parametrize(
    ("depth", "good"), [(31, True), (32, False), (5000, False), (100_000, False)]
)
def test_nesting_is_limited_even_where_nobody_looks(depth, good):
    data = b'{"model":"m","prompt":"x","extra":' + b"[" * depth + b"]" * depth + b"}"
    if good:
        parse(data, CompletionBody)
    else:
        assert error_of(data).code == "invalid_json"


def test_brackets_inside_strings_do_not_count():
    text = '[{"' * 1000
    body, _ = parse(json.dumps({"model": "m", "prompt": text}).encode(), CompletionBody)
    assert body.prompt == text


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(
    fields=st.dictionaries(
        st.sampled_from([*CompletionBody.__struct_fields__, "other"]), JSON_VALUES, max_size=6
    )
)
def test_any_fields_parse_or_fail_with_a_code(fields):
    try:
        parse(json.dumps({**GOOD, **fields}).encode(), CompletionBody)
    except RequestError as error:
        assert error.http_status == 400


@given(data=st.binary(max_size=60))
def test_any_bytes_parse_or_fail_with_a_code(data):
    assert error_of(data).http_status == 400
