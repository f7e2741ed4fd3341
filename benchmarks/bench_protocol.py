"""What typed, checked messages cost over plain msgpack and plain ZeroMQ: pytest benchmarks/bench_protocol.py

Ours and the bare version are measured alternately in one run; ``extra_info`` holds the ratio of their medians,
which is what to compare between machines.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import msgpack
import msgspec
import pytest
import zmq

from protocol import codec, sockets
from protocol.events import StreamAccuracy
from protocol.messages import Ack, Heartbeat, ToServer, WorkerStatus
from protocol.plan import PlanVersion
from protocol.schema import Record
from protocol.telemetry import Hub, Publisher

WORKER = WorkerStatus(
    job_id="3-inference-cam-1",
    kind="inference",
    stream_id="cam-1",
    pid=4711,
    state="ready",
    share_granted=0.3,
    share_achieved=0.29,
    progress=123456,
    model_version=3,
)
HEARTBEAT = Heartbeat(
    executor_id="edge-1-gpu0",
    incarnation="5f3c9a",
    loop_count=123456,
    held=PlanVersion(term=3, window=7, revision=2),
    workers=(WORKER,) * 8,
)
EVENT = StreamAccuracy(
    time_s=1.7e9,
    site_s=120.5,
    stream_id="cam-1",
    window=3,
    accuracy=0.71,
    accuracy_sum=7.1,
    num_scored=10,
    num_frames=10,
    num_analysed=8,
    num_dropped=0,
    num_objects=31,
    fps=10.0,
    latency_ms_p50=4.2,
    model_version=3,
    inference_id="half",
    conditions="night, rain",
)
MESSAGES = pytest.mark.parametrize("message", [HEARTBEAT, EVENT], ids=["heartbeat", "stream_accuracy"])


@pytest.fixture
def context() -> Iterator[sockets.Context]:
    context: sockets.Context = zmq.Context()
    yield context
    context.destroy(linger=0)


def against(benchmark: Any, ours: Callable[[], object], bare: Callable[[], object], batch: int) -> None:
    """Benchmark ``ours``; beside it, medians of alternating batches of both give the ratio."""
    times: dict[str, list[float]] = {"ours": [], "bare": []}
    for _ in range(30):
        for name, call in (("ours", ours), ("bare", bare)):
            start = time.perf_counter()
            for _ in range(batch):
                call()
            times[name].append((time.perf_counter() - start) / batch)
    ours_s, bare_s = statistics.median(times["ours"]), statistics.median(times["bare"])
    benchmark.extra_info.update(ours_us=ours_s * 1e6, bare_us=bare_s * 1e6, ratio=ours_s / bare_s)
    benchmark(ours)
    print(f"\n{benchmark.name}: {ours_s * 1e6:.1f} us, bare {bare_s * 1e6:.1f} us, ratio {ours_s / bare_s:.2f}")


@MESSAGES
def test_encode(benchmark: Any, message: Record) -> None:
    plain = msgspec.to_builtins(message)
    against(benchmark, lambda: codec.encode(message), lambda: msgpack.packb(plain), 500)


@MESSAGES
def test_decode(benchmark: Any, message: Record) -> None:
    data, kind = codec.encode(message), type(message)
    against(benchmark, lambda: codec.decode(data, kind), lambda: msgpack.unpackb(data), 500)


def test_control_round_trip(benchmark: Any, context: sockets.Context) -> None:
    """Heartbeat up, Ack down over TCP loopback in one thread, against the same bytes over bare sockets."""
    server = sockets.ControlServer(context, "tcp://127.0.0.1:0")
    client = sockets.ControlClient(context, server.address)
    while not client.send(HEARTBEAT):
        time.sleep(0.001)
    while not server.recv():
        time.sleep(0.001)

    def ours() -> None:
        client.send(HEARTBEAT)
        server.socket.poll(1000)
        ((peer, message),) = server.recv()
        assert isinstance(message, Heartbeat)
        server.send(peer, Ack(event_id=message.loop_count))
        client.socket.poll(1000)
        assert client.recv() == [Ack(event_id=123456)]

    router: sockets.Socket = context.socket(zmq.ROUTER)
    router.bind("tcp://127.0.0.1:0")
    dealer: sockets.Socket = context.socket(zmq.DEALER)
    dealer.connect(sockets.bound_address(router))
    up, down = codec.frames_of(HEARTBEAT), codec.frames_of(Ack(event_id=123456))

    def bare() -> None:
        dealer.send_multipart(up)
        router.poll(1000)
        peer, *_ = router.recv_multipart()
        router.send_multipart([peer, *down])
        dealer.poll(1000)
        dealer.recv_multipart()

    bare()
    against(benchmark, ours, bare, 100)
    for end in (server, client, router, dealer):
        end.close()


def test_events_through_the_hub(benchmark: Any, context: sockets.Context) -> None:
    """Publish, check, remember and pass on one event to one client, against a bare XPUB sending the same frames."""
    hub = Hub(context, "tcp://127.0.0.1:0", "tcp://127.0.0.1:0")
    publisher: Publisher = hub.publisher("bench")
    client = sockets.telemetry_subscriber(context, hub.subscribe_address)
    bare_socket: sockets.Socket = context.socket(zmq.XPUB)
    bare_socket.bind("tcp://127.0.0.1:0")
    bare_client = sockets.telemetry_subscriber(context, sockets.bound_address(bare_socket))
    bare_socket.recv()
    while not client.poll(5):
        hub.forward()
        publisher.publish(EVENT)
    client.recv_multipart()
    frames = [b"stream_accuracy/cam-1", b"0" * 24, codec.encode(EVENT)]

    def ours() -> None:
        publisher.publish(EVENT)
        client.recv_multipart()

    def bare() -> None:
        bare_socket.send_multipart(frames)
        bare_client.recv_multipart()

    against(benchmark, ours, bare, 200)
    for end in (hub, client, bare_socket, bare_client):
        end.close()


def test_a_decoder_that_knows_the_union_is_as_fast_as_one_that_knows_the_struct(benchmark: Any) -> None:
    data = codec.encode(HEARTBEAT)
    against(benchmark, lambda: codec.decode(data, ToServer), lambda: codec.decode(data, Heartbeat), 500)
