"""The parent's side of a solver child: start, ask, listen, kill. Nothing here ever blocks."""

from __future__ import annotations

import os
import select
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

from optimizer.solver_child import MAX_FRAME_BYTES, Answer, Question, frame, take_frame
from protocol.codec import decode
from protocol.errors import ProtocolError
from protocol.plan import Problem

_CHUNK_BYTES = 1 << 20


class ChildLostError(Exception):
    """The child cannot be used any more: it ended, or says things that make no sense. The text says which."""


def child_command(policy_name: str) -> list[str]:
    """The command that starts a child for ``policy_name``."""
    return [sys.executable, "-m", "optimizer.solver_child", policy_name, str(os.getpid())]


class SolverProcess:
    """One running child. ``command`` is started with a socket as its standard input."""

    def __init__(self, command: Sequence[str]) -> None:
        self._link, theirs = socket.socketpair()
        self._link.setblocking(False)
        with theirs:
            # Its standard output is nobody's: what a solver prints must not reach the answers.
            self._process = subprocess.Popen(list(command), stdin=theirs.fileno(), stdout=subprocess.DEVNULL)
        self._incoming, self._outgoing = bytearray(), bytearray()
        self._serial = 0
        self.ready = False

    @property
    def pid(self) -> int:
        return self._process.pid

    def fileno(self) -> int:
        """Readable when the child has something to say, or has ended."""
        return self._link.fileno()

    def ask(self, problem: Problem, budget_s: float) -> None:
        """Send a question; its answer is due within ``budget_s`` seconds. ChildLostError when the child is gone."""
        self._serial += 1
        question = Question(serial=self._serial, deadline_s=time.monotonic() + budget_s, problem=problem)
        self._outgoing += frame(question)
        self._flush()

    def _flush(self) -> None:
        while self._outgoing:
            try:
                sent = self._link.send(self._outgoing)
            except BlockingIOError:
                return
            except OSError as error:
                raise ChildLostError(self._epitaph()) from error
            del self._outgoing[:sent]

    def listen(self) -> Answer | None:
        """The answer to the last question if it has come. ChildLostError when the child is gone or talks nonsense."""
        self._flush()
        while True:
            try:
                chunk = self._link.recv(_CHUNK_BYTES)
            except BlockingIOError:
                break
            except OSError as error:
                raise ChildLostError(self._epitaph()) from error
            if not chunk:
                raise ChildLostError(self._epitaph())
            self._incoming += chunk
            if len(self._incoming) > MAX_FRAME_BYTES + _CHUNK_BYTES:
                raise ChildLostError("sent more than a plan can be")
        try:
            while (data := take_frame(self._incoming)) is not None:
                answer = decode(data, Answer, max_bytes=MAX_FRAME_BYTES)
                self.ready = True
                if answer.serial == self._serial and answer.serial > 0:
                    return answer
        except (ProtocolError, ValueError) as error:
            raise ChildLostError(f"sent garbage ({error})") from error
        return None

    def wait(self, seconds: float) -> None:
        """Sleep until the child says something, has taken what was left to send, or ``seconds`` are over."""
        writable = [self._link] if self._outgoing else []
        select.select([self._link], writable, [], max(0.0, seconds))

    def _epitaph(self) -> str:
        # The connection of a dying process closes a moment before its exit code can be had.
        try:
            code = self._process.wait(timeout=0.2)
        except subprocess.TimeoutExpired:
            return "closed its connection"
        return f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"

    def kill(self) -> None:
        """End the child at once. It holds nothing that could be lost."""
        self._link.close()
        self._process.kill()
        # SIGKILL needs no cooperation; a child stuck in the kernel is left to init rather than waited for.
        try:
            self._process.wait(timeout=2.0)
        except subprocess.TimeoutExpired:
            return
