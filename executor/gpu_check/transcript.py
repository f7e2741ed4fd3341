"""The written record of a run: a JSON file that is whole after every check, whatever happens to the next one."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any

from executor.shares.mps_control import Query

FORMAT = 1
Details = dict[str, Any]


class SkipCheckError(Exception):
    """The check cannot be made here; the text says why."""


class CheckTimeoutError(Exception):
    """The check took longer than it may."""


class Transcript:
    """Collects checks and the commands given to the control program; writes after each.

    ``seconds``: time for all checks together; what does not fit is skipped.
    """

    def __init__(self, path: Path, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.path = path
        self._clock = clock
        self._end = clock() + seconds
        self._started = clock()
        self.head: Details = {
            "tool": "ekya gpu-check",
            "format": FORMAT,
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "argument_seconds": seconds,
        }
        self.checks: list[Details] = []
        self._commands: list[Details] = []
        self._lock = threading.Lock()

    def observe(self, query: Query) -> None:
        """Keep a query to the control program for the check in hand."""
        with self._lock:
            self._commands.append(
                {
                    "command": query.command,
                    "exit_code": query.exit_code,
                    "stdout": query.output[-4000:],
                    "stderr": query.errors[-4000:],
                    "seconds": query.seconds,
                    "at_s": round(self._clock() - self._started, 3),
                }
            )

    def note(self, text: str) -> None:
        """A line for whoever watches."""
        print(f"[{self._clock() - self._started:6.1f} s] {text}", flush=True)

    def left_s(self) -> float:
        """Seconds left for further checks."""
        return self._end - self._clock()

    def run(
        self, name: str, check: Callable[[Details], None], limit_s: float, needs_s: float, tidy: Callable[[], None]
    ) -> bool:
        """Run one check within ``limit_s`` if ``needs_s`` are left; ``tidy`` always follows. True when it passed.

        The check fills the details it is given as it goes, so that what it found before an error is kept.
        """
        start, details = self._clock(), Details()
        entry: Details = {"name": name, "status": "running", "reason": "", "details": details}
        self.checks.append(entry)
        self._commands = entry["commands"] = []
        self.note(f"{name} ...")
        self.write()
        try:
            if self.left_s() < needs_s:
                raise SkipCheckError(f"{self.left_s():.0f} s are left, it needs {needs_s:.0f} s; raise --seconds")
            with time_limit(min(limit_s, self.left_s() + 5.0)):
                check(details)
            entry["status"] = "passed"
        except SkipCheckError as reason:
            entry |= {"status": "skipped", "reason": str(reason)}
        except Exception as error:
            entry |= {"status": "failed", "reason": f"{type(error).__name__}: {error}"}
            entry["traceback"] = traceback.format_exc()[-3000:]
        try:
            with time_limit(20.0):
                tidy()
        except Exception as error:
            entry["tidy"] = f"{type(error).__name__}: {error}"
        entry["seconds"] = round(self._clock() - start, 2)
        self.note(f"{name}: {entry['status']} in {entry['seconds']:.1f} s {entry['reason'][:300]}")
        self.write()
        return bool(entry["status"] == "passed")

    def write(self) -> None:
        """Write the whole file anew, so that a reader never sees half of one."""
        counts = {
            status: [check["name"] for check in self.checks if check["status"] == status]
            for status in ("passed", "failed", "skipped", "running")
        }
        content = {
            **self.head,
            "seconds": round(self._clock() - self._started, 1),
            "summary": counts,
            "checks": self.checks,
        }
        temporary = self.path.with_name(f".{self.path.name}.part")
        temporary.write_text(json.dumps(content, indent=1, default=str) + "\n")
        os.replace(temporary, self.path)


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise CheckTimeoutError in the main thread after ``seconds``; every wait of Python ends at that."""

    def over(number: int, frame: FrameType | None) -> None:
        raise CheckTimeoutError(f"not over after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, max(0.1, seconds))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)


def watchdog(transcript: Transcript, seconds: float) -> threading.Timer:
    """End the process, transcript written, if it is still there after ``seconds``: something ignores every limit."""

    def give_up() -> None:
        transcript.head["gave_up"] = f"still running {seconds:.0f} s after its start"
        transcript.write()
        transcript.note(transcript.head["gave_up"])
        os._exit(3)

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    return timer
