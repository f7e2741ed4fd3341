"""Durable files of a run: the event log, the state that survives a restart, saved problems."""

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import Collection
from pathlib import Path
from typing import IO

import msgspec

from optimizer.state import SiteState
from protocol.codec import save_json
from protocol.errors import InputError
from protocol.events import TelemetryEvent
from protocol.logs import line
from protocol.plan import Plan, Problem

log = logging.getLogger(__name__)


class RunFolder:
    """One run's folder, held by one optimizer at a time.

    ``store/`` data sets and checkpoints, ``events.jsonl`` every telemetry event, ``state.msgpack`` the
    coordinator's state, ``problems/`` and ``plans/`` what was planned.
    """

    def __init__(self, path: Path) -> None:
        """Create or open the folder. Raises InputError when it cannot be written or another optimizer holds it."""
        self.path = path
        try:
            for folder in (path, self.store, path / "problems", path / "plans"):
                folder.mkdir(parents=True, exist_ok=True)
            self._lock = (path / "lock").open("w")
        except OSError as error:
            raise InputError(f"--out {path}: cannot be written ({error.strerror}); choose another folder") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            raise InputError(f"--out {path}: another optimizer is using it; stop that one or choose another") from None
        self._events: IO[bytes] | None = None
        self._unused: set[str] = set()

    @property
    def store(self) -> Path:
        """Folder of data sets and checkpoints, shared with the executors."""
        return self.path / "store"

    @property
    def events_path(self) -> Path:
        """The event log."""
        return self.path / "events.jsonl"

    # ------------------------------------------------------------ events

    def begin_events(self, *, fresh: bool) -> None:
        """Open the event log; ``fresh`` moves an older one aside."""
        if fresh and self.events_path.exists():
            number = 1 + len(list(self.path.glob("events-*.jsonl")))
            self.events_path.rename(self.path / f"events-{number}.jsonl")
        self._events = self.events_path.open("ab")

    def record(self, event: TelemetryEvent) -> None:
        """Append an event. A full disk costs the record, not the run."""
        if self._events is None:
            return
        try:
            self._events.write(msgspec.json.encode(event) + b"\n")
        except OSError as error:
            log.error("%s", line("events_not_recorded", reason=error.strerror))
            self._events = None

    def flush(self) -> None:
        """Hand what was recorded to the operating system."""
        if self._events is not None:
            try:
                self._events.flush()
            except OSError as error:
                log.error("%s", line("events_not_recorded", reason=error.strerror))
                self._events = None

    # ------------------------------------------------------------ state

    def save_state(self, state: SiteState) -> None:
        """Write the state so that a crash at any moment leaves the old or the new one."""
        target = self.path / "state.msgpack"
        draft = target.with_suffix(".new")
        try:
            with draft.open("wb") as file:
                file.write(msgspec.msgpack.encode(state))
                file.flush()
                os.fsync(file.fileno())
            draft.replace(target)
        except OSError as error:
            log.error("%s", line("state_not_saved", reason=error.strerror))

    def load_state(self) -> SiteState | None:
        """The state of an earlier life, None when there is none that can be read."""
        target = self.path / "state.msgpack"
        try:
            return msgspec.msgpack.decode(target.read_bytes(), type=SiteState)
        except FileNotFoundError:
            return None
        except (msgspec.MsgspecError, UnicodeDecodeError, OSError) as error:
            log.warning("%s", line("state_unreadable", path=target, reason=error))
            return None

    def tidy(self, in_use: Collection[str]) -> None:
        """Delete the models that were not ``in_use`` (paths below the store) the last time either.

        An executor may be about to leave a model that went out of use a moment ago. One that cannot be deleted costs
        room, nothing else.
        """
        unused = {
            path.relative_to(self.store).as_posix() for path in (self.store / "checkpoints").rglob("*.safetensors")
        } - set(in_use)
        for relative in sorted(unused & self._unused):
            path = self.store / relative
            try:
                # The manifest commits a checkpoint: it goes first.
                path.with_suffix(".json").unlink(missing_ok=True)
                path.unlink(missing_ok=True)
            except OSError as error:
                log.warning("%s", line("checkpoint_not_deleted", path=path, reason=error.strerror))
        self._unused = unused

    # ------------------------------------------------------------ problems and plans

    def save_problem(self, problem: Problem, window: int, number: int, phase: str) -> None:
        """Keep a problem for `ekya-optimizer compare`."""
        save_json(problem, self.path / "problems" / f"w{window:03d}-{number:03d}-{phase}.json")

    def save_plan(self, plan: Plan, window: int, number: int, phase: str) -> None:
        """Keep the plan that was chosen for a saved problem, under the same name."""
        save_json(plan, self.path / "plans" / f"w{window:03d}-{number:03d}-{phase}.json")

    def close(self) -> None:
        """Flush and let another optimizer have the folder."""
        self.flush()
        if self._events is not None:
            self._events.close()
        self._lock.close()
