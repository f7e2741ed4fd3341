"""Shares by NVIDIA MPS: a worker is a client that may use a percentage of the GPU's multiprocessors.

The percentage is read once, when the client starts; it is a cap. Hence:

- A share below the cap is made by pacing inside it; a share above it needs a replacement worker.
- A worker proves that it is attached: CUDA runs *silently without MPS* when the daemon cannot be reached, and
  such a worker would take the whole GPU. The proof is its process id in a server's client list and, for a
  share below 1, fewer multiprocessors than the GPU has.
- Killing a busy client harms the others: it is terminated through the daemon before any signal.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping

from executor.links import Ready
from executor.shares.devices import Device
from executor.shares.incident import Drain, ServerView, next_step
from executor.shares.mps_control import MpsDaemon
from protocol.errors import DeviceError, WorkerError
from protocol.logs import line
from protocol.messages import InferenceJob, Job

log = logging.getLogger(__name__)

CLIENT_LIMIT = 48  # up to CUDA 13.0; 60 from 13.1
CHECK_INTERVAL_S = 0.5
STATE_INTERVAL_S = 10.0  # a worker that meets the fault tells it at once; the daemon logs every query
RESTART_INTERVAL_S = 5.0
CONTAINED = "device-side assert"
MIB = 1 << 20
_DRAIN = Drain()


class MpsBackend:
    """Shares of one GPU by an MPS daemon of its own, which is started here and ended by ``close``."""

    name = "mps"
    pace = True
    can_resize_live = False
    holds_at_once = False
    remark = ""
    worker_device = "cuda:0"  # the daemon shows its clients one GPU

    def __init__(self, device: Device, daemon: MpsDaemon, start: bool = True, drain: Drain = _DRAIN) -> None:
        """``start``: start the daemon, which is not running yet. Raises DeviceError when it cannot be started."""
        self._device = device
        self._daemon = daemon
        self._checked_s = float("-inf")
        self._restart_due_s = float("-inf")
        self._state_s = float("-inf")
        self._down = self.waiting = ""
        self._faulted_s: float | None = None
        self._drain = drain
        if start:
            daemon.start()

    def worker_environment(self, job: Job, share: float) -> Mapping[str, str]:
        """The client's variables. Raises WorkerError while the daemon is down or no client is admitted."""
        trouble = self.waiting or self._daemon.trouble()
        if trouble:
            raise WorkerError(trouble)
        self._admit()
        return client_environment(self._daemon, share, 0 if isinstance(job, InferenceJob) else 1, job.memory_bytes)

    def paced_share(self, share: float, cap: float) -> float:
        return min(1.0, share / cap)

    def attached(self, ready: Ready, share: float) -> None:
        if self._daemon.server_of(ready.pid) is None:
            raise WorkerError(f"process {ready.pid} is no client of the MPS daemon: it runs without MPS")
        full = self._device.num_units
        if full and share < 1.0 and not 0 < ready.num_units < full:
            raise WorkerError(f"process {ready.pid} sees {ready.num_units} of {full} multiprocessors at {share:g}")

    def hold(self, pid: int, share: float) -> None:
        return None

    def lift(self, pid: int) -> None:
        return None

    def release(self, pid: int) -> None:
        return None

    def observe(self, duty: float | None, cap: float) -> float | None:
        return None if duty is None else duty * cap

    def evict(self, pid: int) -> None:
        if self._daemon.trouble():
            return
        with contextlib.suppress(WorkerError):
            server = self._daemon.server_of(pid)
            if server is not None:
                done = self._daemon.terminate_client(server, pid)
                log.info("%s", line("mps_terminate_client", client_pid=pid, server_pid=server, done=done))

    def fault(self, pid: int, reason: str, now: float) -> str:
        """A client met a fatal fault: every client of the GPU has it, so all have to leave.

        A failed assertion of a kernel was seen to stay in its client (H100, driver 580): the server's state decides.
        """
        if self._faulted_s is not None or self._down:
            return ""
        if CONTAINED in reason.lower() and all(server.state == "ACTIVE" for server in self._servers() or ()):
            return ""
        return self._begin_incident(f"GPU fault in process {pid} reaches all MPS clients: {reason}", now)

    def check(self, now: float) -> str:
        """Notice a dead daemon or server within ``CHECK_INTERVAL_S`` and a faulted server within ``STATE_INTERVAL_S``;
        bring service back after either."""
        if now - self._checked_s < CHECK_INTERVAL_S:
            return ""
        self._checked_s = now
        if self._down:
            self._restart(now)
            return ""
        if self._faulted_s is not None:
            self._recover(now, self._faulted_s)
            return ""
        self._down = self.waiting = self._daemon.trouble()
        if not self._down and now - self._state_s >= STATE_INTERVAL_S:
            self._state_s = now
            servers = self._servers() or ()
            if any(server.state == "FAULT" for server in servers):
                return self._begin_incident("the MPS server is in state FAULT", now)
        return self._down

    def _begin_incident(self, text: str, now: float) -> str:
        self._faulted_s, self.waiting = now, text
        self._checked_s = now  # those who are to leave need a moment
        return text

    def _recover(self, now: float, faulted_s: float) -> None:
        step = next_step(now - faulted_s, self._servers(), self._drain)
        if step == "wait":
            return
        log.warning("%s", line("mps_incident_over", step=step, seconds=round(now - faulted_s, 3)))
        self._faulted_s, self.waiting = None, ""
        if step == "restart":
            self._down = self.waiting = "the MPS server has not recovered from a fault"
            self._restart(now)

    def _servers(self) -> tuple[ServerView, ...] | None:
        """The daemon's servers; None when it does not answer."""
        if self._daemon.trouble():
            return None
        try:
            return tuple(
                ServerView(state=self._daemon.server_state(pid), num_clients=len(self._daemon.client_pids(pid)))
                for pid in self._daemon.server_pids()
            )
        except WorkerError:
            return None

    def close(self) -> None:
        self._daemon.close()

    def _admit(self) -> None:
        """A client started against a faulted or full server would fail, or run without MPS."""
        clients = 0
        for server in self._daemon.server_pids():
            state = self._daemon.server_state(server)
            if state == "FAULT":
                raise WorkerError(f"MPS server {server} is in state FAULT: waiting for its clients to leave")
            clients += len(self._daemon.client_pids(server))
        if clients >= CLIENT_LIMIT:
            raise WorkerError(f"the MPS server has {clients} clients, its limit is {CLIENT_LIMIT}")

    def _restart(self, now: float) -> None:
        """Only called when the service has begun to stop all workers: they cannot go on without their server."""
        if now < self._restart_due_s:
            return
        self._restart_due_s = now + RESTART_INTERVAL_S
        self._daemon.kill()
        try:
            self._daemon.start()
        except DeviceError as error:
            log.error("%s", line("mps_daemon_restart", reason=str(error)))
            return
        log.warning("%s", line("mps_daemon_restart", reason=self._down))
        self._down = self.waiting = ""
        self._checked_s = now


def client_environment(daemon: MpsDaemon, share: float, priority: int, memory_bytes: int = 0) -> dict[str, str]:
    """What makes a process a client of ``daemon``. ``priority``: 0 above 1; ``memory_bytes``: 0 = no limit."""
    environment = {
        "CUDA_MPS_PIPE_DIRECTORY": str(daemon.pipe_directory),
        "CUDA_MPS_LOG_DIRECTORY": str(daemon.log_directory),
        "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": percentage(share),
        "CUDA_MPS_CLIENT_PRIORITY": str(priority),
        "CUDA_VISIBLE_DEVICES": "",
    }
    if memory_bytes:
        environment["CUDA_MPS_PINNED_DEVICE_MEM_LIMIT"] = f"0={-(-memory_bytes // MIB)}M"
    return environment


def percentage(share: float) -> str:
    """The share as the driver reads it, at least 1 %, without rounding it up beyond the grant.

    >>> percentage(0.3), percentage(1.0), percentage(0.125)
    ('30', '100', '12.5')
    """
    return f"{max(1.0, round(share * 100.0, 3)):g}"
