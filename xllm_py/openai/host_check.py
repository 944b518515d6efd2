"""The Host header: only names this door answers to, so that a web page cannot reach it under a name of its own."""

from __future__ import annotations

import ipaddress
import re

from xllm_py.base.errors import Forbidden, InvalidValue

_HOST = re.compile(
    r"(?:\[(?P<six>[0-9A-Fa-f:.]{2,45})\]|(?P<name>[A-Za-z0-9._-]{1,253}))(?::\d{1,5})?"
)


def check_host(header: str | None, allowed: frozenset[str]) -> None:
    """Raise InvalidValue when missing or malformed, Forbidden when the name is not ours.

    IP addresses and localhost are always ours; `allowed` holds further names, "*" any.
    """
    found = _HOST.fullmatch(header or "")
    if found is None:
        raise InvalidValue("the Host header is missing or malformed", param="host")
    if "*" in allowed or found["six"] is not None:
        return
    name = found["name"].lower().rstrip(".")
    if name == "localhost" or name in allowed or _is_address(name):
        return
    raise Forbidden("this server does not answer to that host name; use its address", param="host")


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
