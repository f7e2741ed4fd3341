"""The process that exact policies run in: warm, silent, and free to hang or crash without harm.

Its standard input is a socket to its parent (`optimizer.solver_process`). It loads its policy, solves
a tiny problem to have everything in memory, says so with a reply of serial 0, and then answers
questions one after the other until the parent is gone. SIGUSR1: nobody wants the answer to the question under way
any more; the next one follows.

Frames: 4 bytes length (big endian), then one MessagePack record: ``Question`` down, ``Answer`` up. A policy
that has a plan before it is done offers it at once, so that a child that is killed later has not worked in vain.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import FrameType

import msgspec

from optimizer.policies.registry import Policy, get_policy, policy_entry, warm_up
from optimizer.problems import random_problem
from protocol.codec import encode
from protocol.errors import EkyaError, ProtocolError
from protocol.plan import Plan, Problem
from protocol.schema import Record

MAX_FRAME_BYTES = 64 << 20
NICENESS = 5  # a quarter of a core that others want, all of one that nobody wants
_PR_SET_PDEATHSIG = 1


class Question(Record, frozen=True, kw_only=True):
    """Solve ``problem`` with the child's policy before ``deadline_s`` of the system-wide monotonic clock."""

    serial: int
    deadline_s: float
    problem: Problem


class Answer(Record, frozen=True, kw_only=True):
    """The plan for question ``serial``; None with a ``reason`` when there is none. Serial 0: ready for questions.

    ``final`` False: a plan that is at hand already, a better one may follow.
    """

    serial: int
    plan: Plan | None = None
    reason: str = ""
    final: bool = True


def frame(record: Record) -> bytes:
    """``record`` with its length in front."""
    data = encode(record, max_bytes=MAX_FRAME_BYTES)
    return struct.pack(">I", len(data)) + data


def question_frame(question: Question) -> bytes:
    """The same for a question, ten times as fast: its problem has been checked, and its sender is trusted.

    Raises:
        ProtocolError: it is too large.
    """
    data = msgspec.msgpack.encode(question)
    if len(data) > MAX_FRAME_BYTES:
        raise ProtocolError(f"it takes {len(data)} bytes, the limit is {MAX_FRAME_BYTES}")
    return struct.pack(">I", len(data)) + data


def take_question(buffer: bytearray) -> Question | None:
    """The next whole question of ``buffer``, None while it is incomplete."""
    data = take_frame(buffer)
    return None if data is None else msgspec.msgpack.decode(data, type=Question)


def take_frame(buffer: bytearray) -> bytes | None:
    """Remove and return the first whole frame of ``buffer``; None while it is incomplete. ValueError when too long."""
    if len(buffer) < 4:
        return None
    (length,) = struct.unpack_from(">I", buffer)
    if length > MAX_FRAME_BYTES:
        raise ValueError(f"a frame of {length} bytes")
    if len(buffer) < 4 + length:
        return None
    data = bytes(buffer[4 : 4 + length])
    del buffer[: 4 + length]
    return data


class _DroppedError(Exception):
    """The question under way is not asked any more."""


class _Dropping:
    """Raises out of a policy when the parent says that its question is dropped; at any other time it says nothing.

    A solver written in C is left when it comes back, by its own time limit at the latest.
    """

    def __init__(self, link: socket.socket) -> None:
        self._link = link
        self._working = self._sending = self._dropped = False
        signal.signal(signal.SIGUSR1, self._hear)

    def _hear(self, _number: int, _frame: FrameType | None) -> None:
        if self._working and not self._sending:
            self._working = False
            raise _DroppedError
        self._dropped = self._sending

    def offer(self, offered: Answer) -> None:
        """Send a plan that is not final; half a frame would make nonsense of everything after it."""
        self._sending, self._dropped = True, False
        self._link.sendall(frame(offered))
        self._sending = False
        if self._dropped:
            raise _DroppedError

    def __enter__(self) -> None:
        self._working = True

    def __exit__(self, *_: object) -> None:
        self._working = False


def answer(policy: Policy, question: Question, dropping: AbstractContextManager[None] | None = None) -> Answer:
    """Ask the policy. Whatever it raises becomes a reason: one bad problem must not cost the warm process."""
    try:
        with dropping or contextlib.nullcontext():
            plan = policy(question.problem, max(0.0, question.deadline_s - time.monotonic()))
    except _DroppedError:
        return Answer(serial=question.serial, reason="it is not asked any more")
    except EkyaError as error:
        return Answer(serial=question.serial, reason=str(error))
    except Exception as error:
        return Answer(serial=question.serial, reason=f"{type(error).__name__}: {error}"[:500])
    return Answer(serial=question.serial, plan=plan)


def _offering(policy: Callable[..., Plan], question: Question, dropping: _Dropping) -> Policy:
    """The policy, sending its parent what it has as soon as it has it."""

    def offer(plan: Plan) -> None:
        dropping.offer(Answer(serial=question.serial, plan=plan, final=False))

    return lambda problem, budget_s: policy(problem, budget_s, offer)


def main(policy_name: str, parent_pid: int) -> int:
    """Serve questions until the parent closes the socket or dies."""
    # The parent decides when this process ends; an interrupt at the terminal reaches both of them.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    # On a machine whose cores also serve the streams, planning lives on what serving leaves.
    with contextlib.suppress(OSError):
        os.nice(NICENESS)
    if os.getppid() != parent_pid:  # it died before the line above took hold
        return 0
    link = socket.socket(fileno=os.dup(0))
    policy = get_policy(policy_name)
    offering = policy_entry(policy_name).offers
    warm_up(policy_name)
    with contextlib.suppress(EkyaError):
        policy(random_problem(2, 1, 3, seed=0), 1.0)
    dropping = _Dropping(link)
    buffer = bytearray()
    try:
        link.sendall(frame(Answer(serial=0)))
        while chunk := link.recv(1 << 20):
            buffer += chunk
            while (question := take_question(buffer)) is not None:
                asked = _offering(policy, question, dropping) if offering else policy
                link.sendall(frame(answer(asked, question, dropping)))
    except OSError:
        pass
    finally:
        link.close()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2])))
