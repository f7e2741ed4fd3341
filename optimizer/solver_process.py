"""The parent's side of a solver child: start, ask, listen, kill. Nothing here blocks for long."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

from optimizer.solver_child import MAX_FRAME_BYTES, Answer, Question, question_frame, take_frame
from protocol.codec import decode
from protocol.errors import ProtocolError
from protocol.plan import Problem

_CHUNK_BYTES = 1 << 20
# A child that floods its parent is not listened to for longer than this at a time, nor for more answers than these.
_MOST_BYTES_AT_ONCE = 8 << 20
_MOST_ANSWERS = 1000
_EPITAPH_S = 0.05
_PATIENCE_S, _PATIENCE_PART = 0.5, 0.1  # at most, and of the time that the child has


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
        self._held: bytes | None = None  # a question for a child that is still starting
        self._serial = 0
        self._num_answers = 0
        self._answered = 0
        self.ready = False
        self.offer: Answer | None = None  # the newest plan of the last question that is not its final answer

    @property
    def pid(self) -> int:
        return self._process.pid

    def fileno(self) -> int:
        """Readable when the child has something to say, or has ended."""
        return self._link.fileno()

    @property
    def behind(self) -> bool:
        """Whether it is still busy with a question before the last one."""
        return self.ready and self._answered < self._serial - 1

    def drop(self) -> None:
        """The answer to the question under way is not wanted any more; the child goes on to the next as soon as it can.

        Only for a child that is ``ready``: one that is starting would end.
        """
        with contextlib.suppress(OSError):
            self._process.send_signal(signal.SIGUSR1)

    def ask(self, problem: Problem, budget_s: float) -> None:
        """Send a question; its answer is due within ``budget_s`` seconds. ChildLostError when the child is gone.

        A child that is still starting gets it when it is ready, and only if no other one has been asked and it has not
        been dropped meanwhile: else a question of the past would be what it answers, or fails at, next.
        """
        self.forget()
        self._serial += 1
        self._num_answers, self.offer = 0, None
        question = Question(serial=self._serial, deadline_s=time.monotonic() + budget_s, problem=problem)
        asked = question_frame(question)
        if not self.ready:
            self._held = asked
            return
        self._outgoing += asked
        # A large problem does not fit into the socket at once; an idle child takes it within milliseconds.
        self._flush(min(_PATIENCE_S, _PATIENCE_PART * budget_s))

    def forget(self) -> None:
        """Nobody waits for the last question any more; it is not sent if it has not been."""
        if self._held is not None:
            self._held, self._answered = None, self._serial

    def _flush(self, patience_s: float = 0.0) -> None:
        """Send what the child takes; ``patience_s``: how long to wait for it when it takes no more at once."""
        end_s = time.monotonic() + patience_s
        while self._outgoing:
            try:
                sent = self._link.send(self._outgoing)
            except BlockingIOError:
                left_s = end_s - time.monotonic()
                if left_s <= 0.0 or not select.select([], [self._link], [], left_s)[1]:
                    return
                continue
            except OSError as error:
                raise ChildLostError(self._epitaph()) from error
            del self._outgoing[:sent]

    def listen(self, epitaph_s: float = _EPITAPH_S) -> Answer | None:
        """The final answer to the last question if it has come; ``offer`` is what came before it.

        ``epitaph_s``: how long to wait for the exit code of a child that has closed its connection.

        Raises:
            ChildLostError: the child is gone, or talks nonsense. What it offered before can be used.
        """
        alive = self._receive()
        try:
            answer = self._take()
        except (ProtocolError, ValueError) as error:
            raise ChildLostError(f"sent garbage ({error})") from error
        if answer is None and not alive:
            raise ChildLostError(self._epitaph(epitaph_s))
        return answer

    def _receive(self) -> bool:
        """Take in what has arrived. False when nothing more can come."""
        with contextlib.suppress(ChildLostError):  # it may have said something before it ended
            self._flush()
        heard = 0
        while heard < _MOST_BYTES_AT_ONCE:
            try:
                chunk = self._link.recv(_CHUNK_BYTES)
            except BlockingIOError:
                return True
            except OSError:
                return False
            if not chunk:
                return False
            heard += len(chunk)
            self._incoming += chunk
            if len(self._incoming) > MAX_FRAME_BYTES + _MOST_BYTES_AT_ONCE:
                raise ChildLostError("sent more than a plan can be")
        return True

    def _take(self) -> Answer | None:
        while (data := take_frame(self._incoming)) is not None:
            answer = decode(data, Answer, max_bytes=MAX_FRAME_BYTES)
            self.ready = True
            self._send_held()
            self._num_answers += 1
            if self._num_answers > _MOST_ANSWERS:
                raise ChildLostError("does not stop answering")
            if answer.final:
                self._answered = max(self._answered, min(answer.serial, self._serial))
            if answer.serial != self._serial or answer.serial == 0:
                continue
            if answer.final:
                return answer
            self.offer = answer
        return None

    def _send_held(self) -> None:
        if self._held is not None:
            self._outgoing += self._held
            self._held = None
            with contextlib.suppress(ChildLostError):  # the next look at it will tell
                self._flush()

    def wait(self, seconds: float) -> None:
        """Sleep until the child says something, has taken what was left to send, or ``seconds`` are over."""
        writable = [self._link] if self._outgoing else []
        select.select([self._link], writable, [], max(0.0, seconds))

    def _epitaph(self, patience_s: float = _EPITAPH_S) -> str:
        # The connection of a dying process closes a moment before its exit code can be had.
        try:
            code = self._process.wait(timeout=max(0.0, patience_s))
        except subprocess.TimeoutExpired:
            return "closed its connection"
        return f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"

    def kill(self) -> None:
        """End the child at once, without waiting for its end: `gone` tells. It holds nothing that could be lost."""
        self._link.close()
        self._process.kill()

    def gone(self) -> bool:
        """Whether a killed child has ended; to be asked until it has, or it stays a zombie."""
        return self._process.poll() is not None

    def wait_gone(self) -> None:
        """Wait for the end of a killed child. One that is stuck in the kernel is left to init."""
        try:
            self._process.wait(timeout=2.0)
        except subprocess.TimeoutExpired:
            return
