"""Worker processes: started, watched, stopped. The shell around one job each; what to run is decided elsewhere.

Stop ladder: StopJob -> grace -> SIGTERM to the group -> grace -> SIGKILL to the group. The ladder is climbed for
a worker that is not wanted any more, is not ready in time, or has not reported for ``hang_s``. A worker under
a share daemon is taken out of the daemon before any signal (``evict``).
"""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerProcess

from executor.limits import Limits
from executor.links import Command, HandOver, JobDone, Ready, Report, StartJob, StopJob
from executor.processes import ForkServer, Pipe, exit_reason, oom_kills, signal_group
from protocol.codec import decode, encode
from protocol.errors import ProtocolError
from protocol.logs import line
from protocol.messages import InferenceJob

log = logging.getLogger(__name__)


@dataclass(slots=True, frozen=True)
class Reported:
    worker_id: int
    report: Report


@dataclass(slots=True, frozen=True)
class Exited:
    """The process is gone; ``reason`` says in words why."""

    worker_id: int
    reason: str


WorkerEvent = Reported | Exited


@dataclass(slots=True)
class _Process:
    worker_id: int
    job_id: str
    process: ForkServerProcess
    pipe: Pipe
    pid: int
    started_s: float
    heard_s: float
    oom_kills: int | None
    ready: bool = False
    ordered: str = ""
    rung: int = 0
    rung_due_s: float = field(default=float("inf"))
    garbage: int = 0


class Supervisor:
    """All worker processes of one executor. Owned by one thread; ``poll`` is to be called when a file descriptor of
    ``read_fds`` is readable, one of ``write_fds`` writable, or ``next_due_s`` has come."""

    def __init__(
        self,
        entry: str = "executor.worker:main",
        limits: Limits | None = None,
        evict: Callable[[int], None] = lambda pid: None,
        clock: Callable[[], float] = time.monotonic,
        forkserver: ForkServer | None = None,
    ) -> None:
        self._entry = entry
        self._limits = limits or Limits()
        self._evict = evict
        self._clock = clock
        self._forkserver = forkserver or ForkServer()
        self._processes: dict[int, _Process] = {}

    def __len__(self) -> int:
        return len(self._processes)

    def warm_up(self) -> None:
        """Blocks for the seconds that the heavy imports take. Raises WorkerError."""
        self._forkserver.warm_up()

    def start(self, worker_id: int, start: StartJob, environment: Mapping[str, str]) -> int:
        """Start a worker for a job; returns its process id.

        Raises:
            WorkerError: no process could be started.
        """
        # A retraining is given up before a stream's inference, and both before the executor itself.
        score = 200 if isinstance(start.job, InferenceJob) else 600
        process, pipe = self._forkserver.start(self._entry, environment, score)
        now = self._clock()
        self._processes[worker_id] = _Process(
            worker_id, start.job.job_id, process, pipe, process.pid or 0, now, now, oom_kills()
        )
        pipe.send(encode(start))
        log.info("%s", line("worker_start", job_id=start.job.job_id, worker_pid=process.pid, share=start.job.share))
        return process.pid or 0

    def send(self, worker_id: int, command: Command) -> None:
        """Queue a command for the worker; a worker that is gone does not mind."""
        child = self._processes.get(worker_id)
        if child is not None:
            child.pipe.send(encode(command))

    def stop(self, worker_id: int, reason: str, quick: bool = False, farewell: HandOver | None = None) -> None:
        """Climb the stop ladder, from its third rung when ``quick``. Repeating it is harmless.

        ``farewell``: said in the place of StopJob to a worker whose successor is there.
        """
        child = self._processes.get(worker_id)
        if child is None or (child.rung > 0 and not quick):
            return
        now = self._clock()
        if not child.ordered:
            log.info("%s", line("worker_stop", job_id=child.job_id, worker_pid=child.pid, reason=reason))
        child.ordered = child.ordered or reason
        if quick:
            self._climb_to(child, 3, now)
        else:
            child.pipe.send(encode(farewell or StopJob(reason=reason[:200])))
            child.rung, child.rung_due_s = 1, now + self._limits.stop_grace_s

    def stop_all(self, reason: str, quick: bool = False) -> None:
        for worker_id in tuple(self._processes):
            self.stop(worker_id, reason, quick)

    # ------------------------------------------------------------ the shell's poll loop

    def read_fds(self) -> list[int]:
        """Readable when a report has come or a process has ended."""
        fds = [child.process.sentinel for child in self._processes.values()]
        return fds + [child.pipe.fileno() for child in self._processes.values() if not child.pipe.closed]

    def write_fds(self) -> list[int]:
        """Writable when a queued command can go on."""
        return [child.pipe.fileno() for child in self._processes.values() if child.pipe.wants_write]

    def next_due_s(self) -> float:
        """When the next time limit ends; infinity without workers."""
        return min((self._due_s(child) for child in self._processes.values()), default=float("inf"))

    def poll(self) -> list[WorkerEvent]:
        """What has happened since the last call; time limits are enforced on the way."""
        events: list[WorkerEvent] = []
        for child in tuple(self._processes.values()):
            child.pipe.flush()
            # The exit is looked at before the pipe is read: what the worker said last is then in the pipe.
            gone = child.process.exitcode is not None
            self._read(child, events)
            if gone:
                while self._read(child, events):
                    pass
                events.append(self._bury(child))
            else:
                self._enforce(child)
        return events

    def close(self, timeout_s: float = 2.0) -> None:
        """Kill what is left and wait for it."""
        self.stop_all("shutdown", quick=True)
        end = time.monotonic() + timeout_s
        while self._processes and time.monotonic() < end:
            self.poll()
            time.sleep(0.01)

    # ------------------------------------------------------------ inside

    def _read(self, child: _Process, events: list[WorkerEvent]) -> bool:
        """Take in what the worker has said; False when nothing (more) was there."""
        try:
            messages = child.pipe.receive()
        except ProtocolError as error:
            self._malformed(child, error)
            return False
        for message in messages:
            try:
                report: Report = decode(message, Report)
            except ProtocolError as error:
                self._malformed(child, error)
                continue
            child.heard_s = self._clock()
            if isinstance(report, Ready):
                child.ready = True
            elif isinstance(report, JobDone) and not child.rung:
                child.ordered, child.rung = "done", 1
                child.rung_due_s = child.heard_s + self._limits.done_grace_s
            events.append(Reported(child.worker_id, report))
        return bool(messages)

    def _malformed(self, child: _Process, error: ProtocolError) -> None:
        child.garbage += 1
        if child.garbage == 1:
            log.warning("%s", line("worker_garbage", job_id=child.job_id, worker_pid=child.pid, reason=str(error)))
        if child.pipe.closed:
            self.stop(child.worker_id, f"unreadable: {error}", quick=True)

    def _due_s(self, child: _Process) -> float:
        if child.rung:
            return child.rung_due_s
        if not child.ready:
            return child.started_s + self._limits.ready_timeout_s
        return child.heard_s + self._limits.hang_s

    def _enforce(self, child: _Process) -> None:
        now = self._clock()
        if now < self._due_s(child):
            return
        if child.rung:
            self._climb_to(child, child.rung + 1, now)
        elif not child.ready:
            self.stop(
                child.worker_id,
                f"not ready after {self._limits.ready_timeout_s:g} s: the model or the video takes long to load, "
                "or the machine is overloaded; raise ready_timeout_s in the executor's configuration",
            )
        else:
            self.stop(child.worker_id, f"hung: no report for {self._limits.hang_s:g} s (hang_s)")

    def _climb_to(self, child: _Process, rung: int, now: float) -> None:
        child.rung = rung
        if rung == 2:
            log.warning("%s", line("worker_sigterm", job_id=child.job_id, worker_pid=child.pid, reason=child.ordered))
            self._evict(child.pid)
            signal_group(child.pid, signal.SIGTERM)
            child.rung_due_s = now + self._limits.term_grace_s
        else:
            log.warning("%s", line("worker_sigkill", job_id=child.job_id, worker_pid=child.pid, reason=child.ordered))
            self._evict(child.pid)
            signal_group(child.pid, signal.SIGKILL)
            child.rung_due_s = now + 1.0  # again, should the first have met a process still being born

    def _bury(self, child: _Process) -> Exited:
        signal_group(child.pid, signal.SIGKILL, leader=False)  # helpers that outlived it
        code = child.process.exitcode
        reason = exit_reason(code, child.ordered, child.oom_kills, oom_kills())
        if child.ordered and child.ordered != "done":
            reason = f"{child.ordered} ({reason})"
        log.info("%s", line("worker_exit", job_id=child.job_id, worker_pid=child.pid, reason=reason))
        child.pipe.close()
        child.process.join()
        child.process.close()
        del self._processes[child.worker_id]
        return Exited(child.worker_id, reason)
