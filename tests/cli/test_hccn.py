"""hccn.conf: read where it means something, believed where it is right, refused with line and text where it is not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from xllm_py.cli import rules
from xllm_py.cli.flags import Given
from xllm_py.cli.hccn import device_ips

Read = Callable[..., tuple[tuple[str, ...], rules.Causes]]


@pytest.fixture
def read(tmp_path: Path) -> Read:
    """devices and text -> addresses, and what was said; text None: there is no file."""

    def made(
        text: str | None, *devices: str, by_hand: bool = False, split: bool = True
    ) -> tuple[tuple[str, ...], rules.Causes]:
        path = tmp_path / "hccn.conf"
        if text is not None:
            path.write_text(text)
        values: dict[str, Any] = {"hccn_conf": str(path), "enable_disagg_pd": split}
        named = frozenset({"hccn_conf"}) if by_hand else frozenset()
        causes = rules.Causes()
        given = Given(values=values, by_hand=named, warnings=())
        return device_ips(causes, given, devices), causes

    return made


GOOD = """# made by hccn_tool
address_0=192.0.2.10
 address_1 = 2001:db8::1
netmask_0=255.255.255.0
gateway_0=192.0.2.1

netdetect_0=192.0.2.2
"""


def test_each_device_gets_its_address(read: Read) -> None:
    ips, causes = read(GOOD, "npu:1", "npu:0")
    assert ips == ("2001:db8::1", "192.0.2.10")
    assert not causes.lines
    assert not causes.warnings


def test_a_device_without_a_line_is_a_warning(read: Read) -> None:
    ips, causes = read(GOOD, "npu:0", "npu:7")
    assert ips == ("192.0.2.10", "")
    assert not causes.lines
    (warning,) = causes.warnings
    assert "npu:7" in warning


def test_no_file_is_a_warning_that_says_how_to_map_it(read: Read) -> None:
    ips, causes = read(None, "npu:0")
    assert (ips, causes.lines) == ((), [])
    (warning,) = causes.warnings
    assert "into the container" in warning


@pytest.mark.parametrize("devices", [("cpu:0",), ("cuda:0",), ("auto",)])
def test_other_devices_do_not_read_it(read: Read, devices: tuple[str, ...]) -> None:
    ips, causes = read("address_0=nonsense", *devices)
    assert (ips, causes.lines, causes.warnings) == ((), [], [])


def test_without_handoffs_it_is_not_read(read: Read) -> None:
    assert read("address_0=nonsense", "npu:0", split=False)[1].lines == []


def test_by_hand_it_has_to_be_there_and_right_on_any_device(read: Read) -> None:
    _, causes = read(None, "cpu:0", by_hand=True)
    assert "cannot be read" in causes.lines[0]
    assert causes.warnings == []
    assert read("address_0=x", "cpu:0", by_hand=True)[1].lines
    assert read(GOOD, "cpu:0", by_hand=True)[0] == ()


@pytest.mark.parametrize(
    ("line", "cause"),
    [
        ("address_x=192.0.2.1", "'x' is no device number"),
        ("address_=192.0.2.1", "'' is no device number"),
        ("address_\u00b2=192.0.2.1", "no device number"),
        ("address_0=192.0.2.300", "'192.0.2.300' is no IP address"),
        ("address_0=", "'' is no IP address"),
        ("address_0 192.0.2.1", "no address_N=IP"),
        ("address_0=192.0.2.1 192.0.2.2", "no address_N=IP"),
        ("address_1=192.0.2.2", "device 1 has the addresses"),
    ],
)
def test_a_wrong_line_is_named_with_its_number(read: Read, line: str, cause: str) -> None:
    _, causes = read(f"address_1=192.0.2.1\n\n{line}\n", "npu:1")
    (said,) = causes.lines
    assert "hccn.conf, line 3:" in said
    assert cause in said


def test_the_same_line_twice_is_harmless(read: Read) -> None:
    ips, causes = read("address_0=192.0.2.1\naddress_0=192.0.2.1\n", "npu:0")
    assert (ips, causes.lines) == (("192.0.2.1",), [])
