"""Flags that both daemons have, declared once (SPEC 2.2 and the last row of 2.6)."""

from __future__ import annotations

from xllm_py.cli.flags import Flag, a, b


def etcd(default_addr: str) -> list[Flag]:
    """Where the registry is."""
    return [
        a(
            "etcd_addr",
            "string",
            default_addr,
            "etcd: host:port[,host:port], optionally http(s)://",
        ),
        b("etcd_namespace", "string", "", "all keys lie under /NAME/"),
        a("etcd_timeout_s", "double", 5.0, "limit of one etcd call"),
        a("etcd_start_timeout_s", "double", 60.0, "patience with etcd at the start, then exit 6"),
    ]


def service() -> list[Flag]:
    """Limits of the HTTP door."""
    return [
        a(
            "request_timeout_s",
            "double",
            600.0,
            "end-to-end limit of a request; a client may only shorten it",
        ),
        a("drain_timeout_s", "double", 30.0, "how long running requests may go on after SIGTERM"),
        a("max_queue_size", "int32", 1024, "requests waiting; over it 429"),
        a("max_body_bytes", "int32", 1 << 20, "request body; over it 413"),
        a("max_best_of", "int32", 8, "upper bound of n and best_of"),
        b("max_logprobs", "int32", 20, "upper bound of top logprobs"),
        a("metrics", "bool", True, "serve /metrics"),
        a("debug_endpoints", "bool", False, "serve /debug/*; beyond loopback only with api keys"),
        Flag(
            "enable_failpoints",
            "bool",
            False,
            "C",
            "fault tests only: XLLM_FAILPOINTS in the environment says where this daemon dies; the cluster key must begin with 'test'",
        ),
        b("reasoning_parser", "string", "", "reasoning format of the model; empty is off"),
        b("tool_call_parser", "string", "", "tool call format of the model; empty is off"),
    ]


def security() -> list[Flag]:
    """Keys, certificates, open doors."""
    return [
        a(
            "cluster_key_file",
            "string",
            "",
            "file with at least 32 random bytes, mode 0600; else the key in etcd",
        ),
        b(
            "tls_cert_file",
            "string",
            "",
            "certificate that names the announced host: mutual TLS on KV and control ports, HTTPS; "
            "all three tls flags or none",
        ),
        b("tls_key_file", "string", "", "private key, mode 0600"),
        b(
            "tls_ca_file",
            "string",
            "",
            "authority of the cluster's certificates; also for https etcd",
        ),
        b("api_key_file", "string", "", "one id:key a line; then only /health and /ready are open"),
        a("allow_insecure_http", "bool", False, "serve HTTP beyond loopback without api keys"),
        b(
            "allowed_hosts",
            "string",
            "",
            "comma list of host names that clients reach this door by, beside its addresses and the announced one; * is any",
        ),
    ]


def logs() -> list[Flag]:
    """What is said, and how."""
    return [
        b("log_level", "string", "info", "debug, info, warning or error"),
        b("log_format", "string", "text", "text or json"),
        b("log_dir", "string", "", "also write a log file here"),
        b("verbose", "bool", False, "tracebacks at a failed start"),
        b(
            "config_json_file",
            "string",
            "",
            "JSON object flag -> value, weaker than any flag given",
        ),
        b("minloglevel", "int32", 0, "glog: 0 info, 1 warning, 2 error"),
        b("v", "int32", 0, "glog: above 0 means debug"),
    ]


GLOG = "logtostderr alsologtostderr"
GLOG_VALUES = "stderrthreshold vmodule max_log_size"
