"""A cluster's authority and the certificates it has signed, as PEM files."""

from __future__ import annotations

from pathlib import Path

import trustme

from xllm_py.core.service_config import TlsSlice


def make_certificates(folder: Path, name: str = "peer", ca: trustme.CA | None = None) -> TlsSlice:
    """One certificate for 127.0.0.1 by a new authority, or by the given one."""
    ca = ca or trustme.CA()
    leaf = ca.issue_cert("127.0.0.1")
    files = TlsSlice(
        cert_file=str(folder / f"{name}.crt"),
        key_file=str(folder / f"{name}.key"),
        ca_file=str(folder / f"{name}-ca.crt"),
    )
    Path(files.cert_file).write_bytes(b"".join(pem.bytes() for pem in leaf.cert_chain_pems))
    leaf.private_key_pem.write_to_path(files.key_file)
    Path(files.key_file).chmod(0o600)
    ca.cert_pem.write_to_path(files.ca_file)
    return files


def flags_of(files: TlsSlice) -> tuple[str, str, str]:
    """For a command line."""
    return (
        f"--tls_cert_file={files.cert_file}",
        f"--tls_key_file={files.key_file}",
        f"--tls_ca_file={files.ca_file}",
    )
