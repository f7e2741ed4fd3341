"""One NVIDIA MPS control daemon: started, asked, watched, ended.

The control program exits with 0 even when a command has failed, so its *output* is read and has to have the form
that the command is documented to print. Queries are serialised (they run one after another in the caller's
thread): concurrent ones are known to fail. The compute mode of the GPU is never touched.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from executor.child import die_with_parent
from protocol.errors import DeviceError, WorkerError
from protocol.logs import line
from protocol.schema import Record

log = logging.getLogger(__name__)

PROGRAM = "nvidia-cuda-mps-control"
MAX_SOCKET_PATH = 107
LONGEST_SOCKET = "control_privileged"


class Query(Record, frozen=True, kw_only=True):
    """One command to the control program and what came of it, to the letter. ``exit_code`` None: it never ended."""

    command: str
    exit_code: int | None
    output: str
    errors: str
    seconds: float


class Identity:
    """A process by its number and start time: a number alone may by now belong to another process."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._started = _start_time(pid)

    def alive(self) -> bool:
        return self._started is not None and _start_time(self.pid) == self._started


class MpsDaemon:
    """The daemon of one GPU, with directories of its own. It ends with this process, however that ends."""

    def __init__(
        self,
        gpu_uuid: str,
        directory: str = "",
        program: str = PROGRAM,
        query_timeout_s: float = 2.0,
        start_timeout_s: float = 10.0,
        observer: Callable[[Query], None] = lambda query: None,
    ) -> None:
        """``directory``: its pipes and logs go below it; empty = a new one below the temporary directory.
        ``observer``: is shown every query, for transcripts.

        Raises:
            DeviceError: the directory's path is too long for the daemon's sockets, or cannot be made.
        """
        self._uuid = gpu_uuid
        self._program = program
        self._query_timeout_s = query_timeout_s
        self._start_timeout_s = start_timeout_s
        self._observer = observer
        self._process: subprocess.Popen[bytes] | None = None
        self._identity: Identity | None = None
        self._servers: dict[int, Identity] = {}
        try:
            self._temporary = "" if directory else tempfile.mkdtemp(prefix="ekya-mps-")
            root = Path(directory or self._temporary).absolute()
            self.pipe_directory, self.log_directory = root / "pipe", root / "log"
            for path in (self.pipe_directory, self.log_directory):
                path.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise DeviceError(f"the MPS directory cannot be made: {error}; set mps_directory") from None
        if len(str(self.pipe_directory / LONGEST_SOCKET).encode()) > MAX_SOCKET_PATH:
            raise DeviceError(f"{self.pipe_directory} is too long for socket paths; set mps_directory to a shorter one")

    @property
    def _environment(self) -> dict[str, str]:
        # The daemon starts the server program, which lies beside it, perhaps outside the PATH.
        beside = os.path.dirname(self._program)
        return {
            **os.environ,
            "PATH": os.pathsep.join(filter(None, (os.environ.get("PATH", os.defpath), beside))),
            "CUDA_MPS_PIPE_DIRECTORY": str(self.pipe_directory),
            "CUDA_MPS_LOG_DIRECTORY": str(self.log_directory),
        }

    def start(self) -> None:
        """Start the daemon and wait until it answers.

        Raises:
            DeviceError: the program is missing, ends at once, or does not answer in time.
        """
        environment = {**self._environment, "CUDA_VISIBLE_DEVICES": self._uuid}
        with (self.log_directory / "daemon.out").open("ab") as output:
            try:
                self._process = subprocess.Popen(
                    [self._program, "-f"],
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    process_group=0,
                    # Safe here: the executor's parent side has one thread.
                    preexec_fn=functools.partial(die_with_parent, signal.SIGTERM),  # noqa: PLW1509
                )
            except OSError as error:
                raise DeviceError(f"{self._program} cannot be started: {error.strerror or error}") from None
        self._identity = Identity(self._process.pid)
        self._servers.clear()
        end = time.monotonic() + self._start_timeout_s
        while time.monotonic() < end:
            if self._process.poll() is not None:
                raise DeviceError(
                    f"the MPS daemon ended at once with code {self._process.returncode}; see {self.log_directory}"
                )
            with contextlib.suppress(WorkerError):
                self.server_pids()
                log.info("%s", line("mps_daemon_start", daemon_pid=self._process.pid, pipes=self.pipe_directory))
                return
            time.sleep(0.05)
        self.kill()
        raise DeviceError(
            f"the MPS daemon does not answer within {self._start_timeout_s:g} s; see {self.log_directory}"
        )

    def trouble(self) -> str:
        """Why the daemon can no longer be relied on, empty when all is well. Cheap: looks at processes only."""
        if self._process is None or self._identity is None:
            return "the MPS daemon is not running"
        if self._process.poll() is not None or not self._identity.alive():
            return "the MPS daemon has died"
        for pid, identity in self._servers.items():
            if not identity.alive():
                return f"MPS server {pid} has died"
        return ""

    # ------------------------------------------------------------ queries

    def query(self, command: str) -> str:
        """What the daemon prints to ``command``.

        Raises:
            WorkerError: it does not answer in time, or cannot be reached.
        """
        start = time.monotonic()
        try:
            done = subprocess.run(
                [self._program],
                input=f"{command}\n",
                env=self._environment,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=self._query_timeout_s,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            self._observe(command, None, "", str(error), start)
            raise WorkerError(f"MPS daemon, {command}: {error}") from None
        self._observe(command, done.returncode, done.stdout, done.stderr, start)
        if done.returncode != 0:
            text = (done.stdout + done.stderr).strip()
            raise WorkerError(f"MPS daemon, {command}: exit code {done.returncode}: {text}")
        return done.stdout.strip()

    def _observe(self, command: str, exit_code: int | None, output: str, errors: str, start: float) -> None:
        seconds = time.monotonic() - start
        self._observer(
            Query(command=command, exit_code=exit_code, output=output, errors=errors, seconds=round(seconds, 4))
        )

    def server_pids(self) -> list[int]:
        """Process ids of the servers; none before the first client. Raises WorkerError."""
        pids = self._numbers("get_server_list")
        for pid in pids:
            if pid not in self._servers:
                self._servers[pid] = Identity(pid)
        return pids

    def client_pids(self, server: int) -> list[int]:
        """Process ids of a server's clients. Raises WorkerError."""
        return self._numbers(f"get_client_list {server}")

    def server_state(self, server: int) -> str:
        """``INITIALIZING``, ``ACTIVE`` or ``FAULT``. Raises WorkerError."""
        text = self.query(f"get_server_status {server}")
        for state in ("INITIALIZING", "ACTIVE", "FAULT"):
            if state in text.upper():
                return state
        raise WorkerError(f"MPS daemon, get_server_status {server}: {text!r}")

    def server_of(self, client: int) -> int | None:
        """The server that ``client`` is attached to; None when it is attached to none. Raises WorkerError."""
        for server in self.server_pids():
            if client in self.client_pids(server):
                return server
        return None

    def terminate_client(self, server: int, client: int) -> bool:
        """Take a client off the GPU without harm to the others; True when the daemon reports success ("0")."""
        return self.query(f"terminate_client {server} {client}").split()[-1:] == ["0"]

    def _numbers(self, command: str) -> list[int]:
        text = self.query(command)
        try:
            return [int(word) for word in text.split()]
        except ValueError:
            raise WorkerError(f"MPS daemon, {command}: {text!r}") from None

    # ------------------------------------------------------------ end

    def kill(self) -> None:
        """End the daemon without asking it, and its servers with it."""
        if self._process is None:
            return
        for sign in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, sign)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(1.0)
                break
        for identity in self._servers.values():
            if identity.alive():
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(identity.pid, signal.SIGKILL)
        self._process = None
        self._servers.clear()

    def close(self) -> None:
        """``quit``, and the hard way when that does not help; removes a directory made by us."""
        if self._process is not None:
            with contextlib.suppress(WorkerError):
                self.query("quit")
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(3.0)
            self.kill()
            log.info("%s", line("mps_daemon_stop", reason="close"))
        if self._temporary:
            shutil.rmtree(self._temporary, ignore_errors=True)


def _start_time(pid: int) -> str | None:
    """Field 22 of /proc/PID/stat, None when the process is gone or a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]
