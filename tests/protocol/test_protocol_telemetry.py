from __future__ import annotations

import logging
import math
import os
import random
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import psutil
import pytest
import zmq
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol import codec, sockets, telemetry
from protocol.errors import InputError, ProtocolError, UnreachableError, VersionMismatchError
from protocol.events import ExecutorChanged, JobShare, Notice, TelemetryEvent, WindowOpened, WorkerChanged
from protocol.messages import SnapshotRequest
from protocol.sockets import ControlServer
from protocol.subscriber import Received, Subscriber
from protocol.telemetry import Hub, NullPublisher, Publisher, event_of, frames_of, topic_of

HANG_S = 20.0
EXAMPLE = Path(__file__).parents[2] / "examples" / "subscribe.py"


def notice(text: str) -> Notice:
    return Notice(level="info", text=text)


def share(job_id: str, stream_id: str = "cam-1", gpu_id: str = "g0", granted: float = 0.5) -> JobShare:
    return JobShare(
        job_id=job_id,
        kind="inference",
        stream_id=stream_id,
        gpu_id=gpu_id,
        share_granted=granted,
        share_achieved=None,
        backend="pacing",
    )


def changed(executor_id: str, change: Any = "joined", gpu_id: str = "g0") -> ExecutorChanged:
    return ExecutorChanged(executor_id=executor_id, gpu_id=gpu_id, change=change, reason="")


def until(attempt: Callable[[], Any]) -> Any:
    """What ``attempt`` returns once it is true."""
    end = time.monotonic() + HANG_S
    while not (result := attempt()):
        assert time.monotonic() < end, "nothing came"
        time.sleep(0.002)
    return result


class Tape:
    """A socket that keeps what is sent."""

    def __init__(self) -> None:
        self.sent: list[list[bytes]] = []

    def send_multipart(self, frames: list[bytes], flags: int = 0) -> object:
        self.sent.append(frames)
        return None


class Site:
    """Control server and hub of an optimizer, driven by its own thread or, without `start`, by `step`."""

    def __init__(self, context: sockets.Context, control: str = "tcp://127.0.0.1:0", **options: Any) -> None:
        self.events: deque[TelemetryEvent] = deque(maxlen=100)
        self.server = ControlServer(context, control)
        self.hub = Hub(context, "tcp://127.0.0.1:0", "tcp://127.0.0.1:0", on_event=self.events.append, **options)
        self.publisher = self.hub.publisher("optimizer")
        self.inbox: list[TelemetryEvent] = []
        self.requests = 0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def step(self) -> bool:
        self.hub.forward()
        for peer, message in self.server.recv():
            if message == SnapshotRequest():
                self.requests += 1
                self.server.send(peer, self.hub.snapshot("street", 3, 7))
        while self.inbox:
            self.publisher.publish(self.inbox.pop(0))
        return False

    def start(self) -> Site:
        def run() -> None:
            while not self._stop.is_set():
                self.step()
                time.sleep(0.002)

        self._thread = threading.Thread(target=run)
        self._thread.start()
        return self

    def close(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        self.server.close()
        self.hub.close()


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def context() -> Iterator[sockets.Context]:
    context: sockets.Context = zmq.Context()
    yield context
    context.destroy(linger=0)


@pytest.fixture
def site(context: sockets.Context, stack: ExitStack) -> Site:
    return stack.enter_context(closing(Site(context)))


def next_live(subscriber: Subscriber, site: Site | None = None) -> Received:
    """The next event that does not come from a snapshot."""

    def attempt() -> Received | None:
        if site is not None:
            site.step()
        received = subscriber.recv(5)
        return None if received is None or received.from_snapshot else received

    result: Received = until(attempt)
    return result


# ---------------------------------------------------------------- frames and publishers


def test_topics_name_kind_and_subject() -> None:
    opened = WindowOpened(window=1, term=1, window_s=30.0, num_streams=1, policy="milp")
    assert topic_of(opened) == b"window_opened/site"
    assert topic_of(share("i-1", "cam-9")) == b"job_share/cam-9"
    assert topic_of(changed("exec-a")) == b"executor_changed/exec-a"


def test_a_publisher_numbers_events_over_all_and_per_topic_and_stamps_them() -> None:
    tape = Tape()
    publisher = Publisher(tape, "exec-a", wall_clock=lambda: 5e8, site_clock=lambda: 12.5)
    for event in (notice("1"), changed("exec-a"), notice("2"), Notice(level="info", text="3", time_s=1.0, site_s=2.0)):
        publisher.publish(event)
    stamped = [event_of(frames) for frames in tape.sent]
    assert [(item.sequence, item.topic_sequence) for item in stamped] == [(1, 1), (2, 1), (3, 2), (4, 3)]
    assert {item.publisher for item in stamped} == {publisher.publisher_id}
    assert [(item.event.time_s, item.event.site_s) for item in stamped] == [(5e8, 12.5)] * 3 + [(1.0, 2.0)]


def test_two_starts_of_a_publisher_do_not_share_an_id() -> None:
    assert Publisher(Tape(), "a").publisher_id != Publisher(Tape(), "a").publisher_id


def test_an_event_that_cannot_be_encoded_is_counted_and_takes_no_number(caplog: pytest.LogCaptureFixture) -> None:
    tape = Tape()
    publisher = Publisher(tape, "a")
    with caplog.at_level(logging.WARNING, "protocol.telemetry"):
        for _ in range(3):
            publisher.publish(share("i-1", granted=math.nan))
    publisher.publish(notice("fine"))
    assert publisher.refused == 3
    assert [event_of(frames).sequence for frames in tape.sent] == [1]
    assert caplog.messages == ['event=event_not_sent kind=JobShare reason="a number is not finite"']


def test_the_null_publisher_takes_everything() -> None:
    sink: telemetry.EventSink = NullPublisher()
    sink.publish(share("i-1", granted=math.nan))


@given(st.lists(st.binary(max_size=60), max_size=4))
@settings(max_examples=200, deadline=None)
def test_random_frames_raise_nothing_but_protocol_errors(frames: list[bytes]) -> None:
    with pytest.raises(ProtocolError):
        event_of(frames)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda frames: [b"notice/cam-1", *frames[1:]],
        lambda frames: [frames[0], frames[1][:15], frames[2]],
        lambda frames: [frames[0], frames[1][:16], frames[2]],
        lambda frames: [frames[0], frames[1][:16] + b"a" * 129, frames[2]],
        lambda frames: [frames[0], frames[1][:16] + b"a\x1b", frames[2]],
        lambda frames: [frames[0], frames[1], codec.encode(SnapshotRequest())],
        lambda frames: [*frames, b""],
    ],
    ids=["topic", "short counters", "no id", "long id", "control character", "no event", "four frames"],
)
def test_frames_that_do_not_fit_together_are_malformed(spoil: Callable[[list[bytes]], list[bytes]]) -> None:
    good = frames_of(notice("x"), "a", 1, 1)
    assert event_of(good).event == notice("x")
    with pytest.raises(ProtocolError):
        event_of(spoil(good))


def test_publishing_to_nobody_neither_blocks_nor_grows(context: sockets.Context) -> None:
    socket = sockets.telemetry_publisher(context, "tcp://127.0.0.1:1")
    publisher = Publisher(socket, "a")
    before = psutil.Process().memory_info().rss
    for _ in range(2000):
        publisher.publish(notice("x" * 10_000))
    assert psutil.Process().memory_info().rss - before < 10 << 20
    socket.close(0)


# ---------------------------------------------------------------- the hub


def test_events_of_executors_and_of_the_optimizer_reach_clients_and_the_recorder(
    context: sockets.Context, site: Site, stack: ExitStack
) -> None:
    subscriber = stack.enter_context(Subscriber("", telemetry_address=site.hub.subscribe_address))
    socket = sockets.telemetry_publisher(context, site.hub.publish_address)
    executor = Publisher(socket, "exec-a")
    texts: set[str] = set()

    def attempt() -> bool:
        executor.publish(notice("from an executor"))
        site.publisher.publish(notice("from the optimizer"))
        site.step()
        received = subscriber.recv(5)
        if received is not None and isinstance(received.event, Notice):
            texts.add(f"{received.publisher.partition('#')[0]}: {received.event.text}")
        return len(texts) == 2

    until(attempt)
    assert texts == {"exec-a: from an executor", "optimizer: from the optimizer"}
    assert {event.text for event in site.events if isinstance(event, Notice)} >= {"from an executor"}
    socket.close(0)


@pytest.mark.parametrize("seed", range(2))
def test_garbage_of_a_publisher_is_counted_and_goes_no_further(context: sockets.Context, site: Site, seed: int) -> None:
    rng = random.Random(seed)
    socket = sockets.telemetry_publisher(context, site.hub.publish_address)

    def attempt() -> bool:
        socket.send_multipart([rng.randbytes(rng.randrange(100)) for _ in range(rng.randrange(1, 6))])
        site.step()
        return site.hub.malformed >= 50

    until(attempt)
    assert site.hub.forwarded == 0
    assert not site.events
    socket.close(0)


def test_a_snapshot_holds_the_newest_event_of_every_kind_and_subject(site: Site) -> None:
    for number in range(30):
        site.publisher.publish(notice(f"n{number}"))
        site.publisher.publish(share("i-1", granted=number / 30))
        site.publisher.publish(share("r-1", granted=number / 60))
        site.publisher.publish(changed(f"exec-{number % 2}"))
    snapshot = site.hub.snapshot("street", 3, 7)
    assert (snapshot.site, snapshot.term, snapshot.window) == ("street", 3, 7)
    assert snapshot.sequence == {site.publisher.publisher_id: 120}
    assert snapshot.telemetry_address == site.hub.subscribe_address
    assert [event.text for event in snapshot.events if isinstance(event, Notice)] == [f"n{n}" for n in range(10, 30)]
    shares = {event.job_id: event.share_granted for event in snapshot.events if isinstance(event, JobShare)}
    assert shares == {"i-1": 29 / 30, "r-1": 29 / 60}
    assert [event.executor_id for event in snapshot.events if isinstance(event, ExecutorChanged)] == [
        "exec-0",
        "exec-1",
    ]


def test_shares_of_jobs_that_ended_and_of_executors_that_went_are_forgotten(site: Site) -> None:
    site.publisher.publish(share("i-1"))
    site.publisher.publish(share("r-1"))
    site.publisher.publish(share("i-2", "cam-2", gpu_id="g1"))
    ended = WorkerChanged(job_id="r-1", stream_id="cam-1", gpu_id="g0", kind="retrain", change="finished", reason="")
    site.publisher.publish(ended)
    site.publisher.publish(changed("exec-b", "lost", gpu_id="g1"))
    snapshot = site.hub.snapshot("street", 1, 0)
    assert [event.job_id for event in snapshot.events if isinstance(event, JobShare)] == ["i-1"]


def test_what_the_hub_remembers_is_bounded(context: sockets.Context, stack: ExitStack) -> None:
    site = stack.enter_context(closing(Site(context, max_topics=50)))
    for number in range(2000):
        site.hub.publisher(f"p{number}").publish(share("i", f"cam-{number}"))
    snapshot = site.hub.snapshot("street", 1, 0)
    assert [event.stream_id for event in snapshot.events if isinstance(event, JobShare)] == [
        f"cam-{number}" for number in range(1950, 2000)
    ]
    assert len(snapshot.sequence) == 1024


def test_a_snapshot_of_large_events_fits_into_one_message(context: sockets.Context, stack: ExitStack) -> None:
    site = stack.enter_context(closing(Site(context)))
    for number in range(200):
        reason = "x" * 60_000
        site.publisher.publish(ExecutorChanged(executor_id=f"e{number}", gpu_id="g", change="joined", reason=reason))
    snapshot = site.hub.snapshot("street", 1, 0)
    assert len(codec.encode(snapshot)) <= codec.MAX_DOWN_BYTES
    newest = snapshot.events[-1]
    assert isinstance(newest, ExecutorChanged)
    assert newest.executor_id == "e199"


def test_forward_takes_no_more_than_its_limit(context: sockets.Context, site: Site) -> None:
    socket = sockets.telemetry_publisher(context, site.hub.publish_address)
    publisher = Publisher(socket, "a")

    def connected() -> int:
        publisher.publish(notice("probe"))
        return site.hub.forward()

    until(connected)
    for _ in range(500):
        publisher.publish(notice("x"))
    counts: list[int] = []
    until(lambda: counts.append(site.hub.forward(limit=20)) or sum(counts) >= 500)  # type: ignore[func-returns-value]
    assert max(counts) == 20
    socket.close(0)


# ---------------------------------------------------------------- subscribers


def test_a_late_subscriber_gets_the_present_state_and_then_live_events_without_a_gap(
    context: sockets.Context, stack: ExitStack
) -> None:
    site = Site(context)
    for number in range(40):
        site.publisher.publish(share("i-1", granted=number / 40))
    stack.enter_context(closing(site.start()))
    subscriber = stack.enter_context(Subscriber(site.server.address))
    snapshot = subscriber.start(HANG_S)
    assert snapshot.site == subscriber.site == "street"
    first = subscriber.recv(0)
    assert first is not None
    assert first.from_snapshot
    assert isinstance(first.event, JobShare)
    assert first.event.share_granted == 39 / 40
    until(lambda: subscriber.snapshots == 2 or subscriber.recv(10))
    until(lambda: subscriber.recv(10) is None and subscriber.snapshots >= 2)
    site.inbox += [share("i-1", granted=0.01), share("i-1", granted=0.02)]
    live = [next_live(subscriber), next_live(subscriber)]
    assert [(item.sequence, item.missed) for item in live] == [(41, 0), (42, 0)]
    assert subscriber.missed == 0


def test_a_subscriber_with_a_filter_sees_its_topics_only_and_no_gaps(site: Site, stack: ExitStack) -> None:
    address = site.hub.subscribe_address
    subscriber = stack.enter_context(Subscriber("", telemetry_address=address, prefixes=["executor_changed/"]))

    def probe() -> Received | None:
        site.publisher.publish(changed("probe"))
        site.step()
        return subscriber.recv(5)

    until(probe)
    while subscriber.recv(50) is not None:
        pass
    for number in range(20):
        site.publisher.publish(notice("not for us"))
        site.publisher.publish(changed(f"e{number % 3}"))
    site.step()
    received = [next_live(subscriber) for _ in range(20)]
    assert {topic_of(item.event)[:17] for item in received} == {b"executor_changed/"}
    assert subscriber.missed == 0


def test_a_slow_subscriber_sees_its_loss_and_gets_a_snapshot_and_memory_stays_bounded(
    context: sockets.Context, stack: ExitStack
) -> None:
    site = stack.enter_context(closing(Site(context, high_water=200)))
    subscriber = Subscriber(
        site.server.address, telemetry_address=site.hub.subscribe_address, high_water=200, request_interval_s=0.05
    )
    stack.enter_context(subscriber)

    def joined() -> bool:
        site.step()
        site.publisher.publish(changed("probe"))
        return subscriber.recv(5) is not None and subscriber.snapshots > 0

    until(joined)
    while subscriber.recv(100) is not None:
        site.step()
    before, number = psutil.Process().memory_info().rss, 1500
    for index in range(number):
        site.publisher.publish(share(f"job-{index % 5}", granted=index / number))
        site.publisher.publish(Notice(level="info", text="x" * 30_000))
    assert psutil.Process().memory_info().rss - before < 30 << 20
    snapshots, live, idle, state = subscriber.snapshots, 0, 0, dict[str, float]()

    def drained() -> bool:
        nonlocal live, idle
        site.step()
        received = subscriber.recv(5)
        if received is not None:
            live += not received.from_snapshot
            if isinstance(received.event, JobShare):
                state[received.event.job_id] = received.event.share_granted
        idle = 0 if received is not None else idle + 1
        return subscriber.snapshots > snapshots and idle > 30

    until(drained)
    assert state == {f"job-{index % 5}": index / number for index in range(number - 5, number)}
    site.publisher.publish(notice("this one shows what was lost before it"))
    assert next_live(subscriber, site).missed > 0
    assert subscriber.missed > number / 2
    assert live + subscriber.missed <= 2 * number
    idle, snapshots = 0, subscriber.snapshots
    until(drained)
    site.publisher.publish(notice("the next one"))
    assert next_live(subscriber, site).missed == 0


def test_lost_events_are_counted_exactly(context: sockets.Context, stack: ExitStack) -> None:
    socket: sockets.Socket = context.socket(zmq.XPUB)
    socket.bind("tcp://127.0.0.1:0")
    subscriber = stack.enter_context(Subscriber("", telemetry_address=sockets.bound_address(socket)))
    socket.recv()
    for sequence in (5, 6, 9, 10, 2, 11, 20):
        socket.send_multipart(frames_of(notice(str(sequence)), "a", sequence, sequence))
    socket.send_multipart([b"junk"])
    socket.send_multipart(frames_of(notice("other"), "b", 7, 7))
    received = [next_live(subscriber) for _ in range(8)]
    assert [item.missed for item in received] == [0, 0, 2, 0, 0, 0, 8, 0]
    assert subscriber.missed == 10
    assert subscriber.malformed == 1
    socket.close(0)


def test_events_that_a_snapshot_covers_are_not_told_again(context: sockets.Context, stack: ExitStack) -> None:
    site = stack.enter_context(closing(Site(context)))
    subscriber = Subscriber(
        site.server.address, telemetry_address=site.hub.subscribe_address, request_interval_s=0.0, silence_s=0.2
    )
    stack.enter_context(subscriber)
    newest = -1.0
    for number in range(300):
        site.publisher.publish(share("i-1", granted=number / 300))
        site.step()
        received = subscriber.recv(1)
        if received is not None and isinstance(received.event, JobShare):
            assert received.event.share_granted >= newest
            newest = received.event.share_granted
    assert newest > 0.5


def test_an_answer_that_comes_too_late_tells_nothing_older_than_what_was_told(
    context: sockets.Context, stack: ExitStack
) -> None:
    site = stack.enter_context(closing(Site(context)))
    ahead_s = 0.0
    subscriber = Subscriber(
        site.server.address,
        telemetry_address=site.hub.subscribe_address,
        clock=lambda: time.monotonic() + ahead_s,
        request_interval_s=1000.0,
        silence_s=1000.0,
    )
    stack.enter_context(subscriber)

    def asked() -> list[Any]:
        subscriber.recv(5)
        return list(site.server.recv())

    for stream, granted in (("cam-1", 0.1), ("cam-2", 0.2)):
        site.publisher.publish(share(f"i-{stream}", stream, granted=granted))
    (peer, _), *more = until(asked)
    assert not more
    late = site.hub.snapshot("street", 3, 7)
    ahead_s = 10.0

    def told() -> Received | None:
        site.publisher.publish(share("i-cam-1", granted=0.5))
        site.hub.forward()
        return subscriber.recv(5)

    until(told)
    site.server.send(peer, late)
    received = []

    def adopted() -> bool:
        received.append(subscriber.recv(5))
        return subscriber.snapshots == 1

    until(adopted)
    received += [subscriber.recv(20) for _ in range(3)]
    events = [item.event for item in received if item is not None]
    assert {(e.stream_id, e.share_granted) for e in events if isinstance(e, JobShare)} - {("cam-1", 0.5)} == {
        ("cam-2", 0.2)
    }


def test_a_snapshot_is_asked_for_once_at_a_time(context: sockets.Context, stack: ExitStack) -> None:
    site = stack.enter_context(closing(Site(context)))
    subscriber = Subscriber(site.server.address, telemetry_address=site.hub.subscribe_address, request_interval_s=0.0)
    stack.enter_context(subscriber)
    requests: list[Any] = []
    for _ in range(20):
        subscriber.recv(5)
        requests += site.server.recv()
    assert len(requests) == 1


def test_a_subscriber_follows_an_optimizer_that_started_anew(context: sockets.Context, stack: ExitStack) -> None:
    first = Site(context)
    address = first.server.address
    first.start()
    subscriber = Subscriber(address, silence_s=0.2, request_interval_s=0.05)
    stack.enter_context(subscriber)
    subscriber.start(HANG_S)
    old = subscriber.telemetry_address
    first.close()

    def again() -> Site | None:
        try:
            return Site(context, control=address)
        except InputError:
            return None

    second: Site = until(again)
    second.publisher.publish(notice("early"))
    stack.enter_context(closing(second.start()))

    def heard() -> bool:
        second.inbox.append(notice("live"))
        received = subscriber.recv(20)
        return received is not None and not received.from_snapshot

    until(heard)
    assert subscriber.telemetry_address == second.hub.subscribe_address != old


def test_nobody_there_is_a_clear_error() -> None:
    with (
        Subscriber("tcp://127.0.0.1:9") as subscriber,
        pytest.raises(UnreachableError, match=r"no optimizer answers at tcp://127\.0\.0\.1:9 within 0\.2 s; check"),
    ):
        subscriber.start(0.2)


def test_an_optimizer_of_another_version_is_a_clear_error(context: sockets.Context, stack: ExitStack) -> None:
    router: sockets.Socket = context.socket(zmq.ROUTER)
    router.bind("tcp://127.0.0.1:0")

    def answer() -> None:
        peer, *_ = router.recv_multipart()
        router.send_multipart([peer, b"\x05rejected", b"\xc1"])

    thread = threading.Thread(target=answer)
    thread.start()
    subscriber = stack.enter_context(Subscriber(sockets.bound_address(router)))
    with pytest.raises(VersionMismatchError, match=r"version 5.*version 1"):
        subscriber.start(HANG_S)
    thread.join()
    router.close(0)


@pytest.mark.process
def test_the_example_client_prints_live_telemetry(site: Site) -> None:
    assert len(EXAMPLE.read_text().splitlines()) < 30
    command = [sys.executable, str(EXAMPLE), site.hub.subscribe_address, "notice/"]
    environment = {**os.environ, "PYTHONPATH": "", "PYTHONSAFEPATH": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        lines: list[str] = []
        reader = threading.Thread(target=lambda: lines.append(process.stdout.readline() if process.stdout else ""))
        reader.start()

        def printed() -> bool:
            site.publisher.publish(notice("hello there"))
            site.step()
            return bool(lines)

        try:
            until(printed)
        finally:
            process.kill()
        reader.join()
    assert lines[0].startswith("notice/site  {'type': 'notice'")
    assert "'text': 'hello there'" in lines[0]
