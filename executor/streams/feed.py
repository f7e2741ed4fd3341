"""What a serving worker is fed with: frames as they arrive, on the source's own clock.

A city and a recording have frames by number, and the clock says which have arrived. A live stream sends what it sends.
"""

from __future__ import annotations

import math
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from executor.streams.clock import FrameClock
from executor.streams.frames import Frame, FrameSource
from executor.streams.health import Health
from executor.streams.live import LiveReader
from executor.streams.ring import LiveFrame, RingWriter
from executor.streams.video import SourceError
from protocol.messages import InferenceJob
from protocol.schema import LiveSource, StreamSpec

_BACKLOG_S = 1.0  # frames older than this are of no use to anybody
_LIVE_POLL_S = 0.004
_DEGRADED_POLL_S = 0.1
_OK = Health("ok")


@dataclass(frozen=True)
class Taken:
    """``frame``: the next one to look at, None when none is there. ``dropped``: frames given up for it, which are
    judged by the last result. ``num_lost``: frames given up that nothing else is known of."""

    frame: Frame | None
    dropped: tuple[Frame, ...] = ()
    num_lost: int = 0


class Feed(Protocol):
    """Times are of ``time.monotonic``."""

    def take(self, now: float) -> Taken:
        """What has come since the last call, one frame to look at a time."""
        ...

    def next_s(self, now: float) -> float:
        """When it is worth asking again."""
        ...

    def arrival_s(self, frame: Frame) -> float:
        """When a frame that was taken just now arrived."""
        ...

    def begin(self, at_s: float) -> None:
        """Frames that arrived before ``at_s`` are somebody else's: do not even look at them."""
        ...

    def health(self, now: float) -> Health:
        """How the stream is."""
        ...

    def first(self) -> Frame | None:
        """A frame to warm up with, None when none can be had yet."""
        ...

    def close(self) -> None:
        """End what runs for it."""
        ...


class ClockedFeed:
    """Frames of a source that has them all, as its clock says; at most a second of them waits."""

    def __init__(self, source: FrameSource, fps: float, position_s: float, now: float) -> None:
        self._source = source
        self._limit = max(2, math.ceil(fps * _BACKLOG_S))
        self._clock = FrameClock(fps, position_s, now, self._limit)
        self._waiting: deque[int] = deque()
        self._broken = ""
        self._num_failed = 0
        self._from_s = float("-inf")

    def take(self, now: float) -> Taken:
        arrived = self._clock.arrived(now)
        self._waiting.extend(range(arrived.frames.start - arrived.num_skipped, arrived.frames.start))
        self._waiting.extend(arrived.frames)
        while self._waiting and self._clock.arrival_s(self._waiting[0]) < self._from_s:
            self._waiting.popleft()
        excess = [self._waiting.popleft() for _ in range(len(self._waiting) - self._limit)]
        dropped = tuple(frame for frame in map(self._get, excess) if frame is not None)
        num_lost = len(excess) - len(dropped)
        frame = None
        if self._waiting:
            frame = self._get(self._waiting.popleft())
            num_lost += frame is None
        return Taken(frame, dropped, num_lost)

    def next_s(self, now: float) -> float:
        return now if self._waiting else self._clock.next_due()

    def arrival_s(self, frame: Frame) -> float:
        return self._clock.arrival_s(frame.index)

    def begin(self, at_s: float) -> None:
        self._from_s = at_s

    def health(self, now: float) -> Health:
        return Health("garbage", self._broken) if self._broken else _OK

    def first(self) -> Frame | None:
        return self._get(self._clock.next_index)

    def close(self) -> None:
        """The source belongs to whoever opened it."""

    def _get(self, index: int) -> Frame | None:
        try:
            frame = self._source.frame(index)
        except SourceError as error:
            self._broken = str(error)
            return None
        self._broken = ""
        return frame


class LiveFeed:
    """The pictures of a live stream as frames; they are kept on disk for those who look back."""

    def __init__(self, stream: StreamSpec, source: LiveSource, store: Path, origin_s: float, now: float) -> None:
        self._fps = stream.fps
        ring = RingWriter(store, stream, source.keep_s, round((now - origin_s) * stream.fps))
        self._reader = LiveReader(source, stream.fps, origin_s, ring)
        self._last_s = now

    def take(self, now: float) -> Taken:
        picture, num_lost = self._reader.take(now)
        if picture is None:
            return Taken(None, num_lost=num_lost)
        self._last_s = picture.time_s
        return Taken(LiveFrame(picture.index, self._fps, picture.picture), num_lost=num_lost)

    def next_s(self, now: float) -> float:
        if now - self._last_s > 1.0:
            well = self._reader.health(now).condition not in ("lost", "stalled")
            return now + (5 * _LIVE_POLL_S if well else _DEGRADED_POLL_S)
        return now + min(max(self._last_s + 1.0 / self._fps - now, _LIVE_POLL_S), _DEGRADED_POLL_S)

    def arrival_s(self, frame: Frame) -> float:
        return self._last_s  # only the latest is ever asked for

    def begin(self, at_s: float) -> None:
        """Nothing to do: pictures that nobody took are given up by the reader itself."""

    def health(self, now: float) -> Health:
        return self._reader.health(now)

    def first(self) -> Frame | None:
        return None

    def close(self) -> None:
        self._reader.close()


def open_feed(job: InferenceJob, source: FrameSource | None, store: Path, origin_s: float | None = None) -> Feed:
    """The feed of a job. ``source``: its opened frames by number, None for a live stream. ``origin_s``: when the stream
    was at position 0, on ``time.monotonic``; None: the job's position is that of this moment.

    Raises InputError when recent frames cannot be kept in ``store``.
    """
    now = time.monotonic()
    origin_s = now - job.position_s if origin_s is None else origin_s
    if isinstance(job.stream.source, LiveSource):
        return LiveFeed(job.stream, job.stream.source, store, origin_s, now)
    assert source is not None
    return ClockedFeed(source, job.stream.fps, now - origin_s, now)
