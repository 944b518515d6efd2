"""The flags of `xllm-master` (SPEC 2.6)."""

from __future__ import annotations

from xllm_py.cli import shared_flags
from xllm_py.cli.flags import Flag, a, b, ignored, in_group

_SERVICE = in_group(
    "service",
    a("server_host", "string", "", "bind address of both ports; empty: 127.0.0.1"),
    a("advertise_host", "string", "", "address instances dial; empty: server_host"),
    a("http_server_port", "int32", 8888, "OpenAI HTTP"),
    a("rpc_server_port", "int32", 8889, "gRPC for instances"),
    a(
        "tokenizer_path",
        "string",
        "",
        "folder with tokenizer, chat template and config files; required",
    ),
    a(
        "http_server_max_concurrency",
        "int32",
        16384,
        "open requests, streams included; over it 429",
    ),
    b("http_server_idle_timeout_s", "int32", 75, "an idle connection is closed"),
    b("rpc_server_idle_timeout_s", "int32", 600, "an idle connection is closed", idle=True),
    b("rpc_server_max_concurrency", "int32", 128, "unary calls in flight", idle=True),
    b("dashboard", "bool", True, "the status page", idle=True),
    *shared_flags.service(),
)
_CLUSTER = in_group(
    "cluster",
    *shared_flags.etcd("127.0.0.1:2379"),
    b(
        "embedded_etcd",
        "bool",
        False,
        "serve an etcd-compatible registry at etcd_addr; one box, in memory",
    ),
    a("load_balance_policy", "string", "RR", "RR, LOAD, CAR (cache-aware) or SLO_AWARE"),
    b("block_size", "int32", 128, "the cards rule", idle=True),
    b("xxh3_128bits_seed", "uint32", 1024, "as in xllm"),
    b("target_ttft", "int32", 1000, "ms to the first token, for SLO_AWARE"),
    b("target_tpot", "int32", 50, "ms a token, for SLO_AWARE"),
    a("timeout_ms", "int32", 5000, "limit of a unary call to an instance"),
    a("connect_timeout_ms", "int32", 1000, "limit of connecting to an instance"),
    a("detect_disconnected_instance_interval", "int32", 15, "seconds a gone instance stays listed"),
    b("instance_delete_probe_timeout_ms", "int32", 1000, "probe after a card vanished", idle=True),
    b("instance_delete_probe_attempts", "int32", 2, "probes after a card vanished", idle=True),
    b("enable_request_trace", "bool", False, "one JSON line per journey", idle=True),
    a("suspect_after_ms", "int32", 500, "silence after which an instance gets no new work"),
    a("gone_after_ms", "int32", 1000, "silence after which an instance is given up"),
    a("queue_timeout_s", "double", 60.0, "how long a request waits for room, then an error"),
    a("max_attempts", "int32", 3, "submissions of one request that may be lost"),
    b("allow_approximate_failover", "bool", False, "continue where the numerics differ", idle=True),
    Flag("default_backend_type", "string", "xllm", "C", "xllm"),
)
_C = """http_server_num_threads rpc_server_num_threads num_threads max_concurrency port listen_addr idle_timeout_s
readiness_check_interval_s lease_lost_heartbeat_timeout_ms vllm_http_timeout_ms internal_api_token"""

TABLE: list[Flag] = [
    *_SERVICE,
    *_CLUSTER,
    *in_group("security", *shared_flags.security()),
    *in_group("logs", *shared_flags.logs()),
    *ignored(_C, "string"),
    *ignored(shared_flags.GLOG, "bool"),
    *ignored(shared_flags.GLOG_VALUES, "string"),
]
