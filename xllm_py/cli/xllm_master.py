"""`xllm-master`, also `xllm_master_serving`: flags to MasterConfig, then master/daemon. No torch in this process, ever."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from xllm_py.base.errors import ModelLoadError, UsageError
from xllm_py.cli import master_flags, rules
from xllm_py.cli.entry import run_command
from xllm_py.cli.flags import FlagCommand, Given, echo_given, one_line
from xllm_py.cluster.policies import POLICIES
from xllm_py.master.config import MasterConfig

INTRO = (
    "xllm-master: the front door of a cluster. A registry and a tokenizer:\n"
    "  xllm-master --etcd_addr=127.0.0.1:12389 --tokenizer_path=FOLDER"
)
_LEASE_S = 3
_FINITE = {
    "timeout_ms": 5000,
    "connect_timeout_ms": 1000,
    "http_server_idle_timeout_s": 75,
    "rpc_server_idle_timeout_s": 600,
}


def build(given: Given) -> MasterConfig:
    """Check every rule; raise UsageError with all causes at once, or ModelLoadError."""
    causes = rules.Causes()
    values = rules.finite(causes, given.values, _FINITE)
    _check_simple(causes, values)
    rules.foreign_environment(causes)
    host = values["server_host"] or "127.0.0.1"
    key = rules.security(causes, values, host, has_peers=True)
    config = MasterConfig(
        tokenizer_path=values["tokenizer_path"],
        host=host,
        advertise_host=rules.announced(causes, values, host),
        http_port=rules.port(causes, values, "http_server_port"),
        rpc_port=rules.port(causes, values, "rpc_server_port", zero=False),
        etcd=rules.etcd(causes, values, _LEASE_S),
        embedded_etcd=values["embedded_etcd"],
        cluster_key=key,
        tls=rules.tls(causes, values),
        max_attempts=values["max_attempts"],
        queue_timeout_s=values["queue_timeout_s"],
        http=rules.http(
            causes,
            values,
            values["http_server_max_concurrency"],
            idle_s=values["http_server_idle_timeout_s"],
        ),
        decode_response_to_service=rules.environment_bool(
            causes, "ENABLE_DECODE_RESPONSE_TO_SERVICE", True
        ),
        load_balance_policy=_policy(causes, values),
        target_ttft_s=values["target_ttft"] / 1000,
        target_tpot_s=values["target_tpot"] / 1000,
        prefix_seed=values["xxh3_128bits_seed"],
        rpc_timeout_s=values["timeout_ms"] / 1000,
        connect_timeout_s=values["connect_timeout_ms"] / 1000,
        suspect_after_s=values["suspect_after_ms"] / 1000,
        gone_after_s=values["gone_after_ms"] / 1000,
        forget_gone_after_s=float(values["detect_disconnected_instance_interval"]),
        failpoints=rules.failpoints_of(causes, values, key),
        log=rules.logs(causes, values),
        warnings=(*given.warnings, *causes.warnings),
        given=echo_given(given),
    )
    if causes.lines:
        raise UsageError("\n".join(causes.lines))
    if not rules.is_folder(config.tokenizer_path):
        raise ModelLoadError(
            f"--tokenizer_path={one_line(config.tokenizer_path)} is no folder. Pass the model's folder"
        )
    return config


def _check_simple(causes: rules.Causes, values: Mapping[str, Any]) -> None:
    causes.need(
        bool(values["tokenizer_path"]), "--tokenizer_path is missing. Pass the model's folder"
    )
    causes.need(bool(values["etcd_addr"]), "--etcd_addr is empty. Pass host:port")
    causes.need(
        not values["embedded_etcd"] or "," not in values["etcd_addr"],
        "--embedded_etcd serves one address. Pass one",
    )
    backend = values["default_backend_type"]
    causes.need(backend == "xllm", f"--default_backend_type={backend} is not built. Use xllm")
    rules.at_least(
        causes, values, 1, "timeout_ms", "connect_timeout_ms", "suspect_after_ms", "gone_after_ms"
    )
    rules.at_least(
        causes,
        values,
        1,
        "detect_disconnected_instance_interval",
        "max_attempts",
        "http_server_idle_timeout_s",
    )
    rules.at_least(causes, values, 0, "http_server_max_concurrency")
    rules.at_least(causes, values, 1, "target_ttft", "target_tpot")
    causes.need(
        values["gone_after_ms"] >= values["suspect_after_ms"],
        "--gone_after_ms must not lie below --suspect_after_ms. Raise it",
    )


def _policy(causes: rules.Causes, values: Mapping[str, Any]) -> str:
    policy = str(values["load_balance_policy"])
    known = ", ".join(POLICIES)
    causes.need(
        policy in POLICIES, f"--load_balance_policy={policy} is unknown. Use one of {known}"
    )
    return policy


def _run(given: Given) -> int:
    config = build(given)
    from xllm_py.master.daemon import run

    return run(config)


COMMAND = FlagCommand(
    "xllm-master", INTRO, master_flags.TABLE, _run, aliases=("xllm_master_serving",)
)


def main() -> None:
    """Console entry point."""
    run_command(COMMAND, sys.argv[1:])


if __name__ == "__main__":
    main()
