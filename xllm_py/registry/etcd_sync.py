"""First contact with etcd when a daemon starts, through the etcd3 library: sign in, version, one read. Synchronous, so in a thread.

Called by registry/etcd before its own loops begin, and by nothing else: etcd3's watcher, lock and lease refresh are never used
(docs/decisions). etcd3 0.12.0 brings stubs that protobuf refuses since version 4, so ours take their place before it is imported.
"""

from __future__ import annotations

import sys
import types
from dataclasses import dataclass
from typing import Any

import grpc

from xllm_py.core.service_config import EtcdSlice
from xllm_py.registry.etcd_stubs import auth_pb2, kv_pb2, rpc_pb2, rpc_pb2_grpc


@dataclass(frozen=True, slots=True)
class Greeting:
    """What answered: its host:port and its version."""

    endpoint: str
    version: str


def endpoints(address: str) -> list[str]:
    """host:port of each part of a comma list."""
    return [part.partition("://")[2] or part for part in address.split(",")]


def greet(config: EtcdSlice, key: bytes) -> Greeting:
    """Ask the endpoints in their order; the first that answers counts. Takes timeout_s per call at most.

    Raises the grpc.RpcError of the last endpoint when none answers, or at once when one refuses us.
    """
    etcd3 = _etcd3()
    refused: grpc.RpcError | None = None
    for endpoint in endpoints(config.address):
        try:
            return _greet_one(etcd3, config, endpoint, key)
        except grpc.RpcError as error:
            refused = error
            if error.code() not in _TRY_NEXT:
                break
    assert refused is not None
    raise refused


_TRY_NEXT = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)


def _greet_one(etcd3: Any, config: EtcdSlice, endpoint: str, key: bytes) -> Greeting:
    host, _, port = endpoint.rpartition(":")
    client = etcd3.client(
        host=host,
        port=int(port),
        ca_cert=config.ca_file if config.address.startswith("https://") else None,
        timeout=config.timeout_s,
        user=config.username or None,
        password=config.password or None,
    )
    # its metadata carries the token already; gRPC refuses call credentials on a channel without TLS
    client.call_credentials = None
    try:
        client.get(key)
        return Greeting(endpoint, str(client.status().version))
    except etcd3.Etcd3Exception as error:
        if isinstance(
            error.__context__, grpc.RpcError
        ):  # it says more than the library's own exception
            raise error.__context__ from None
        raise
    finally:
        client.close()


def _etcd3() -> Any:
    """The library over our stubs."""
    if "etcd3" not in sys.modules:
        package = types.ModuleType("etcd3.etcdrpc")
        for stubs in (rpc_pb2, rpc_pb2_grpc):
            vars(package).update({k: v for k, v in vars(stubs).items() if not k.startswith("_")})
        sys.modules[package.__name__] = package
        for name, stubs in (
            ("auth_pb2", auth_pb2),
            ("kv_pb2", kv_pb2),
            ("rpc_pb2", rpc_pb2),
            ("rpc_pb2_grpc", rpc_pb2_grpc),
        ):
            sys.modules[f"{package.__name__}.{name}"] = stubs
    import etcd3

    return etcd3
