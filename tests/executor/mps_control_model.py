"""A model of ``nvidia-cuda-mps-control`` as its documentation and its users describe it; only the standard library.

``-f`` runs the daemon, without arguments commands are read from standard input. As in the original, a command
that fails prints something and the exit code is 0; it is 1 only when the daemon cannot be reached. The commands
that begin with ``model_`` stand for what CUDA does in a client, and for faults. What it prints and how many
multiprocessors a percentage gives was recorded on a GPU (tests/executor/transcripts, H100, driver 580):

  model_attach PID PERCENTAGE   a client connects; its percentage is fixed from now on; prints its multiprocessors
  model_detach PID              a client leaves in an orderly way
  model_percentage PID          what the client was admitted with
  model_fault | model_delay SECONDS | model_die | model_die_server

  model_mortal | model_forgets   what ends a client harms nobody | the server stays in FAULT whatever happens

A client that vanishes without leaving or being terminated puts the server into state FAULT (the documentation
says "undefined", the GPU of the transcripts does not mind; this is the worse case, ``model_mortal`` the other); it
becomes ACTIVE again when all its clients have left.
"""

from __future__ import annotations

import atexit
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

NUM_UNITS = 132
GRANULARITY = 2
LEAST_UNITS = 8
CLIENT_LIMIT = 48


class Daemon:
    def __init__(self) -> None:
        self.server: subprocess.Popen[bytes] | None = None
        self.clients: dict[int, float] = {}
        self.fault = False
        self.mortal = False
        self.forgets = False
        self.delay_s = 0.0

    def answer(self, command: str) -> str | None:
        """The text to print, None to end."""
        time.sleep(self.delay_s)
        self.look_after_clients()
        name, *words = command.split()
        try:
            numbers = [float(word) for word in words]
        except ValueError:
            return "Invalid argument"
        if name == "quit":
            self.end_server()
            return None
        if name == "get_server_list":
            return str(self.server.pid) if self.server else ""
        if name == "model_attach":
            return self.attach(int(numbers[0]), numbers[1])
        if name == "model_detach":
            self.clients.pop(int(numbers[0]), None)
            return "0"
        if name == "model_percentage":
            return str(self.clients.get(int(numbers[0]), "none"))
        if name == "model_fault":
            self.fault = True
            return "0"
        if name in ("model_mortal", "model_forgets"):
            setattr(self, name.removeprefix("model_"), True)
            return "0"
        if name == "model_delay":
            self.delay_s = numbers[0]
            return "0"
        if name == "model_die":
            os._exit(9)
        if name == "model_die_server" and self.server:
            self.server.kill()
            self.server.wait()
            return "0"
        if name == "get_default_active_thread_percentage":
            return "100.0"
        if name == "get_default_client_priority":
            return "0"
        if name == "ps" and not self.server:
            return "Server not found"
        of_server = ("get_client_list", "get_server_status", "terminate_client", "get_active_thread_percentage")
        if name in of_server:
            if not self.server or not numbers or int(numbers[0]) != self.server.pid:
                return f"Server {words[0] if words else ''} not found"
            if name == "get_active_thread_percentage":
                return "100.0"  # the server's default, whatever its clients were started with
            if name == "get_client_list":
                return "\n".join(map(str, self.clients))
            if name == "get_server_status":
                return "FAULT" if self.fault else "ACTIVE"
            client = int(numbers[1])
            if client not in self.clients:
                return "201"
            del self.clients[client]
            os.kill(client, signal.SIGKILL)
            return "0"
        return f'Unknown command "{name}"'

    def attach(self, pid: int, percentage: float) -> str:
        if self.fault:
            return "807"
        if len(self.clients) >= CLIENT_LIMIT:
            return "805"
        if self.server is None:
            self.server = subprocess.Popen(["sleep", "1000"], stdin=subprocess.DEVNULL)
        self.clients[pid] = percentage
        units = int(NUM_UNITS * percentage / 100.0) // GRANULARITY * GRANULARITY
        return str(max(LEAST_UNITS, units))

    def look_after_clients(self) -> None:
        for pid in tuple(self.clients):
            if not Path(f"/proc/{pid}").exists():
                del self.clients[pid]
                self.fault = self.fault or not self.mortal
        if not self.clients and not self.forgets:
            self.fault = False

    def end_server(self) -> None:
        if self.server:
            self.server.kill()
            self.server.wait()


def serve(pipes: Path) -> None:
    if not os.environ.get("CUDA_VISIBLE_DEVICES", "").startswith("GPU-"):
        sys.exit("the model wants the GPU's UUID")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(pipes / "control"))
    (pipes / "nvidia-cuda-mps-control.pid").write_text(str(os.getpid()))
    listener.listen(8)
    daemon = Daemon()
    atexit.register(daemon.end_server)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    while True:
        peer, _ = listener.accept()
        with peer:
            text = peer.recv(4096).decode().strip()
            answer = daemon.answer(text) if text else ""
            if answer is None:
                (pipes / "control").unlink()
                return
            peer.sendall(f"{answer}\n".encode() if answer else b"")


def ask(pipes: Path) -> int:
    for command in sys.stdin:
        peer = socket.socket(socket.AF_UNIX)
        try:
            peer.connect(str(pipes / "control"))
        except OSError:
            print("Cannot find MPS control daemon process")
            return 1
        peer.sendall(command.encode())
        while data := peer.recv(65536):
            sys.stdout.write(data.decode())
        peer.close()
    return 0


if __name__ == "__main__":
    directory = Path(os.environ["CUDA_MPS_PIPE_DIRECTORY"])
    if sys.argv[1:] == ["-f"]:
        (directory / "control").unlink(missing_ok=True)
        serve(directory)
    else:
        sys.exit(ask(directory))
