"""Live streams: a thread that reads what comes, whatever it is, and hands over the newest pictures.

The thread opens the stream, decodes it and opens it again when it is lost; nothing that a camera does ends it. Pictures
that nobody took in time are dropped and counted, so that results are never about the past.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av

from executor.streams.health import FrameCounter, Health, HealthJudge, StampClock, Waiting, pause_s
from executor.streams.ring import RingWriter
from protocol.errors import EkyaError
from protocol.logs import line
from protocol.schema import LiveSource

_log = logging.getLogger(__name__)

# A decoder that stays this long behind what comes gives up to the next key frame.
_BEHIND_S = 2.0
# After so many times ``stall_s`` of data without a picture the stream is opened anew.
_GARBAGE_STALLS = 3.0
# A session with pictures for so long was a good one.
_GOOD_SESSION_S = 1.0
# What FFmpeg may read before it knows what a stream holds: what is read meanwhile is late.
_PROBE = {"probesize": "500000", "analyzeduration": "500000", "fpsprobesize": "1"}


class LiveError(EkyaError):
    """The stream cannot be used as it is at the moment; it is tried again."""


class _StuckError(LiveError):
    """It is connected and gives no pictures: perhaps a new connection does. Its health is known already."""


@dataclass(frozen=True)
class LivePicture:
    """A decoded picture (``av.VideoFrame``), its frame number, and when it was taken on the monotonic clock."""

    index: int
    time_s: float
    picture: Any


class LiveReader:
    """Reads ``source`` in a thread of its own until ``close``.

    ``fps``: pictures handed over per second, at most. ``origin_s``: where stream time 0 lies on ``time.monotonic``;
    None: the first picture is at ``start_s`` of stream time. ``ring``: gets every numbered picture, dropped ones too.
    """

    def __init__(
        self,
        source: LiveSource,
        fps: float,
        origin_s: float | None,
        ring: RingWriter | None = None,
        start_s: float = 0.0,
    ) -> None:
        self._source, self._ring = source, ring
        self._counter = FrameCounter(fps, origin_s, start_s)
        self._stamps = StampClock()
        self._lock = threading.Lock()
        self._judge = HealthJudge(source.stall_s, time.monotonic())
        self._waiting = Waiting[LivePicture](source.max_latency_s)
        self._stop = threading.Event()
        self._complained_s = -1e9
        self._first_s: float | None = None
        self._thread = threading.Thread(target=self._run, name="live-reader", daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        """The address, without user name and password."""
        return bare(self._source.url)

    def take(self, now: float) -> tuple[LivePicture | None, int]:
        """(the oldest picture that waits or None, pictures dropped since the last call)."""
        with self._lock:
            return self._waiting.take(now)

    def health(self, now: float) -> Health:
        """How the stream is."""
        with self._lock:
            return self._judge.at(now)

    def close(self) -> None:
        """End the thread. One that hangs in a library call is left to the end of the process."""
        self._stop.set()
        self._thread.join(0.5)

    # ------------------------------------------------------------ the thread

    def _run(self) -> None:
        attempt = 0
        draw = random.Random()
        while not self._stop.is_set():
            self._first_s = None
            stuck = False
            try:
                self._session()
                reason = "the stream ended"
            except _StuckError as error:
                stuck, reason = True, str(error)
            except (av.FFmpegError, LiveError, OSError, ValueError, MemoryError) as error:
                reason = reason_of(error)
            except Exception as error:
                # Whatever a camera sends, the thread lives on and the stream is tried again.
                reason = f"{type(error).__name__}: {error}"
            if self._stop.is_set():
                return
            if not stuck:
                with self._lock:
                    self._judge.lost(reason)
            _log.warning(line("live_stream_lost", url=bare(self._source.url), reason=reason, attempt=attempt))
            if self._first_s is not None and time.monotonic() - self._first_s > _GOOD_SESSION_S:
                attempt = 0  # what ended a good session is a new trouble
            self._stop.wait(pause_s(attempt, self._source.backoff_s, self._source.backoff_max_s, draw.random()))
            attempt += 1

    def _session(self) -> None:
        """One connection, from opening to its end. Raises what ends it."""
        with open_live(self._source) as container:
            video = next((stream for stream in container.streams if stream.type == "video"), None)
            if video is None:
                raise LiveError("holds no video stream")
            video.codec_context.thread_count = 1  # more would only make pictures later
            self._stamps = StampClock()
            with self._lock:
                self._judge.connected(time.monotonic())
            paced = is_paced(self._source.url, container)
            pacer = _Pace() if paced else None
            while True:
                try:
                    self._play(container, video, pacer)
                except av.error.ExitError:
                    raise _StuckError("no data came in time") from None
                if not (self._source.loop and is_file(self._source.url)) or self._stop.is_set():
                    return
                container.seek(0)
                if pacer is not None:
                    pacer.start_again()

    def _play(self, container: Any, video: Any, pacer: _Pace | None) -> None:
        behind_since: float | None = None
        skipping = False
        picture_s = time.monotonic()
        for packet in container.demux(video):
            if self._stop.is_set():
                return
            now = time.monotonic()
            if now - picture_s > _GARBAGE_STALLS * self._source.stall_s:
                raise _StuckError("data came, but no picture")
            if skipping:
                late_s = self._stamps.late_s(_seconds(packet.pts, packet.time_base), now)
                if not packet.is_keyframe or late_s > self._source.max_latency_s:
                    continue
                skipping, behind_since = False, None
            for picture in self._decoded(packet):
                if pacer is not None and self._stop.wait(pacer.wait_s(_stamp_of(picture), time.monotonic())):
                    return
                picture_s = time.monotonic()
                late_s = self._hand_over(picture, picture_s)
                if late_s <= 2 * self._source.max_latency_s:
                    behind_since = None
                elif behind_since is None:
                    behind_since = picture_s
                elif picture_s - behind_since > _BEHIND_S:
                    skipping = True
                    _log.warning(line("live_stream_behind", url=bare(self._source.url), late_s=round(late_s, 2)))

    def _decoded(self, packet: Any) -> Iterator[Any]:
        try:
            pictures = packet.decode()
        except av.FFmpegError:
            with self._lock:
                self._judge.bad_data()
            return
        if packet.size and not pictures:
            with self._lock:
                self._judge.no_picture()
        for picture in pictures:
            if picture.is_corrupt:
                with self._lock:
                    self._judge.bad_data()
            else:
                yield picture

    def _hand_over(self, picture: Any, now: float) -> float:
        """Queue the picture; how late it is, in seconds."""
        self._first_s = now if self._first_s is None else self._first_s
        time_s = self._stamps.local(_stamp_of(picture), now)
        late_s = now - time_s
        index = self._counter.number(time_s)
        if index is not None:
            # First, and never once others may have the picture: two threads must not convert the same one.
            self._keep(index, picture, now)
        with self._lock:
            self._judge.picture((picture.width, picture.height), now)
            if index is None:
                return late_s
            self._waiting.add(LivePicture(index, time_s, picture), time_s, now)
        return late_s

    def _keep(self, index: int, picture: Any, now: float) -> None:
        if self._ring is None:
            return
        try:
            self._ring.write(index, picture)
        except (OSError, av.FFmpegError, ValueError) as error:
            # Serving does not depend on the ring; labels will miss these frames.
            if now - self._complained_s > 30.0:
                self._complained_s = now
                _log.error(line("frame_not_kept", index=index, reason=reason_of(error)))


class _Pace:
    """When the pictures of a recording are due: its first one at once, the others as far apart as their time stamps."""

    _REBASE_S = 1.0

    def __init__(self) -> None:
        self._base: tuple[float, float] | None = None
        self._shown: float | None = None

    def start_again(self) -> None:
        """The recording begins anew; its first picture follows its last one as if it were the next."""
        self._base = None

    def wait_s(self, stamp_s: float | None, now: float) -> float:
        """Seconds until the picture stamped ``stamp_s`` is due, never negative."""
        if stamp_s is None:
            return 0.0
        if self._base is None:
            start = now if self._shown is None else self._shown
            self._base = (stamp_s, start)
        due = self._base[1] + stamp_s - self._base[0]
        if now - due > self._REBASE_S or due - now > self._REBASE_S * 10:
            # A machine that was stopped, or a jump of the time stamps: go on from here.
            self._base, due = (stamp_s, now), now
        self._shown = due
        return max(0.0, due - now)


def open_live(source: LiveSource) -> Any:
    """The opened ``av`` container. Raises LiveError or av.FFmpegError."""
    url, options, form = source.url, dict(_PROBE), None
    scheme = url.partition("://")[0].lower() if "://" in url else ""
    if scheme in ("rtsp", "rtsps"):
        options |= {"rtsp_transport": source.transport, "fflags": "nobuffer", "max_delay": "200000"}
    elif not scheme and url.startswith("/dev/"):
        form = "v4l2"
        if not Path(url).exists():
            raise LiveError(f"{url} is not there")
    elif not scheme:
        if not Path(url).is_file():
            raise LiveError(f"{url}: no such file")
        options = {}
    # Reading may take as long as the stream may stall before it is opened anew.
    return av.open(url, format=form, options=options, timeout=(source.open_timeout_s, source.stall_s + 1.0))


def is_file(url: str) -> bool:
    """A video file, and neither an address nor a device."""
    return "://" not in url and not url.startswith("/dev/")


def is_paced(url: str, container: Any) -> bool:
    """Whether what comes is a recording, which comes as fast as it can be read, or arrives in pieces of seconds."""
    if is_file(url):
        return True
    scheme = url.partition("://")[0].lower()
    finite = container.duration is not None and container.duration > 0
    return scheme in ("http", "https") and (finite or url.partition("?")[0].endswith(".m3u8"))


def bare(url: str) -> str:
    """An address without user name and password, for logs and events."""
    scheme, separator, rest = url.partition("://")
    host, slash, path = rest.partition("/")
    return f"{scheme}{separator}{host.rpartition('@')[2]}{slash}{path}" if separator else url


def reason_of(error: BaseException) -> str:
    """An error of FFmpeg or of the system in a few words, without the address that it may repeat."""
    if isinstance(error, av.error.ExitError):
        return "no answer in time"
    text = getattr(error, "strerror", None) or str(error)
    return (text or type(error).__name__).splitlines()[0]


def _stamp_of(picture: Any) -> float | None:
    return _seconds(picture.pts, picture.time_base)


def _seconds(pts: int | None, time_base: Any) -> float | None:
    return None if pts is None or time_base is None else float(pts * time_base)
