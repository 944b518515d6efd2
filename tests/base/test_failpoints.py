"""Named moments: what is armed strikes at its count or token; nothing else does anything; every name has its place."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from xllm_py.base import failpoints
from xllm_py.base.errors import InternalError, UsageError

KEY = b"test key"
SOURCES = Path(failpoints.__file__).parents[1]


@pytest.fixture(autouse=True)
def disarmed() -> Iterator[None]:
    yield
    failpoints.arm("", b"")


def test_nothing_strikes_that_is_not_armed() -> None:
    failpoints.hit("d.step")
    failpoints.arm("d.step:raise", KEY)
    failpoints.hit("p.recv")


def test_it_strikes_once_at_its_count() -> None:
    failpoints.arm("d.step.3:raise,p.recv:raise", KEY)
    for _ in range(2):
        failpoints.hit("d.step")
    with pytest.raises(InternalError, match=r"d\.step"):
        failpoints.hit("d.step")
    failpoints.hit("d.step")


def test_it_strikes_at_its_token_each_time() -> None:
    failpoints.arm("d.step@0:raise", KEY)
    failpoints.hit("d.step", [1, 2])
    for _ in range(2):
        with pytest.raises(InternalError):
            failpoints.hit("d.step", [1, 0])


@pytest.mark.parametrize(
    ("action", "code"), [("kill9", -9), ("exit", 1), ("sleep(1)", 0), ("stop", None)]
)
def test_actions_are_of_the_process_itself(action: str, code: int | None) -> None:
    program = (
        "from xllm_py.base import failpoints\n"
        f"failpoints.arm('d.fin:{action}', b'test')\nfailpoints.hit('d.fin')"
    )
    child = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE)
    if code is None:
        assert child.stderr is not None
        assert child.stderr.readline() == b"failpoint d.fin: stop\n"
        with pytest.raises(subprocess.TimeoutExpired):
            child.wait(0.3)
        child.kill()
        child.wait()
        child.stderr.close()
        return
    _, told = child.communicate(timeout=60)
    assert child.returncode == code
    assert told == f"failpoint d.fin: {action.partition('(')[0]}".encode() + (
        b"(1)\n" if "(" in action else b"\n"
    )


@pytest.mark.parametrize(
    ("plan", "told"),
    [
        ("d.step", "is not name"),
        ("d.step:jump", "actions are kill9"),
        ("d.stop:kill9", "no 'd.stop'"),
        ("d.step.x:kill9", "no 'd.step.x'"),
        ("d.step:sleep", "is not name"),
    ],
)
def test_a_plan_that_makes_no_sense_is_refused(plan: str, told: str) -> None:
    with pytest.raises(UsageError, match=re.escape(told)):
        failpoints.check(plan, KEY)


@pytest.mark.parametrize("key", [b"", b"a real key", b"atest"])
def test_a_key_that_somebody_keeps_arms_nothing(key: bytes) -> None:
    with pytest.raises(UsageError, match="tests only"):
        failpoints.arm("d.step:raise", key)
    failpoints.hit("d.step")


def test_every_name_has_one_place_and_every_place_a_name() -> None:
    text = "".join(path.read_text() for path in SOURCES.rglob("*.py"))
    places = re.findall(
        r"failpoints\.hit\(\s*\"([a-z_.]+)\"(?: if [^\"]* else \"([a-z_.]+)\")?", text
    )
    found = [name for pair in places for name in pair if name]
    assert sorted(found) == sorted(failpoints.NAMES)
