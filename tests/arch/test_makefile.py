"""`make` alone tells what there is, and every target's commands can be read by make and by the shell."""

from __future__ import annotations

import os
import re
import shutil
import subprocess

import pytest

from tests.arch.source import ROOT

TARGETS = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="no make on PATH")


def targets() -> list[str]:
    assert TARGETS is not None
    return TARGETS[1].split()


def make(*words: str) -> str:
    """What make prints; it must succeed."""
    done = subprocess.run(
        ["make", "--no-print-directory", *words],
        cwd=ROOT,
        env={**os.environ, "MAKEFLAGS": ""},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@needs_make
def test_make_alone_lists_every_target_with_one_sentence() -> None:
    listed = {line.split()[0]: line.split()[1:] for line in make().splitlines()}
    assert list(listed) == targets()
    assert all(listed.values())


@needs_make
@pytest.mark.parametrize("target", targets())
def test_the_commands_of_a_target_are_shell(target: str) -> None:
    commands = make("--dry-run", target)
    assert commands
    subprocess.run(["bash", "-n"], input=commands, text=True, check=True, timeout=60)


def test_every_folder_of_the_quick_tests_exists() -> None:
    named = re.search(r"^PURE := (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert named is not None
    assert not [place for place in named[1].split() if not (ROOT / place).exists()]
