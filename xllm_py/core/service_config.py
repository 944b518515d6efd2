"""Frozen slices of configuration that both daemons have: HTTP limits, registry, keys, logs. Plain types only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpSlice:
    """Limits of the HTTP door."""

    max_concurrent_requests: int
    request_timeout_s: float = 600.0
    drain_timeout_s: float = 30.0
    max_queue_size: int = 1024
    max_body_bytes: int = 1 << 20
    max_best_of: int = 8
    max_logprobs: int = 20
    metrics: bool = True
    debug_endpoints: bool = False
    idle_connection_s: float = 75.0  # between two requests of one connection
    allowed_hosts: frozenset[str] = frozenset()  # names in lower case; "*": any
    api_keys: Mapping[str, str] = field(default_factory=dict, repr=False)  # id -> key; empty: open


@dataclass(frozen=True, slots=True, kw_only=True)
class EtcdSlice:
    """Where the registry is; address empty: none."""

    address: str
    namespace: str = ""
    username: str = ""
    password: str = ""
    ca_file: str = ""
    timeout_s: float = 5.0
    start_timeout_s: float = 60.0
    ttl_s: int = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsSlice:
    """Certificate and private key of this process, and the authority whose certificates peers must show: PEM files."""

    cert_file: str
    key_file: str
    ca_file: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LogSlice:
    """What is said, and how."""

    level: str = "info"
    form: str = "text"
    directory: str = ""
    verbose: bool = False
