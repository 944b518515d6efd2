"""Whatever stands on a command line or in a flagfile, the command ends with an exit code of its own and whole error lines."""

from __future__ import annotations

import json
import string

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.cli.support import TABLES, Said, say, write_model
from xllm_py.cli.flags import TYPES

MANY = settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
# what no shell can pass is left out: NUL
ANY_TEXT = st.text(st.characters(exclude_characters="\0"), max_size=12)
ODD_VALUES = st.sampled_from(
    [
        "",
        " ",
        "true",
        "false",
        "on",
        "-1",
        "0",
        "0x10",
        "1e400",
        "nan",
        "9" * 5000,
        "..",
        "/",
        "a,b",
        ",",
        "\n",
        "\x1b",
    ]
)
VALUES = st.one_of(ODD_VALUES, ANY_TEXT, st.integers().map(str), st.floats().map(str))
SPECIAL = (
    "flagfile",
    "fromenv",
    "tryfromenv",
    "undefok",
    "help",
    "helpmatch",
    "helpon",
    "version",
    "",
)


@st.composite
def words(draw: st.DrawFn, program: str) -> str:
    """One word: a flag in one of its forms, with a value of its type or another, or anything."""
    if draw(st.integers(0, 9)) == 0:
        return draw(ANY_TEXT)
    names = [flag.name for flag in TABLES[program] if flag.priority != "C"]
    name = draw(st.sampled_from([*names, *SPECIAL]))
    if draw(st.integers(0, 9)) == 0:
        name = draw(ANY_TEXT) + name[1:]
    if draw(st.booleans()):
        name = name.replace("_", "-")
    dashes = draw(st.sampled_from(["--", "-", "--no", "---", ""]))
    equals = draw(st.sampled_from(["=", "", " "]))
    return f"{dashes}{name}{equals}{draw(VALUES) if equals else ''}"


def check(said: Said, program: str) -> None:
    """Exit codes 0, 2 and 3 (no such model), and one whole line a cause; with --verbose a traceback stands before them."""
    assert said.code in (0, 2, 3)
    assert said.errors if said.code else not said.errors
    lines = said.errors
    if said.given is not None and said.given.values["verbose"]:
        first = next((i for i, line in enumerate(lines) if line.startswith(program)), 0)
        lines = lines[first:]
    for line in lines:
        assert line.startswith(f"{program}: error: ")
        assert line.isprintable()
    if said.config is not None:
        assert all(warning.isprintable() for warning in said.config.warnings)


def needed(program: str, folder) -> str:
    flag = "model" if program == "xllm" else "tokenizer_path"
    return f"--{flag}={write_model(folder / 'tiny')}"


@pytest.mark.parametrize("program", sorted(TABLES))
@MANY
@given(data=st.data())
def test_any_command_line_ends_in_order(program, tmp_path, data):
    line = data.draw(st.lists(words(program), max_size=5))
    check(say(program, needed(program, tmp_path), *line), program)


@pytest.mark.parametrize("program", sorted(TABLES))
@MANY
@given(data=st.data())
def test_any_flagfile_ends_in_order(program, tmp_path, data):
    lines = data.draw(st.lists(st.one_of(words(program), st.text(max_size=20)), max_size=6))
    end = data.draw(st.sampled_from(["\n", "\r\n", "\n\n  "]))
    path = tmp_path / "flags"
    path.write_bytes(end.join(lines).encode("utf-8", "replace"))
    check(say(program, needed(program, tmp_path), f"--flagfile={path}"), program)


@MANY
@given(content=st.binary(max_size=60))
def test_any_bytes_as_a_flagfile_end_in_order(tmp_path, content):
    path = tmp_path / "flags"
    path.write_bytes(content)
    check(say("xllm", needed("xllm", tmp_path), f"--flagfile={path}"), "xllm")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner, max_size=2)
    ),
    max_leaves=4,
)
NAMES = st.sampled_from([flag.name for flag in TABLES["xllm"]]) | st.text(max_size=6)


@MANY
@given(body=st.dictionaries(NAMES, JSON, max_size=4) | JSON)
def test_any_config_file_ends_in_order(tmp_path, body):
    path = tmp_path / "flags.json"
    path.write_text(json.dumps(body))
    check(say("xllm", needed("xllm", tmp_path), f"--config_json_file={path}"), "xllm")


@pytest.mark.parametrize("kind", ["int32", "uint32", "int64"])
@MANY
@given(
    number=st.integers(-(2**65), 2**65),
    form=st.sampled_from(["{}", "{:+d}", " {}", "{:#x}", "00{}"]),
)
def test_an_integer_is_read_exactly_or_refused(kind, number, form):
    word = form.format(number)
    low, high = {"int32": (-(2**31), 2**31), "uint32": (0, 2**32), "int64": (-(2**63), 2**63)}[kind]
    try:
        found = TYPES[kind].convert(word, None, None)
    except Exception as error:  # noqa: BLE001  click's own error carries the reason; anything else fails below
        fits = low <= number < high and "-" not in word.lstrip("-") and "-0x" not in word
        assert type(error).__name__ == "BadParameter"
        assert not fits
    else:
        assert found == number
        assert low <= found < high


@MANY
@given(word=st.text(string.digits + "+-.eExXpPaf \tinfINF_", max_size=10))
def test_a_double_is_read_as_a_finite_number_or_refused(word):
    try:
        found = TYPES["double"].convert(word, None, None)
    except Exception as error:  # noqa: BLE001  as above
        assert type(error).__name__ == "BadParameter"
    else:
        assert found == (float.fromhex(word) if "x" in word.lower() else float(word))
        assert abs(found) < float("inf")
