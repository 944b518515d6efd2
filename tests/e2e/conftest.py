"""Clusters shared by the end-to-end tests; each is started once per file: idle daemons cost a tenth of a core, and they would stay for the rest of a session."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.checkpoints import make_checkpoint
from tests.e2e.cluster import Cluster, running

DECODE_TOKENS = 1920  # what D of the slow cluster holds
SLOW_LAYERS = 16
TOKEN_BYTES = 2 * SLOW_LAYERS * 2 * 16 * 4  # K and V, layers, KV heads, head size, float32


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


@pytest.fixture(scope="session")
def slow_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As small, but deep: a step takes some milliseconds, so that every phase can be looked at."""
    folder = tmp_path_factory.mktemp("slow_models") / "tiny"
    return make_checkpoint(folder, seed=8, layers=SLOW_LAYERS, with_tokenizer=True)


@contextmanager
def pair(folder: Path, model: Path, *, direct: bool) -> Iterator[Cluster]:
    """Registry, master, one PREFILL, one DECODE."""
    with running(folder, model) as cluster:
        way = {"ENABLE_DECODE_RESPONSE_TO_SERVICE": str(direct).lower()}
        # a busy machine keeps processes waiting for longer than the defaults bear
        cluster.start_master("--suspect_after_ms=1500", "--gone_after_ms=3000", env=way)
        cluster.start_instance("prefill", "PREFILL", "--block_size=16")
        # one of the two ways begins steps of decodes ahead; the text is the same
        ahead = f"--enable_schedule_overlap={str(direct).lower()}"
        cluster.start_instance("decode", "DECODE", "--block_size=16", ahead)
        cluster.wait_ready()
        yield cluster


@pytest.fixture(scope="module")
def direct_cluster(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """D answers straight to the master."""
    with pair(tmp_path_factory.mktemp("direct"), tiny_model, direct=True) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def relayed_cluster(
    tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Cluster]:
    """D answers through P."""
    with pair(tmp_path_factory.mktemp("relayed"), tiny_model, direct=False) as cluster:
        yield cluster


@pytest.fixture(scope="module", params=["direct", "relayed"])
def pd_cluster(request: pytest.FixtureRequest) -> Cluster:
    """Each of the two."""
    cluster = request.getfixturevalue(f"{request.param}_cluster")
    assert isinstance(cluster, Cluster)
    return cluster


@pytest.fixture(scope="module")
def lone_instance(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """One DEFAULT instance, no registry."""
    with running(tmp_path_factory.mktemp("lone"), tiny_model) as cluster:
        cluster.start_instance("default", "DEFAULT", "--block_size=16")
        cluster.wait_ready()
        yield cluster


@pytest.fixture(scope="module")
def slow_cluster(slow_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Every phase lasts long enough to be looked at.

    P computes one token a step and one request at a time, all of it each time; D holds fewer tokens than P; the master bears
    silence.
    """
    with running(tmp_path_factory.mktemp("slow"), slow_model) as cluster:
        cluster.start_master("--suspect_after_ms=30000", "--gone_after_ms=30000")
        cluster.start_instance(
            "prefill",
            "PREFILL",
            "--block_size=16",
            "--max_seqs_per_batch=1",
            "--max_tokens_per_chunk_for_prefill=1",
            "--enable_prefix_cache=false",
        )
        cluster.start_instance(
            "decode", "DECODE", "--block_size=16", f"--max_cache_size={DECODE_TOKENS * TOKEN_BYTES}"
        )
        cluster.wait_ready()
        yield cluster
