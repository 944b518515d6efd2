"""The import contracts of setup.cfg: kept by the package, and each of them sees its sin."""

from __future__ import annotations

import configparser
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.arch.source import ROOT

SECTION = "importlinter:contract:"
RANK_SIDE = {
    "__main__",
    "edits",
    "grammar",
    "judge",
    "rank_group",
    "ranks",
    "sampler",
    "self_test",
    "uniforms",
    "worker",
}

# contract -> (file, what is added to its end, the import that must be reported)
SINS: dict[str, list[tuple[str, str, str]]] = {
    "floors": [
        ("base/ids.py", "import xllm_py.core.plan", "xllm_py.base.ids -> xllm_py.core.plan"),
        (
            "engine/loop.py",
            "def f(): import xllm_py.master.config",
            "xllm_py.engine.loop -> xllm_py.master.config",
        ),
        ("utils/__init__.py", "", "xllm_py.utils"),
    ],
    "no-torch": [
        ("master/router.py", "import torch", "xllm_py.master.router -> torch"),
        (
            "engine/toy.py",
            "def f(): import xllm_py.engine.worker",
            "xllm_py.engine.toy -> xllm_py.engine.worker",
        ),
    ],
    "pure": [
        ("core/scheduler.py", "import time", "xllm_py.core.scheduler -> time"),
        ("wire/codec.py", "import xllm_py.base.log", "xllm_py.wire.codec -> xllm_py.base.log"),
    ],
    "grpc-edge": [
        ("openai/app.py", "def f(): import grpc", "xllm_py.openai.app -> grpc"),
    ],
    "control-pb": [
        (
            "instance/peers.py",
            "import xllm_py.control.pb.xllm_pb2",
            "xllm_py.instance.peers -> xllm_py.control.pb.xllm_pb2",
        ),
    ],
    "etcd-stubs": [
        (
            "instance/announcer.py",
            "import xllm_py.registry.etcd_stubs.kv_pb2",
            "xllm_py.instance.announcer -> xllm_py.registry.etcd_stubs.kv_pb2",
        ),
    ],
    "devices-apart": [
        (
            "device/another.py",
            "import xllm_py.device.cpu",
            "xllm_py.device.another -> xllm_py.device.cpu",
        ),
    ],
    "transports-apart": [
        (
            "transport/memory.py",
            "import xllm_py.transport.tcp",
            "xllm_py.transport.memory -> xllm_py.transport.tcp",
        ),
    ],
    "transports-inside": [
        (
            "transport/pipe.py",
            "import xllm_py.transport.tcp_socket",
            "xllm_py.transport.pipe -> xllm_py.transport.tcp_socket",
        ),
    ],
    "acyclic": [
        (
            "cluster/load.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING: import xllm_py.cluster.routing\n",
            "No cycles are allowed in xllm_py.cluster.",
        ),
        (
            "cluster/routing.py",
            "import xllm_py.cluster.load",
            ".routing -> .load (1 import)",
        ),
    ],
    "one-home": [
        ("cli/rules.py", "import msgspec", "xllm_py.cli.rules -> msgspec"),
    ],
}


def contracts() -> dict[str, str]:
    """Name in setup.cfg -> title in the report."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    found = [section for section in config.sections() if section.startswith(SECTION)]
    return {section.removeprefix(SECTION): config[section]["name"] for section in found}


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    """Run the linter over the package in this folder, with its setup.cfg."""
    command = [Path(sys.executable).with_name("lint-imports"), "--no-cache", "--no-logo"]
    environment = {**os.environ, "PYTHONPATH": str(folder), "COLUMNS": "300"}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=100
    )


def broken(report: str) -> dict[str, str]:
    """Title of a broken contract -> what is said of it. A title is a line underlined over its whole length."""
    found: dict[str, list[str]] = {}
    lines = report.partition("Broken contracts")[2].splitlines()
    title = ""
    for line, after in zip(lines, [*lines[1:], ""], strict=True):
        if line and after == "-" * len(line):
            title = line
        found.setdefault(title, []).append(line)
    return {title: "\n".join(said) for title, said in found.items()}


@pytest.fixture(scope="session")
def sinful(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the linter says of a copy of the package with every sin in it."""
    folder = tmp_path_factory.mktemp("sinful")
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "xllm_py", folder / "xllm_py", ignore=ignored)
    shutil.copy(ROOT / "setup.cfg", folder)
    for place, text, _ in (sin for sins in SINS.values() for sin in sins):
        path = folder / "xllm_py" / place
        path.parent.mkdir(exist_ok=True)
        with path.open("a") as file:
            file.write(f"\n{text}\n")
    done = lint(folder)
    assert done.returncode == 1, done.stdout + done.stderr
    return broken(done.stdout)


def test_every_contract_is_kept() -> None:
    done = lint(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"Contracts: {len(contracts())} kept, 0 broken." in done.stdout


def test_every_contract_has_a_sin_to_see() -> None:
    assert set(SINS) == set(contracts())


@pytest.mark.parametrize(
    "contract, reported",
    [(contract, sin[2]) for contract, sins in SINS.items() for sin in sins],
)
def test_a_sin_is_reported_under_its_contract(
    sinful: dict[str, str], contract: str, reported: str
) -> None:
    said = sinful.get(contracts()[contract], "")
    assert any(line.removeprefix("-").strip().startswith(reported) for line in said.splitlines()), (
        said or sinful
    )


def test_every_file_of_the_engine_is_on_one_side_of_the_torch_line() -> None:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    modules = config[f"{SECTION}no-torch"]["source_modules"].split()
    without = {name.removeprefix("xllm_py.engine.") for name in modules if ".engine." in name}
    present = {path.stem for path in (ROOT / "xllm_py/engine").glob("*.py")} - {"__init__"}
    assert without | RANK_SIDE == present
    assert not without & RANK_SIDE
