"""Clusters shared by the end-to-end tests; each is started once per session and checked for leaks at its end."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.checkpoints import make_checkpoint
from tests.e2e.cluster import Cluster, running


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen2 checkpoint with a tokenizer, small enough to serve thousands of tokens a second."""
    return make_checkpoint(
        tmp_path_factory.mktemp("models") / "tiny",
        seed=7,
        vocab_size=320,
        hidden_size=64,
        layers=3,
        heads=4,
        kv_heads=2,
        intermediate=128,
        tied=False,
        dtype="float32",
        with_tokenizer=True,
    )


@pytest.fixture(scope="session", params=["direct", "relayed"])
def pd_cluster(
    request: pytest.FixtureRequest, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Cluster]:
    """Registry, master, one PREFILL, one DECODE; D answers straight to the master, or through P."""
    direct = "true" if request.param == "direct" else "false"
    with running(tmp_path_factory.mktemp(request.param), tiny_model) as cluster:
        cluster.start_master(env={"ENABLE_DECODE_RESPONSE_TO_SERVICE": direct})
        cluster.start_instance("prefill", "PREFILL", "--block_size=16")
        cluster.start_instance("decode", "DECODE", "--block_size=16")
        cluster.wait_ready()
        yield cluster


@pytest.fixture(scope="session")
def lone_instance(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """One DEFAULT instance, no registry."""
    with running(tmp_path_factory.mktemp("lone"), tiny_model) as cluster:
        cluster.start_instance("default", "DEFAULT", "--block_size=16")
        cluster.wait_ready()
        yield cluster
