"""Recording a stretch of a live stream that nobody serves yet, for the labels of its first model."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from executor.streams.live import LiveReader
from executor.streams.ring import RingWriter
from protocol.errors import InputError
from protocol.schema import LiveSource, StreamSpec

_POLL_S = 0.1


def record(
    stream: StreamSpec,
    source: LiveSource,
    store: Path,
    from_s: float,
    to_s: float,
    wait: Callable[[float], None],
    stopped: Callable[[], bool],
) -> None:
    """Record ``to_s - from_s`` seconds from the first picture on, as frames of [from_s, to_s) of stream time.

    ``wait`` pauses for so many seconds, ``stopped`` ends it early. Raises InputError, with what is wrong with the
    stream, when no picture comes within its ``open_timeout_s`` and ``stall_s``.
    """
    ring = RingWriter(store, stream, to_s - from_s + 1.0, round(from_s * stream.fps))
    begun = time.monotonic()
    reader = LiveReader(source, stream.fps, None, ring, start_s=from_s)
    try:
        first_s: float | None = None
        while not stopped():
            now = time.monotonic()
            picture, _ = reader.take(now)
            if picture is not None and first_s is None:
                first_s = now
            if first_s is None and now - begun > source.open_timeout_s + source.stall_s:
                health = reader.health(now)
                reason = health.reason or "no picture came"
                raise InputError(f"stream {stream.stream_id}: source.url {reader.url}: {reason}")
            if first_s is not None and now - first_s >= to_s - from_s:
                return
            wait(_POLL_S)
    finally:
        reader.close()
