"""Telemetry: events as frames, publishers, the hub in the optimizer. Lossy by contract, and every loss is seen.

An event travels as three frames: topic, counters, payload. The counters are the publisher's sequence number
over all its events and over the events of this topic (both 8 bytes, big endian, from 1), then the publisher's
id. Whoever hears everything checks the first, whoever hears some topics the second.
"""

from __future__ import annotations

import logging
import os
import struct
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import msgspec
import zmq

from protocol import codec, sockets
from protocol.errors import ProtocolError
from protocol.events import (
    DriftScored,
    ExecutorChanged,
    GateDecided,
    JobShare,
    LabelsCollected,
    Notice,
    ProfileEstimated,
    RetrainCorrected,
    RetrainFinished,
    RetrainProgress,
    StreamAccuracy,
    StreamDegraded,
    StreamRecovered,
    TelemetryEvent,
    WorkerChanged,
)
from protocol.logs import RateLimiter, line
from protocol.messages import PROTOCOL_VERSION, Snapshot

log = logging.getLogger(__name__)

SITE = "site"
MAX_PUBLISHER_ID = 128
_COUNTERS = struct.Struct(">QQ")
MAX_PUBLISHERS = 1024
_ENDED = ("finished", "failed", "stopped")


def topic_of(event: TelemetryEvent) -> bytes:
    """``<kind>/<subject>``: the subject is the stream, the executor, or ``site``."""
    return f"{type(event).__struct_config__.tag}/{_subject(event)}".encode()


def _subject(event: TelemetryEvent) -> str:
    match event:
        case (
            StreamAccuracy()
            | JobShare()
            | WorkerChanged()
            | RetrainProgress()
            | RetrainFinished()
            | RetrainCorrected()
            | GateDecided()
            | DriftScored()
            | LabelsCollected()
            | ProfileEstimated()
            | StreamDegraded()
            | StreamRecovered()
        ):
            return event.stream_id
        case ExecutorChanged():
            return event.executor_id
        case _:
            return SITE


def key_of(event: TelemetryEvent) -> tuple[bytes, str]:
    """What an event is the state of: a newer event of the same key takes its place. Notices have no such key."""
    match event:
        case JobShare():
            detail = event.job_id
        case WorkerChanged():
            detail = f"{event.gpu_id}/{event.kind}"
        case _:
            detail = ""
    return topic_of(event), detail


def frames_of(event: TelemetryEvent, publisher_id: str, sequence: int, topic_sequence: int) -> list[bytes]:
    """The three frames of an event. Raises ProtocolError when it cannot be encoded (NaN, too large)."""
    payload = codec.encode(event, max_bytes=codec.MAX_UP_BYTES)
    return [topic_of(event), _COUNTERS.pack(sequence, topic_sequence) + publisher_id.encode(), payload]


class Stamped(NamedTuple):
    """An event as it came off the wire."""

    event: TelemetryEvent
    topic: bytes
    publisher: str
    sequence: int
    topic_sequence: int


def event_of(frames: Sequence[bytes]) -> Stamped:
    """The event in three frames. Raises ProtocolError for anything else."""
    if len(frames) != 3:
        raise ProtocolError(f"{len(frames)} frames where topic, counters and payload are due")
    topic, counters, payload = frames
    name = counters[_COUNTERS.size :]
    if not 0 < len(name) <= MAX_PUBLISHER_ID or not name.isascii() or not name.decode("ascii").isprintable():
        raise ProtocolError("malformed counters frame")
    sequence, topic_sequence = _COUNTERS.unpack_from(counters)
    event: TelemetryEvent = codec.decode(payload, TelemetryEvent, max_bytes=codec.MAX_UP_BYTES)
    if topic != topic_of(event):
        raise ProtocolError("the topic does not fit the event")
    return Stamped(event, topic, name.decode("ascii"), sequence, topic_sequence)


# ---------------------------------------------------------------- publishing


class EventSink(Protocol):
    """What code that has something to tell needs: `Publisher` or `NullPublisher`."""

    def publish(self, event: TelemetryEvent) -> None: ...


class _FrameSocket(Protocol):
    def send_multipart(self, frames: list[bytes], /, flags: int = 0) -> object: ...


class NullPublisher:
    """Tells nobody."""

    def publish(self, event: TelemetryEvent) -> None:
        return None


class Publisher:
    """Numbers, stamps and sends events. Never blocks and never raises over an event: telemetry must not stop work."""

    def __init__(
        self,
        socket: _FrameSocket,
        publisher_id: str,
        *,
        wall_clock: Callable[[], float] = time.time,
        site_clock: Callable[[], float] = lambda: 0.0,
    ) -> None:
        """``site_clock``: seconds of the site's stream clock. A random part is added to ``publisher_id`` (ASCII),
        since counters start anew with every start and an id stands for one run of the counters."""
        self.publisher_id = f"{publisher_id}#{os.urandom(4).hex()}"
        self.refused = 0
        self.dropped = 0
        self._socket = socket
        self._wall_clock = wall_clock
        self._site_clock = site_clock
        self._sequence = 0
        self._topics: dict[bytes, int] = {}
        self._limiter = RateLimiter()

    def publish(self, event: TelemetryEvent) -> None:
        """Send ``event``; ``time_s`` and ``site_s`` are filled in when they are zero."""
        stamp = {}
        if event.time_s == 0.0:
            stamp["time_s"] = self._wall_clock()
        if event.site_s == 0.0:
            stamp["site_s"] = self._site_clock()
        if stamp:
            event = msgspec.structs.replace(event, **stamp)
        topic = topic_of(event)
        try:
            frames = frames_of(event, self.publisher_id, self._sequence + 1, self._topics.get(topic, 0) + 1)
        except ProtocolError as error:
            self.refused += 1
            if self._limiter.admit(str(type(event)), time.monotonic()) is not None:
                log.warning("%s", line("event_not_sent", kind=type(event).__name__, reason=str(error)))
            return
        self._sequence += 1
        self._topics[topic] = self._topics.get(topic, 0) + 1
        try:
            self._socket.send_multipart(frames, zmq.NOBLOCK)
        except zmq.Again:
            self.dropped += 1


# ---------------------------------------------------------------- the hub


class Hub:
    """Takes the events of all publishers of a site and gives them to all clients; remembers the newest ones.

    Lives in the optimizer's poll loop: register `poll_sockets` for reading and call `forward` when one is readable.
    """

    def __init__(
        self,
        context: sockets.Context,
        publish_address: str,
        subscribe_address: str,
        *,
        on_event: Callable[[TelemetryEvent], None] | None = None,
        max_topics: int = 4096,
        max_notices: int = 20,
        high_water: int = sockets.TELEMETRY_HIGH_WATER,
    ) -> None:
        """Binds both addresses. ``on_event`` is called with every event, after it was passed on.

        Raises InputError when an address cannot be bound.
        """
        self._sources = sockets.hub_sources(context, publish_address, high_water)
        try:
            self._clients = sockets.hub_clients(context, subscribe_address, high_water)
        except Exception:
            self._sources.close(0)
            raise
        self.publish_address = sockets.bound_address(self._sources)
        self.subscribe_address = sockets.bound_address(self._clients)
        self.malformed = 0
        self.forwarded = 0
        self._on_event = on_event
        self._max_topics = max_topics
        self._last: OrderedDict[tuple[bytes, str], tuple[TelemetryEvent, int]] = OrderedDict()
        self._notices: deque[tuple[TelemetryEvent, int]] = deque(maxlen=max_notices)
        self._sequence: OrderedDict[str, int] = OrderedDict()
        self._limiter = RateLimiter()

    @property
    def poll_sockets(self) -> tuple[sockets.Socket, sockets.Socket]:
        """To be polled for reading: events of publishers, subscriptions of clients."""
        return self._sources, self._clients

    def publisher(
        self,
        publisher_id: str,
        *,
        wall_clock: Callable[[], float] = time.time,
        site_clock: Callable[[], float] = lambda: 0.0,
    ) -> Publisher:
        """A publisher inside this process and thread, without a socket in between."""
        return Publisher(_Local(self._take), publisher_id, wall_clock=wall_clock, site_clock=site_clock)

    def forward(self, limit: int = 1000) -> int:
        """Pass on up to ``limit`` waiting events; the number passed on. Never blocks."""
        for _ in range(limit):  # subscriptions are libzmq's business; they only have to be taken off the queue
            if sockets.receive(self._clients, 1) is None:
                break
        before = self.forwarded
        for _ in range(limit):
            item = sockets.receive(self._sources, 3)
            if item is None:
                break
            self._take(*item)
        return self.forwarded - before

    def snapshot(self, site: str, term: int, window: int) -> Snapshot:
        """The newest event per kind and subject, oldest first, within the size of one message."""
        events: list[TelemetryEvent] = []
        room = codec.MAX_DOWN_BYTES // 2
        for event, num_bytes in [*self._notices, *self._last.values()][::-1]:
            room -= num_bytes
            if room < 0:
                break
            events.append(event)
        return Snapshot(
            protocol_version=PROTOCOL_VERSION,
            site=site,
            term=term,
            window=window,
            sequence=dict(self._sequence),
            events=tuple(events[::-1]),
            telemetry_address=self.subscribe_address,
        )

    def close(self) -> None:
        self._sources.close()
        self._clients.close()

    def _take(self, frames: list[bytes], origin: str = "") -> None:
        try:
            stamped = event_of(frames)
        except ProtocolError as error:
            self.malformed += 1
            held_back = self._limiter.admit(origin, time.monotonic())
            if held_back is not None:
                detail = line(
                    "event_refused", peer=origin, reason=str(error), total=self.malformed, held_back=held_back
                )
                log.warning("%s", detail)
            return
        self._sequence[stamped.publisher] = stamped.sequence
        self._sequence.move_to_end(stamped.publisher)
        while len(self._sequence) > MAX_PUBLISHERS:
            self._sequence.popitem(last=False)
        self._remember(stamped, len(frames[2]))
        self.forwarded += 1
        self._clients.send_multipart(frames, zmq.NOBLOCK)
        if self._on_event is not None:
            self._on_event(stamped.event)

    def _remember(self, stamped: Stamped, num_bytes: int) -> None:
        event = stamped.event
        match event:
            case Notice():
                self._notices.append((event, num_bytes))
                return
            case WorkerChanged() if event.change in _ENDED:
                self._last.pop((f"job_share/{event.stream_id}".encode(), event.job_id), None)
            case StreamDegraded():
                self._last.pop((f"stream_recovered/{event.stream_id}".encode(), ""), None)
            case StreamRecovered():
                self._last.pop((f"stream_degraded/{event.stream_id}".encode(), ""), None)
            case ExecutorChanged() if event.change in ("lost", "left"):
                gone = [k for k, (v, _) in self._last.items() if isinstance(v, JobShare) and v.gpu_id == event.gpu_id]
                for key in gone:
                    del self._last[key]
        state = key_of(event)
        self._last[state] = event, num_bytes
        self._last.move_to_end(state)
        while len(self._last) > self._max_topics:
            self._last.popitem(last=False)


class _Local:
    """Looks like a socket to a publisher that lives in the hub's process."""

    def __init__(self, take: Callable[[list[bytes]], None]) -> None:
        self._take = take

    def send_multipart(self, frames: list[bytes], flags: int = 0) -> object:
        return self._take(frames)
