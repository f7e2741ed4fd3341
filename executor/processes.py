"""One worker process: its pipe, its exit, signals to its group. Nothing here blocks, whatever the worker does."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import struct
from collections.abc import Mapping
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from executor import child
from protocol.errors import ProtocolError, WorkerError

MAX_MESSAGE_BYTES = 8 << 20
READ_BYTES = 256 << 10
_HEADER = struct.Struct("!i")


class Pipe:
    """The parent's end of a worker's pipe, in the framing of ``multiprocessing.Connection``, without blocking.

    ``Connection.recv_bytes`` would hold the executor up for ever when a worker is stopped in the middle of a
    message, ``send_bytes`` when it does not read. Framing: length as a signed 32-bit big-endian number, payload.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._incoming = bytearray()
        self._outgoing = bytearray()
        self.closed = False
        os.set_blocking(connection.fileno(), False)

    def fileno(self) -> int:
        return self._connection.fileno()

    @property
    def wants_write(self) -> bool:
        return bool(self._outgoing) and not self.closed

    def send(self, data: bytes) -> None:
        """Queue a message and write as much as the worker takes."""
        self._outgoing += _HEADER.pack(len(data)) + data
        self.flush()

    def flush(self) -> None:
        try:
            while self._outgoing and not self.closed:
                del self._outgoing[: os.write(self.fileno(), self._outgoing)]
        except BlockingIOError:
            pass
        except OSError:
            self._outgoing.clear()  # the worker is gone; its exit tells the rest

    def receive(self) -> list[bytes]:
        """Whole messages that have come in; at most ``READ_BYTES`` are read at a time, so nobody can flood the loop.

        Raises:
            ProtocolError: a length is negative or above ``MAX_MESSAGE_BYTES``; the pipe is useless from then on.
        """
        try:
            data = b"" if self.closed else os.read(self.fileno(), READ_BYTES)
            self.closed = self.closed or not data
        except BlockingIOError:
            data = b""
        except OSError:
            data, self.closed = b"", True
        self._incoming += data
        messages = []
        start = 0
        while len(self._incoming) - start >= _HEADER.size:
            (length,) = _HEADER.unpack_from(self._incoming, start)
            if not 0 <= length <= MAX_MESSAGE_BYTES:
                self.closed = True
                raise ProtocolError(f"a worker announced a message of {length} bytes")
            end = start + _HEADER.size + length
            if len(self._incoming) < end:
                break
            messages.append(bytes(self._incoming[start + _HEADER.size : end]))
            start = end
        del self._incoming[:start]
        return messages

    def close(self) -> None:
        self.closed = True
        self._connection.close()


class ForkServer:
    """Starts worker processes from a server that has the heavy libraries imported."""

    def __init__(self, preload: str = "executor.preload", log_level: str = "info") -> None:
        self._log_level = log_level
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["executor.tether", preload])

    def ensure_running(self) -> None:
        """Start the server's imports without waiting for them."""
        forkserver.ensure_running()

    def warm_up(self) -> None:
        """Start the server and wait until its imports are done (seconds), so that later starts take milliseconds.

        Raises:
            WorkerError: the server cannot be started.
        """
        self.start("executor.child:enter_nothing", {}, 0)[0].join()

    def start(self, entry: str, environment: Mapping[str, str], oom_score_adj: int) -> tuple[ForkServerProcess, Pipe]:
        """Start a process that runs ``entry``.

        Raises:
            WorkerError: the system or the server refuses.
        """
        ours, theirs = self._context.Pipe()
        process = self._context.Process(
            target=child.enter, args=(theirs, entry, dict(environment), oom_score_adj, self._log_level), daemon=False
        )
        try:
            process.start()
        except (OSError, EOFError) as error:
            ours.close()
            raise WorkerError(f"cannot start a worker process: {error or type(error).__name__}") from None
        finally:
            theirs.close()
        return process, Pipe(ours)


def signal_group(pid: int, number: signal.Signals, leader: bool = True) -> None:
    """Signal a worker and whatever it started; quiet when they are gone.

    A worker that has not made its group yet is signalled alone, unless ``leader`` is False: then it has ended
    and its number may belong to somebody else.
    """
    if pid <= 0:
        return
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, number)
        return
    if not leader:
        return
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, number)


def oom_kills() -> int | None:
    """How often the kernel has killed for memory in this control group; None where that cannot be read."""
    for name in ("/sys/fs/cgroup/memory.events", "/sys/fs/cgroup/memory/memory.oom_control"):
        with contextlib.suppress(OSError, ValueError):
            for row in Path(name).read_text().splitlines():
                key, _, value = row.partition(" ")
                if key == "oom_kill":
                    return int(value)
    return None


def exit_reason(exit_code: int | None, ordered: str, oom_before: int | None, oom_after: int | None) -> str:
    """A process's end in words. ``ordered``: why we stopped it, empty when it ended by itself."""
    if exit_code is None:
        return "vanished: its exit code is unknown"
    if exit_code == 255 and not ordered:
        return "exit code 255 (or the forkserver died and took it along)"
    if exit_code >= 0:
        return f"exit code {exit_code}"
    try:
        name = signal.Signals(-exit_code).name
    except ValueError:
        name = f"signal {-exit_code}"
    if -exit_code == signal.SIGKILL and not ordered:
        if oom_before is not None and oom_after is not None and oom_after > oom_before:
            return "killed by SIGKILL: out of memory (the kernel counted an out-of-memory kill)"
        return "killed by SIGKILL, not by this executor: out of memory, or somebody's kill -9"
    hints = {signal.SIGSEGV: ": crash in native code", signal.SIGBUS: ": a mapped file shrank, or /dev/shm is full"}
    return f"killed by {name}{hints.get(signal.Signals(-exit_code), '') if name.startswith('SIG') else ''}"
