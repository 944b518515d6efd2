"""`xllm-master`, also `xllm_master_serving`: flags to MasterConfig, then master/daemon. No torch in this process, ever."""

from __future__ import annotations

import sys
from pathlib import Path

from xllm_py.base.errors import ModelLoadError, UsageError
from xllm_py.cli import master_flags, rules
from xllm_py.cli.entry import run_command
from xllm_py.cli.flags import FlagCommand, Given, echo_given
from xllm_py.master.config import MasterConfig

INTRO = (
    "xllm-master: the front door of a cluster. A registry and a tokenizer:\n"
    "  xllm-master --etcd_addr=127.0.0.1:12389 --tokenizer_path=FOLDER"
)
_LEASE_S = 3


def build(given: Given) -> MasterConfig:
    """Check every rule; raise UsageError with all causes at once, or ModelLoadError."""
    values, causes = given.values, rules.Causes()
    host = values["server_host"] or "127.0.0.1"
    announced = values["advertise_host"] or host
    causes.need(
        bool(values["tokenizer_path"]), "--tokenizer_path is missing. Pass the model's folder"
    )
    causes.need(bool(values["etcd_addr"]), "--etcd_addr is empty. Pass host:port")
    causes.need(
        announced not in ("0.0.0.0", "::"),
        f"{announced} is no address to announce. Pass --advertise_host",
    )
    policy = values["load_balance_policy"]
    if policy != "RR":
        why = "not built yet" if policy in ("CAR", "SLO_AWARE") else "unknown"
        causes.need(False, f"--load_balance_policy={policy} is {why}. Use RR")
    backend = values["default_backend_type"]
    causes.need(backend == "xllm", f"--default_backend_type={backend} is not built. Use xllm")
    rules.at_least(
        causes, values, 1, "timeout_ms", "connect_timeout_ms", "suspect_after_ms", "gone_after_ms"
    )
    rules.at_least(causes, values, 1, "detect_disconnected_instance_interval", "max_attempts")
    rules.at_least(causes, values, 0, "http_server_max_concurrency", "target_ttft", "target_tpot")
    causes.need(
        values["gone_after_ms"] >= values["suspect_after_ms"],
        "--gone_after_ms must not lie below --suspect_after_ms. Raise it",
    )
    embedded = values["embedded_etcd"]
    causes.need(
        not embedded or "," not in values["etcd_addr"],
        "--embedded_etcd serves one address. Pass one",
    )
    config = MasterConfig(
        tokenizer_path=values["tokenizer_path"],
        host=host,
        advertise_host=announced,
        http_port=rules.port(causes, values, "http_server_port"),
        rpc_port=rules.port(causes, values, "rpc_server_port"),
        etcd=rules.etcd(causes, values, _LEASE_S),
        embedded_etcd=embedded,
        cluster_key=rules.security(causes, values, host, has_peers=True),
        http=rules.http(causes, values, values["http_server_max_concurrency"]),
        decode_response_to_service=rules.environment_bool(
            causes, "ENABLE_DECODE_RESPONSE_TO_SERVICE", True
        ),
        load_balance_policy=policy,
        rpc_timeout_s=values["timeout_ms"] / 1000,
        connect_timeout_s=values["connect_timeout_ms"] / 1000,
        suspect_after_s=values["suspect_after_ms"] / 1000,
        gone_after_s=values["gone_after_ms"] / 1000,
        forget_gone_after_s=float(values["detect_disconnected_instance_interval"]),
        log=rules.logs(causes, values),
        warnings=given.warnings,
        given=echo_given(given),
    )
    if causes.lines:
        raise UsageError("\n".join(causes.lines))
    if not Path(config.tokenizer_path).is_dir():
        raise ModelLoadError(
            f"--tokenizer_path={config.tokenizer_path} is no folder. Pass the model's folder"
        )
    return config


def _run(given: Given) -> int:
    config = build(given)
    from xllm_py.master.daemon import run

    return run(config)


COMMAND = FlagCommand("xllm-master", INTRO, master_flags.TABLE, _run)


def main() -> None:
    """Console entry point."""
    run_command(COMMAND, sys.argv[1:])


if __name__ == "__main__":
    main()
