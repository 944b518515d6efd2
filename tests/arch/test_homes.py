"""Every library has one home, so that it can be replaced there; and what is installed is what is used."""

from __future__ import annotations

import configparser
import re
import sys
from collections import defaultdict
from functools import cache

import grimp

from tests.arch.source import ROOT

# library -> (distribution, the modules or packages that may import it)
HOMES: dict[str, tuple[str, tuple[str, ...]]] = {
    "click": ("click", ("cli",)),
    "etcd3": ("etcd3", ("registry.etcd_sync",)),
    "google": (
        "protobuf",
        ("control.client", "control.pb", "control.server", "registry.etcd_stubs"),
    ),
    "grpc": (
        "grpcio",
        (
            "control.channels",
            "control.client",
            "control.server",
            "control.status",
            "control.tls",
            "registry.embedded",
            "registry.embedded_services",
            "registry.etcd",
            "registry.etcd_lease",
            "registry.etcd_stubs",
            "registry.etcd_sync",
            "registry.etcd_watch",
        ),
    ),
    "httptools": ("httptools", ("openai.protocol",)),
    "jinja2": ("jinja2", ("openai.template_child",)),
    "mooncake": ("mooncake-transfer-engine-non-cuda", ("transport.fabric_mooncake",)),
    "nixl_cu12": ("nixl-cu12", ("transport.fabric_nixl",)),
    "llguidance": ("llguidance", ("engine.grammar", "openai.grammar_child")),
    "msgspec": ("msgspec", ("openai", "transport.pipe")),
    "numpy": (
        "numpy",
        (
            "device",
            "engine.edits",
            "engine.grammar",
            "engine.judge",
            "engine.sampler",
            "engine.uniforms",
            "engine.worker",
            "transport.stage",
        ),
    ),
    "prometheus_client": ("prometheus_client", ("base.metrics",)),
    "psutil": ("psutil", ("base.ports", "base.process")),
    "torch_npu": ("torch_npu", ("device.npu.load",)),
    "triton": ("triton", ("device.cuda.kernels", "device.cuda.draw_kernels", "device.cuda.launch")),
    "safetensors": ("safetensors", ("model.weights",)),
    "tokenizers": ("tokenizers", ("openai.tokenizer",)),
    "torch": (
        "torch",
        (
            "device",
            "model",
            "engine.edits",
            "engine.judge",
            "engine.rank_group",
            "engine.sampler",
            "engine.self_test",
            "engine.worker",
        ),
    ),
    "uvicorn": ("uvicorn", ("openai.protocol", "openai.server")),
    "uvloop": ("uvloop", ("instance.daemon", "instance.rank_node", "master.daemon")),
    "xxhash": ("xxhash", ("base.hashing",)),
}
# what an extra installs; --kv_transport asks for it
EXTRAS = {"mooncake-transfer-engine-non-cuda", "nixl-cu12", "torch_npu", "triton"}
# installed, though no line of ours imports it
UNIMPORTED: dict[str, str] = {}


@cache
def importers() -> dict[str, frozenset[str]]:
    """Third-party library -> our modules that import it, without `xllm_py.`."""
    graph = grimp.build_graph("xllm_py", include_external_packages=True, cache_dir=None)
    found = defaultdict(set)
    for library in graph.modules:
        if library.partition(".")[0] not in sys.stdlib_module_names | {"xllm_py"}:
            for module in graph.find_modules_that_directly_import(library):
                found[library].add(module.removeprefix("xllm_py."))
    return {library: frozenset(modules) for library, modules in found.items()}


def lives_in(module: str, home: str) -> bool:
    return f"{module}.".startswith(f"{home}.")


def strangers(found: dict[str, frozenset[str]]) -> list[str]:
    """Imports of a library outside its homes, or of one that has none."""
    return sorted(
        f"{module} imports {library}"
        for library, modules in found.items()
        for module in modules
        if not any(lives_in(module, home) for home in HOMES.get(library, ("", ()))[1])
    )


def declared() -> set[str]:
    """Names in install_requires."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    lines = config["options"]["install_requires"].split("\n")
    return {found[0] for line in lines if (found := re.match(r"[A-Za-z0-9_.-]+", line))}


def test_every_library_is_imported_at_its_home_only() -> None:
    assert not strangers(importers()), "\n".join(strangers(importers()))


def test_every_home_is_lived_in() -> None:
    empty = [
        f"{home} does not import {library}"
        for library, (_, homes) in HOMES.items()
        for home in homes
        if not any(lives_in(module, home) for module in importers().get(library, ()))
    ]
    assert not empty, "\n".join(empty)


def test_what_is_installed_is_what_is_imported() -> None:
    imported = {HOMES[library][0] for library in importers() if library in HOMES}
    assert declared() == (imported | set(UNIMPORTED)) - EXTRAS
    assert not imported & set(UNIMPORTED)


def test_a_library_away_from_home_and_one_without_a_home_are_reported() -> None:
    found = {"torch": frozenset({"device.cpu", "master.router"}), "requests": frozenset({"cli"})}
    assert strangers(found) == ["cli imports requests", "master.router imports torch"]
