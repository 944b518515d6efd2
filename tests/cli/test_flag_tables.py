"""Every flag of the specification is there with its type, default and priority, and no other."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import pytest

from tests.cli import spec_flags
from xllm_py.cli import flags, master_flags, xllm_flags
from xllm_py.cli.flags import TYPES, Flag

Entry = tuple[str, str, str, str]


def entry(flag: Flag) -> Entry:
    """As the frozen table writes it."""
    default = str(flag.default)
    if flag.type == "bool":
        default = default.lower()
    if flag.type == "double":
        default = f"{flag.default:g}"
    return flag.name, flag.type, default or '""', flag.priority


def ignored(names: Iterable[str], kind: str) -> set[Entry]:
    return {(name, kind, "false" if kind == "bool" else '""', "C") for name in names}


def expected_xllm() -> set[Entry]:
    bools = [f"enable_{name}" for name in spec_flags.XLLM_C_ENABLE.split()]
    bools += [*spec_flags.XLLM_C_BOOL.split(), *spec_flags.GLOG.split()[:2]]
    values = [*spec_flags.XLLM_C_VALUE.split(), *spec_flags.GLOG.split()[2:]]
    written = {*spec_flags.rows(spec_flags.XLLM), *spec_flags.rows(spec_flags.GLOG_TAKEN)}
    return {*written, *ignored(bools, "bool"), *ignored(values, "string")}


def expected_master() -> set[Entry]:
    shared = {row for row in expected_xllm() if row[0] in spec_flags.MASTER_AS_XLLM.split()}
    written = {*spec_flags.rows(spec_flags.MASTER), *spec_flags.rows(spec_flags.GLOG_TAKEN)}
    values = [*spec_flags.MASTER_C.split(), *spec_flags.GLOG.split()[2:]]
    bools = ignored(spec_flags.GLOG.split()[:2], "bool")
    return {*written, *shared, *bools, *ignored(values, "string")}


@pytest.mark.parametrize(
    ("table", "expected"),
    [(xllm_flags.TABLE, expected_xllm()), (master_flags.TABLE, expected_master())],
    ids=["xllm", "xllm-master"],
)
def test_the_flags_are_those_of_the_specification(table, expected):
    found = {entry(flag) for flag in table}
    assert found - expected == set()
    assert expected - found == set()


@pytest.mark.parametrize("table", [xllm_flags.TABLE, master_flags.TABLE], ids=["xllm", "master"])
def test_each_flag_is_declared_once_in_a_group_with_words(table):
    names = [flag.name for flag in table]
    assert sorted(set(names)) == sorted(names)
    assert all(flag.group and flag.text and flag.type in TYPES for flag in table)


@pytest.mark.parametrize("table", [xllm_flags.TABLE, master_flags.TABLE], ids=["xllm", "master"])
def test_every_default_is_a_word_of_its_type(table):
    for flag in table:
        word = str(flag.default).lower() if flag.type == "bool" else str(flag.default)
        value = TYPES[flag.type].convert(word, None, None)
        assert (value, type(value)) == (flag.default, type(flag.default)), flag.name


def test_ignored_prefixes_are_those_of_the_specification():
    assert sorted(xllm_flags.IGNORED_PREFIXES) == sorted(spec_flags.XLLM_C_PREFIXES.split())


def test_what_is_without_effect_yet_is_known():
    """A flag leaves this list with the feature that gives it an effect."""

    def idle(table: list[Flag]) -> set[str]:
        return {flag.name for flag in table if flag.idle and flag.priority == "A"}

    assert idle(master_flags.TABLE) == set()
    assert idle(xllm_flags.TABLE) == {"handoff_hold_s"}


def test_the_same_flag_means_the_same_in_both_programs():
    mine = {flag.name: flag for flag in xllm_flags.TABLE}
    for name in spec_flags.MASTER_AS_XLLM.split():
        (other,) = [flag for flag in master_flags.TABLE if flag.name == name]
        assert replace(other, group="") == replace(mine[name], group="")


def test_secrets_are_masked_and_paths_are_shown():
    given = flags.Given(
        {
            "internal_api_token": "s3cret",
            "tokenizer_path": "/t",
            "cluster_key_file": "/k",
            "port": 1,
        },
        frozenset({"internal_api_token", "tokenizer_path", "cluster_key_file", "port"}),
        (),
    )
    shown = flags.echo_given(given)
    assert shown == "--cluster_key_file=/k --internal_api_token=*** --port=1 --tokenizer_path=/t"


def test_a_start_without_flags_says_so():
    assert (
        flags.echo_given(flags.Given({"port": 1}, frozenset(), ())) == "all flags at their defaults"
    )
