"""A start that cannot succeed says why in its last line, cause and fix, and exits with the code of SPEC 1.3."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.e2e.cluster import ROOT, Cluster
from tests.ports import free_port

LAST_LINE = re.compile(r"(xllm|xllm-master): error: (.+?)([.;,]) (.+)\.")


def end_of(program: str, *flags: str, without_torch: Path | None = None) -> tuple[int, str]:
    """(exit code, last line of stderr) of a start that must end by itself, without a traceback."""
    shadow = {} if without_torch is None else {"PYTHONPATH": str(without_torch)}
    done = subprocess.run(
        [sys.executable, "-m", f"xllm_py.cli.{program}", *flags],
        cwd=ROOT,
        env={**os.environ, **shadow},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert "Traceback" not in done.stderr, done.stderr
    assert "torch was imported" not in done.stderr, done.stderr
    lines = done.stderr.splitlines()
    told = [line for line in lines if ": error: " in line]
    assert len(told) == 1, done.stderr
    assert told == lines[-1:], done.stderr
    assert LAST_LINE.fullmatch(told[0]), told[0]
    return done.returncode, told[0]


@pytest.fixture(scope="session")
def no_torch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that, put on PYTHONPATH, makes `import torch` fail: what ends before the model needs none."""
    folder = tmp_path_factory.mktemp("no_torch")
    (folder / "torch.py").write_text("raise SystemError('torch was imported')\n")
    return folder


@pytest.fixture
def busy_port() -> Iterator[int]:
    """A port on which this test listens."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


def instance_flags(model: Path, *flags: str) -> list[str]:
    """A cheap instance on a free port; later flags win."""
    common = ("--devices=cpu:0", "--cpu_threads=1", "--max_cache_size=4194304")
    return [f"--model={model}", *common, f"--port={free_port()}", *flags]


def master_flags(model: Path, *flags: str) -> list[str]:
    """A master on free ports with a registry of its own; later flags win."""
    ports = (f"--http_server_port={free_port()}", f"--rpc_server_port={free_port()}")
    etcd = ("--embedded_etcd=true", f"--etcd_addr=127.0.0.1:{free_port()}")
    return [f"--tokenizer_path={model}", *ports, *etcd, *flags]


# ---- flags ----


@pytest.mark.parametrize(
    ("flags", "cause"),
    [
        (["--devices=tpu:0"], "'tpu:0' is no device"),
        (["--enable_disagg_pd", "--etcd_addr=127.0.0.1:1"], "--enable_disagg_pd needs a role"),
        (["--enable_disagg_pd", "--instance_role=DECODE"], "--enable_disagg_pd needs a registry"),
        (["--instance_role=PREFILL"], "--instance_role=PREFILL needs --enable_disagg_pd"),
        (["--instance_role=BOTH"], "--instance_role=BOTH is unknown"),
        (["--etcd_addr=somewhere"], "'somewhere' is no host:port"),
        (["--block_size=48"], "--block_size=48"),
    ],
)
def test_flags_of_an_instance_that_cannot_work_are_exit_2(
    tiny_model: Path, no_torch: Path, flags: list[str], cause: str
) -> None:
    given = instance_flags(tiny_model, "--advertise_host=192.0.2.1", *flags)
    code, line = end_of("xllm", *given, without_torch=no_torch)
    assert (code, cause in line) == (2, True), line


@pytest.mark.parametrize(
    ("flag", "cause"),
    [
        ("--tokenizer_path=", "--tokenizer_path is missing"),
        ("--load_balance_policy=BEST", "--load_balance_policy=BEST is unknown"),
        ("--etcd_addr=", "--etcd_addr is empty"),
    ],
)
def test_flags_of_a_master_that_cannot_work_are_exit_2(
    tiny_model: Path, no_torch: Path, flag: str, cause: str
) -> None:
    code, line = end_of("xllm_master", *master_flags(tiny_model, flag), without_torch=no_torch)
    assert (code, cause in line) == (2, True), line


# ---- ports ----


def holder() -> str:
    """How the process that listens on the busy port, this one, is named."""
    return f"by pid {os.getpid()} ("


@pytest.mark.parametrize("flag", ["--port", "--disagg_pd_port", "--transfer_listen_port"])
def test_a_port_of_an_instance_given_by_hand_never_moves(
    tiny_model: Path, no_torch: Path, busy_port: int, flag: str
) -> None:
    role = ("--enable_disagg_pd", "--instance_role=PREFILL", "--etcd_addr=127.0.0.1:1")
    flags = instance_flags(tiny_model, *role, f"{flag}={busy_port}")
    code, line = end_of("xllm", *flags, without_torch=no_torch)
    assert code == 5, line
    assert f"port {busy_port} is taken" in line
    assert holder() in line
    assert line.endswith(f"pass another {flag}.")


@pytest.mark.parametrize("flag", ["--http_server_port", "--rpc_server_port", "--etcd_addr"])
def test_a_port_of_a_master_never_moves(
    tiny_model: Path, no_torch: Path, busy_port: int, flag: str
) -> None:
    value = f"127.0.0.1:{busy_port}" if flag == "--etcd_addr" else str(busy_port)
    flags = master_flags(tiny_model, f"{flag}={value}")
    code, line = end_of("xllm_master", *flags, without_torch=no_torch)
    assert code == 5, line
    assert holder() in line
    assert line.endswith(f"pass another {flag}.")


def test_default_ports_move_on_when_they_are_busy(tiny_model: Path, tmp_path: Path) -> None:
    """Two instances with the default ports: the second one's card and log name where it listens."""
    cluster = Cluster(tmp_path, tiny_model)
    try:
        cluster.start_registry()
        common = ["--enable_disagg_pd=true", f"--etcd_addr=127.0.0.1:{cluster.etcd_port}"]
        for name, role in (("one", "PREFILL"), ("two", "DECODE")):
            port = free_port()
            flags = instance_flags(tiny_model, *common, f"--instance_role={role}")
            cluster.start(name, "cli.xllm", *flags, f"--port={port}", port=port)
        one, two = cluster.daemons[1:]
        cluster.wait_ready(one, two)
        places = [re.search(r"ready .* control=(\S+) kv=(\S+)", each.log()) for each in (one, two)]
        assert all(places), [one.tail(), two.tail()]
        taken = {address for place in places if place for address in place.groups()}
        assert len(taken) == 4
        moved = one.log() + two.log()
        assert "control port is taken, moved on port=7777" in moved
        assert "KV port is taken, moved on port=26000" in moved
    finally:
        cluster.stop()


# ---- registry ----


@pytest.mark.parametrize("program", ["xllm", "xllm_master"])
def test_a_registry_that_is_not_there_is_exit_6(
    tiny_model: Path, no_torch: Path, program: str
) -> None:
    address = f"127.0.0.1:{free_port()}"
    wrong = ("--embedded_etcd=false", f"--etcd_addr={address}", "--etcd_start_timeout_s=0.3")
    flags = (
        instance_flags(tiny_model, *wrong[1:])
        if program == "xllm"
        else master_flags(tiny_model, *wrong)
    )
    code, line = end_of(program, *flags, without_torch=no_torch)
    assert code == 6, line
    assert address in line
    assert "--etcd_addr" in line


# ---- model folders ----

Break = Callable[[Path], object]


def broken_copy(model: Path, folder: Path, do: Break) -> Path:
    """A copy of the model to which something was done."""
    copy = folder / "broken"
    shutil.copytree(model, copy)
    do(copy)
    return copy


def rewrite(name: str, text: str) -> Break:
    """Put other text into a file of the model folder."""
    return lambda folder: (folder / name).write_text(text)


def cut_weights(folder: Path) -> None:
    """As an interrupted download leaves them."""
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:50_000])


def drop_tensor(folder: Path) -> None:
    """One tensor fewer."""
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors")


BAD_TEMPLATE = json.dumps({"chat_template": "{% for message in %}"})


@pytest.mark.parametrize(
    ("do", "cause"),
    [
        (shutil.rmtree, "was not found"),
        (lambda folder: [path.unlink() for path in folder.iterdir()], "no config.json in"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json is missing"),
        (rewrite("tokenizer.json", '{"model": '), "tokenizer.json is no usable tokenizer"),
        (rewrite("tokenizer_config.json", "["), "tokenizer_config.json is no valid JSON"),
        (rewrite("tokenizer_config.json", BAD_TEMPLATE), "the chat template in"),
    ],
    ids=["no folder", "empty", "no tokenizer", "broken tokenizer", "no JSON", "broken template"],
)
def test_a_folder_without_a_usable_model_is_exit_3_before_torch_is_needed(
    tiny_model: Path, tmp_path: Path, no_torch: Path, do: Break, cause: str
) -> None:
    model = broken_copy(tiny_model, tmp_path, do)
    code, line = end_of("xllm", *instance_flags(model), without_torch=no_torch)
    assert (code, cause in line) == (3, True), line


@pytest.mark.parametrize(
    ("do", "cause"),
    [
        (rewrite("config.json", "{oops"), "config.json: is not JSON"),
        (
            rewrite("config.json", '{"model_type": "gpt9"}'),
            "field model_type is 'gpt9', which is not supported",
        ),
        (cut_weights, "model.safetensors: is truncated"),
        (drop_tensor, "no tensor model.norm.weight"),
    ],
    ids=["broken config", "unknown type", "truncated weights", "missing tensor"],
)
def test_a_model_that_does_not_load_is_exit_3(
    tiny_model: Path, tmp_path: Path, do: Break, cause: str
) -> None:
    model = broken_copy(tiny_model, tmp_path, do)
    code, line = end_of("xllm", *instance_flags(model))
    assert (code, cause in line) == (3, True), line


@pytest.mark.parametrize("make", [shutil.rmtree, rewrite("tokenizer.json", "{")])
def test_a_master_without_a_tokenizer_is_exit_3(
    tiny_model: Path, tmp_path: Path, no_torch: Path, make: Break
) -> None:
    folder = broken_copy(tiny_model, tmp_path, make)
    code, line = end_of("xllm_master", *master_flags(folder), without_torch=no_torch)
    assert (code, "tokenizer" in line) == (3, True), line


# ---- devices and memory ----


def test_a_cache_of_less_than_two_blocks_is_exit_4_with_numbers_and_flag(tiny_model: Path) -> None:
    code, line = end_of("xllm", *instance_flags(tiny_model, "--max_cache_size=100000"))
    assert code == 4, line
    assert "may take 0.0954 MiB" in line
    assert re.search(r"two blocks need 0\.188 MiB; raise --max_cache_size", line), line


@pytest.mark.parametrize(
    ("device", "cause"), [("npu:0", "torch_npu"), ("cuda:63", "cpu:0"), ("mlu:0", "cpu:0")]
)
def test_a_device_that_is_not_there_is_exit_4(tiny_model: Path, device: str, cause: str) -> None:
    code, line = end_of("xllm", *instance_flags(tiny_model, f"--devices={device}"))
    assert code == 4, line
    assert device in line
    assert cause in line
