"""From the flags of `xllm` to an InstanceConfig, and every rule that ends a start with exit code 2."""

from __future__ import annotations

import pytest

from tests.cli.support import say, write_model
from xllm_py.cluster.instance_info import Role

ETCD = "--etcd_addr=127.0.0.1:12389"


@pytest.fixture
def model(tmp_path):
    return f"--model={write_model(tmp_path / 'tiny')}"


@pytest.fixture
def build(model):
    """The configuration of a line that is fine."""

    def run(*words: str):
        said = say("xllm", model, *words)
        assert said.code == 0, said.err
        return said.config

    return run


@pytest.fixture
def refused(model):
    """The error lines of a line that is not, without the program's name."""

    def run(*words: str) -> list[str]:
        said = say("xllm", model, *words)
        assert said.code == 2, said.err
        assert said.config is None
        return [line.removeprefix("xllm: error: ") for line in said.errors]

    return run


def test_a_model_is_all_that_is_needed(build, tmp_path):
    config = build()
    assert config.model_path == str(tmp_path / "tiny")
    assert config.served_names == ("tiny",)
    assert config.engine.devices == ("auto",)
    assert config.addresses.host == config.addresses.advertise_host == "127.0.0.1"
    assert (config.cluster.role, config.cluster.routed) == (Role.DEFAULT, False)
    assert config.engine.scheduler.max_tokens_per_chunk == 10240
    assert not config.engine.kv_listen
    assert config.warnings == ()
    assert config.http.max_concurrent_requests == 200


def test_no_model_is_an_error():
    said = say("xllm")
    assert (said.code, said.errors) == (
        2,
        ["xllm: error: --model is missing. Pass a model folder."],
    )


def test_the_prefill_command_of_the_reference_page(build):
    config = build(
        "--port=8010",
        "--devices=npu:0",
        "--master_node_addr=127.0.0.1:18888",
        "--enable_prefix_cache=false",
        "--enable_chunked_prefill=false",
        "--enable_disagg_pd=true",
        "--instance_role=PREFILL",
        ETCD,
        "--transfer_listen_port=26000",
        "--disagg_pd_port=7777",
        "--node_rank=0",
        "--nnodes=1",
    )
    assert config.cluster.role is Role.PREFILL
    assert config.cluster.enable_disagg_pd
    assert config.cluster.routed
    assert config.engine.devices == ("npu:0",)
    assert (config.engine.kv_port, config.addresses.disagg_pd_port) == (26000, 7777)
    assert not config.engine.kv_port_may_move
    assert not config.addresses.disagg_pd_port_may_move
    assert not config.engine.scheduler.enable_chunked_prefill
    assert all("hccn.conf" in line for line in config.warnings)  # on a host without NPUs


def test_the_decode_command_of_the_page_cut_off_by_its_stray_blank(build):
    config = build("--port=8020", "--enable_disagg_pd", "--instance_role=DECODE", ETCD, " ")
    assert config.cluster.role is Role.DECODE
    assert config.addresses.disagg_pd_port_may_move
    assert config.engine.kv_port_may_move
    assert len(config.warnings) == 1


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("--enable_disagg_pd", "--instance_role=DECODE", ETCD), ""),
        (("--devices=cpu:0,cpu:1", "--dp_size=2"), ""),
        (("--enable_disagg_pd", "--instance_role=PREFILL", ETCD), "no steps of decodes"),
        (("--devices=cpu:0,cpu:1",), "several devices"),
    ],
)
def test_steps_are_begun_ahead_where_that_can_be_had(build, words, why):
    config = build("--enable_schedule_overlap", *words)
    told = [line for line in config.warnings if "overlap" in line]
    assert config.engine.scheduler.overlap is (not why)
    assert len(told) == bool(why) and all(why in line for line in told)
    assert not build(*words).engine.scheduler.overlap


def test_names_are_the_given_ones_without_repeats(build):
    assert build("--model_id=a", "--served_model_name=b,,a,c").served_names == ("a", "b", "c")


@pytest.mark.parametrize(
    ("words", "routed"),
    [
        ((ETCD,), True),
        ((ETCD, "--enable_service_routing"), True),
        ((ETCD, "--noenable_service_routing"), False),
        ((), False),
    ],
)
def test_a_registry_means_registering_unless_told_otherwise(build, words, routed):
    assert build(*words).cluster.routed is routed


def test_values_reach_their_slices(build):
    config = build(
        "--max_concurrent_requests=0",
        "--request_timeout_s=7.5",
        "--max_body_bytes=99",
        "--block_size=16",
        "--max_cache_size=0x100000",
        "--max_memory_utilization=0.5",
        "--max_tokens_per_batch=64",
        "--max_tokens_per_chunk_for_prefill=16",
        "--heart_beat_interval=0.5",
        "--rpc_channel_timeout_ms=250",
        "--health_check_interval_ms=500",
        "--random_seed=11",
        "--kv_streams=4",
        "--dtype=float32",
        "--log_level=error",
        "--log_format=json",
    )
    assert config.http.max_concurrent_requests == 65536
    assert (config.http.request_timeout_s, config.http.max_body_bytes) == (7.5, 99)
    cache = config.engine.cache
    assert (cache.block_size, cache.max_cache_bytes, cache.max_memory_utilization) == (
        16,
        1 << 20,
        0.5,
    )
    assert config.engine.scheduler.max_tokens_per_chunk == 16
    assert (config.cluster.heart_beat_interval_s, config.cluster.rpc_timeout_s) == (0.5, 0.25)
    assert (config.stalled_after_s, config.random_seed) == (0.5, 11)
    assert config.engine.dtype == "float32"
    assert config.engine.kv_streams == 4
    assert (config.log.level, config.engine.log_level, config.log.form) == (
        "error",
        "error",
        "json",
    )


@pytest.mark.parametrize(
    ("words", "level"),
    [
        (("--v=1",), "debug"),
        (("--minloglevel=1",), "warning"),
        (("--minloglevel=2",), "error"),
        (("--minloglevel=7",), "info"),
        (("--log_level=error", "--v=1"), "error"),
    ],
)
def test_the_numbers_of_glog_mean_a_level(build, words, level):
    assert build(*words).log.level == level


def test_minus_one_means_our_default_and_is_said(build):
    config = build("--rpc_channel_timeout_ms=-1")
    assert config.cluster.rpc_timeout_s == 5.0
    assert config.warnings == ("--rpc_channel_timeout_ms=-1 would wait for ever; 5000 is used",)


@pytest.mark.parametrize(
    "word",
    [
        "--backend=vlm",
        "--task=embed",
        "--num_speculative_tokens=2",
        "--enable_pd_ooc",
        "--kv_split_size=2",
        "--dp_size=2",
        "--ep_size=2",
        "--cp_size=2",
        "--nnodes=0",
        "--kv_transport=rdma",
        "--kv_cache_dtype=int8",
        "--kv_cache_transfer_mode=pull",
        "--block_size=3",
        "--block_size=512",
        "--block_size=0",
        "--max_memory_utilization=0",
        "--max_memory_utilization=1.01",
        "--prefill_scheduling_memory_usage_threshold=0",
        "--max_tokens_per_chunk_for_prefill=0",
        "--max_tokens_per_batch=0",
        "--max_seqs_per_batch=0",
        "--request_queue_size=0",
        "--dtype=half",
        "--load_format=bin",
        "--generation_config=mine",
        "--priority_strategy=multi_slo_and_prio",
        "--logprobs_mode=cooked",
        "--etcd_ttl=1",
        "--etcd_ttl=61",
        "--heart_beat_interval=0.01",
        "--heart_beat_interval=11",
        "--node_rank=1",
        "--node_rank=-1",
        "--max_model_len=-1",
        "--cpu_threads=-1",
        "--max_cache_size=-1",
        "--max_concurrent_requests=-1",
        "--random_seed=-2",
        "--device_id=-2",
        "--rpc_channel_timeout_ms=0",
        "--health_check_interval_ms=0",
        "--grant_ttl_s=0",
        "--kv_streams=0",
        "--kv_streams=17",
        "--handoff_hold_s=-1",
        "--request_timeout_s=0",
        "--drain_timeout_s=-3",
        "--max_queue_size=0",
        "--max_body_bytes=0",
        "--max_best_of=0",
        "--max_best_of=129",
        "--max_logprobs=-1",
        "--max_logprobs=2001",
        "--reasoning_parser=qwen3",
        "--tool_call_parser=auto",
        "--port=65536",
        "--port=-1",
        "--disagg_pd_port=70000",
        "--devices=tpu:0",
        "--devices=cpu",
        "--devices=cpu:x",
        "--devices=cpu:\u00b2",
        "--devices=npu:0,npu:0",
        "--instance_role=prefill",
        "--instance_role=PREFILL",
        "--instance_role=INVALID",
        "--enable_service_routing",
        "--log_level=loud",
        "--log_format=xml",
        "--log_dir=/nowhere/at/all",
        "--log_dir=" + "x" * 5000,
        "--etcd_addr=nonsense",
        "--etcd_addr=127.0.0.1:0",
        "--etcd_addr=127.0.0.1:99999",
        "--etcd_addr=https://127.0.0.1:1",
        "--etcd_timeout_s=0",
        "--tls_cert_file=/x",
        "--port=" + "9" * 5000,
    ],
    ids=lambda word: ascii(word)[:60],
)
def test_a_value_outside_its_rule_is_one_line_with_a_fix(refused, word):
    (line,) = refused(word)
    flag = word.partition("=")[0].removeprefix("--")
    assert flag.removesuffix("_cert_file") in line
    cause, _, fix = line.partition(". ")
    assert cause
    assert fix


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--enable_disagg_pd", ETCD), "--enable_disagg_pd needs a role"),
        (("--enable_disagg_pd", "--instance_role=DECODE"), "needs a registry"),
        (
            ("--enable_disagg_pd", "--instance_role=MIX", ETCD, "--noenable_service_routing"),
            "implies --enable_service_routing",
        ),
        (("--devices=cpu:0", "--device_id=1"), "--device_id contradicts --devices"),
        (
            ("--nnodes=2", "--enable_disagg_pd", "--instance_role=PREFILL", ETCD),
            "need one key. Pass --cluster_key_file",
        ),
        (("--nnodes=2", "--master_node_addr=here"), "--master_node_addr=here is no host:port"),
        (("--devices=cpu:0,cpu:1", "--dp_size=3"), "--dp_size=3 does not divide the 2 --devices"),
        (("--devices=cpu:0,cpu:1", "--dp_size=2", "--ep_size=2"), "divide the 1 devices that"),
        (("--devices=cpu:0,cpu:1", "--dp_size=2", "--nnodes=2"), "an instance on each node"),
        (
            ("--devices=cpu:0,cpu:1", "--dp_size=2", "--kv_transport=nixl"),
            "do not go together. Use tcp or auto",
        ),
        (("--devices=cpu:0,cpu:1", "--ep_size=4"), "--ep_size=4 does not divide the 2 devices"),
        (("--nnodes=2", "--profile_steps=/tmp/x"), "--profile_steps times one rank"),
        (("--devices=npu:0", "--block_size=64"), "Pass --block_size=128"),
        (("--etcd_addr=10.0.0.9:2379",), "127.0.0.1 would be announced. Pass --advertise_host"),
        (("--etcd_addr=10.0.0.9:2379", "--advertise_host=::"), ":: is no address to announce"),
    ],
)
def test_flags_that_contradict_each_other_are_refused(refused, words, says):
    (line,) = refused(*words)
    assert says in line


def test_ranks_are_the_devices_of_all_nodes(build):
    config = build("--devices=cpu:0,cpu:1").engine
    assert (config.num_ranks, config.rank, config.ranks.address) == (2, 0, "")
    assert build("--devices=cpu:0,cpu:1", "--dp_size=2").num_replicas == 2
    assert build("--devices=cpu:0,cpu:1", "--ep_size=2").engine.ranks.expert_groups == 2
    config = build(
        "--devices=cpu:0,cpu:1",
        "--nnodes=3",
        "--node_rank=2",
        "--master_node_addr=127.0.0.1:19999",
        "--max_reconnect_count=10",
    ).engine
    assert (config.num_ranks, config.rank) == (6, 4)
    assert (config.ranks.address, config.ranks.patience_s) == ("127.0.0.1:19999", 15.0)


def test_mixed_device_types_are_refused(refused):
    assert "--devices mixes types. Use one." in refused("--devices=cpu:0,cuda:0")


def test_all_causes_are_told_at_once(refused):
    lines = refused("--block_size=3", "--port=70000", "--dtype=half", "--etcd_addr=x")
    assert len(lines) == 4


def test_only_one_of_the_etcd_credentials_is_refused(refused, monkeypatch):
    monkeypatch.setenv("ETCD_USERNAME", "ann")
    monkeypatch.delenv("ETCD_PASSWORD", raising=False)
    (line,) = refused()
    assert "ETCD_USERNAME and ETCD_PASSWORD go together" in line


def test_etcd_credentials_come_from_the_environment_and_are_not_echoed(build, monkeypatch):
    monkeypatch.setenv("ETCD_USERNAME", "ann")
    monkeypatch.setenv("ETCD_PASSWORD", "s3cret")
    config = build(ETCD)
    assert (config.cluster.etcd.username, config.cluster.etcd.password) == ("ann", "s3cret")
    assert "s3cret" not in config.given


def test_switches_of_the_original_in_the_environment_are_named_in_one_line(build, monkeypatch):
    monkeypatch.setenv("MC_TCP_PROTO", "1")
    monkeypatch.setenv("ENABLE_XLLM_DEBUG_LOG", "")
    assert build().warnings == (
        "in the environment, ignored here: MC_TCP_PROTO, ENABLE_XLLM_DEBUG_LOG",
    )


def test_failpoints_need_their_flag_and_a_key_that_is_none(build, refused, tmp_path, monkeypatch):
    keys = {}
    for name, text in (("test", "test" * 8), ("real", "real" * 8)):
        keys[name] = tmp_path / name
        keys[name].write_text(text)
        keys[name].chmod(0o600)
    test, real = (f"--cluster_key_file={keys[name]}" for name in ("test", "real"))
    monkeypatch.setenv("XLLM_FAILPOINTS", "d.step:kill9")
    config = build(test)
    assert config.engine.failpoints == ""
    assert config.warnings == (
        "in the environment, ignored without --enable_failpoints: XLLM_FAILPOINTS",
    )
    assert build(test, "--enable_failpoints").engine.failpoints == "d.step:kill9"
    for words in ([], [real]):
        (line,) = refused("--enable_failpoints", *words)
        assert "must begin with 'test'" in line
    monkeypatch.setenv("XLLM_FAILPOINTS", "d.step")
    (line,) = refused("--enable_failpoints", test)
    assert "'d.step' is not name" in line


def test_the_model_root_may_come_from_the_environment(tmp_path, monkeypatch):
    write_model(tmp_path / "root" / "mine")
    monkeypatch.setenv("XLLM_MODEL_ROOT", str(tmp_path / "root"))
    assert say("xllm", "--model=mine").config.served_names == ("mine",)
    assert say("xllm", "--model=mine", "--model_root=/nowhere").code == 3


def test_a_remote_registry_with_an_address_to_announce_is_fine(build):
    config = build("--etcd_addr=10.0.0.9:2379", "--advertise_host=10.0.0.8")
    assert config.addresses.advertise_host == "10.0.0.8"


def test_device_id_alone_picks_the_index(build):
    assert build("--device_id=0").engine.devices == ("cpu:0",)
