"""A cluster whose KV, control and HTTP ports speak TLS: it serves, and who has no certificate of its authority gets nothing."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from tests.certificates import flags_of, make_certificates
from tests.e2e.cluster import Cluster, Daemon, running, wait_for
from tests.e2e.phases import body
from xllm_py.core.service_config import TlsSlice


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> TlsSlice:
    return make_certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="module")
def cluster(
    files: TlsSlice, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Cluster]:
    with running(tmp_path_factory.mktemp("tls"), tiny_model) as made:
        made.tls = ssl.create_default_context(cafile=files.ca_file)
        made.start_master(*flags_of(files))
        made.start_instance("prefill", "PREFILL", "--block_size=16", *flags_of(files))
        made.start_instance("decode", "DECODE", "--block_size=16", *flags_of(files))
        made.wait_ready()
        yield made


def named(cluster: Cluster, name: str) -> Daemon:
    return next(daemon for daemon in cluster.daemons if daemon.name == name)


def flag(daemon: Daemon, name: str) -> int:
    """A port from its command line."""
    return int(next(word for word in daemon.command if word.startswith(f"--{name}=")).split("=")[1])


def test_a_request_goes_through_p_and_d(cluster: Cluster) -> None:
    asked = body([5, 6, 7] * 20, max_tokens=12, temperature=0)
    status, answer = named(cluster, "master").request("POST", "/v1/completions", asked)
    assert status == 200, answer
    wait_for("P to be empty", named(cluster, "prefill").idle)
    counted = named(cluster, "master").request("GET", "/metrics")[1]
    assert 'xllm_handoff_offers_total{result="landed"} 1.0' in counted


def test_strangers_get_nothing(cluster: Cluster, files: TlsSlice) -> None:
    """Without a certificate no port of peers answers, whatever is said."""
    decode = named(cluster, "decode")
    kv, control = flag(decode, "transfer_listen_port"), flag(decode, "disagg_pd_port")
    context = ssl.create_default_context(cafile=files.ca_file)
    for port in (kv, control):
        with (
            socket.create_connection(("127.0.0.1", port), 5) as sock,
            pytest.raises((ssl.SSLError, ConnectionError)),
            context.wrap_socket(sock, server_hostname="127.0.0.1") as wrapped,
        ):
            wrapped.sendall(b"hello")
            if not wrapped.recv(1):
                raise ConnectionError
    with grpc.insecure_channel(f"127.0.0.1:{control}") as channel:
        call = channel.unary_unary("/xllm.v1.DisaggPDService/Describe")
        with pytest.raises(grpc.RpcError) as refused:
            call(b"", timeout=2)
        assert refused.value.code() == grpc.StatusCode.UNAVAILABLE


def test_an_instance_of_another_authority_is_not_linked(cluster: Cluster, tmp_path: Path) -> None:
    other = make_certificates(tmp_path, "other")
    stranger = cluster.start_instance("stranger", "PREFILL", "--block_size=16", *flags_of(other))
    wait_for("its card", lambda: " ready" in stranger.log())
    master = named(cluster, "master")

    def listed() -> dict[str, object]:
        rows = master.request("GET", "/admin/instances")[1]["instances"]
        return next((row for row in rows if row["name"].endswith(f":{stranger.port}")), {})

    row = wait_for("its row", listed)
    assert row["state"] == "JOINING"
    stranger.stop()
    cluster.daemons.remove(stranger)
