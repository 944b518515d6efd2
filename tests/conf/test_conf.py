"""What is given to operators is what the programs take: units, flag files, manifests."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from xllm_py.cli import hccn, master_flags, placement, rules, xllm, xllm_flags
from xllm_py.cli.flags import FlagCommand, Given

ROOT = Path(__file__).resolve().parents[2]
CONF = ROOT / "conf"
UNITS = sorted((CONF / "systemd").glob("*.service"))
FLAGS = sorted((CONF / "flags").glob("*.flags"))
MANIFESTS = sorted((CONF / "kubernetes").glob("*.yaml"))
VERSION = "1.31"
PROGRAMS = {"xllm": xllm_flags.TABLE, "xllm-master": master_flags.TABLE}


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze on PATH")
@pytest.mark.parametrize("unit", UNITS, ids=lambda it: it.name)
def test_units_are_what_systemd_takes(unit: Path, tmp_path: Path) -> None:
    text = re.sub(r"/usr/local/bin/\S+", sys.executable, unit.read_text())  # one that is there
    (tmp_path / unit.name).write_text(text)
    done = subprocess.run(
        ["systemd-analyze", "verify", str(tmp_path / unit.name)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    said = [line for line in done.stderr.splitlines() if "xllm" in line]
    assert (done.returncode, said) == (0, [])


@pytest.mark.parametrize("unit", UNITS, ids=lambda it: it.name)
def test_units_start_programs_that_tell_systemd_of_themselves(unit: Path) -> None:
    text = unit.read_text()
    (program,) = re.findall(
        r"^ExecStart=/usr/local/bin/(\S+) --flagfile=/etc/xllm/%i\.flags$", text, re.M
    )
    assert program in PROGRAMS
    for line in ("Type=notify", "WatchdogSec=30", "KillMode=mixed", "Restart=on-failure"):
        assert line in text.splitlines()


def given(program: str, words: list[str]) -> Given:
    """As the program reads them; a flag that there is not ends it."""
    caught: list[Given] = []

    def run(found: Given) -> int:
        caught.append(found)
        return 0

    assert FlagCommand(program, "", PROGRAMS[program], run).start(words) == 0
    return caught[0]


@pytest.mark.parametrize("file", FLAGS, ids=lambda it: it.name)
def test_flag_files_hold_flags_that_fit(file: Path, tmp_path: Path) -> None:
    program = "xllm-master" if file.stem == "main" else "xllm"
    found = given(program, [f"--flagfile={file}"])
    assert not [line for line in found.warnings if "unknown" in line]
    assert found.by_hand >= {
        line[2:].partition("=")[0]
        for line in file.read_text().splitlines()
        if line.startswith("--")
    }
    if program == "xllm":
        values = {
            **found.values,
            "model": str(tmp_path),
            "hccn_conf": str(CONF / "hccn.conf.example"),
        }
        causes = rules.Causes()
        devices = placement.named_devices(causes, values)
        placement.ranks_of(causes, values, devices)
        xllm._role(causes, values)
        ips = hccn.device_ips(causes, Given(values, found.by_hand, ()), devices)
        assert not causes.lines
        if values["enable_disagg_pd"]:
            assert all(ips)


def documents() -> list[Any]:
    return [
        pytest.param(document, id=f"{file.name}-{document['kind']}")
        for file in MANIFESTS
        for document in yaml.safe_load_all(file.read_text())
    ]


def pods(document: dict[str, Any]) -> list[dict[str, Any]]:
    """Templates of pods in it."""
    spec = document.get("spec", {})
    if document["kind"] == "LeaderWorkerSet":
        both = spec["leaderWorkerTemplate"]
        return [both["leaderTemplate"], both["workerTemplate"]]
    return [spec["template"]] if "template" in spec else []


@pytest.mark.parametrize("document", documents())
def test_manifests_fit_the_schema(document: dict[str, Any]) -> None:
    if document["kind"] == "Kustomization":
        assert all((CONF / "kubernetes" / name).exists() for name in document["resources"])
        return
    if document["kind"] == "LeaderWorkerSet":  # no part of Kubernetes itself; what it makes is
        assert document["apiVersion"] == "leaderworkerset.x-k8s.io/v1"
        for number, template in enumerate(pods(document)):
            pod = {
                "apiVersion": "v1",
                "kind": "Pod",
                "metadata": {"name": f"pod-{number}"},
                "spec": template["spec"],
            }
            kubernetes_validate.validate(pod, VERSION, strict=True)
        return
    kubernetes_validate.validate(document, VERSION, strict=True)


def containers() -> list[Any]:
    return [
        pytest.param(container, id=f"{file.stem}-{number}")
        for file in MANIFESTS
        for document in yaml.safe_load_all(file.read_text())
        for number, template in enumerate(pods(document))
        for container in template["spec"]["containers"]
        if container["command"][0] in PROGRAMS
    ]


@pytest.mark.parametrize("container", containers())
def test_containers_are_started_with_flags_that_there_are_and_ports_that_are_theirs(
    container: dict[str, Any],
) -> None:
    words = [re.sub(r"\$\(LWS_GROUP_SIZE\)", "2", word) for word in container["args"]]
    words = [re.sub(r"\$\(LWS_WORKER_INDEX\)", "1", word) for word in words]
    values = given(container["command"][0], words).values
    flags = {
        "http": "http_server_port" if "http_server_port" in values else "port",
        "rpc": "rpc_server_port",
        "control": "disagg_pd_port",
        "kv": "transfer_listen_port",
    }
    ports = {each["name"]: each["containerPort"] for each in container.get("ports", ())}
    for name, port in ports.items():
        if name == "ranks":
            assert values["master_node_addr"].endswith(f":{port}")
        else:
            assert values[flags[name]] == port
    mounted = {mount["mountPath"] for mount in container["volumeMounts"]}
    files = [values[name] for name in ("cluster_key_file", "api_key_file")]
    assert all(file.rpartition("/")[0] in mounted for file in files)
