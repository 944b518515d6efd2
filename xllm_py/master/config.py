"""The configuration of one master, in frozen slices; made by cli/xllm_master from the flags, read by master/daemon."""

from __future__ import annotations

from dataclasses import dataclass

from xllm_py.core.service_config import EtcdSlice, HttpSlice, LogSlice, TlsSlice


@dataclass(frozen=True, slots=True, kw_only=True)
class MasterConfig:
    """Everything `xllm-master` is told."""

    tokenizer_path: str
    host: str = "127.0.0.1"
    advertise_host: str = "127.0.0.1"
    http_port: int = 8888
    rpc_port: int = 8889
    etcd: EtcdSlice
    embedded_etcd: bool = False
    cluster_key: bytes = b""  # from the key file; empty: the key in etcd
    tls: TlsSlice | None = None
    http: HttpSlice
    decode_response_to_service: bool = True  # D streams to the master; False: through P
    load_balance_policy: str = "RR"
    target_ttft_s: float = 1.0
    target_tpot_s: float = 0.05
    prefix_seed: int = 1024
    max_attempts: int = 3
    queue_timeout_s: float = 60.0
    rpc_timeout_s: float = 5.0
    connect_timeout_s: float = 1.0
    suspect_after_s: float = 0.5
    gone_after_s: float = 1.0
    forget_gone_after_s: float = 15.0
    failpoints: str = ""  # base/failpoints
    log: LogSlice
    warnings: tuple[str, ...] = ()
    given: str = ""  # all flags that were given, for the log
