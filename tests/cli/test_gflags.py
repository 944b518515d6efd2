"""Our reading of command lines against a frozen table of what gflags 2.2.2 says, and the table against gflags where it is installed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli import oracle

ROWS = oracle.rows()
SAME = [row for row in ROWS if not row.reason]
DIFFERENT = [row for row in ROWS if row.reason]


def by_name(row: oracle.Row) -> str:
    return ascii(row.name + " ".join(row.files.values()) + " ".join(row.env.values()))


@pytest.mark.parametrize("row", SAME, ids=by_name)
def test_a_command_line_comes_to_what_gflags_makes_of_it(row):
    found = oracle.ours(row)
    if row.real is None:
        assert found.values is None
        assert found.causes
    else:
        assert row.real["words"] == []
        assert found.values == row.real["values"], found.causes


def test_the_table_is_long_enough_and_names_no_line_twice():
    assert len(SAME) >= 50
    keys = [(row.words, tuple(row.files.items()), tuple(row.env.items())) for row in ROWS]
    assert len(set(keys)) == len(keys)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not oracle.buildable():
        pytest.skip("real gflags is not here: install g++ and libgflags-dev (Debian)")
    return oracle.build(tmp_path_factory.mktemp("oracle"))


@pytest.mark.parametrize("row", ROWS, ids=by_name)
def test_the_frozen_table_says_what_gflags_says_here(program, row):
    assert oracle.ask(program, row) == row.real


# Where we differ on purpose: refused here alone, passed over, accepted with a warning, accepted here alone.
PASSED_OVER = [row for row in DIFFERENT if "blanks only" in row.reason]
TOLERANT = [row for row in DIFFERENT if row.real is None]
WARNED = [row for row in DIFFERENT if row not in PASSED_OVER and "warn" in row.reason]
STRICTER = [row for row in DIFFERENT if row not in [*PASSED_OVER, *TOLERANT, *WARNED]]


def test_every_difference_has_its_reason_in_the_specification():
    assert all("(SPEC 1." in row.reason for row in DIFFERENT)
    assert all((PASSED_OVER, TOLERANT, WARNED, STRICTER))


@pytest.mark.parametrize("row", STRICTER, ids=by_name)
def test_gflags_accepts_it_and_we_do_not(row):
    found = oracle.ours(row)
    assert row.real is not None
    assert found.values is None
    assert len(found.causes) == max(1, len(row.real["words"]))


@pytest.mark.parametrize("row", PASSED_OVER, ids=by_name)
def test_blanks_are_a_word_for_gflags_and_passed_over_here(row):
    found = oracle.ours(row)
    assert found.values == row.real["values"]
    assert len(found.warnings) == len(row.real["words"]) == 1
    assert "backslash" in found.warnings[0]


@pytest.mark.parametrize("row", WARNED, ids=by_name)
def test_gflags_is_silent_where_we_warn(row):
    found = oracle.ours(row)
    assert found.values == row.real["values"]
    assert len(found.warnings) == 1
    if row.files:
        assert found.warnings[0].startswith(("a:1: ", "a:2: "))


@pytest.mark.parametrize("row", TOLERANT, ids=by_name)
def test_gflags_refuses_it_and_we_do_not(row):
    assert oracle.ours(row).values == {}


def test_the_hint_for_a_bool_with_a_blank_names_the_flag():
    found = oracle.ours(oracle.Row(("--flag_off", "false"), None))
    assert found.causes == ["stray word 'false'. Write --flag_off=false"]


def test_all_errors_of_a_line_are_told_at_once():
    words = ("--nope", "--smal=3", "--count=-1", "--small=x", "--small=y", "word")
    causes = oracle.ours(oracle.Row(words, None)).causes
    assert len(causes) == 6
    assert "unknown flag --smal. Did you mean --small?" in causes
    assert any(cause.startswith("unknown flag --nope. ") for cause in causes)


def test_an_unknown_name_in_fromenv_says_where_it_stood():
    (cause,) = oracle.ours(oracle.Row(("--tryfromenv=smal",), None)).causes
    assert cause == "--tryfromenv: unknown flag --smal. Did you mean --small?"


def test_a_flagfile_may_nest_sixteen_deep_and_no_deeper():
    files = {str(depth): f"--flagfile={depth + 1}\n" for depth in range(1, 17)}
    files["16"] = "--small=5\n"
    fine = oracle.Row(("--flagfile=1",), None, files)
    assert oracle.ours(fine).values == {"small": 5}
    deeper = oracle.Row(("--flagfile=0",), None, {"0": "--flagfile=1\n", **files})
    (cause,) = oracle.ours(deeper).causes
    assert "more than 16 deep" in cause


def test_a_flagfile_that_names_itself_is_an_error():
    row = oracle.Row(("--flagfile=a",), None, {"a": "--flagfile=a,a,a\n"})
    found = oracle.ours(row)
    assert found.values is None
    assert len(found.causes) == 3


@pytest.mark.parametrize("content", [b"--text=\xff\n", b"--flagfile=a\0b\n"], ids=ascii)
def test_a_flagfile_with_odd_bytes_is_an_error(tmp_path, content):
    (tmp_path / "odd").write_bytes(content)
    found = oracle.ours(oracle.Row((f"--flagfile={tmp_path / 'odd'}",), None))
    assert "cannot be read" in found.causes[0]
