"""Key files, and what a door beyond loopback needs."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from tests.certificates import flags_of, make_certificates
from tests.cli.support import say, write_model
from xllm_py.openai.key_check import KeyRing

KEYS = "# people\nann:first-key\n\n  bob:second:key=\n"


@pytest.fixture
def model(tmp_path):
    return f"--model={write_model(tmp_path / 'tiny')}"


@pytest.fixture
def key_file(tmp_path):
    """Writes a file that only its owner may read."""

    def write(content: str | bytes, mode: int = 0o600) -> str:
        path = tmp_path / "keys"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        path.chmod(mode)
        return str(path)

    return write


@pytest.mark.parametrize("program", ["xllm", "xllm-master"])
def test_api_keys_are_one_id_and_key_a_line(program, model, tmp_path, key_file):
    needed = model if program == "xllm" else f"--tokenizer_path={tmp_path}"
    said = say(program, needed, f"--api_key_file={key_file(KEYS)}")
    assert said.code == 0, said.err
    assert said.config.http.api_keys == {"ann": "first-key", "bob": "second:key="}
    assert said.config.warnings == ()
    assert "first-key" not in repr(said.config)
    assert KeyRing(said.config.http.api_keys).holder("Bearer second:key=") == "bob"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "holds no key"),
        ("# nobody\n\n", "holds no key"),
        ("ann:first-key\nsecret-without-id\n", "line 2 is no id:key"),
        ("ann:\n", "line 1 is no id:key"),
        (":key\n", "line 1 is no id:key"),
        ("ann: key\n", "line 1 is no id:key"),
        ("ann:two words\n", "line 1 is no id:key"),
        ("ann:first\nann:second\n", "line 2 repeats an id"),
        (b"ann:\xff\xfe\n", "line 1 is no id:key"),
    ],
    ids=ascii,
)
def test_a_broken_api_key_file_ends_the_start_and_is_never_shown(model, key_file, content, says):
    said = say("xllm", model, f"--api_key_file={key_file(content)}")
    assert said.code == 2
    assert says in said.errors[0]
    for secret in ("secret", "first", "second", "two words"):
        assert secret not in said.err


@pytest.mark.parametrize("name", ["api_key_file", "cluster_key_file"])
def test_a_key_file_that_others_can_read_is_refused(model, key_file, name):
    path = key_file(KEYS + "# " + "x" * 32, 0o640)
    said = say("xllm", model, f"--{name}={path}")
    assert (said.code, said.errors) == (
        2,
        [f"xllm: error: --{name}={path} can be read by others. Run chmod 600."],
    )


@pytest.mark.parametrize("name", ["api_key_file", "cluster_key_file"])
@pytest.mark.parametrize("path", ["/nowhere", "/", "y" * 5000], ids=lambda path: path[:10])
def test_a_key_file_that_cannot_be_read_is_refused(model, name, path):
    said = say("xllm", model, f"--{name}={path}")
    assert said.code == 2
    assert all(line.startswith(f"xllm: error: --{name}={path} ") for line in said.errors)


def test_the_cluster_key_is_the_bytes_of_its_file(model, key_file):
    said = say("xllm", model, f"--cluster_key_file={key_file(bytes(range(40)))}")
    assert said.config.cluster.cluster_key == bytes(range(40))
    assert say("xllm", model).config.cluster.cluster_key == b""


@pytest.mark.parametrize("length", [0, 31])
def test_a_short_cluster_key_is_never_taken_for_none(model, key_file, length):
    said = say("xllm", model, f"--cluster_key_file={key_file(b'k' * length)}")
    assert (said.code, f"holds {length} bytes. Use at least 32." in said.err) == (2, True)


def test_a_door_beyond_loopback_needs_keys(model, key_file):
    said = say("xllm", model, "--host=0.0.0.0")
    assert said.code == 2
    assert said.errors == [
        "xllm: error: binding HTTP to 0.0.0.0 without keys. Pass --api_key_file or "
        "--allow_insecure_http=true, or bind to 127.0.0.1."
    ]
    said = say("xllm", model, "--host=0.0.0.0", f"--api_key_file={key_file(KEYS)}")
    assert (said.code, said.config.addresses.host, said.config.warnings) == (0, "0.0.0.0", ())


def test_a_door_left_open_is_warned_about(model):
    said = say("xllm", model, "--host=0.0.0.0", "--allow_insecure_http")
    assert said.code == 0
    assert said.config.warnings == (
        "HTTP on 0.0.0.0 is open to whoever reaches it, as --allow_insecure_http says",
    )


def test_debug_routes_beyond_loopback_need_keys_even_when_the_door_is_open(model, key_file):
    words = (model, "--host=0.0.0.0", "--allow_insecure_http", "--debug_endpoints")
    said = say("xllm", *words)
    assert (said.code, "--debug_endpoints on 0.0.0.0 need keys" in said.err) == (2, True)
    assert say("xllm", *words, f"--api_key_file={key_file(KEYS)}").code == 0
    assert say("xllm", model, "--debug_endpoints").config.http.debug_endpoints


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "localhost", "::1"])
def test_loopback_needs_nothing(model, host):
    said = say("xllm", model, f"--host={host}", "--debug_endpoints")
    assert (said.code, said.config.warnings) == (0, ())


def test_ports_for_peers_beyond_loopback_need_a_key_or_tls(model, tmp_path, key_file):
    keys = f"--api_key_file={key_file(KEYS)}"
    instance = ("xllm", model, "--host=10.0.0.1", "--etcd_addr=10.0.0.9:2379", keys)
    master = ("xllm-master", f"--tokenizer_path={tmp_path}", "--server_host=10.0.0.1", keys)
    secret = tmp_path / "cluster.key"
    secret.write_bytes(b"k" * 32)
    secret.chmod(0o600)
    certificates = make_certificates(tmp_path)
    for words in (instance, master):
        said = say(*words)
        assert (said.code, "need to know who comes in. Pass --cluster_key_file" in said.err) == (
            2,
            True,
        )
        said = say(*words, f"--cluster_key_file={secret}")
        assert said.code == 0
        assert ["NOT encrypted" in line for line in said.config.warnings] == [True]
        said = say(*words, *flags_of(certificates))
        assert (said.code, said.config.warnings) == (0, ())
    assert say(*master, *flags_of(certificates)).config.tls == certificates
    config = say(*instance, *flags_of(certificates)).config
    assert config.cluster.tls == config.engine.kv_tls == certificates


def test_tls_files_are_looked_at_before_anything_starts(model, tmp_path):
    good, other = make_certificates(tmp_path), make_certificates(tmp_path, "other")
    cases = {
        "belong together": dataclasses.replace(good, key_file=other.key_file),
        "cannot be read": dataclasses.replace(good, cert_file=str(tmp_path / "none")),
        "--tls_ca_file": dataclasses.replace(good, ca_file=good.key_file),
    }
    for text, files in cases.items():
        said = say("xllm", model, *flags_of(files))
        assert (said.code, text in said.err) == (2, True), said.err
        assert len(said.errors) == 1
    Path(good.key_file).chmod(0o644)
    assert "can be read by others" in say("xllm", model, *flags_of(good)).err


def test_the_tls_flags_go_together(model):
    for words in (("--tls_cert_file=/c",), ("--tls_cert_file=/c", "--tls_key_file=/k")):
        assert say("xllm", model, *words).errors == [
            "xllm: error: the three --tls_*_file flags go together. Pass all or none."
        ]


def test_an_authority_alone_serves_an_https_registry(model):
    said = say("xllm", model, "--etcd_addr=https://127.0.0.1:1", "--tls_ca_file=/ca.pem")
    assert (said.code, said.config.cluster.etcd.ca_file) == (0, "/ca.pem")
