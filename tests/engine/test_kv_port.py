"""What a rank's KV port is for peers."""

from __future__ import annotations

from contextlib import closing

import pytest

from tests.conformance.kv_pair import KEY, make_memory
from tests.ports import free_port
from xllm_py.core.config import EngineConfig, RanksConfig
from xllm_py.core.kv_plan import Share
from xllm_py.engine.kv_port import announced, open_port


@pytest.mark.parametrize(
    ("host", "shown"), [("", "127.0.0.1"), ("d.example", "d.example"), ("::1", "[::1]")]
)
def test_peers_are_told_the_address_that_is_announced_not_where_it_listens(
    host: str, shown: str
) -> None:
    config = EngineConfig(model_path="", cluster_key=KEY, kv_advertise_host=host)
    with closing(open_port(config, make_memory(1), Share())) as transport:
        port = transport.endpoint.rpartition(":")[2]
        assert announced(config, transport) == f"{shown}:{port}"


def test_ranks_of_one_node_take_ports_beside_each_other() -> None:
    port = free_port()
    found = []
    for place in range(2):
        config = EngineConfig(
            model_path="", cluster_key=KEY, kv_port=port, ranks=RanksConfig(place=place)
        )
        with closing(open_port(config, make_memory(1), Share())) as transport:
            found.append(int(transport.endpoint.rpartition(":")[2]))
    assert found[1] > found[0] >= port
