"""What a process holds is read from the operating system."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest

from xllm_py.base import process


def test_an_open_file_shows_in_what_we_hold() -> None:
    before = process.held()
    with Path(os.devnull).open("rb"):
        assert process.held().file_handles == before.file_handles + 1
    assert before.threads >= 1
    assert before.resident_bytes > 1 << 20


def test_a_child_is_counted_on_its_own() -> None:
    command = [sys.executable, "-c", "print(1, flush=True); input()"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        seen = process.held(child.pid)
        child.communicate(b"\n", timeout=30)
    assert seen.file_handles >= 3
    assert 0 < seen.resident_bytes < process.held().resident_bytes


def test_a_process_that_is_gone_is_named() -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as child:
        child.wait(timeout=30)
    with pytest.raises(ProcessLookupError, match=str(child.pid)):
        process.held(child.pid)


def test_the_host_has_at_least_as_much_memory_as_it_has_left() -> None:
    available, total = process.host_memory()
    assert 0 < available <= total


def test_the_way_to_a_host_is_an_interface() -> None:
    assert process.interface_towards("127.0.0.1", 9) == process.interface_towards("127.8.9.1", 9)
    assert process.interface_towards("127.0.0.1", 9).startswith("lo")
    assert process.interface_towards("no.such.host.invalid", 9) == ""


def test_what_was_freed_is_given_back() -> None:
    kept = [bytearray(1 << 16) for _ in range(2000)]
    pinned = kept[-1]
    del kept
    before = process.held().resident_bytes
    process.give_back_memory()
    assert process.held().resident_bytes <= before
    assert len(pinned) == 1 << 16


def test_what_is_imported_is_not_looked_through_any_more_and_the_rest_is() -> None:
    before = gc.get_freeze_count()
    with pytest.raises(ImportError), process.imports_for_good():
        assert not gc.isenabled()
        kept = [[number] for number in range(1000)]
        raise ImportError("a library is missing")
    assert gc.isenabled()
    assert gc.get_freeze_count() >= before + len(kept)
    gc.unfreeze()


def test_what_a_server_has_made_is_not_looked_through_and_what_comes_less_often() -> None:
    thresholds, kept = gc.get_threshold(), [[number] for number in range(1000)]
    try:
        process.stay()
        assert gc.get_freeze_count() >= len(kept)
        assert gc.get_threshold()[0] > thresholds[0]
        assert gc.isenabled()
    finally:
        gc.unfreeze()
        gc.set_threshold(*thresholds)
