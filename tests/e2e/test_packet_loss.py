"""Row N-10 of the fault matrix, between whole daemons: the link that KV takes loses packets in both directions."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.cluster import ROOT
from tests.e2e.packet_loss import REQUESTS

RATES = (0.01, 0.1, 0.5)
_ALONE = ("unshare", "--net")
_RULE = "iptables -A INPUT -p tcp -m statistic --mode random --probability 0.5 -j DROP"


def packets_can_be_lost() -> bool:
    """Root may have them lost in a network namespace, where the kernel and the sandbox around us let it."""
    if os.geteuid() != 0 or not all(map(shutil.which, ("unshare", "ip", "iptables"))):
        return False
    tried = subprocess.run([*_ALONE, "sh", "-c", _RULE], capture_output=True, check=False)
    return tried.returncode == 0


@pytest.mark.skipif(
    not packets_can_be_lost(), reason="needs root, network namespaces and iptables: N-10 not tried"
)
def test_lost_packets_cost_time_and_no_text(tiny_model: Path, tmp_path: Path) -> None:
    """One in a hundred and one in ten: every request is served. Every second one: served, or ended with an error."""
    program = [*_ALONE, sys.executable, "-m", "tests.e2e.packet_loss"]
    words = [str(tiny_model), str(tmp_path), *map(str, RATES)]
    done = subprocess.run(
        [*program, *words], cwd=ROOT, capture_output=True, text=True, timeout=110, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) == len(RATES) * REQUESTS
    for row in rows:
        if row["rate"] < 0.5 or row["status"] != 503:
            assert row["status"] == 200, row
            assert row["text"] == row["expected"]
