"""What a daemon decides about its HTTP door: limits, timeouts, names. Made once by the daemon, read by App and server."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpSettings:
    """Defaults are those of SPEC sections 2 and 7; times in seconds, sizes in bytes."""

    max_concurrent_requests: int = 200  # open generations, streams included; 0: 65536
    max_body_bytes: int = 1 << 20
    max_header_bytes: int = 16 << 10
    max_header_fields: int = 64
    max_url_bytes: int = 8 << 10
    max_connections: int = 20_000
    request_timeout_s: float = 600.0  # a client may only shorten it
    read_timeout_s: float = 10.0  # for the headers, and again for the body
    keepalive_s: float = 15.0  # silence after which a stream gets a comment line
    idle_connection_s: float = 75.0  # between two requests of one connection
    slow_reader_bytes: int = 256 << 10  # unread answer after which a stream is paused
    max_prompts: int = 64  # in one completion
    max_best_of: int = 8  # candidates of one prompt
    max_logprobs: int = 20  # likeliest tokens shown beside each token
    debug_endpoints: bool = False  # serve the extra routes under /debug/
    serve_metrics: bool = True
    # names the Host header may carry beside `localhost` and IP addresses; "*": any
    allowed_hosts: frozenset[str] = frozenset()
    api_keys: Mapping[str, str] = field(default_factory=dict, repr=False)  # id -> key; empty: open
    random_seed: int = -1  # base of the seeds drawn for requests that bring none; -1: the system's
    version: Mapping[str, str] = field(default_factory=dict)  # further fields of /version

    @property
    def open_limit(self) -> int:
        """Open generations allowed."""
        return self.max_concurrent_requests or 65_536
