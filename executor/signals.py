"""Signals of the executor's process as something a poller can wait for."""

from __future__ import annotations

import contextlib
import os
import signal


class SignalWakeup:
    """SIGINT and SIGTERM only wake a poller. Install before torch is imported: it is then nobody else's."""

    def __init__(self) -> None:
        self._read, self._write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._old: dict[signal.Signals, object] = {}

    def install(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._old[number] = signal.signal(number, lambda *_: None)
        signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)

    def fileno(self) -> int:
        return self._read

    def taken(self) -> list[signal.Signals]:
        """Signals since the last call."""
        with contextlib.suppress(BlockingIOError):
            return [signal.Signals(number) for number in os.read(self._read, 512)]
        return []

    def close(self) -> None:
        if self._old:
            signal.set_wakeup_fd(-1)
            for number, handler in self._old.items():
                signal.signal(number, handler)  # type: ignore[arg-type]
            self._old.clear()
        os.close(self._read)
        os.close(self._write)
