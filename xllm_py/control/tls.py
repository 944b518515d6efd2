"""Mutual TLS on gRPC: one certificate for both ends of a process, one authority for the cluster.

Files are read when a server or the channels of a process are made; cli/rules has looked at them before.
"""

from __future__ import annotations

from pathlib import Path

import grpc

from xllm_py.core.service_config import TlsSlice


def server_credentials(tls: TlsSlice) -> grpc.ServerCredentials:
    """Callers must show a certificate of the authority."""
    return grpc.ssl_server_credentials(
        [(_read(tls.key_file), _read(tls.cert_file))],
        root_certificates=_read(tls.ca_file),
        require_client_auth=True,
    )


def channel_credentials(tls: TlsSlice) -> grpc.ChannelCredentials:
    """The peer must show one that names the address we dial."""
    return grpc.ssl_channel_credentials(
        root_certificates=_read(tls.ca_file),
        private_key=_read(tls.key_file),
        certificate_chain=_read(tls.cert_file),
    )


def _read(path: str) -> bytes:
    return Path(path).read_bytes()
