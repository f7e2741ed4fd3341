"""The client side of telemetry: live events, losses seen and counted, snapshots to become whole again."""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

import zmq

from protocol import sockets
from protocol.errors import ProtocolError, UnreachableError, VersionMismatchError
from protocol.events import Notice, TelemetryEvent
from protocol.messages import Rejected, Snapshot, SnapshotRequest
from protocol.telemetry import MAX_PUBLISHERS, event_of, key_of, topic_of

_ANSWER_S = 1.0  # live events wait no longer than this for a snapshot
_SETTLE_S = 0.5
_MAX_TOLD = 8192


class Received(NamedTuple):
    """``missed``: events lost since the live event before. Events of a snapshot have sequence 0 and no publisher."""

    event: TelemetryEvent
    publisher: str
    sequence: int
    missed: int
    from_snapshot: bool = False


class Subscriber:
    """A client of a site's telemetry. Asks for a snapshot at the start, after a loss and after a silence.

    An event may come twice (live and in a snapshot), but the newest of a kind and subject comes last.
    """

    def __init__(
        self,
        control_address: str,
        *,
        telemetry_address: str = "",
        prefixes: Sequence[str] = ("",),
        clock: Callable[[], float] = time.monotonic,
        high_water: int = sockets.TELEMETRY_HIGH_WATER,
        request_interval_s: float = 1.0,
        silence_s: float = 5.0,
    ) -> None:
        """``control_address`` "" = no snapshots; then ``telemetry_address`` is needed, which otherwise
        overrides the one in the snapshot (for a tunnel). ``prefixes`` of topics
        (see `topic_of`). After ``silence_s`` without an event a snapshot finds out whether somebody is there."""
        if not control_address and not telemetry_address:
            raise ValueError("a control address or a telemetry address is needed")
        self.control_address = control_address
        self.telemetry_address = telemetry_address
        self.missed = 0
        self.malformed = 0
        self.snapshots = 0
        self._untold = 0  # lost events that no delivered event has reported yet
        self.site = ""
        self._pinned = bool(telemetry_address)
        self._prefixes = tuple(prefix.encode() for prefix in prefixes)
        self._everything = b"" in self._prefixes
        self._clock = clock
        self._high_water = high_water
        self._request_interval_s = request_interval_s
        self._silence_s = silence_s
        self._context: sockets.Context = zmq.Context()
        self._control = sockets.ControlClient(self._context, control_address) if control_address else None
        self._events: sockets.Socket | None = None
        self._poller, self._answers = zmq.Poller(), zmq.Poller()
        if self._control is not None:
            self._poller.register(self._control.socket, zmq.POLLIN)
            self._answers.register(self._control.socket, zmq.POLLIN)
        if telemetry_address:
            self._subscribe(telemetry_address)
        self._pending: deque[Received] = deque()
        self._counters: OrderedDict[tuple[str, bytes], int] = OrderedDict()
        self._known: dict[str, int] = {}
        self._told: OrderedDict[tuple[bytes, str], tuple[str, int]] = OrderedDict()
        self._due_s = clock()
        self._asked_s = self._answered_s = -float("inf")
        self._heard_s = clock()

    def start(self, timeout_s: float = 5.0) -> Snapshot:
        """Wait for the first snapshot; its events are also what `recv` gives first.

        Raises:
            UnreachableError: no answer within ``timeout_s``.
            VersionMismatchError: the optimizer speaks another protocol version.
        """
        if self._control is None:
            raise ValueError("a snapshot needs a control address")
        end_s = self._clock() + timeout_s
        while (left_s := end_s - self._clock()) > 0:
            self._ask_if_due()
            self._poller.poll(min(50, int(left_s * 1000) + 1))
            for answer in self._control.recv():
                if isinstance(answer, VersionMismatchError):
                    raise answer
                if isinstance(answer, Rejected):
                    raise UnreachableError(f"the optimizer at {self.control_address} refuses: {answer.reason}")
                if isinstance(answer, Snapshot):
                    self._adopt(answer)
                    return answer
        raise UnreachableError(
            f"no optimizer answers at {self.control_address} within {timeout_s:g} s; "
            "check that it is running and that this is the control address it printed"
        )

    def recv(self, timeout_ms: int) -> Received | None:
        """The next event; None when none came within ``timeout_ms``."""
        end_s = self._clock() + timeout_ms / 1000
        while True:
            if self._pending:
                return self._pending.popleft()
            self._ask_if_due()
            self._take_answers()
            if self._pending:
                continue
            # An event that overtakes the snapshot would be followed by the older state in it, so events wait.
            waiting = self._awaiting_answer()
            received = None if waiting else self._take_event()
            if received is not None:
                return received
            left_ms = (end_s - self._clock()) * 1000
            if left_ms <= 0:
                return None
            poller = self._answers if waiting else self._poller
            poller.poll(min(100, int(left_ms) + 1))

    def close(self) -> None:
        if self._control is not None:
            self._control.close()
        if self._events is not None:
            self._events.close(0)
        self._context.term()

    def __enter__(self) -> Subscriber:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _subscribe(self, address: str) -> None:
        if self._events is not None:
            self._poller.unregister(self._events)
            self._events.close(0)
        self._events = sockets.telemetry_subscriber(self._context, address, self._prefixes, self._high_water)
        self._poller.register(self._events, zmq.POLLIN)
        self.telemetry_address = address

    def _take_event(self) -> Received | None:
        """The next live event that is not covered by a snapshot."""
        while self._events is not None and (item := sockets.receive(self._events, 3)) is not None:
            try:
                event, topic, publisher, sequence, topic_sequence = event_of(item[0])
            except ProtocolError:
                self.malformed += 1
                continue
            self._heard_s = self._clock()
            missed = self._count(publisher, topic, sequence, topic_sequence)
            if missed:
                self.missed += missed
                self._untold += missed
                self._due_s = self._heard_s
            if sequence > self._known.get(publisher, 0):
                missed, self._untold = self._untold, 0
                self._remember(event, publisher, sequence)
                return Received(event, publisher, sequence, missed)
        return None

    def _remember(self, event: TelemetryEvent, publisher: str, sequence: int) -> None:
        if self._control is None or isinstance(event, Notice):
            return
        key = key_of(event)
        self._told[key] = publisher, sequence
        self._told.move_to_end(key)
        while len(self._told) > _MAX_TOLD:
            self._told.popitem(last=False)

    def _overtaken(self, event: TelemetryEvent, snapshot: Snapshot) -> bool:
        """Whether a live event newer than ``snapshot`` was already told of what ``event`` is the state of."""
        publisher, sequence = self._told.get(key_of(event), ("", 0))
        return sequence > snapshot.sequence.get(publisher, sequence)

    def _count(self, publisher: str, topic: bytes, sequence: int, topic_sequence: int) -> int:
        key, number = ((publisher, b""), sequence) if self._everything else ((publisher, topic), topic_sequence)
        last = self._counters.get(key)
        if last is None and self._everything:
            last = self._known.get(publisher)
        self._counters[key] = max(number, last or 0)
        self._counters.move_to_end(key)
        while len(self._counters) > 8 * MAX_PUBLISHERS:
            self._counters.popitem(last=False)
        return max(0, number - last - 1) if last is not None else 0

    def _take_answers(self) -> None:
        for answer in self._control.recv() if self._control is not None else ():
            if isinstance(answer, Snapshot):
                self._adopt(answer)

    def _adopt(self, snapshot: Snapshot) -> None:
        self.snapshots += 1
        self.site = snapshot.site
        self._heard_s = self._answered_s = self._clock()
        self._known = snapshot.sequence
        for event in snapshot.events:
            if topic_of(event).startswith(self._prefixes) and not self._overtaken(event, snapshot):
                self._pending.append(Received(event, "", 0, 0, True))
        address = sockets.seen_from(snapshot.telemetry_address, self.control_address)
        self._due_s = float("inf")
        if address and address != self.telemetry_address and not self._pinned:
            self._subscribe(address)
            # Nothing tells when the subscription has reached the hub; what falls in between is in a second snapshot.
            self._due_s = self._clock() + _SETTLE_S

    def _awaiting_answer(self) -> bool:
        return self._answered_s < self._asked_s and self._clock() - self._asked_s < _ANSWER_S

    def _ask_if_due(self) -> None:
        now = self._clock()
        # One question at a time: with two on the way, events told after the first answer are newer than the second.
        if self._control is None or self._awaiting_answer() or now - self._asked_s < self._request_interval_s:
            return
        if (now >= self._due_s or now - self._heard_s > self._silence_s) and self._control.send(SnapshotRequest()):
            self._asked_s = now
