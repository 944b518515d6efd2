"""The configuration of one instance, in frozen slices; made by cli/xllm from the flags, read by instance/daemon."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from xllm_py.cluster.instance_info import Role
from xllm_py.core.config import EngineConfig
from xllm_py.core.service_config import EtcdSlice, HttpSlice, LogSlice, TlsSlice


@dataclass(frozen=True, slots=True, kw_only=True)
class AddressSlice:
    """Where this instance listens and what it announces."""

    host: str = "127.0.0.1"
    advertise_host: str = "127.0.0.1"
    port: int = 8010
    disagg_pd_port: int = 7777
    disagg_pd_port_may_move: bool = True  # not given by hand: the next free port will do


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterSlice:
    """The instance's place in a cluster."""

    role: Role = Role.DEFAULT
    enable_disagg_pd: bool = False
    flexible: bool = False  # the elected master may give it the other half of the work
    routed: bool = False  # registers and takes work from masters
    etcd: EtcdSlice
    cluster_key: bytes = b""  # from the key file; empty: the key in etcd
    tls: TlsSlice | None = None
    heart_beat_interval_s: float = 0.1
    rpc_timeout_s: float = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class InstanceConfig:
    """Everything `xllm` is told."""

    model_path: str
    served_names: tuple[str, ...]
    num_replicas: int = 1  # engines with a model and a scheduler each (--dp_size)
    engine: EngineConfig  # incarnation, cluster key and KV address are filled in by the daemon
    addresses: AddressSlice
    http: HttpSlice
    cluster: ClusterSlice
    log: LogSlice
    device_ips: tuple[str, ...] = ()  # of npu hosts, one a device; empty: not known
    cpu_affinity: tuple[int, ...] = ()  # cores; none: all that are there
    stalled_after_s: float = 3.0  # work queued and no step for so long: /health says 503
    engine_start_timeout_s: float = 900.0
    random_seed: int = -1  # base of the seeds drawn at our own door; -1: from the system
    sampling_defaults: Mapping[str, float] = field(default_factory=dict)  # of the model's file
    warnings: tuple[str, ...] = ()
    given: str = ""  # all flags that were given, for the log
