"""A worker's end of the pipe to its executor: commands in, reports out, rests in between.

The main thread owns it. Commands are answered between two steps and during rests, so a rest of many seconds
at a small share delays none of them. Progress is only reported from here: a step that hangs silences it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from multiprocessing.connection import Connection

from executor.learning.device import Device
from executor.links import Command, Progress, Report, SetShare, StartJob, StopJob
from executor.shares.pacing import Pacer
from protocol.codec import decode, encode
from protocol.errors import ProtocolError
from protocol.logs import line

_log = logging.getLogger(__name__)


class ParentGoneError(Exception):
    """The executor closed its end of the pipe; the worker has nobody to work for."""


def receive(connection: Connection) -> Command:
    """Next command, waiting for it. Raises ParentGoneError at the end of the pipe and ProtocolError."""
    try:
        data = connection.recv_bytes()
    except (EOFError, OSError) as error:
        raise ParentGoneError from error
    command: Command = decode(data, Command)
    return command


class Link:
    """Commands, reports and pacing of one job (an ``executor.learning.stepping.Stepper``).

    ``on_command`` gets every command but SetShare and StopJob, which are answered here.
    """

    def __init__(self, connection: Connection, start: StartJob, device: Device) -> None:
        self._connection, self._device, self._pace = connection, device, start.pace
        self._interval_s = start.stats_interval_s
        self._share, self._cap = start.job.share, start.cap
        self._pacer = self._new_pacer()
        self._count = 0
        self._reported = time.monotonic()
        self.on_command: Callable[[Command], None] = _ignore
        self.stopping = ""

    def busy_s(self) -> float:
        """Busy seconds of the whole device consumed by this process: half of them count where it can use half of it."""
        return self._device.busy_s() * self._cap

    def start_afresh(self) -> None:
        """Forget what starting up has consumed: a share is owed from the first step on."""
        self._pacer = self._new_pacer()

    def excuse(self, seconds: float) -> None:
        """Do not make the job rest for ``seconds`` that were consumed beside it."""
        self._pacer.excuse(seconds)

    def step(self) -> bool:
        """A step is done: answer commands, report, rest as the share asks. True: a stop was requested."""
        self._count += 1
        self._answer(0.0)
        self._report()
        while not self.stopping and (owed := self._pacer.owed_s()) > 0.0:
            self.wait(owed)
        return bool(self.stopping)

    def wait(self, seconds: float) -> None:
        """Do nothing for at most ``seconds``; returns early when a command came. Reports go on."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0.0:
            before = time.monotonic()
            came = self._answer(min(left, self._interval_s / 2))
            self._device.rested(time.monotonic() - before)
            self._count += 1
            self._report()
            if came:
                break
        self._pacer.owed_s()  # settles the account, so that a long wait saves up no more than the burst

    def send(self, report: Report) -> None:
        """Raises ParentGoneError when nobody listens any more."""
        try:
            self._connection.send_bytes(encode(report))
        except OSError as error:
            raise ParentGoneError from error

    def _new_pacer(self) -> Pacer:
        share = self._share if self._pace else 1.0
        return Pacer(share, time.monotonic, self._device.busy_s, self.wait)

    def _report(self) -> None:
        if time.monotonic() - self._reported >= self._interval_s:
            self._send_progress()

    def _send_progress(self) -> None:
        self._reported = time.monotonic()
        share = self._share if self._pace else None
        self.send(Progress(count=self._count, share_achieved=self._pacer.achieved(), share=share))

    def _answer(self, seconds: float) -> bool:
        """Answer all commands that are there, waiting up to ``seconds`` for the first."""
        came = False
        while self._connection_has_data(0.0 if came else seconds):
            came = True
            try:
                command = receive(self._connection)
            except ProtocolError as error:
                _log.warning(line("command_refused", reason=error))
                continue
            if isinstance(command, SetShare):
                self._share = command.share
                if self._pace:
                    self._pacer.set_share(command.share)
                    self._send_progress()  # others wait for the share that this worker gives up
            elif isinstance(command, StopJob):
                self.stopping = command.reason or "stop"
            else:
                self.on_command(command)
        return came

    def _connection_has_data(self, seconds: float) -> bool:
        try:
            return self._connection.poll(max(0.0, seconds))
        except OSError as error:
            raise ParentGoneError from error


def _ignore(command: Command) -> None:
    _log.warning(line("command_refused", reason=f"{type(command).__name__} is not for this kind of job"))
