"""RTSP cameras for tests, by GStreamer's RTSP server (``make rtsp-rig`` installs it on Debian and its kin)."""

from __future__ import annotations

import struct
import subprocess
import time
from pathlib import Path

from tests.cameras.film import units

SYSTEM_PYTHON = "/usr/bin/python3"
_SERVER = Path(__file__).with_name("rtsp_server.py")
_PROBE = (
    "import gi; gi.require_version('Gst', '1.0'); gi.require_version('GstRtspServer', '1.0'); "
    "from gi.repository import Gst, GstRtspServer; Gst.init(None); "
    "missing = [n for n in ('appsrc', 'h264parse', 'rtph264pay') if not Gst.ElementFactory.find(n)]; "
    "raise SystemExit('no GStreamer element ' + ', '.join(missing) if missing else 0)"
)


def why_not() -> str:
    """Why no RTSP camera can be had here; "" when one can."""
    try:
        probe = subprocess.run([SYSTEM_PYTHON, "-c", _PROBE], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"no GStreamer RTSP server ({error}); make rtsp-rig installs it"
    if probe.returncode == 0:
        return ""
    reason = (probe.stderr.strip().splitlines() or ["unknown"])[-1]
    return f"no GStreamer RTSP server ({reason}); make rtsp-rig installs it"


class RtspCamera:
    """A process that can be killed and started again on its port. ``films``: MPEG-TS files."""

    def __init__(self, folder: Path, port: int, *films: Path, fps: float = 10.0) -> None:
        self.url = f"rtsp://127.0.0.1:{port}/camera"
        self._paths = []
        for film in films:
            path = folder / f"{film.stem}.units"
            if not path.exists():
                path.write_bytes(b"".join(struct.pack("<IB", len(unit), key) + unit for unit, key in units(film)))
            self._paths.append(str(path))
        self._command = [SYSTEM_PYTHON, str(_SERVER), str(port), str(fps), *self._paths]
        self._process: subprocess.Popen[str] | None = None
        self.start()

    def start(self) -> None:
        """Begin anew after a kill. Raises RuntimeError when the server does not start."""
        end = time.monotonic() + 20.0
        while time.monotonic() < end:
            self._process = subprocess.Popen(
                self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            )
            assert self._process.stdout is not None
            if self._process.stdout.readline().strip() == "ready":
                return
            self.kill()
            time.sleep(0.2)  # the port of a server that was killed a moment ago
        raise RuntimeError(f"no RTSP server at {self.url}")

    def tell(self, command: str) -> None:
        """A command of rtsp_server.py; none while it is dead."""
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.write(command + "\n")
            self._process.stdin.flush()

    def hurt(self, how: str) -> None:
        """Do what goes wrong with cameras: "kill", "freeze", "noise" (a little) or "garbage"."""
        if how == "kill":
            self.kill()
        else:
            self.tell({"freeze": "freeze", "noise": "noise 0.002", "garbage": "noise 1"}[how])

    def mend(self) -> None:
        """Be well again."""
        if self._process is None:
            self.start()
        else:
            self.tell("thaw")
            self.tell("noise 0")

    def close(self) -> None:
        """End it."""
        self.kill()

    @property
    def alive(self) -> bool:
        """The server runs."""
        return self._process is not None and self._process.poll() is None

    def kill(self) -> None:
        """End it as a power cut would."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()
