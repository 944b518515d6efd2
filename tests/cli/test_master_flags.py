"""From the flags of `xllm-master` to a MasterConfig, and its rules."""

from __future__ import annotations

import pytest

from tests.cli.support import say

SWITCH = "ENABLE_DECODE_RESPONSE_TO_SERVICE"


@pytest.fixture
def tokenizer(tmp_path):
    return f"--tokenizer_path={tmp_path}"


@pytest.fixture
def build(tokenizer):
    """The configuration of a line that is fine."""

    def run(*words: str):
        said = say("xllm-master", tokenizer, *words)
        assert said.code == 0, said.err
        return said.config

    return run


@pytest.fixture
def refused(tokenizer):
    """The error lines of a line that is not, without the program's name."""

    def run(*words: str) -> list[str]:
        said = say("xllm-master", tokenizer, *words)
        assert said.code == 2, said.err
        return [line.removeprefix("xllm-master: error: ") for line in said.errors]

    return run


def test_a_tokenizer_is_all_that_is_needed(build, monkeypatch):
    monkeypatch.delenv(SWITCH, raising=False)
    config = build()
    assert (config.host, config.advertise_host) == ("127.0.0.1", "127.0.0.1")
    assert (config.http_port, config.rpc_port) == (8888, 8889)
    assert config.etcd.address == "127.0.0.1:2379"
    assert config.decode_response_to_service
    assert config.http.max_concurrent_requests == 16384
    assert config.http.idle_connection_s == 75
    assert (config.load_balance_policy, config.warnings) == ("RR", ())


def test_no_tokenizer_is_an_error():
    said = say("xllm-master")
    assert (said.code, said.errors) == (
        2,
        ["xllm-master: error: --tokenizer_path is missing. Pass the model's folder."],
    )


@pytest.mark.parametrize("path", ["/nowhere", "x" * 5000, "/\na"], ids=ascii)
def test_a_tokenizer_folder_that_is_not_there_is_exit_code_3(path):
    said = say("xllm-master", f"--tokenizer_path={path}")
    assert (said.code, len(said.errors)) == (3, 1)


def test_the_master_command_of_the_reference_page(tokenizer, monkeypatch):
    monkeypatch.setenv(SWITCH, "true")
    said = say(
        "xllm-master",
        "--etcd_addr=127.0.0.1:12389",
        *("--http_server_port", "28888"),
        *("--rpc_server_port", "28889"),
        tokenizer + "/",
    )
    assert said.code == 0
    assert (said.config.http_port, said.config.rpc_port) == (28888, 28889)
    assert said.config.etcd.address == "127.0.0.1:12389"


@pytest.mark.parametrize("policy", ["RR", "LOAD", "CAR", "SLO_AWARE"])
def test_the_policy_and_its_targets_are_taken_as_they_are(build, policy):
    config = build(
        f"--load_balance_policy={policy}",
        "--target_ttft=300",
        "--target_tpot=20",
        "--xxh3_128bits_seed=7",
    )
    assert config.load_balance_policy == policy
    assert (config.target_ttft_s, config.target_tpot_s, config.prefix_seed) == (0.3, 0.02, 7)
    assert config.warnings == ()


@pytest.mark.parametrize("policy", ["car", "", "RANDOM"])
def test_an_unknown_policy_is_refused(refused, policy):
    (line,) = refused(f"--load_balance_policy={policy}")
    assert (
        line == f"--load_balance_policy={policy} is unknown. Use one of RR, LOAD, CAR, SLO_AWARE."
    )


@pytest.mark.parametrize(
    ("word", "meant"), [("true", True), ("Y", True), ("0", False), ("no", False)]
)
def test_the_way_of_answers_is_a_switch_in_the_environment(build, monkeypatch, word, meant):
    monkeypatch.setenv(SWITCH, word)
    assert build().decode_response_to_service is meant


@pytest.mark.parametrize("word", ["", "on", "2"])
def test_a_bad_word_in_the_environment_is_refused(refused, monkeypatch, word):
    monkeypatch.setenv(SWITCH, word)
    (line,) = refused()
    assert line == f"{SWITCH}={word} is no bool. Use true or false."


def test_switches_of_the_original_in_the_environment_are_named(build, monkeypatch):
    monkeypatch.setenv("ENABLE_XLLM_DEBUG_LOG", "1")
    assert build().warnings == ("in the environment, ignored here: ENABLE_XLLM_DEBUG_LOG",)


def test_values_reach_their_slices(build):
    config = build(
        "--http_server_max_concurrency=0",
        "--http_server_idle_timeout_s=9",
        "--timeout_ms=200",
        "--connect_timeout_ms=300",
        "--suspect_after_ms=50",
        "--gone_after_ms=60",
        "--detect_disconnected_instance_interval=2",
        "--embedded_etcd",
        "--etcd_namespace=/x/",
        "--advertise_host=127.0.0.2",
    )
    assert config.http.max_concurrent_requests == 65536
    assert config.http.idle_connection_s == 9
    assert (config.rpc_timeout_s, config.connect_timeout_s) == (0.2, 0.3)
    assert (config.suspect_after_s, config.gone_after_s) == (0.05, 0.06)
    assert config.forget_gone_after_s == 2
    assert config.embedded_etcd
    assert config.etcd.namespace == "/x/"
    assert config.advertise_host == "127.0.0.2"


def test_minus_one_means_our_default_and_is_said(build):
    config = build("--timeout_ms=-1", "--http_server_idle_timeout_s=-1")
    assert (config.rpc_timeout_s, config.http.idle_connection_s) == (5.0, 75.0)
    assert len(config.warnings) == 2


@pytest.mark.parametrize(
    "word",
    [
        "--etcd_addr=",
        "--etcd_addr=localhost",
        "--default_backend_type=vllm",
        "--timeout_ms=0",
        "--connect_timeout_ms=-2",
        "--suspect_after_ms=0",
        "--suspect_after_ms=2000",
        "--detect_disconnected_instance_interval=0",
        "--max_attempts=0",
        "--http_server_idle_timeout_s=0",
        "--http_server_max_concurrency=-1",
        "--target_ttft=-1",
        "--target_tpot=-1",
        "--http_server_port=65536",
        "--rpc_server_port=-1",
        "--reasoning_parser=x",
        "--tool_call_parser=x",
        "--advertise_host=0.0.0.0",
    ],
)
def test_a_value_outside_its_rule_is_one_line_with_a_fix(refused, word):
    (line,) = refused(word)
    assert word.partition("=")[0].removeprefix("--") in line
    assert line.partition(". ")[2]


def test_the_embedded_registry_serves_one_address(refused):
    (line,) = refused("--embedded_etcd", "--etcd_addr=127.0.0.1:1,127.0.0.1:2")
    assert "--embedded_etcd serves one address" in line


def test_a_master_far_from_its_registry_needs_an_address_to_announce(refused):
    (line,) = refused("--etcd_addr=http://etcd.example:2379")
    assert "Pass --advertise_host" in line
