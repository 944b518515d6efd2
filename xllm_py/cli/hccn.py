"""/etc/hccn.conf: the addresses of an Ascend host's devices on their own network (SPEC 6.9).

With KV over TCP they are told to the others in the card and not needed, so a missing file is a warning; a wrong one is refused.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from pathlib import Path

from xllm_py.cli import rules
from xllm_py.cli.flags import Given

_LINE = re.compile(r"\s*address_(?P<index>[^=\s]*)\s*=\s*(?P<address>\S*)\s*")


def device_ips(causes: rules.Causes, given: Given, devices: Sequence[str]) -> tuple[str, ...]:
    """One address a device, empty where the file has none; () where no file is to be read: on other devices, unless it was named by hand."""
    path, by_hand = Path(given.values["hccn_conf"]), "hccn_conf" in given.by_hand
    on_npu = all(name.startswith("npu:") for name in devices)
    if not by_hand and not (on_npu and given.values["enable_disagg_pd"]):
        return ()
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        if by_hand:
            causes.need(
                False, f"--hccn_conf={path} cannot be read ({error.strerror}). Fix the path"
            )
        else:
            causes.warn(
                f"{path} is not there, so the card tells no device addresses; where something needs them, map the host's file into "
                f"the container (-v {path}:{path}:ro)"
            )
        return ()
    found = _parse(causes, path, text)
    if not on_npu:
        return ()
    missing = [name for name in devices if int(name.partition(":")[2]) not in found]
    if missing:
        causes.warn(
            f"{path} has no line address_N for {', '.join(missing)}; is it the host's file, and are devices renumbered in the container?"
        )
    return tuple(found.get(int(name.partition(":")[2]), "") for name in devices)


def _parse(causes: rules.Causes, path: Path, text: str) -> dict[int, str]:
    """Index -> address; every line that is wrong is a cause with its number."""
    found: dict[int, str] = {}
    for number, line in enumerate(text.splitlines(), 1):
        matched = _LINE.fullmatch(line)
        if matched is None:
            if line.strip().startswith("address_"):
                causes.need(
                    False, f"{path}, line {number}: '{line.strip()}' is no address_N=IP. Fix it"
                )
            continue
        index, address = matched["index"], matched["address"]
        if not index.isascii() or not index.isdigit():
            causes.need(False, f"{path}, line {number}: '{index}' is no device number. Fix it")
            continue
        if not _is_address(address):
            causes.need(False, f"{path}, line {number}: '{address}' is no IP address. Fix it")
            continue
        known = found.setdefault(int(index), address)
        causes.need(
            known == address,
            f"{path}, line {number}: device {index} has the addresses {known} and {address}. Leave one of them",
        )
    return found


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True
