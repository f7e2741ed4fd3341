"""Shares as they are held and changed: achieved against granted, resizing a serving stream, swapping its model.

``python benchmarks/bench_resize.py [shares|resize|swap ...] [cgroup|pacing|replacement ...]`` prints the tables;
``pytest benchmarks/bench_resize.py`` holds their bounds with fewer repetitions. Executor, workers, sockets and share
backends are the real ones, on one core.
``replacement`` is what MPS needs, where a running client cannot grow: here with paced workers whose cap is fixed.

What a change adds to the interval between two results is the longest interval that touches the time after it, less the
frame interval. A busy machine adds waits of its own: the column ``no change`` measures them in the same way, and the
last one is the load average meanwhile, which counts others' work as well.
"""

from __future__ import annotations

import functools
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import psutil
import pytest
import torch
from rich.console import Console
from rich.table import Table

from executor import worker
from executor.config import make_config
from executor.learning import checkpoints
from executor.learning.models import build_student
from executor.limits import HandOvers
from executor.service import Service
from executor.shares.backend import PacingBackend, ShareBackend
from executor.shares.choose import choose_backend
from executor.shares.devices import find_device
from executor.signals import SignalWakeup
from protocol import logs
from protocol.messages import ApplyPlan, Heartbeat, InferenceJob, WorkerStatus
from protocol.schema import CheckpointRef, InferenceConfig, StreamSpec, StudentSpec
from tests.executor import tiny_source
from tests.executor.optimizer_model import OptimizerModel, plan

CORE = max(os.sched_getaffinity(0))
BACKENDS = ("cgroup", "pacing", "replacement")
STREAM = tiny_source.spec("resize", fps=20.0, student=StudentSpec(head_width=8))
# More than a whole core's work, or large shares would not be used up.
GREEDY = msgspec.structs.replace(tiny_source.spec("greedy-share", fps=240.0), crop_px=48)
SHARES = (0.1, 0.2, 0.3, 0.5, 0.7, 0.9)
LOG = "RESIZE_BENCH_RESULTS"


class Noted(tiny_source.TinyFrame):
    """A frame that writes down when its result was there: a worker asks for the conditions right after it."""

    def __init__(self, index: int, file: int) -> None:
        super().__init__(index)
        self._file = file

    @property
    def conditions(self) -> str:
        os.write(self._file, f"{self.index} {time.monotonic():.6f}\n".encode())
        return ""

    @conditions.setter
    def conditions(self, value: str) -> None:
        pass


class NotedSource(tiny_source.TinySource):
    def __init__(self, path: str, spec: StreamSpec) -> None:
        super().__init__(spec)
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def frame(self, index: int) -> tiny_source.TinyFrame:
        return Noted(index, self._file)


def noting_worker(connection: Connection) -> None:
    """The executor's worker on a stream whose results are written down."""
    worker.main(connection, functools.partial(NotedSource, os.environ[LOG]))


class ReplacingBackend(PacingBackend):
    """Paced workers that cannot grow beyond the share they were started with, as clients of MPS."""

    name = "replacement"
    can_resize_live = False
    holds_at_once = False

    def paced_share(self, share: float, cap: float) -> float:
        return share


def run_executor(name: str, address: str) -> int:
    """The executor's process."""
    logs.configure("executor", "error")
    signals = SignalWakeup()
    signals.install()
    device = find_device(f"cpu:{CORE}")
    backend: ShareBackend
    backend = ReplacingBackend(device) if name == "replacement" else choose_backend(name, device)  # type: ignore[arg-type]
    config = make_config({"device": device.text, "connect": address, "executor_id": "e1", "worker": WORKER})
    # Every change of the benchmark is to be a hand-over where one is needed at all.
    rules = HandOvers(min_growth=0.0, pause_s=0.0, refit_below=0.9, refit_after_s=0.0)
    return Service(msgspec.structs.replace(config, hand_overs=rules), device, backend, signals).run()


WORKER = "benchmarks.bench_resize:noting_worker"


class Site:
    """One executor with one serving stream, and the results that it gives."""

    def __init__(self, name: str, stream: StreamSpec, share: float, folder: Path) -> None:
        self.results = folder / f"results-{name}"
        self.store = folder
        self.stream = stream
        self.revision = 0
        self.optimizer = OptimizerModel()
        self.optimizer.store = str(folder)
        environment = {**os.environ, LOG: str(self.results), "PYTHONPATH": str(Path(__file__).parents[1])}
        command = [sys.executable, __file__, "--executor", name, self.optimizer.address]
        self.process = subprocess.Popen(command, env=environment)
        self._turning = threading.Lock()
        self.optimizer.wait_for(Heartbeat, timeout_s=60.0)
        self.job = InferenceJob(
            job_id="serve",
            stream=stream,
            share=share,
            config=InferenceConfig(config_id="every", resolution_px=stream.crop_px),
            checkpoint=save(folder, stream, 1),
            position_s=100.0,
        )
        self.apply()
        self.until(lambda w: w.state == "ready")

    def apply(self, **changes: Any) -> None:
        """Send the job anew, changed."""
        self.job = msgspec.structs.replace(self.job, **changes)
        self.revision += 1
        sent: ApplyPlan = plan(self.job, window=0, revision=self.revision)
        self.optimizer.apply(sent)

    def until(self, condition: Callable[[WorkerStatus], bool], timeout_s: float = 60.0) -> WorkerStatus:
        """The worker, alone and as wanted."""
        beat = self.optimizer.wait_until(lambda b: len(b.workers) == 1 and condition(b.workers[0]), timeout_s)
        return beat.workers[0]

    def wait(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self.optimizer.turn(0.02)

    def times(self) -> tuple[list[int], list[float]]:
        """(frames, when their results were there), in the order of time."""
        rows = [row.split() for row in self.results.read_text().splitlines()]
        return [int(row[0]) for row in rows], [float(row[1]) for row in rows]

    def close(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(60.0)  # a busy machine may not let it run for a while
        self.optimizer.close()


@contextmanager
def site(name: str, stream: StreamSpec, share: float) -> Iterator[Site]:
    with tempfile.TemporaryDirectory() as folder:
        running = Site(name, stream, share, Path(folder))
        try:
            yield running
        finally:
            running.close()


def save(store: Path, stream: StreamSpec, version: int) -> CheckpointRef:
    torch.set_num_threads(1)
    torch.manual_seed(version)
    student = build_student(stream.student, len(stream.classes))
    return checkpoints.save(
        store, student, stream_id=stream.stream_id, version=version, classes=stream.classes, crop_px=stream.crop_px
    )


def added_ms(frames: list[int], done: list[float], at: list[float], fps: float, within_s: float = 1.0) -> list[float]:
    """What every moment of ``at`` added to an interval between two results, ms.

    >>> [round(ms) for ms in added_ms([0, 1, 2], [0.0, 0.1, 0.23], [0.12], 10.0)]
    [30]
    """
    when = np.array(done)
    gaps = np.diff(when)
    found = []
    for moment in at:
        touched = (when[1:] >= moment) & (when[:-1] <= moment + within_s)
        found.append(max(0.0, float(gaps[touched].max()) - 1.0 / fps) * 1e3 if touched.any() else float("nan"))
    return found


def measure_resize(name: str, rounds: int, settle_s: float = 1.0) -> dict[str, Any]:
    """From 0.2 to 0.6 and back ``rounds`` times."""
    changed, quiet = list[float](), list[float]()
    with site(name, STREAM, 0.2) as running:
        running.wait(2.0)
        running.results.write_text("")
        pid = running.until(lambda w: True).pid
        for _ in range(rounds):
            for share in (0.6, 0.2):
                quiet.append(time.monotonic())
                running.wait(settle_s)
                changed.append(time.monotonic())
                running.apply(share=share)
                if name == "replacement":
                    old = pid
                    pid = running.until(lambda w, old=old: w.state == "ready" and w.pid != old).pid  # type: ignore[misc]
                    # The moment that counts is the hand-over, not the order.
                    changed[-1] = time.monotonic() - 0.3
                running.wait(settle_s)
        running.wait(0.5)
        frames, done = running.times()
    order = np.argsort(done)
    frames, done = [frames[i] for i in order], [done[i] for i in order]
    lost = frames[-1] - min(frames) + 1 - len(set(frames))
    return {
        "backend": name,
        "changes": len(changed),
        "lost": lost,
        "twice": len(frames) - len(set(frames)),
        "added": added_ms(frames, done, changed, STREAM.fps, settle_s),
        "quiet": added_ms(frames, done, quiet, STREAM.fps, settle_s * 0.9),
        "load": os.getloadavg()[1],
    }


def measure_shares(name: str, seconds: float = 4.0) -> list[dict[str, float]]:
    """Processor time of a worker that always has work, per second, at each share."""
    rows = []
    with site(name, GREEDY, SHARES[0]) as running:
        pid = running.until(lambda w: w.state == "ready").pid
        usage = psutil.Process(pid)
        for share in SHARES:
            running.apply(share=share)
            running.wait(0.5)
            start, before = time.monotonic(), sum(usage.cpu_times()[:2])
            running.wait(seconds)
            wall = time.monotonic() - start
            achieved = (sum(usage.cpu_times()[:2]) - before) / wall
            told = running.until(lambda w: w.share_achieved is not None).share_achieved or 0.0
            rows.append({"share": share, "achieved": achieved, "told": told, "load": os.getloadavg()[0]})
    return rows


def measure_swaps(name: str, swaps: int, pause_s: float = 0.5) -> dict[str, Any]:
    """Swap the checkpoint of a serving stream; its memory, its open files and its intervals."""
    changed, quiet = list[float](), list[float]()
    with site(name, STREAM, 0.5) as running:
        refs = [save(running.store, STREAM, version) for version in range(2, 2 + min(swaps, 8))]
        process = psutil.Process(running.until(lambda w: w.state == "ready").pid)
        memory, files = list[int](), list[int]()
        for number in range(swaps):
            ref = refs[number % len(refs)]
            quiet.append(time.monotonic())
            running.wait(pause_s)
            changed.append(time.monotonic())
            running.apply(checkpoint=ref)
            running.until(lambda w, ref=ref: w.model_version == ref.version)  # type: ignore[misc]
            running.wait(pause_s)
            memory.append(process.memory_info().rss)
            files.append(process.num_fds())
        frames, done = running.times()
    fifth = max(1, swaps // 5)
    return {
        "backend": name,
        "swaps": swaps,
        "added": added_ms(frames, done, changed, STREAM.fps, 2 * pause_s),
        "quiet": added_ms(frames, done, quiet, STREAM.fps, pause_s * 0.9),
        "memory_mib": (statistics.median(memory[-fifth:]) - statistics.median(memory[fifth : 2 * fifth])) / (1 << 20),
        "files": max(files[-fifth:]) - max(files[:fifth]),
        "load": os.getloadavg()[1],
    }


def percentile(values: list[float], q: float) -> float:
    return float(np.nanpercentile(values, q))


# ---------------------------------------------------------------- bounds, with few repetitions


@pytest.mark.parametrize("name", BACKENDS)
def test_resizing_loses_no_frame(name: str) -> None:
    found = measure_resize(name, 3)
    assert (found["lost"], found["twice"]) == (0, 0)
    assert percentile(found["added"], 50) <= 20.0 + percentile(found["quiet"], 90)


@pytest.mark.parametrize(("name", "bound"), [("cgroup", 0.05), ("pacing", 0.1)])
def test_shares_are_held(name: str, bound: float) -> None:
    for row in measure_shares(name, 3.0):
        assert row["achieved"] <= row["share"] * (1.0 + bound) + 0.005


def test_swapping_leaks_nothing() -> None:
    found = measure_swaps("pacing", 20, 0.2)
    assert found["files"] <= 0
    assert found["memory_mib"] < 8.0


# ---------------------------------------------------------------- tables


def _print_shares(console: Console, names: list[str]) -> None:
    table = Table("backend", "granted", "achieved", "error", "as reported", "load")
    for name in names:
        for row in measure_shares(name):
            error = row["achieved"] / row["share"] - 1.0
            table.add_row(
                name,
                f"{row['share']:.2f}",
                f"{row['achieved']:.3f}",
                f"{error:+.1%}",
                f"{row['told']:.3f}",
                f"{row['load']:.2f}",
            )
    console.print(table)


def _print_changes(console: Console, rows: list[dict[str, Any]], what: str) -> None:
    table = Table("backend", what, "lost", "added p50 ms", "p99", "no change p50", "p99", "memory", "files", "load")
    for row in rows:
        table.add_row(
            row["backend"],
            str(row[what]),
            str(row.get("lost", "")),
            *(f"{percentile(row[of], q):.1f}" for of in ("added", "quiet") for q in (50, 99)),
            f"{row['memory_mib']:+.1f} MiB" if "memory_mib" in row else "",
            f"{row['files']:+d}" if "files" in row else "",
            f"{row['load']:.2f}",
        )
    console.print(table)


def main() -> int:
    if sys.argv[1:2] == ["--executor"]:
        return run_executor(sys.argv[2], sys.argv[3])
    console = Console()
    wanted = sys.argv[1:] or ["shares", "resize", "swap"]
    names = [name for name in BACKENDS if name in wanted] or list(BACKENDS)
    if "shares" in wanted:
        _print_shares(console, [name for name in names if name != "replacement"])
    if "resize" in wanted:
        for name in names:
            _print_changes(console, [measure_resize(name, 15 if name == "replacement" else 50, 0.5)], "changes")
    if "swap" in wanted:
        _print_changes(console, [measure_swaps("cgroup", 200, 0.15)], "swaps")
    return 0


if __name__ == "__main__":
    sys.exit(main())
