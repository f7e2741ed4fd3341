from __future__ import annotations

import logging
import random
import socket as tcp
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import pytest
import zmq

from protocol import codec, sockets
from protocol.errors import InputError, ProtocolError, VersionMismatchError
from protocol.messages import Ack, Goodbye, Rejected, SnapshotRequest
from protocol.sockets import ControlClient, ControlServer, parse_address, seen_from

HANG_S = 20.0


@pytest.fixture
def context() -> Iterator[sockets.Context]:
    context: sockets.Context = zmq.Context()
    yield context
    context.destroy(linger=0)


@pytest.fixture
def now() -> list[float]:
    return [100.0]


@pytest.fixture
def server(context: sockets.Context, now: list[float]) -> ControlServer:
    return ControlServer(context, "tcp://127.0.0.1:0", clock=lambda: now[0])


def until(attempt: Callable[[], Any]) -> Any:
    """What ``attempt`` returns once it is true."""
    end = time.monotonic() + HANG_S
    while not (result := attempt()):
        assert time.monotonic() < end, "nothing came"
        time.sleep(0.005)
    return result


def collect(server: ControlServer, number: int) -> list[tuple[bytes, Any]]:
    """The next ``number`` messages, taken in small bites."""
    received: list[tuple[bytes, Any]] = []
    while len(received) < number:
        received += until(lambda: server.recv(limit=7))
    return received


@pytest.fixture
def dealer(context: sockets.Context, server: ControlServer) -> sockets.Socket:
    """A peer that may say anything."""
    dealer: sockets.Socket = context.socket(zmq.DEALER)
    dealer.connect(server.address)
    return dealer


# ---------------------------------------------------------------- addresses


@pytest.mark.parametrize(
    "text",
    [
        "tcp://127.0.0.1:5600",
        "tcp://edge-1.site.example:1",
        "tcp://[::1]:65535",
        "ipc:///run/ekya.sock",
        "tcp://localhost:80",
    ],
)
def test_an_address_to_connect_to_is_taken_as_it_is(text: str) -> None:
    assert parse_address(f" {text}\n", "--connect") == text


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is not an address"),
        ("127.0.0.1:5600", "is not an address; write it like tcp://"),
        ("http://127.0.0.1:5600", "is not an address"),
        ("tcp://127.0.0.1", "is not an address"),
        ("tcp://:5600", "is not an address"),
        ("tcp://host:56o0", "is not an address"),
        ("tcp://host:5600/path", "is not an address"),
        ("tcp://ho st:5600", "is not an address"),
        ("tcp://host:70000", "port 70000 .* out of range"),
        ("tcp://host:0", "has no port"),
        ("tcp://*:5600", "wildcard host"),
        ("tcp://0.0.0.0:5600", "wildcard host"),
        ("ipc://", "has no path"),
        ("ipc:///" + "x" * 107, "longer than 107 bytes"),
    ],
)
def test_a_wrong_address_is_an_error_that_names_the_flag(text: str, says: str) -> None:
    with pytest.raises(InputError, match=f"^--connect: .*{says}"):
        parse_address(text, "--connect")


@pytest.mark.parametrize("text", ["tcp://*:0", "tcp://*:*", "tcp://0.0.0.0:5600", "tcp://127.0.0.1:0"])
def test_wildcards_are_allowed_for_binding(text: str) -> None:
    assert parse_address(text, "--listen", bind=True) == text.replace(":*", ":0")


def test_a_wildcard_host_is_replaced_by_the_host_that_was_reached() -> None:
    assert seen_from("tcp://0.0.0.0:7000", "tcp://edge-1:5600") == "tcp://edge-1:7000"
    assert seen_from("tcp://[::]:7000", "tcp://[fe80::1]:5600") == "tcp://[fe80::1]:7000"
    assert seen_from("tcp://10.0.0.1:7000", "tcp://edge-1:5600") == "tcp://10.0.0.1:7000"
    assert seen_from("ipc:///a", "tcp://edge-1:5600") == "ipc:///a"
    assert seen_from("", "tcp://edge-1:5600") == ""


def test_port_zero_is_read_back_and_a_second_bind_is_refused(context: sockets.Context, server: ControlServer) -> None:
    assert int(server.address.rpartition(":")[2]) > 0
    with pytest.raises(InputError, match=r"cannot listen on tcp://127.*Address already in use; choose another"):
        ControlServer(context, server.address)


def test_every_socket_has_its_options_set(context: sockets.Context, server: ControlServer) -> None:
    made = {
        "router": server.socket,
        "dealer": sockets.control_dealer(context, server.address),
        "pub": sockets.telemetry_publisher(context, server.address),
        "xsub": sockets.hub_sources(context, "tcp://127.0.0.1:0"),
        "xpub": sockets.hub_clients(context, "tcp://127.0.0.1:0"),
        "sub": sockets.telemetry_subscriber(context, server.address),
    }
    for name, socket in made.items():
        high_water = 256 if name in ("router", "dealer") else 5000
        assert socket.getsockopt(zmq.LINGER) == sockets.LINGER_MS, name
        assert socket.getsockopt(zmq.SNDHWM) == socket.getsockopt(zmq.RCVHWM) == high_water, name
        assert 0 < int(socket.getsockopt(zmq.MAXMSGSIZE)) <= codec.MAX_DOWN_BYTES, name
        assert socket.getsockopt(zmq.IMMEDIATE) == (name != "sub"), name
        if name not in ("pub", "xsub"):
            assert socket.getsockopt(zmq.HEARTBEAT_IVL) == sockets.HEARTBEAT_MS, name
        socket.close()


# ---------------------------------------------------------------- control


def test_messages_go_both_ways(context: sockets.Context, server: ControlServer) -> None:
    with closing(ControlClient(context, server.address)) as client:
        until(lambda: client.send(SnapshotRequest()))
        collect(server, 1)
        sent = [Goodbye(executor_id="exec-a", reason=str(number)) for number in range(20)]
        for message in sent:
            assert client.send(message)
        received = collect(server, 20)
        assert [message for _, message in received] == sent
        peer = received[0][0]
        assert server.send(peer, Ack(event_id=7))
        assert until(client.recv) == [Ack(event_id=7)]
        assert server.recv() == []
        assert client.recv() == []


def test_recv_takes_no_more_than_its_limit(context: sockets.Context, server: ControlServer) -> None:
    with closing(ControlClient(context, server.address)) as client:
        for _ in range(5):
            until(lambda: client.send(SnapshotRequest()))
        assert len(until(lambda: server.recv(limit=2))) <= 2


def test_a_send_to_nobody_fails_and_is_counted(context: sockets.Context, server: ControlServer) -> None:
    assert not server.send(b"\x00nobody", Ack(event_id=1))
    client = ControlClient(context, server.address)
    until(lambda: client.send(SnapshotRequest()))
    ((peer, _),) = until(server.recv)
    assert server.send(peer, Ack(event_id=1))
    client.close()
    until(lambda: not server.send(peer, Ack(event_id=2)))
    assert server.unroutable == 2


def test_a_client_without_a_server_keeps_nothing_for_later(context: sockets.Context) -> None:
    with closing(ControlServer(context, "tcp://127.0.0.1:0")) as first:
        address = first.address
    until(lambda: _bindable(address))
    with closing(ControlClient(context, address)) as client:
        assert not client.send(Goodbye(executor_id="a", reason="stale"))
        with closing(ControlServer(context, address)) as second:
            until(lambda: client.send(Goodbye(executor_id="a", reason="fresh")))
            assert [message for _, message in collect(second, 1)] == [Goodbye(executor_id="a", reason="fresh")]


def _bindable(address: str) -> bool:
    with tcp.socket() as probe:
        probe.setsockopt(tcp.SOL_SOCKET, tcp.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", int(address.rpartition(":")[2])))
        except OSError:
            return False
        return True


@pytest.mark.parametrize(
    "frames",
    [
        [b""],
        [b"\x01hello"],
        [b"", b""],
        [b"\x01ack", b"\x80"],
        [b"\x01hello", b"\xc1"],
        [b"\x01\xff", b""],
        [b"x"] * 3,
        [b"x"] * 5000,
    ],
    ids=["empty", "header only", "two empty", "wrong way", "no messagepack", "no ascii", "three frames", "many frames"],
)
def test_malformed_messages_are_counted_and_the_next_one_is_taken(
    server: ControlServer, dealer: sockets.Socket, frames: list[bytes]
) -> None:
    dealer.send_multipart(frames)
    dealer.send_multipart(codec.frames_of(SnapshotRequest()))
    received = collect(server, 2)
    assert isinstance(received[0][1], ProtocolError)
    assert received[1] == (received[0][0], SnapshotRequest())
    assert server.malformed == 1


def test_another_protocol_version_is_told_so(server: ControlServer, dealer: sockets.Socket) -> None:
    dealer.send_multipart([b"\x09hello", b"of a form that nobody here knows"])
    ((_, error),) = until(server.recv)
    assert isinstance(error, VersionMismatchError)
    assert "version 9" in str(error)
    answer = codec.message_of(dealer.recv_multipart(), Rejected | Ack)
    assert answer == Rejected(reason="the optimizer speaks protocol version 1 only")


def test_a_client_of_another_version_of_optimizer_is_told_so(context: sockets.Context) -> None:
    router: sockets.Socket = context.socket(zmq.ROUTER)
    router.bind("tcp://127.0.0.1:0")
    with closing(ControlClient(context, sockets.bound_address(router))) as client:
        until(lambda: client.send(SnapshotRequest()))
        peer, *_ = router.recv_multipart()
        router.send_multipart([peer, b"\x02rejected", codec.encode(Rejected(reason="version 2 only"))])
        (error,) = until(client.recv)
        assert isinstance(error, VersionMismatchError)
        assert "version 2 only" in str(error)
        assert client.malformed == 1
    router.close(0)


@pytest.mark.parametrize("seed", range(3))
def test_random_bytes_on_the_port_disturb_nobody(context: sockets.Context, server: ControlServer, seed: int) -> None:
    rng = random.Random(seed)
    port = int(server.address.rpartition(":")[2])
    with closing(ControlClient(context, server.address)) as client:
        for _ in range(20):
            with tcp.create_connection(("127.0.0.1", port)) as connection:
                connection.sendall(rng.choice([b"", b"\xff\0\0\0\0\0\0\0\x01\x7f", b"GET / HTTP/1.0\r\n\r\n"]))
                connection.sendall(rng.randbytes(rng.randrange(2000)))
        until(lambda: client.send(SnapshotRequest()))
        received: list[tuple[bytes, Any]] = []
        while not (peers := [peer for peer, message in received if message == SnapshotRequest()]):
            received += until(server.recv)
        assert len(received) - server.malformed == len(peers) == 1
        assert server.send(peers[0], Ack(event_id=1))
        assert until(client.recv) == [Ack(event_id=1)]


def test_a_frame_over_the_limit_cuts_only_its_sender_off(
    context: sockets.Context, server: ControlServer, dealer: sockets.Socket
) -> None:
    with closing(ControlClient(context, server.address)) as client:
        dealer.send_multipart([b"\x01hello", bytes(codec.MAX_UP_BYTES + 1)])
        until(lambda: client.send(SnapshotRequest()))
        assert [message for _, message in until(server.recv)] == [SnapshotRequest()]
        with pytest.raises(ProtocolError, match="limit"):
            client.send(Goodbye(executor_id="a", reason="x" * codec.MAX_UP_BYTES))


def test_log_lines_about_malformed_messages_are_few_and_name_the_peer(
    server: ControlServer, dealer: sockets.Socket, now: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "protocol.sockets"):
        for _ in range(200):
            dealer.send_multipart([b"junk"])
        until(lambda: server.recv(50) and server.malformed == 200)
        now[0] += 60.0
        dealer.send_multipart([b"junk"])
        until(server.recv)
    assert len(caplog.messages) == 2
    assert caplog.messages[0].startswith("event=message_refused origin=127.0.0.1 peer=00")
    assert caplog.messages[1].endswith("total=201 held_back=199")
