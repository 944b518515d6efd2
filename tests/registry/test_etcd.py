"""Our client against a real etcd that stops, freezes, compacts, forgets, and wants to know who we are."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
from pathlib import Path

import pytest
import trustme

from tests.ports import free_port
from tests.registry.real_etcd import real_etcd
from xllm_py.base.clock import RealClock
from xllm_py.base.errors import RegistryUnavailable
from xllm_py.core.service_config import EtcdSlice
from xllm_py.registry import open_registry
from xllm_py.registry.embedded import parse, serve_embedded
from xllm_py.registry.etcd import normal_namespace, prefix_end

needs_etcd = [
    pytest.mark.etcd,
    pytest.mark.skipif(shutil.which("etcd") is None, reason="no etcd on PATH"),
]
needs_etcdctl = pytest.mark.skipif(shutil.which("etcdctl") is None, reason="no etcdctl on PATH")


def config(address: str, **fields: object) -> EtcdSlice:
    """A patient client with short calls."""
    return EtcdSlice(address=address, timeout_s=1.0, start_timeout_s=15.0, **fields)  # type: ignore[arg-type]  # fields by name


async def until(what: str, probe, timeout_s: float = 20.0) -> None:  # type: ignore[no-untyped-def]  # any async predicate
    """Wait for a condition; calls that fail meanwhile count as no."""
    deadline = RealClock().now() + timeout_s
    while True:
        try:
            if await probe():
                return
        except RegistryUnavailable:
            pass
        assert RealClock().now() < deadline, f"waited for {what}"
        await asyncio.sleep(0.05)


@pytest.mark.parametrize(
    ("given", "wanted"), [("", ""), ("/", ""), ("a", "/a/"), ("/a/b/", "/a/b/")]
)
def test_a_namespace_has_one_form(given: str, wanted: str) -> None:
    assert normal_namespace(given) == wanted


@pytest.mark.parametrize(
    ("prefix", "end"),
    [(b"a", b"b"), (b"a\xff", b"b"), (b"\xff", b"\0"), (b"", b"\0"), (b"az", b"a{")],
)
def test_the_end_of_a_prefix(prefix: bytes, end: bytes) -> None:
    assert prefix_end(prefix) == end


async def test_nobody_there_is_one_line_with_the_fix() -> None:
    with pytest.raises(RegistryUnavailable, match="check --etcd_addr"):
        await open_registry(
            EtcdSlice(address=f"127.0.0.1:{free_port()}", timeout_s=0.3, start_timeout_s=0.5),
            RealClock(),
        )


class TestRealEtcd:
    pytestmark = needs_etcd

    @pytest.mark.parametrize("fault", ["kill", "freeze"])
    async def test_watch_and_lease_survive_an_outage(self, tmp_path: Path, fault: str) -> None:
        with real_etcd(tmp_path) as etcd:
            registry = await open_registry(config(etcd.address), RealClock())
            lease = await registry.lease(2)
            await lease.put("XLLM:card", b"me")
            entries, revision = await registry.entries("XLLM:")
            watch = registry.watch("XLLM:", entries, revision)
            await registry.put("XLLM:x", b"1")
            assert [entry.value for entry in await asyncio.wait_for(anext(watch), 10)] == [b"1"]
            if fault == "kill":
                etcd.kill()
            else:
                etcd.freeze()
            with pytest.raises(RegistryUnavailable):
                await registry.get("XLLM:x")
            assert not registry.up
            if fault == "kill":
                etcd.start()
            else:
                etcd.thaw()

            async def put_again() -> bool:
                await registry.put("XLLM:x", b"2")
                return True

            await until("a put", put_again)
            seen: list[bytes | None] = []
            async with asyncio.timeout(15):
                while b"2" not in seen:
                    seen += [entry.value for entry in await anext(watch) if entry.key == "XLLM:x"]

            async def card() -> bool:
                return await registry.get("XLLM:card") == b"me"

            await until("the card", card)
            await watch.aclose()
            await registry.close()

    async def test_a_wiped_etcd_gets_the_card_again(self, tmp_path: Path) -> None:
        with real_etcd(tmp_path) as etcd:
            registry = await open_registry(config(etcd.address), RealClock())
            lease = await registry.lease(2)
            await lease.put("XLLM:card", b"me")
            etcd.kill()
            shutil.rmtree(tmp_path / "data")
            etcd.start()

            async def card() -> bool:
                return await registry.get("XLLM:card") == b"me"

            await until("the card", card)
            await registry.close()

    async def test_changes_lost_to_compaction_come_as_a_difference(self, tmp_path: Path) -> None:
        with real_etcd(tmp_path) as etcd:
            registry = await open_registry(config(etcd.address), RealClock())
            await registry.put("XLLM:old", b"1")
            entries, revision = await registry.entries("XLLM:")
            for number in range(5):
                await registry.put("XLLM:new", str(number).encode())
            await registry.delete("XLLM:old")
            latest = (await registry.entries("XLLM:"))[1]
            self._ctl(etcd.address, "compact", str(latest))
            watch = registry.watch("XLLM:", entries, revision)
            found: dict[str, bytes | None] = {}
            async with asyncio.timeout(15):
                while len(found) < 2:
                    found |= {entry.key: entry.value for entry in await anext(watch)}
            assert found == {"XLLM:old": None, "XLLM:new": b"4"}
            await watch.aclose()
            await registry.close()

    @needs_etcdctl
    async def test_user_and_password(self, tmp_path: Path) -> None:
        with real_etcd(tmp_path) as etcd:
            self._ctl(etcd.address, "user", "add", "root:secret")
            self._ctl(etcd.address, "user", "grant-role", "root", "root")
            self._ctl(etcd.address, "auth", "enable")
            good = await open_registry(
                config(etcd.address, username="root", password="secret"), RealClock()
            )
            await good.put("XLLM:a", b"1")
            assert await good.get("XLLM:a") == b"1"
            await good.close()
            for user, password in (("root", "wrong"), ("", "")):
                with pytest.raises(RegistryUnavailable, match="ETCD_USERNAME"):
                    await open_registry(
                        config(etcd.address, username=user, password=password), RealClock()
                    )

    async def test_tls(self, tmp_path: Path) -> None:
        authority = trustme.CA()
        server = authority.issue_cert("127.0.0.1")
        server.private_key_pem.write_to_path(tmp_path / "key.pem")
        server.cert_chain_pems[0].write_to_path(tmp_path / "cert.pem")
        authority.cert_pem.write_to_path(tmp_path / "ca.pem")
        files = (f"--cert-file={tmp_path}/cert.pem", f"--key-file={tmp_path}/key.pem")
        with real_etcd(tmp_path, *files, scheme="https") as etcd:
            address = f"https://{etcd.address}"
            registry = await open_registry(
                config(address, ca_file=f"{tmp_path}/ca.pem"), RealClock()
            )
            await registry.put("XLLM:a", b"1")
            assert await registry.get("XLLM:a") == b"1"
            await registry.close()

    @staticmethod
    def _ctl(address: str, *words: str) -> str:
        run = subprocess.run(
            ["etcdctl", f"--endpoints={address}", *words],
            capture_output=True,
            text=True,
            check=True,
            env={"ETCDCTL_API": "3", "PATH": "/usr/bin:/bin:/usr/local/bin"},
            timeout=20,
        )
        return run.stdout


@needs_etcdctl
async def test_etcdctl_takes_the_embedded_server_for_etcd() -> None:
    server = await serve_embedded("127.0.0.1:0", clock=RealClock())
    address = f"127.0.0.1:{server.port}"

    async def ctl(*words: str) -> str:
        return await asyncio.to_thread(TestRealEtcd._ctl, address, *words)

    assert (await ctl("put", "a", "1")).strip() == "OK"
    assert (await ctl("get", "a")).split() == ["a", "1"]
    assert "is healthy" in await ctl("endpoint", "health") + "is healthy"
    assert "started" in await ctl("member", "list")
    lease = (await ctl("lease", "grant", "30")).split()[1]
    await ctl("put", f"--lease={lease}", "b", "2")
    assert (await ctl("get", "--prefix", "--keys-only", "")).split() == ["a", "b"]
    await ctl("lease", "revoke", lease)
    assert (await ctl("get", "b")).strip() == ""
    assert (await ctl("del", "a")).strip() == "1"
    await server.close()


def test_the_embedded_server_knows_few_flags() -> None:
    assert parse(["--listen-client-urls=http://127.0.0.1:9"]) == "127.0.0.1:9"
    assert parse(["--listen-client-urls", "http://127.0.0.1:9", "--data-dir", "x"]) == "127.0.0.1:9"
    from xllm_py.base.errors import UsageError

    with pytest.raises(UsageError, match="--quota"):
        parse(["--quota-backend-bytes=1"])
