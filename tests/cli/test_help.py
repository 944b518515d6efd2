"""What the commands print: help, version, warnings, errors, completion."""

from __future__ import annotations

import re

import pytest

from tests.cli.support import TABLES, say
from xllm_py.cli import xllm, xllm_master

PROGRAMS = sorted(TABLES)


@pytest.fixture
def model(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    return f"--model={tmp_path}"


def shown_flags(text: str) -> list[str]:
    return re.findall(r"^  --(\w+)", text, re.MULTILINE)


@pytest.mark.parametrize("word", ["--help", "-h", "-help", "--helpshort", "--help=true"])
@pytest.mark.parametrize("program", PROGRAMS)
def test_help_shows_the_flags_of_priority_a_by_group(program, word):
    said = say(program, word)
    assert (said.code, said.err) == (0, "")
    assert shown_flags(said.out) == [
        flag.name
        for group in dict.fromkeys(each.group for each in TABLES[program])
        for flag in TABLES[program]
        if flag.group == group and flag.priority == "A"
    ]
    headings = re.findall(r"^(\S.*):$", said.out, re.MULTILINE)
    wanted = [flag.group for flag in TABLES[program] if flag.priority == "A"]
    assert headings == list(dict.fromkeys(wanted))
    idle = [flag for flag in TABLES[program] if flag.priority == "A" and flag.idle]
    assert bool(idle) == (program == "xllm")  # the master's all do what they say
    assert said.out.count("(no effect yet)") == len(idle)


@pytest.mark.parametrize("program", PROGRAMS)
def test_helpfull_shows_every_flag_with_type_default_and_priority(program):
    said = say(program, "--helpfull")
    assert said.code == 0
    assert sorted(shown_flags(said.out)) == sorted(flag.name for flag in TABLES[program])
    assert "  --etcd_timeout_s (double, default 5.0) [A]\n" in said.out
    assert "  --metrics (bool, default true) [A]\n" in said.out
    assert (
        "  --tls_cert_file (string, default empty) [B]\n"
        "      certificate that names the announced host: mutual TLS on KV and control ports, HTTPS; all three tls flags "
        "or none\n"
    ) in said.out
    assert "  --vmodule (string, default empty) [C]\n" in said.out


@pytest.mark.parametrize("words", [("--helpmatch=prefix",), ("-helpmatch", "prefix")])
def test_helpmatch_shows_flags_by_a_part_of_their_name(words):
    said = say("xllm", *words)
    assert said.code == 0
    assert set(shown_flags(said.out)) == {
        flag.name for flag in TABLES["xllm"] if "prefix" in flag.name
    }


def test_helpon_shows_one_group():
    said = say("xllm", "--helpon=security")
    assert shown_flags(said.out)[0] == "cluster_key_file"
    assert len(shown_flags(said.out)) == sum(flag.group == "security" for flag in TABLES["xllm"])


@pytest.mark.parametrize("word", ["--helpon=nothing", "--helpmatch=nothing"])
def test_help_that_finds_nothing_names_the_groups(word):
    said = say("xllm", word)
    assert (said.code, shown_flags(said.out)) == (0, [])
    assert "No flag matches 'nothing'. Groups: model and device; service;" in said.out


def test_help_words_that_lack_their_word_are_errors_or_empty():
    assert say("xllm", "--helpmatch").code == 0
    assert say("xllm", "--help=false", "--model=/nowhere").code == 3
    assert say("xllm", "--nohelp", "--model=/nowhere").code == 3


@pytest.mark.parametrize("program", PROGRAMS)
def test_version_is_one_line(program):
    said = say(program, "--version")
    line = rf"{program} version \S+ \(python 3\.\d+\.\d+, torch \S+, devices cpu cuda npu\)\n"
    assert (said.code, said.err) == (0, "")
    assert re.fullmatch(line, said.out)


def test_help_comes_before_errors_of_the_same_line():
    said = say("xllm", "--nonsense", "--port=x", "--help")
    assert (said.code, said.err) == (0, "")


def test_flags_without_effect_are_named_in_one_line(model):
    said = say("xllm", model, "--handoff_hold_s=3", "--max_tokens_for_graph_mode=9")
    assert said.code == 0
    assert said.config.warnings == (
        "accepted but without effect in this version: "
        "--max_tokens_for_graph_mode, --handoff_hold_s",
    )


@pytest.mark.parametrize(
    "word",
    [
        "--enable_prefix_cache=false",
        "--enable_deterministic=true",
        "--enable_mix_batch=true",
        "--priority_strategy=fcfs",
        "--xxh3_128bits_seed=1024",
        "--nodashboard",
    ],
)
def test_asking_for_what_happens_anyway_is_no_warning(model, word):
    assert say("xllm", model, word).config.warnings == ()


def test_switching_off_what_cannot_be_switched_off_is_a_warning(model):
    word = "--enable_deterministic=false"
    (warning,) = say("xllm", model, word, "--devices=cpu:0").config.warnings
    assert "without effect" in warning
    said = say("xllm", model, word, "--devices=cuda:0").config
    assert said.warnings == ()
    assert not said.engine.is_exact


def test_ignored_flags_of_the_original_are_named_in_one_line(model):
    said = say(
        "xllm",
        model,
        "--enable_mla=false",
        "--tp_size=4",
        "--dit_cache=1",
        "--noeplb_x",
        "--tp_size=8",
    )
    assert said.code == 0
    assert said.config.warnings == (
        "flags of the original, ignored here: --enable_mla, --tp_size, --dit_cache, --noeplb_x",
    )


def test_ignored_flags_in_a_flagfile_join_the_same_line(model, tmp_path):
    (tmp_path / "f").write_text("--dit_cache=1\n--enable_mla\n")
    said = say("xllm", model, f"--flagfile={tmp_path / 'f'}")
    assert said.config.warnings == (
        "flags of the original, ignored here: --enable_mla, --dit_cache",
    )


def test_the_master_knows_no_ignored_prefixes():
    assert say("xllm-master", "--dit_cache=1").code == 2


def test_unknown_flags_are_all_listed_each_with_a_hint():
    said = say("xllm", "--modle=x", "--enable_disag_pd", "--zzzzzzzzzzz", "--noenable_prefx_cache")
    assert said.code == 2
    assert said.errors == [
        "xllm: error: unknown flag --modle. Did you mean --model?",
        "xllm: error: unknown flag --enable_disag_pd. Did you mean --enable_disagg_pd?",
        "xllm: error: unknown flag --zzzzzzzzzzz. See --helpfull.",
        "xllm: error: unknown flag --noenable_prefx_cache. Did you mean --enable_prefix_cache?",
    ]


def test_a_value_cannot_break_an_error_line_in_two():
    said = say("xllm", "--port=1\n2", "--log_level=a\x1b[1mb\rc\u2028d", "--model=/\nx")
    assert said.code == 2
    assert said.errors == ["xllm: error: --port: '1\\n2' is no int32. See --helpfull."]
    said = say("xllm", "--log_level=a\x1b[1mb\rc\u2028d", "--model=/\nx")
    assert said.errors == [
        "xllm: error: --log_level=a\\x1b[1mb\\rc\\u2028d is unknown. Use debug, info, warning or error."
    ]
    said = say("xllm", "--model=/\nx")
    assert (said.code, len(said.errors)) == (3, 1)


def test_a_word_of_blanks_is_passed_over_with_a_warning_that_names_the_cause(model):
    said = say("xllm", model, "  ", "--port=1234")
    assert (said.code, said.config.addresses.port) == (0, 1234)
    (warning,) = said.config.warnings
    assert "blanks" in warning
    assert "backslash" in warning


def test_a_flagfile_names_the_program_by_either_of_its_names(tmp_path):
    (tmp_path / "f").write_text(
        "xllm_master_serving\n--http_server_port=1\nxllm\n--http_server_port=2\n"
    )
    said = say("xllm-master", f"--flagfile={tmp_path / 'f'}", f"--tokenizer_path={tmp_path}")
    assert said.config.http_port == 1


def test_verbose_shows_the_traceback_of_a_failed_start():
    quiet, loud = say("xllm", "--model=/nowhere"), say("xllm", "--model=/nowhere", "--verbose")
    assert (quiet.code, loud.code) == (3, 3)
    assert "Traceback" not in quiet.err
    assert "Traceback" in loud.err
    assert loud.errors[-1] == quiet.errors[-1]


# ---- --config_json_file


def config_file(tmp_path, text: str) -> str:
    (tmp_path / "c.json").write_text(text)
    return f"--config_json_file={tmp_path / 'c.json'}"


def test_a_config_file_is_weaker_than_a_flag(model, tmp_path):
    word = config_file(
        tmp_path, '{"port": 1, "disagg-pd-port": 2, "metrics": false, "max_cache_size": 5}'
    )
    said = say("xllm", model, word, "--port=3")
    assert said.code == 0
    addresses = said.config.addresses
    assert (addresses.port, addresses.disagg_pd_port) == (3, 2)
    assert not addresses.disagg_pd_port_may_move
    assert not said.config.http.metrics
    assert said.config.engine.cache.max_cache_bytes == 5


def test_a_config_file_is_warned_about_like_flags(model, tmp_path):
    word = config_file(tmp_path, '{"handoff_hold_s": 3, "tp_size": "4", "dit_x": 1}')
    assert say("xllm", model, word).config.warnings == (
        "accepted but without effect in this version: --handoff_hold_s",
        "flags of the original, ignored here: --tp_size, --dit_x",
    )


@pytest.mark.parametrize(
    ("text", "causes"),
    [
        ('{"port": "x", "prot": 1, "metrics": null}', 3),
        ('{"port": [1]}', 1),
        ('{"max_memory_utilization": NaN}', 1),
        ('{"port": 1.5}', 1),
        ("[]", 1),
        ("{", 1),
        ("[" * 100_000, 1),
        ('{"port": ' + "1" * 5000 + "}", 1),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_bad_config_file_is_a_usage_error(model, tmp_path, text, causes):
    said = say("xllm", model, config_file(tmp_path, text))
    assert said.code == 2
    assert len(said.errors) == causes


def test_a_missing_config_file_is_a_usage_error(model):
    assert say("xllm", model, "--config_json_file=/nowhere").code == 2


# ---- the real commands


@pytest.mark.parametrize("command", [xllm.COMMAND, xllm_master.COMMAND], ids=lambda each: each.name)
def test_the_real_commands_answer_help_in_this_process(command, capsys):
    assert command.start(["--help"]) == 0
    assert capsys.readouterr().out.startswith(f"{command.name}: ")
