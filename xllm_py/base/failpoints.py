"""Named places where a test has a process die, stand still or fail; nothing happens there otherwise.

    XLLM_FAILPOINTS=d.step.3:kill9,p.offer.pre:sleep(500)     what happens at the third step, and before the first offer
    XLLM_FAILPOINTS=d.step@17:kill9                           ... whenever token 17 is among those of the step

Armed by a daemon, and only with --enable_failpoints and a cluster key that begins with `test`: neither alone is enough.
Actions: kill9, exit, stop (SIGSTOP), sleep(milliseconds), raise.
"""

from __future__ import annotations

import os
import re
import signal
import threading
from collections.abc import Container
from dataclasses import dataclass

from xllm_py.base.errors import InternalError, UsageError

NAMES = frozenset(
    {
        "m.submit.pre",
        "m.submit.post",
        "m.delta.pre_accept",
        "m.delta.post_accept",
        "m.client.pre_write",
        "m.client.post_write",
        "p.recv",
        "p.prefill.chunk",
        "p.first_token",
        "p.offer.pre",
        "p.offer.post",
        "p.kv.pre_commit",
        "p.kv.post_commit",
        "p.first_generation.pre",
        "p.first_generation.post",
        "p.release",
        "d.grant.pre",
        "d.grant.post",
        "d.kv.frame",
        "d.kv.pre_commit",
        "d.kv.post_commit",
        "d.first_generation.pre",
        "d.first_generation.post",
        "d.step",
        "d.delta.pre_send",
        "d.delta.post_send",
        "d.fin",
    }
)
TEST_KEY = b"test"  # how a cluster key begins that nobody keeps a secret with
_POINT = re.compile(
    r"(?P<name>[a-z_.]+?)(\.(?P<count>\d+)|@(?P<token>\d+))?:(?P<action>kill9|exit|stop|raise|sleep\((?P<ms>\d+)\))"
)


@dataclass(slots=True)
class _Point:
    """One that is armed."""

    action: str
    left: int = 1  # hits until it strikes
    token: int = -1
    sleep_s: float = 0.0

    def hit(self, name: str, tokens: Container[int]) -> None:
        if self.token >= 0 and self.token not in tokens:
            return
        self.left -= 1
        if self.left == 0 or self.token >= 0:
            self._strike(name)

    def _strike(self, name: str) -> None:
        # not through the log, whose queue would die with us
        os.write(2, f"failpoint {name}: {self.action}\n".encode())
        if self.action == "raise":
            raise InternalError(f"failpoint {name}")
        if self.action == "exit":
            os._exit(1)
        if self.sleep_s:
            threading.Event().wait(self.sleep_s)
        else:
            os.kill(os.getpid(), signal.SIGSTOP if self.action == "stop" else signal.SIGKILL)


_armed: dict[str, _Point] = {}


def parse(plan: str) -> dict[str, _Point]:
    """Points by name. Raises UsageError naming what is wrong with the first that is."""
    points = {}
    for text in filter(None, plan.split(",")):
        found = _POINT.fullmatch(text)
        if found is None:
            raise UsageError(
                f"XLLM_FAILPOINTS: {text!r} is not name[.count|@token]:action; actions are kill9, exit, stop, sleep(ms), raise"
            )
        if found["name"] not in NAMES:
            raise UsageError(
                f"XLLM_FAILPOINTS: no {found['name']!r}; there are {', '.join(sorted(NAMES))}"
            )
        points[found["name"]] = _Point(
            action=found["action"],
            left=int(found["count"] or 1),
            token=int(found["token"] or -1),
            sleep_s=int(found["ms"] or 0) / 1000,
        )
    return points


def check(plan: str, cluster_key: bytes) -> dict[str, _Point]:
    """The points, if they may be armed. Raises UsageError."""
    points = parse(plan)
    if not cluster_key.startswith(TEST_KEY):
        raise UsageError(
            "--enable_failpoints is for tests only: the key of --cluster_key_file must begin with 'test'"
        )
    return points


def arm(plan: str, cluster_key: bytes) -> None:
    """From now on these points strike in this process; an empty plan has none. Raises UsageError."""
    points = check(plan, cluster_key) if plan else {}
    _armed.clear()
    _armed.update(points)


def hit(name: str, tokens: Container[int] = ()) -> None:
    """This place was come to. tokens: those that are worked on."""
    if _armed:
        point = _armed.get(name)
        if point is not None:
            point.hit(name, tokens)
