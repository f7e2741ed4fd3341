"""What all checks share: the GPU, the clients, the daemon, and measurements made of several of them."""

from __future__ import annotations

import contextlib
import itertools
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from executor.gpu_check.clients import Client, ClientError, Clients
from executor.gpu_check.transcript import Details, SkipCheckError, Transcript
from executor.shares.mps import client_environment
from executor.shares.mps_control import MpsDaemon
from protocol.errors import DeviceError, WorkerError

LOG_TAIL = 3000


@dataclass
class Bench:
    """The state of a run.

    ``uuid``: of the GPU, empty when there is none; ``index``: as NVML counts. ``measure_s``: for each figure.
    ``rounds``: hand-overs there and back. ``queries``: per thread. ``watch_s``: how long an incident is watched.
    ``matrix``: edge of the matrix products, which use all of a GPU. ``extra``: variables for every client.
    ``worker``: the executor's worker.
    """

    transcript: Transcript
    clients: Clients
    uuid: str
    program: str
    index: int = 0
    num_units: int = 0
    measure_s: float = 1.2
    matrix: int = 8192
    nets: tuple[str, ...] = ("edge_cnn", "resnet18", "mobilenet_v3_small")
    rounds: int = 2
    queries: int = 25
    watch_s: float = 2.0
    percentages: tuple[int, ...] = (100, 80, 60, 40, 20, 10)
    used_memory: Callable[[], int] = lambda: 0
    daemon: MpsDaemon | None = None
    mps_trouble: str = "the daemon has not been started"
    directory: str = ""
    worker: str = "executor.worker:main"
    extra: Mapping[str, str] = field(default_factory=dict)
    works: bool = False

    def need_gpu(self) -> None:
        """Raises SkipCheckError without a usable GPU."""
        if not self.works:
            raise SkipCheckError("no CUDA client could be started: see the check cuda_client")

    def need_daemon(self) -> MpsDaemon:
        """The daemon, answering. Raises SkipCheckError when MPS cannot be had."""
        if self.daemon is None:
            raise SkipCheckError(f"MPS is not to be had here: {self.mps_trouble}")
        if self.daemon.trouble():
            self.restart_daemon()
        return self.daemon

    def plain(self) -> dict[str, str]:
        """The environment of a client without MPS."""
        names = [name for name in os.environ if name.startswith("CUDA_MPS_")]
        return {**dict.fromkeys(names, ""), "CUDA_VISIBLE_DEVICES": self.uuid, **self.extra}

    def under_mps(self, percent: float, priority: int = 0, memory_bytes: int = 0) -> dict[str, str]:
        """The environment of an MPS client."""
        return {**client_environment(self.need_daemon(), percent / 100.0, priority, memory_bytes), **self.extra}

    # ------------------------------------------------------------ the daemon

    def start_daemon(self) -> float:
        """Start the daemon; returns the seconds that it took. Raises DeviceError."""
        start = time.monotonic()
        daemon = MpsDaemon(
            self.uuid, self.directory, self.program, query_timeout_s=10.0, observer=self.transcript.observe
        )
        try:
            daemon.start()
        except DeviceError as error:
            self.mps_trouble = str(error)
            raise
        self.daemon = daemon
        return time.monotonic() - start

    def restart_daemon(self) -> float:
        """End it the hard way, with its server, and start it; returns the seconds. Raises DeviceError."""
        start = time.monotonic()
        if self.daemon is not None:
            self.daemon.kill()
            self.daemon.start()
        return time.monotonic() - start

    def evict(self, pid: int) -> None:
        """Take a client out through the daemon, if there is one and it answers."""
        daemon = self.daemon
        if daemon is None or daemon.trouble():
            return
        with contextlib.suppress(WorkerError):
            server = daemon.server_of(pid)
            if server is not None:
                daemon.terminate_client(server, pid)

    def logs(self) -> dict[str, str]:
        """The ends of the daemon's log files."""
        root = Path(self.directory) / "log"
        files = sorted(path for path in root.glob("*") if path.is_file()) if root.is_dir() else []
        return {path.name: path.read_text(errors="replace")[-LOG_TAIL:] for path in files}

    def server_state(self) -> str:
        """The state of the (only) server, or what is wrong."""
        daemon = self.need_daemon()
        try:
            servers = daemon.server_pids()
            return daemon.server_state(servers[0]) if servers else "no server"
        except WorkerError as error:
            return f"error: {error}"

    def tidy(self) -> None:
        """After a check: every client out."""
        self.clients.end_all(self.evict)

    # ------------------------------------------------------------ measurements

    def rate(self, client: Client, work: Mapping[str, object], share: float = 1.0, scale: float = 1.0) -> Details:
        """What the client does of ``work`` in a while."""
        return rounded(client.ask("work", 60.0, seconds=self.measure_s * scale, share=share, **work))

    def rates(self, pairs: list[tuple[Client, Mapping[str, object]]], share: float = 1.0) -> list[Details]:
        """The same of several clients at once."""
        for client, work in pairs:
            client.post("work", seconds=self.measure_s * 1.5, share=share, **work)
        return [rounded(client.good(60.0)) for client, _ in pairs]

    def workloads(self) -> dict[str, dict[str, object]]:
        """Names and arguments of the work that is measured: retraining and inference of the students, and matrix
        products, which fill the GPU."""
        work: dict[str, dict[str, object]] = {}
        for net in self.nets:
            px = 32 if net == "edge_cnn" else 64
            work[f"{net}_train_b32"] = {"kind": "train", "net": net, "batch": 32, "px": px}
            work[f"{net}_infer_b16"] = {"kind": "infer", "net": net, "batch": 16, "px": px}
        if "resnet18" in self.nets:
            work["resnet18_train_b256"] = {"kind": "train", "net": "resnet18", "batch": 256, "px": 64}
        work["matmul"] = {"kind": "matmul", "batch": self.matrix}
        return work

    def hand_over(self, old: Client, environment: Mapping[str, str], work: Mapping[str, object], fps: float) -> Details:
        """Let ``old`` serve frames, start a second client meanwhile, hand over between two frames.

        The gap is the interval between the last result of the old and the first of the new one, less 1 / fps.
        """
        old.post("serve", **work)
        old.good(30.0)
        zero = time.monotonic() + 0.1
        old.post("start", zero_s=zero, fps=fps, first=0)
        time.sleep(0.5)
        began = time.monotonic()
        new = self.clients.open(environment)
        new.post("serve", **work)
        new.good(30.0)
        warm = time.monotonic()
        at = int((warm + 0.1 - zero) * fps) + 1
        old.post("until", index=at)
        new.post("start", zero_s=zero, fps=fps, first=at)
        before = old.good(10.0)["results"]
        time.sleep(0.5)
        new.post("stop")
        after = new.good(10.0)["results"]
        new.leave()
        return gap_of(before, after, fps) | {"replacement_ready_s": round(warm - began, 3)}


def gap_of(before: list[Any], after: list[Any], fps: float) -> Details:
    """Frames lost and time added between two results, of [frame, due, done] before and after a hand-over.

    >>> gap_of([[0, 0.0, 0.01], [1, 0.1, 0.11]], [[2, 0.2, 0.23]], 10.0)["added_ms"]
    20.0
    """
    frames = [index for index, _, _ in (*before, *after)]
    done = [when for _, _, when in (*before, *after)]
    intervals = [b - a for a, b in itertools.pairwise(done)]
    gap = after[0][2] - before[-1][2]
    ordinary = statistics.median(intervals) if intervals else 1.0 / fps
    return {
        "frames_lost": frames[-1] - frames[0] + 1 - len(set(frames)),
        "frames_twice": len(frames) - len(set(frames)),
        "gap_ms": round(gap * 1e3, 2),
        "added_ms": round((gap - 1.0 / fps) * 1e3, 2),
        "ordinary_interval_ms": round(ordinary * 1e3, 2),
        "longest_interval_ms": round(max(intervals) * 1e3, 2),
        "latency_ms_max": round(max((when - due) * 1e3 for _, due, when in (*before, *after)), 2),
    }


def rounded(answer: Details) -> Details:
    """The figures of an answer, without what only the client's protocol needs."""
    return {
        key: round(value, 4) if isinstance(value, float) else value
        for key, value in answer.items()
        if key not in ("ok", "began_s", "at_s")
    }


def attempt(client: Client, timeout_s: float) -> Details:
    """The next answer of a client, whatever it is; how it ended when there is none."""
    try:
        return client.answer(timeout_s)
    except ClientError as error:
        return {"ok": False, "error": str(error)}


def output_of(command: list[str], timeout_s: float = 20.0) -> Details:
    """What a command says, to the letter."""
    start = time.monotonic()
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=timeout_s, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return {"command": " ".join(command), "exit_code": None, "stderr": str(error)}
    return {
        "command": " ".join(command),
        "exit_code": done.returncode,
        "stdout": done.stdout[-6000:],
        "stderr": done.stderr[-2000:],
        "seconds": round(time.monotonic() - start, 3),
    }
