"""One RTSP camera: a process of its own, to be run by the system's Python, which has GStreamer's bindings.

    /usr/bin/python3 rtsp_server.py PORT FPS FILM...

A film is a file of access units: each a little-endian uint32 length, a byte that is 1 for a key frame, and the bytes
(H.264 byte stream). The stream is rtsp://127.0.0.1:PORT/camera, the same for all clients, as a camera's is. Commands
are lines of standard input: "film N", "freeze", "thaw", "noise P" (share of bytes replaced). Ends with its input.
"""

from __future__ import annotations

import random
import struct
import sys
import threading
import time
from pathlib import Path
from typing import Any

import gi  # type: ignore[import-not-found]

gi.require_version("Gst", "1.0")
gi.require_version("GstRtspServer", "1.0")
from gi.repository import GLib, Gst, GstRtspServer  # type: ignore[import-not-found]  # noqa: E402

PIPELINE = (
    "( appsrc name=source is-live=true format=time do-timestamp=true caps=video/x-h264,stream-format=byte-stream,"
    "alignment=au ! h264parse ! rtph264pay name=pay0 pt=96 config-interval=-1 )"
)


def read_film(path: str) -> list[bytes]:
    data = Path(path).read_bytes()
    units, at = [], 0
    while at < len(data):
        length, _ = struct.unpack_from("<IB", data, at)
        units.append(data[at + 5 : at + 5 + length])
        at += 5 + length
    return units


class Camera:
    def __init__(self, port: int, fps: float, films: list[list[bytes]]) -> None:
        self.films, self.fps = films, fps
        self.film, self.frozen, self.noise = 0, False, 0.0
        self.sources: list[Any] = []
        self.lock = threading.Lock()
        server = GstRtspServer.RTSPServer()
        server.set_address("127.0.0.1")
        server.set_service(str(port))
        factory = GstRtspServer.RTSPMediaFactory()
        factory.set_launch(PIPELINE)
        factory.set_shared(True)
        factory.connect("media-configure", self.configure)
        server.get_mount_points().add_factory("/camera", factory)
        if not server.attach(None):
            raise SystemExit(f"port {port} cannot be used")
        self.server = server
        threading.Thread(target=self.shoot, daemon=True).start()
        threading.Thread(target=self.obey, daemon=True).start()

    def configure(self, _: Any, media: Any) -> None:
        source = media.get_element().get_by_name("source")
        with self.lock:
            self.sources.append(source)
        media.connect("unprepared", lambda _: self.drop(source))

    def drop(self, source: Any) -> None:
        with self.lock:
            if source in self.sources:
                self.sources.remove(source)

    def shoot(self) -> None:
        """Push a unit to every media at the camera's pace, whoever listens.

        What it shows is a matter of the time, not of when it was started, so that cameras with one film show the same.
        """
        draw, number = random.Random(1), int(time.monotonic() * self.fps)
        while True:
            number += 1
            units = self.films[self.film]
            time.sleep(max(0.0, number / self.fps - time.monotonic()))
            unit = units[number % len(units)]
            if self.frozen:
                continue
            if self.noise:
                # The start code and the kind of unit stay, so that it reaches the decoder.
                unit = unit[:6] + bytes(
                    draw.randrange(256) if draw.random() < self.noise else byte for byte in unit[6:]
                )
            with self.lock:
                sources = list(self.sources)
            for source in sources:
                source.emit("push-buffer", Gst.Buffer.new_wrapped(unit))

    def obey(self) -> None:
        for text in sys.stdin:
            word, _, value = text.strip().partition(" ")
            if word == "film":
                self.film = int(value)
            elif word == "noise":
                self.noise = float(value)
            elif word in ("freeze", "thaw"):
                self.frozen = word == "freeze"
        loop.quit()


if __name__ == "__main__":
    Gst.init(None)
    loop = GLib.MainLoop()
    camera = Camera(int(sys.argv[1]), float(sys.argv[2]), [read_film(path) for path in sys.argv[3:]])
    print("ready", flush=True)
    loop.run()
