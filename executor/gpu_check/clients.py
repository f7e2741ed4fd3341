"""Client processes as the checks use them: started from the forkserver, asked, waited for, ended."""

from __future__ import annotations

import contextlib
import json
import select
import signal
import time
from collections.abc import Callable, Mapping
from multiprocessing.context import ForkServerProcess
from typing import Any

from executor.processes import ForkServer, Pipe, exit_reason, signal_group

Answer = dict[str, Any]
ENTRY = "executor.learning.gpu_client:main"
PRELOAD = "executor.learning.gpu_client"


class ClientError(Exception):
    """A client has ended, does not answer, or could not do what it was asked."""


class Client:
    """One process. ``opened``: its answer to ``open``, empty before that."""

    def __init__(self, process: ForkServerProcess, pipe: Pipe) -> None:
        self._process, self._pipe = process, pipe
        self._waiting: list[bytes] = []
        self.pid = process.pid or 0
        self.opened: Answer = {}

    def post(self, do: str, **arguments: object) -> None:
        """Send a command without waiting for the answer."""
        self._pipe.send(json.dumps({"do": do, **arguments}).encode())

    def answer(self, timeout_s: float = 30.0) -> Answer:
        """The next answer, good or bad. Raises ClientError when none comes."""
        end = time.monotonic() + timeout_s
        while not self._waiting:
            left = end - time.monotonic()
            if left <= 0.0:
                raise ClientError(f"client {self.pid} does not answer within {timeout_s:g} s")
            select.select([self._pipe.fileno()], [self._pipe.fileno()] if self._pipe.wants_write else [], [], left)
            self._pipe.flush()
            self._waiting += self._pipe.receive()
            if self._pipe.closed and not self._waiting:
                self._process.join(2.0)
                raise ClientError(f"client {self.pid} is gone: {exit_reason(self._process.exitcode, '', None, None)}")
        answer: Answer = json.loads(self._waiting.pop(0))
        return answer

    def good(self, timeout_s: float = 30.0) -> Answer:
        """The next answer. Raises ClientError when it is an error."""
        answer = self.answer(timeout_s)
        if not answer["ok"]:
            raise ClientError(f"client {self.pid}: {answer['error']}")
        return answer

    def ask(self, do: str, timeout_s: float = 30.0, **arguments: object) -> Answer:
        """Command and good answer."""
        self.post(do, **arguments)
        return self.good(timeout_s)

    def wait_gone(self, timeout_s: float) -> bool:
        self._process.join(timeout_s)
        return self._process.exitcode is not None

    def leave(self, timeout_s: float = 5.0) -> bool:
        """Ask it to leave in an orderly way; True when it has."""
        self.post("exit")
        return self.wait_gone(timeout_s)

    def kill(self) -> None:
        signal_group(self.pid, signal.SIGKILL)
        self._process.join(5.0)

    def close(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._pipe.close()


class Clients:
    """All clients of a check. ``device``: as the client has to call it."""

    def __init__(self, device: str, entry: str = ENTRY, preload: str = PRELOAD) -> None:
        self.device = device
        self._entry = entry
        self.forkserver = ForkServer(preload, "error")
        self.alive: list[Client] = []

    def warm_up(self) -> None:
        """Raises WorkerError."""
        self.forkserver.warm_up()

    def start(self, environment: Mapping[str, str]) -> Client:
        """A new process that has not touched the device yet."""
        client = Client(*self.forkserver.start(self._entry, environment, 500))
        self.alive.append(client)
        return client

    def open(self, environment: Mapping[str, str], timeout_s: float = 60.0) -> Client:
        """A client with the device open; ``opened["ready_s"]`` is the time from the start on. Raises ClientError."""
        return self.open_all([environment], timeout_s)[0]

    def open_all(self, environments: list[Mapping[str, str]], timeout_s: float = 60.0) -> list[Client]:
        """Several clients that start at the same time. Raises ClientError."""
        start = time.monotonic()
        clients = [self.start(environment) for environment in environments]
        for client in clients:
            client.post("open", device=self.device)
        for client in clients:
            client.opened = client.good(timeout_s)
            client.opened["ready_s"] = client.opened["at_s"] - start
        return clients

    def end_all(self, evict: Callable[[int], None] = lambda pid: None) -> list[int]:
        """Everybody out: asked first, after 3 s evicted and killed. The process ids that had to be killed."""
        for client in self.alive:
            client.post("exit")
        end = time.monotonic() + 3.0
        killed = []
        for client in self.alive:
            if not client.wait_gone(max(0.05, end - time.monotonic())):
                killed.append(client.pid)
                evict(client.pid)
                client.kill()
            client.close()
        self.alive.clear()
        return killed
