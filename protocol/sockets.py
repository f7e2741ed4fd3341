"""ZeroMQ sockets with every option set, and the two ends of a control connection.

A socket belongs to the thread that polls it. Nothing here blocks: sends and receives return at once.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable
from typing import TypeAlias, cast

import zmq

from protocol import codec
from protocol.errors import InputError, ProtocolError, VersionMismatchError
from protocol.logs import RateLimiter, line
from protocol.messages import PROTOCOL_VERSION, Rejected, ToClient, ToServer

log = logging.getLogger(__name__)

Context: TypeAlias = "zmq.Context[zmq.Socket[bytes]]"
Socket: TypeAlias = "zmq.Socket[bytes]"

LINGER_MS = 500  # long enough for a Goodbye or a Rejected to leave, short enough not to hold an exit up
CONTROL_HIGH_WATER = 256
TELEMETRY_HIGH_WATER = 5000
HEARTBEAT_MS = 2000
HEARTBEAT_TIMEOUT_MS = 6000
RECONNECT_MS = 100
RECONNECT_MAX_MS = 2000
MAX_IPC_BYTES = 107

_TCP = re.compile(
    r"tcp://(?P<host>\*|\[[0-9A-Fa-f:.%\w]+\]|[A-Za-z0-9_](?:[A-Za-z0-9_.-]*[A-Za-z0-9_])?):(?P<port>\*|\d{1,5})"
)
_WILDCARDS = ("*", "0.0.0.0", "[::]")


def parse_address(text: str, flag_name: str, *, bind: bool = False) -> str:
    """``text`` when it is an address to connect to (or to bind to), stripped of blanks.

    ``tcp://HOST:PORT`` or ``ipc://PATH``. For binding, the host may be ``*`` and the port ``0`` (any free one).

    Raises:
        InputError: names ``flag_name`` and shows what an address looks like.
    """
    address = text.strip()
    example = "tcp://127.0.0.1:5600"
    if address.startswith("ipc://"):
        path = address.removeprefix("ipc://")
        if not path or "\0" in path:
            raise InputError(f"{flag_name}: {text!r} has no path; write ipc:///path/to/socket")
        if len(path.encode()) > MAX_IPC_BYTES:
            raise InputError(
                f"{flag_name}: the path of {text!r} is longer than {MAX_IPC_BYTES} bytes; use a shorter one"
            )
        return address
    match = _TCP.fullmatch(address)
    if match is None:
        raise InputError(f"{flag_name}: {text!r} is not an address; write it like {example}")
    host, port = match["host"], match["port"]
    if port != "*" and int(port) > 65535:
        raise InputError(f"{flag_name}: port {port} of {text!r} is out of range; ports go from 1 to 65535")
    if bind:
        return f"tcp://{host}:{'0' if port == '*' else port}"
    if host in _WILDCARDS:
        raise InputError(f"{flag_name}: {text!r} has a wildcard host; name the machine to connect to, like {example}")
    if port in ("*", "0"):
        raise InputError(f"{flag_name}: {text!r} has no port; write the one the optimizer printed, like {example}")
    return address


def seen_from(advertised: str, control_address: str) -> str:
    """``advertised`` with a wildcard host replaced by the host that ``control_address`` reached the peer at."""
    match, reached = _TCP.fullmatch(advertised), _TCP.fullmatch(control_address)
    if match is None or reached is None or match["host"] not in _WILDCARDS:
        return advertised
    return f"tcp://{reached['host']}:{match['port']}"


# ---------------------------------------------------------------- factories


def control_router(context: Context, address: str) -> Socket:
    """The optimizer's end of all control connections, bound. Undeliverable sends fail instead of vanishing.

    Raises:
        InputError: the address cannot be bound.
    """
    socket = _socket(context, zmq.ROUTER, CONTROL_HIGH_WATER, codec.MAX_UP_BYTES, address)
    socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
    _beat(socket)
    return _bind(socket, address)


def control_dealer(context: Context, address: str) -> Socket:
    """An executor's or client's end, connected; it sends only while the connection stands (``IMMEDIATE``)."""
    socket = _socket(context, zmq.DEALER, CONTROL_HIGH_WATER, codec.MAX_DOWN_BYTES, address)
    _beat(socket)
    return _connect(socket, address)


def telemetry_publisher(context: Context, hub_address: str, high_water: int = TELEMETRY_HIGH_WATER) -> Socket:
    """A PUB connected to the hub; beyond ``high_water`` queued events it drops, it never blocks."""
    return _connect(_socket(context, zmq.PUB, high_water, codec.MAX_DOWN_BYTES, hub_address), hub_address)


def hub_sources(context: Context, address: str, high_water: int = TELEMETRY_HIGH_WATER) -> Socket:
    """The hub's XSUB, bound, subscribed to everything."""
    socket = _bind(_socket(context, zmq.XSUB, high_water, codec.MAX_UP_BYTES, address), address)
    socket.send(b"\x01")
    return socket


def hub_clients(context: Context, address: str, high_water: int = TELEMETRY_HIGH_WATER) -> Socket:
    """The hub's XPUB, bound; holds at most ``high_water`` events for each slow client."""
    socket = _socket(context, zmq.XPUB, high_water, 4096, address)
    _beat(socket)
    return _bind(socket, address)


def telemetry_subscriber(
    context: Context, address: str, prefixes: tuple[bytes, ...] = (b"",), high_water: int = TELEMETRY_HIGH_WATER
) -> Socket:
    """A client's SUB, connected, with at most ``high_water`` events waiting."""
    socket = _socket(context, zmq.SUB, high_water, codec.MAX_UP_BYTES, address)
    _beat(socket)
    for prefix in prefixes:
        socket.setsockopt(zmq.SUBSCRIBE, prefix)
    return _connect(socket, address)


def bound_address(socket: Socket) -> str:
    """The address a socket is bound to, with the port that was chosen."""
    return cast(bytes, socket.getsockopt(zmq.LAST_ENDPOINT)).rstrip(b"\0").decode()


def _socket(context: Context, kind: int, high_water: int, max_bytes: int, address: str) -> Socket:
    socket: Socket = context.socket(kind)
    socket.setsockopt(zmq.LINGER, LINGER_MS)
    socket.setsockopt(zmq.SNDHWM, high_water)
    socket.setsockopt(zmq.RCVHWM, high_water)
    socket.setsockopt(zmq.MAXMSGSIZE, max_bytes)
    socket.setsockopt(zmq.RECONNECT_IVL, RECONNECT_MS)
    socket.setsockopt(zmq.RECONNECT_IVL_MAX, RECONNECT_MAX_MS)
    # A SUB has nothing to queue; with IMMEDIATE it would only subscribe once its thread happens to call it again.
    socket.setsockopt(zmq.IMMEDIATE, kind != zmq.SUB)
    if "[" in address:
        socket.setsockopt(zmq.IPV6, 1)
    return socket


def _beat(socket: Socket) -> None:
    """ZMTP heartbeats find a dead network path; the peer's main loop proves itself by its own heartbeats."""
    socket.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MS)
    socket.setsockopt(zmq.HEARTBEAT_TTL, HEARTBEAT_TIMEOUT_MS)


def _bind(socket: Socket, address: str) -> Socket:
    try:
        socket.bind(address)
    except zmq.ZMQError as error:
        socket.close(0)
        raise InputError(f"cannot listen on {address}: {_words(error)}; choose another address or port 0") from None
    return socket


def _connect(socket: Socket, address: str) -> Socket:
    try:
        socket.connect(address)
    except zmq.ZMQError as error:
        socket.close(0)
        raise InputError(f"cannot connect to {address}: {_words(error)}") from None
    return socket


def _words(error: zmq.ZMQError) -> str:
    """What went wrong, without the address that pyzmq adds to it."""
    return zmq.strerror(error.errno) if error.errno is not None else str(error)


def receive(socket: Socket, max_frames: int) -> tuple[list[bytes], str] | None:
    """The frames of the next message and its sender's IP address; None when none waits.

    A message of too many frames keeps ``max_frames + 1`` of them: enough to be refused, without its memory.
    """
    try:
        first = socket.recv(zmq.NOBLOCK, copy=False)
    except zmq.Again:
        return None
    frames = [first.bytes]
    more = first.more
    while more:
        part = socket.recv(copy=False)
        more = part.more
        if len(frames) <= max_frames:
            frames.append(part.bytes)
    try:
        origin = str(first.get("Peer-Address"))
    except zmq.ZMQError:
        origin = ""
    return frames, origin


# ---------------------------------------------------------------- the two ends of a control connection


class ControlServer:
    """The optimizer's end. ``peer_id`` is libzmq's name of a *connection*: a peer that reconnects gets a new one,
    so remember it from every message and not only from Hello."""

    def __init__(self, context: Context, address: str, clock: Callable[[], float] = time.monotonic) -> None:
        """Raises InputError when ``address`` (see `parse_address` with ``bind=True``) cannot be bound."""
        self.socket = control_router(context, address)
        self.address = bound_address(self.socket)
        self.malformed = 0
        self.unroutable = 0
        self._clock = clock
        self._limiter = RateLimiter()

    def recv(self, limit: int = 256) -> list[tuple[bytes, ToServer | ProtocolError]]:
        """Up to ``limit`` waiting messages, in order of arrival, malformed ones as the error they caused.

        A peer of another protocol version has been answered with `Rejected` when its error is returned.
        """
        received: list[tuple[bytes, ToServer | ProtocolError]] = []
        while len(received) < limit and (item := receive(self.socket, 3)) is not None:
            (peer, *frames), origin = item
            try:
                received.append((peer, codec.message_of(frames, ToServer, max_bytes=codec.MAX_UP_BYTES)))
            except ProtocolError as error:
                self.malformed += 1
                _complain(self._limiter, self._clock(), origin, peer.hex()[:16], error, self.malformed)
                if isinstance(error, VersionMismatchError):
                    reason = f"the optimizer speaks protocol version {PROTOCOL_VERSION} only"
                    self.send(peer, Rejected(reason=reason))
                received.append((peer, error))
        return received

    def send(self, peer: bytes, message: ToClient) -> bool:
        """True when handed to a standing connection; False when the peer is gone or does not read.

        Raises:
            ProtocolError: the message cannot be encoded (NaN, too large).
        """
        if _send(self.socket, [peer, *codec.frames_of(message)]):
            return True
        self.unroutable += 1
        return False

    def close(self) -> None:
        self.socket.close()


class ControlClient:
    """An executor's or telemetry client's end of one control connection; libzmq reconnects by itself."""

    def __init__(self, context: Context, address: str, clock: Callable[[], float] = time.monotonic) -> None:
        """``address``: see `parse_address`. Nobody needs to be there yet."""
        self.socket = control_dealer(context, address)
        self.address = address
        self.malformed = 0
        self._clock = clock
        self._limiter = RateLimiter()

    def recv(self, limit: int = 256) -> list[ToClient | ProtocolError]:
        """Up to ``limit`` waiting messages, malformed ones as the error they caused."""
        received: list[ToClient | ProtocolError] = []
        while len(received) < limit and (item := receive(self.socket, 2)) is not None:
            frames, origin = item
            try:
                received.append(codec.message_of(frames, ToClient))
            except ProtocolError as error:
                self.malformed += 1
                _complain(self._limiter, self._clock(), origin, self.address, error, self.malformed)
                received.append(error)
        return received

    def send(self, message: ToServer) -> bool:
        """True when handed to a standing connection; False when there is none or it is full: say it again later.

        Raises:
            ProtocolError: the message cannot be encoded (NaN, too large).
        """
        return _send(self.socket, codec.frames_of(message, max_bytes=codec.MAX_UP_BYTES))

    def close(self) -> None:
        self.socket.close()


def _send(socket: Socket, frames: list[bytes]) -> bool:
    try:
        socket.send_multipart(frames, zmq.NOBLOCK)
    except zmq.Again:
        return False
    except zmq.ZMQError as error:
        if error.errno == zmq.EHOSTUNREACH:
            return False
        raise
    return True


def _complain(limiter: RateLimiter, now: float, origin: str, peer: str, error: ProtocolError, count: int) -> None:
    """One line per IP address and interval; routing ids are the peer's choice and would make new keys for ever."""
    held_back = limiter.admit(origin, now)
    if held_back is not None:
        text = line(
            "message_refused",
            origin=origin or "unknown",
            peer=peer,
            reason=str(error),
            total=count,
            held_back=held_back,
        )
        log.warning("%s", text)
