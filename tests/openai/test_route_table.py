"""Patterns and methods."""

from __future__ import annotations

import pytest

from xllm_py.base.errors import MethodNotAllowed, UnknownRoute
from xllm_py.openai.route_table import RouteTable

TABLE = RouteTable(
    {
        ("GET", "/a"): 1,
        ("POST", "/a"): 2,
        ("GET", "/m/*"): 3,
        ("GET", "/i/{name}"): 4,
        ("POST", "/i/{name}/drain"): 5,
    }
)


@pytest.mark.parametrize(
    ("method", "path", "handler", "params"),
    [
        ("GET", "/a", 1, {}),
        ("HEAD", "/a", 1, {}),
        ("POST", "/a", 2, {}),
        ("GET", "/m/org/model%2Fx", 3, {"*": "org/model/x"}),
        ("GET", "/i/127.0.0.1%3A80", 4, {"name": "127.0.0.1:80"}),
        ("POST", "/i/p%2F1/drain", 5, {"name": "p/1"}),
    ],
)
def test_routes_are_found(method, path, handler, params):
    assert TABLE.find(method, path) == (handler, params)


@pytest.mark.parametrize(
    "path", ["/", "/a/", "/b", "/m", "/m/", "/i/", "/i//drain", "/i/x/y/drain"]
)
def test_other_paths_are_unknown(path):
    with pytest.raises(UnknownRoute):
        TABLE.find("GET", path)


def test_a_known_path_names_its_methods():
    with pytest.raises(MethodNotAllowed):
        TABLE.find("DELETE", "/a")
    assert TABLE.allowed("/a") == "GET, POST"
    assert TABLE.allowed("/i/x/drain") == "POST"
