"""Lines of the log: one per record, fields whole, and nothing that breaks a line or stops the speaker."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest

from xllm_py.base import log

PROGRAM = """
import sys
from xllm_py.base import log
log.setup(level={level!r}, form={form!r}, directory={directory!r}, program="prog")
logger = log.get("xllm_py.some.room")
logger.debug("steps", count=1)
logger.info("instance ready", name="127.0.0.1:8010", port=7)
logger.warning("odd", reason="a b")
try:
    raise ValueError("broken")
except ValueError as error:
    logger.error("task failed", exc_info=error, task="t")
"""


def lines(tmp_path: Path, *, level: str = "info", form: str = "text", file: bool = False) -> str:
    """What a program of its own writes until it ends."""
    directory = str(tmp_path) if file else ""
    code = PROGRAM.format(level=level, form=form, directory=directory)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == ""
    if file:
        assert (tmp_path / "prog.log").read_text() == done.stderr
    return done.stderr


def test_text_is_level_time_message_and_fields(tmp_path: Path) -> None:
    found = lines(tmp_path).splitlines()
    assert found[0][0] == "I"
    assert found[0].endswith("instance ready name=127.0.0.1:8010 port=7")
    assert found[1][0] == "W"
    assert found[2][0] == "E"
    assert found[2].endswith("task failed task=t")
    assert found[-1] == "ValueError: broken"


def test_everything_is_written_before_the_program_ends_and_to_the_file_too(
    tmp_path: Path,
) -> None:
    found = lines(tmp_path, level="debug", file=True)
    assert "D " in found
    assert "steps count=1" in found


def test_json_is_one_object_a_line_with_its_fields(tmp_path: Path) -> None:
    found = [json.loads(line) for line in lines(tmp_path, form="json").splitlines()]
    assert [one["level"] for one in found] == ["info", "warning", "error"]
    first = found[0]
    assert (first["message"], first["name"], first["port"]) == (
        "instance ready",
        "127.0.0.1:8010",
        7,
    )
    assert first["logger"] == "xllm_py.some.room"
    assert first["ts"] > 1e9
    assert found[2]["traceback"].endswith("ValueError: broken")


def record(message: str, **fields: object) -> logging.LogRecord:
    made = logging.LogRecord("xllm_py.x", logging.INFO, "", 0, message, (), None)
    made.fields = fields
    return made


@pytest.mark.parametrize("value", [{"a": 1}, b"raw", Path("x"), ValueError("v"), None, 1.5])
def test_a_field_of_any_kind_can_be_written(value: object) -> None:
    assert json.loads(log.JsonFormatter().format(record("m", value=value)))["message"] == "m"
    assert " value=" in log.TextFormatter().format(record("m", value=value))


@pytest.mark.parametrize("end", ["\n", "\r", "\x0b", "\x85", "\u2028", "\x1b[2K"])
def test_a_field_cannot_begin_a_line_of_its_own(end: str) -> None:
    """What a stranger sent may stand in a field; it must not look like our next line."""
    forged = f"x{end}E 12:00:00.000 engine failed"
    for formatter in (log.TextFormatter(), log.JsonFormatter()):
        line = formatter.format(record(forged, reason=forged))
        assert len(line.splitlines()) == 1
        assert "\x1b" not in line


def test_other_scripts_stay_as_they_are() -> None:
    assert log.TextFormatter().format(record("m", text="wörld 世界 🙂")).endswith("wörld 世界 🙂")


def test_a_library_that_configures_logging_does_not_silence_us(tmp_path: Path) -> None:
    """What nixl does when it is imported: without care it closes the handler that our lines go through."""
    code = """
import logging.config
from xllm_py.base import log
log.setup()
configure = logging.config.dictConfig
with log.kept():
    logging.config.dictConfig({"version": 1, "loggers": {"lib": {"level": "INFO"}}})
assert logging.config.dictConfig is configure
log.get("xllm_py.some.room").info("still here")
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert "still here" in done.stderr
