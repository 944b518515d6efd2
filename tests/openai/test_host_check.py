"""Which Host headers this door answers to."""

from __future__ import annotations

import pytest

from xllm_py.base.errors import Forbidden, InvalidValue
from xllm_py.openai.host_check import check_host


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:80", "127.0.0.1:8010", "[::1]:80", "10.0.0.9", "box.example"]
)
def test_addresses_localhost_and_named_hosts_pass(host):
    check_host(host, frozenset({"box.example"}))


@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example", "1.2.3.4.evil.example"])
def test_foreign_names_are_forbidden(host):
    with pytest.raises(Forbidden):
        check_host(host, frozenset())
    check_host(host, frozenset({"*"}))


@pytest.mark.parametrize(
    "host", [None, "", "a b", "localhost:1:2", "user@localhost", "[::1", "a/b"]
)
def test_malformed_hosts_are_refused(host):
    with pytest.raises(InvalidValue):
        check_host(host, frozenset({"*"}))
