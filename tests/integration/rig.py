"""Real processes of a small site: one optimizer, executors, and a telemetry client that waits for events."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import psutil

from optimizer.report import read_events
from protocol.events import Event

Kind = TypeVar("Kind", bound=Event)

SITE = """
name = "rig"
window_s = {window_s}
deadline_s = 0.5
replan_s = 1.0
min_executors = {executors}
silence_s = 2.0
control = "tcp://127.0.0.1:{port}"

[bootstrap]
seconds = 12.0
label_fps = 2.0
epochs = 2

[profiling]
share = 0.5
limit = 0.6

[stream_defaults]
classes = ["person", "cyclist", "car", "van", "bus", "motorcycle"]
fps = 4.0
label_fps = 3.0
[stream_defaults.golden]
seconds_per_frame = 0.002

[[streams]]
stream_id = "north"
[streams.source]
type = "city"
seed = 1
num_objects = 5
[[streams]]
stream_id = "south"
[streams.source]
type = "city"
seed = 2
num_objects = 5

[[inference]]
config_id = "f1r32"
resolution_px = 32
[[inference]]
config_id = "f4r24"
frame_interval = 4
resolution_px = 24

[[retrain]]
config_id = "head-2"
epochs = 2
trained_fraction = 0.0
[[retrain]]
config_id = "all-6"
epochs = 6
"""


def free_port() -> int:
    """A TCP port that nobody used a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(what: str, condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
    """Poll until ``condition``; fail naming ``what``."""
    end = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > end:
            raise AssertionError(f"not within {timeout_s:g} s: {what}")
        time.sleep(0.05)


class Rig:
    """Starts and kills the processes of one site; everything is gone after ``close``."""

    def __init__(self, folder: Path, *, executors: int = 1, window_s: float = 8.0, site: str = SITE) -> None:
        self.folder = folder
        self.out = folder / "out"
        self.port = free_port()
        self.site_file = folder / "site.toml"
        self.site_file.write_text(site.format(port=self.port, executors=executors, window_s=window_s))
        self.processes: list[subprocess.Popen[bytes]] = []
        self.cores = sorted(os.sched_getaffinity(0))

    @property
    def address(self) -> str:
        return f"tcp://127.0.0.1:{self.port}"

    def optimizer(self, *more: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "optimizer.cli", "run", str(self.site_file), "--out", str(self.out), *more]
        return self._start(command, "optimizer")

    def executor(self, core: int = 0, *more: str) -> subprocess.Popen[bytes]:
        device = f"cpu:{self.cores[core % len(self.cores)]}"
        # An id of its own: where there is but one core, two executors share it.
        name = ["--id", f"e{core}"]
        command = [sys.executable, "-m", "executor.cli", "--device", device, "--connect", self.address, *name, *more]
        return self._start(command, f"executor{core}")

    def events(self, kind: type[Kind]) -> list[Kind]:
        """The recorded telemetry events of one kind so far."""
        path = self.out / "events.jsonl"
        return [e for e in read_events(path) if isinstance(e, kind)] if path.exists() else []

    def log(self, name: str) -> str:
        """What a process has printed."""
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def close(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        for process in self.processes:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _start(self, command: list[str], name: str) -> subprocess.Popen[bytes]:
        with (self.folder / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
        self.processes.append(process)
        return process


def descendants(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """All processes below ``process`` at this moment."""
    return psutil.Process(process.pid).children(recursive=True)


def all_gone(processes: list[psutil.Process]) -> bool:
    """True when none of them runs any more (zombies do not count)."""
    return not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in processes)
