"""Logging: one line per transition, `key=value` or JSON, on stderr or a file; nothing per token.

`setup` is called once by a daemon. Everyone else calls `get(__name__)` and logs `log.info("instance ready", name=...)`.
A record is handed to a queue and written by a thread, so that a slow terminal never stops an event loop.
"""

from __future__ import annotations

import contextlib
import json
import logging
import logging.config
import logging.handlers
import queue
import sys
from collections.abc import Iterator, MutableMapping
from pathlib import Path
from typing import Any

# what ends a line or moves a terminal's cursor, written out: a field may hold what a stranger sent
_ESCAPES = {code: repr(chr(code))[1:-1] for code in (*range(32), *range(127, 160), 0x2028, 0x2029)}
_STANDARD = ("exc_info", "stack_info", "stacklevel", "extra")


class Logger(logging.LoggerAdapter[logging.Logger]):
    """Turns keyword arguments into the record's fields."""

    def process(
        self, msg: str, kwargs: MutableMapping[str, Any]
    ) -> tuple[str, MutableMapping[str, Any]]:
        """Split logging's own keywords from ours."""
        own = {key: kwargs.pop(key) for key in list(kwargs) if key not in _STANDARD}
        kwargs["extra"] = {"fields": own}
        return msg, kwargs


class TextFormatter(logging.Formatter):
    """`I 12:00:00.123 instance ready name=127.0.0.1:8010`."""

    def format(self, record: logging.LogRecord) -> str:
        """One line; a traceback follows on its own lines."""
        clock = self.formatTime(record, "%H:%M:%S")
        fields = "".join(f" {key}={value}" for key, value in _fields(record).items())
        line = (
            f"{record.levelname[0]} {clock}.{int(record.msecs):03d} {record.getMessage()}{fields}"
        ).translate(_ESCAPES)
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return line


class JsonFormatter(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        """Fields of the record beside `ts`, `level`, `logger` and `message`."""
        line: dict[str, Any] = {
            "ts": round(record.created, 6),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_fields(record),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    fields = getattr(record, "fields", None)
    return fields if isinstance(fields, dict) else {}


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """While importing a library that configures logging for the whole process: that would close every handler there is, ours too."""
    configure = logging.config.dictConfig
    logging.config.dictConfig = lambda config: None
    try:
        yield
    finally:
        logging.config.dictConfig = configure


def get(name: str) -> Logger:
    """The logger of one module."""
    return Logger(logging.getLogger(name), {})


def setup(
    *, level: str = "info", form: str = "text", directory: str = "", program: str = "xllm"
) -> None:
    """Route the `xllm_py` loggers to stderr, and to `<directory>/<program>.log` when a folder is given."""
    formatter = JsonFormatter() if form == "json" else TextFormatter()
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stderr)]
    if directory:
        handlers.append(logging.handlers.WatchedFileHandler(Path(directory) / f"{program}.log"))
    for handler in handlers:
        handler.setFormatter(formatter)
    records: queue.SimpleQueue[logging.LogRecord] = queue.SimpleQueue()
    listener = logging.handlers.QueueListener(records, *handlers)
    root = logging.getLogger("xllm_py")
    root.handlers = [_Forward(records, listener)]
    root.setLevel(level.upper())
    root.propagate = False
    listener.start()


def on_hangup() -> None:
    """SIGHUP of a daemon: it goes on. A log file that was moved is followed anyway, so there is nothing to reopen."""
    get(__name__).info("hangup", log_files="followed", keys="read at the next start")


def close() -> None:
    """Write what is queued; called before a program's last words, which nothing may follow."""
    for handler in logging.getLogger("xllm_py").handlers:
        handler.close()


class _Forward(logging.handlers.QueueHandler):
    """Hands the record over unformatted: both ends are one process. Closed by logging itself at exit."""

    def __init__(
        self,
        records: queue.SimpleQueue[logging.LogRecord],
        listener: logging.handlers.QueueListener,
    ) -> None:
        super().__init__(records)
        self._listener: logging.handlers.QueueListener | None = listener

    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        return record

    def close(self) -> None:
        """Stop the writing thread once it has written everything."""
        listener, self._listener = self._listener, None
        if listener is not None:
            listener.stop()
        super().close()
