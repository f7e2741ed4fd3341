"""A camera that sends a film over HTTP as MPEG-TS, for ever, in real time, and can misbehave. No extra programs."""

from __future__ import annotations

import contextlib
import io
import random
import socket
import threading
import time
from pathlib import Path

import av


class NetworkCamera:
    """Serves ``films`` (MPEG-TS files) at ``url``; every client gets its own copy from the beginning.

    ``frozen``: connected, and sends nothing. ``noise``: share of the bytes that are replaced. ``film``: index into
    ``films``, changes take effect at the next connection or, as another picture size, at once.
    """

    def __init__(self, *films: Path, fps: float = 10.0) -> None:
        self._films = films
        self.film = 0
        self.frozen = False
        self.noise = 0.0
        self.num_clients = 0
        self._fps = fps
        self._server: socket.socket | None = None
        self._clients: list[socket.socket] = []
        self._port = 0
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}/stream.ts"

    def start(self) -> None:
        """Listen, on the port of before."""
        server = socket.socket()
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind(("127.0.0.1", self._port))
        server.listen(8)
        self._port, self._server = server.getsockname()[1], server
        threading.Thread(target=self._accept, args=(server,), daemon=True).start()

    def kill(self) -> None:
        """Cut everybody off and listen no more."""
        server, self._server = self._server, None
        for each in (server, *self._clients):
            if each is not None:
                with contextlib.suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)
                each.close()
        self._clients.clear()

    def hurt(self, how: str) -> None:
        """Do what goes wrong with cameras: "kill", "freeze", "noise" (a little) or "garbage"."""
        if how == "kill":
            self.kill()
        self.frozen = how == "freeze"
        self.noise = {"noise": 0.002, "garbage": 1.0}.get(how, 0.0)

    def mend(self) -> None:
        """Be well again."""
        self.frozen, self.noise = False, 0.0
        if self._server is None:
            self.start()

    def close(self) -> None:
        """End it."""
        self.kill()

    def _accept(self, server: socket.socket) -> None:
        while True:
            try:
                client, _ = server.accept()
            except OSError:
                return
            self._clients.append(client)
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        self.num_clients += 1
        draw = random.Random(self.num_clients)
        try:
            client.recv(4096)
            client.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: video/mp2t\r\nConnection: close\r\n\r\n")
            start, number, film = time.monotonic(), 0, -1
            chunks: list[bytes] = []
            while self._server is not None:
                if film != self.film:
                    film, chunks, first = self.film, [], number
                if number - first >= len(chunks):
                    chunks += _chunks(self._films[film], number, self._fps)
                due = start + number / self._fps
                time.sleep(max(0.0, due - time.monotonic()))
                if not self.frozen:
                    client.sendall(self._spoilt(chunks[number - first], draw))
                number += 1
        except OSError:
            pass
        finally:
            client.close()

    def _spoilt(self, data: bytes, draw: random.Random) -> bytes:
        if not self.noise:
            return data
        return bytes(draw.randrange(256) if draw.random() < self.noise else byte for byte in data)


def _chunks(film: Path, first: int, fps: float) -> list[bytes]:
    """The film as one piece of MPEG-TS per frame, its first frame stamped ``first / fps`` seconds."""
    buffer = io.BytesIO()
    ends = []
    with av.open(str(film)) as source, av.open(buffer, "w", format="mpegts", options={"flush_packets": "1"}) as out:
        video = source.streams.video[0]
        copy = out.add_stream_from_template(video)
        begin = None
        for packet in source.demux(video):
            if packet.dts is None or packet.pts is None:
                continue
            assert video.time_base is not None
            begin = packet.pts if begin is None else begin
            shift = round((first / fps + 1.0) / video.time_base) - begin
            packet.pts, packet.dts, packet.stream = packet.pts + shift, packet.dts + shift, copy
            out.mux(packet)
            ends.append(buffer.tell())
    data = buffer.getvalue()
    return [data[a:b] for a, b in zip([0, *ends[:-1]], [*ends[:-1], len(data)], strict=True)]
