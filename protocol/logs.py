"""Logs for people with grep: one line per event on stderr, ``key=value``, a reason in every lifecycle line.

time=2026-03-01T12:00:00.123Z level=warning process=executor-a pid=4711 event=worker_exit job_id=... reason="..."
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections import OrderedDict
from typing import TextIO

from protocol.errors import InputError

LEVELS = ("debug", "info", "warning", "error")
_BARE = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.:/+-@,*[]{}<>|%#")


def configure(process_name: str, level: str = "info", stream: TextIO | None = None) -> None:
    """Send all logs of this process to stderr. Calling it again replaces the former setting.

    Raises:
        InputError: ``level`` is not one of `LEVELS`.
    """
    if level.lower() not in LEVELS:
        raise InputError(f"log level {level!r} is unknown; use one of {', '.join(LEVELS)}")
    handler = logging.StreamHandler(stream if stream is not None else sys.stderr)
    handler.setFormatter(_KeyValueFormatter(process_name))
    root = logging.getLogger()
    for old in list(root.handlers):
        if isinstance(old.formatter, _KeyValueFormatter):
            root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(level.upper())


def line(event: str, **fields: object) -> str:
    """``event=... key=value ...``: quoted where a value needs it, floats short, None left out."""
    parts = [f"event={_value(event)}"]
    parts += [f"{key}={_value(value)}" for key, value in fields.items() if value is not None]
    return " ".join(parts)


class RateLimiter:
    """Lets one line per key and interval through and counts what it held back. Memory is bounded."""

    def __init__(self, interval_s: float = 5.0, max_keys: int = 1024) -> None:
        self.interval_s = interval_s
        self.max_keys = max_keys
        self._last: OrderedDict[str, tuple[float, int]] = OrderedDict()

    def admit(self, key: str, now: float) -> int | None:
        """None: hold it back. Otherwise the number of lines of ``key`` held back since the last one let through."""
        entry = self._last.get(key)
        if entry is not None and now - entry[0] < self.interval_s:
            self._last[key] = (entry[0], entry[1] + 1)
            return None
        self._last[key] = (now, 0)
        self._last.move_to_end(key)
        while len(self._last) > self.max_keys:
            self._last.popitem(last=False)
        return 0 if entry is None else entry[1]


class _KeyValueFormatter(logging.Formatter):
    def __init__(self, process_name: str) -> None:
        super().__init__()
        self._process_name = process_name

    def format(self, record: logging.LogRecord) -> str:
        text = record.getMessage()
        if not text.startswith("event="):
            text = f"event=log logger={_value(record.name)} text={_value(text)}"
        when = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        head = f"time={when}.{int(record.msecs):03d}Z level={record.levelname.lower()}"
        out = f"{head} process={_value(self._process_name)} pid={os.getpid()} {text}"
        if record.exc_info:
            out += "\n" + self.formatException(record.exc_info)
        return out


def _value(value: object) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    if text and all(letter in _BARE for letter in text):
        return text
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in escaped) + '"'
