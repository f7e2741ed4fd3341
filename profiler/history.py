"""Durable memory of the profiler: trials, estimates, outcomes, realised accuracy, in one SQLite file.

The file is an aid, not a necessity: a corrupt or unwritable one costs the system its experience, never its
run. Such a file is moved aside with a warning and a fresh one is begun.
"""

from __future__ import annotations

import contextlib
import logging
import sqlite3
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import msgspec

from profiler.corrections import reached_accuracy
from profiler.priors import Observation
from profiler.records import Estimate, Outcome, StreamHistory, WindowHistory
from protocol.schema import TrialResult

log = logging.getLogger("ekya.profiler")

SCHEMA_VERSION = 1
MAX_WINDOWS = 20

_SCHEMA = """
CREATE TABLE IF NOT EXISTS windows (
    id INTEGER PRIMARY KEY AUTOINCREMENT, run TEXT NOT NULL, stream TEXT NOT NULL, window INTEGER NOT NULL,
    time_s REAL NOT NULL, realised REAL, predicted REAL, trial BLOB, estimate BLOB, UNIQUE (run, stream, window));
CREATE TABLE IF NOT EXISTS outcomes (
    window_id INTEGER NOT NULL REFERENCES windows (id), config TEXT NOT NULL, time_s REAL NOT NULL,
    accuracy_predicted REAL, accuracy_after REAL, seconds_predicted REAL, busy_s REAL, promoted INTEGER NOT NULL,
    payload BLOB NOT NULL, PRIMARY KEY (window_id, config));
CREATE INDEX IF NOT EXISTS windows_by_stream ON windows (stream, id);
"""

Payload = TypeVar("Payload", TrialResult, Estimate, Outcome)


class History:
    """Writer and reader of the history file. Not for use from several threads.

    ``run`` tells one run's window numbers from another's: rows are unique in (run, stream, window), so that
    recording a repeated message again changes nothing, and a later run begins new rows behind the old ones.
    """

    def __init__(self, path: Path, *, run: str = "") -> None:
        self.path = path
        self.run = run
        self.num_failed_writes = 0
        self._db: sqlite3.Connection | None = None
        try:
            self._db = _open(path)
        except (sqlite3.Error, OSError) as error:
            _move_aside(path, str(error))
            try:
                self._db = _open(path)
            except (sqlite3.Error, OSError) as again:
                log.warning("history=unavailable path=%s reason=%r estimates learn within this run only", path, again)
                self._db = _open(Path(":memory:"))

    def close(self) -> None:
        """Close the file. Later calls raise ``sqlite3.ProgrammingError``."""
        if self._db is not None:
            self._db.close()

    def __enter__(self) -> History:
        return self

    def __exit__(self, *args: object) -> None:
        self.close()

    # ------------------------------------------------------------ writing

    def record_trial(self, trial: TrialResult, *, time_s: float) -> None:
        """Keep a stream's trial results of a window. ``time_s``: wall-clock time, for people."""
        self._set(trial.stream_id, trial.window, time_s, "trial", msgspec.msgpack.encode(trial))

    def record_estimate(self, estimate: Estimate, *, time_s: float) -> None:
        """Keep the estimate that the window's plan was made from."""
        stream = estimate.profile.stream_id
        self._set(stream, estimate.window, time_s, "estimate", msgspec.msgpack.encode(estimate))

    def record_outcome(self, outcome: Outcome, *, time_s: float) -> None:
        """Keep a retraining's outcome; the newest one counts for a configuration tried twice in a window."""
        result = outcome.result
        with self._guard() as db:
            db.execute(
                "INSERT OR REPLACE INTO outcomes VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    self._window_id(db, result.stream_id, result.window, time_s),
                    result.config.config_id,
                    time_s,
                    outcome.accuracy_predicted,
                    result.accuracy_after,
                    outcome.seconds_predicted,
                    result.busy_s,
                    int(outcome.promoted),
                    msgspec.msgpack.encode(outcome),
                ),
            )

    def record_window(
        self, stream_id: str, window: int, *, realised: float | None, predicted: float | None, time_s: float
    ) -> None:
        """Keep the realised and predicted window-averaged live accuracy of a closed window."""
        self._set(stream_id, window, time_s, "realised", realised)
        self._set(stream_id, window, time_s, "predicted", predicted)

    # ------------------------------------------------------------ reading

    def view(self, stream_id: str, *, max_windows: int = MAX_WINDOWS) -> StreamHistory:
        """The newest ``max_windows`` windows of a stream, of all runs, oldest first. Unreadable rows are skipped."""
        db = self._connection()
        try:
            rows = db.execute(
                "SELECT id, window, realised, predicted, trial, estimate FROM windows WHERE stream = ? "
                "ORDER BY id DESC LIMIT ?",
                (stream_id, max_windows),
            ).fetchall()
            windows = []
            for row_id, window, realised, predicted, trial, estimate in reversed(rows):
                payloads = db.execute(
                    "SELECT payload FROM outcomes WHERE window_id = ? ORDER BY time_s, rowid", (row_id,)
                ).fetchall()
                decoded = [_decode(payload, Outcome) for (payload,) in payloads]
                windows.append(
                    WindowHistory(
                        window=window,
                        trial=_decode(trial, TrialResult),
                        estimate=_decode(estimate, Estimate),
                        outcomes=tuple(outcome for outcome in decoded if outcome is not None),
                        realised=realised,
                        predicted=predicted,
                    )
                )
        except sqlite3.DatabaseError as error:
            log.warning("history=unreadable path=%s stream=%s reason=%r", self.path, stream_id, error)
            return StreamHistory(stream_id=stream_id)
        return StreamHistory(stream_id=stream_id, windows=tuple(windows))

    def observations(self, *, max_windows: int = MAX_WINDOWS) -> tuple[Observation, ...]:
        """Retrainings of all streams in the newest windows, whose results say something about their configurations.

        Windows are numbered anew, 0 the oldest, so that they are in order over several runs.
        """
        found: list[tuple[tuple[str, int], Outcome]] = []
        try:
            rows = self._connection().execute(
                "SELECT run, window, payload FROM outcomes JOIN windows ON id = window_id ORDER BY id"
            )
            for run, window, payload in rows:
                outcome = _decode(payload, Outcome)
                if outcome is not None:
                    found.append(((run, window), outcome))
        except sqlite3.DatabaseError as error:
            log.warning("history=unreadable path=%s reason=%r", self.path, error)
            return ()
        newest = list(dict.fromkeys(key for key, _ in found))[-max_windows:]
        order = {key: place for place, key in enumerate(newest)}
        return tuple(
            Observation(
                stream_id=outcome.result.stream_id,
                window=order[key],
                config=outcome.result.config,
                accuracy_before=outcome.result.accuracy_before,
                accuracy_after=reached,
            )
            for key, outcome in found
            if key in order and (reached := reached_accuracy(outcome)) is not None
        )

    def streams(self) -> tuple[str, ...]:
        """Ids of all streams remembered, sorted."""
        try:
            rows = self._connection().execute("SELECT DISTINCT stream FROM windows ORDER BY stream").fetchall()
        except sqlite3.DatabaseError as error:
            log.warning("history=unreadable path=%s reason=%r", self.path, error)
            return ()
        return tuple(str(row[0]) for row in rows)

    # ------------------------------------------------------------ inside

    def _connection(self) -> sqlite3.Connection:
        if self._db is None:
            raise sqlite3.ProgrammingError("the history is closed")
        return self._db

    @contextlib.contextmanager
    def _guard(self) -> Iterator[sqlite3.Connection]:
        """One transaction; a failed write (disk full, file damaged) is counted and told, never raised."""
        db = self._connection()
        try:
            with db:
                yield db
        except sqlite3.ProgrammingError:
            raise
        except sqlite3.Error as error:
            self.num_failed_writes += 1
            log.warning("history=write_failed path=%s count=%d reason=%r", self.path, self.num_failed_writes, error)

    def _window_id(self, db: sqlite3.Connection, stream_id: str, window: int, time_s: float) -> int:
        db.execute(
            "INSERT OR IGNORE INTO windows (run, stream, window, time_s) VALUES (?, ?, ?, ?)",
            (self.run, stream_id, window, time_s),
        )
        row = db.execute(
            "SELECT id FROM windows WHERE run = ? AND stream = ? AND window = ?", (self.run, stream_id, window)
        ).fetchone()
        return int(row[0])

    def _set(self, stream_id: str, window: int, time_s: float, column: str, value: bytes | float | None) -> None:
        with self._guard() as db:
            row_id = self._window_id(db, stream_id, window, time_s)
            db.execute(f"UPDATE windows SET {column} = ? WHERE id = ?", (value, row_id))


def _open(path: Path) -> sqlite3.Connection:
    in_memory = str(path) == ":memory:"
    if not in_memory:
        path.parent.mkdir(parents=True, exist_ok=True)
    db = sqlite3.connect(path)
    try:
        if not in_memory:
            # WAL: a reader (a person with sqlite3, a later report) never blocks the running service.
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA synchronous = NORMAL")
        problems: Sequence[tuple[str]] = db.execute("PRAGMA quick_check").fetchall()
        if problems != [("ok",)]:
            raise sqlite3.DatabaseError(f"quick_check: {problems[0][0]}")
        (version,) = db.execute("PRAGMA user_version").fetchone()
        if version not in (0, SCHEMA_VERSION):
            raise sqlite3.DatabaseError(f"schema version {version}, this release reads {SCHEMA_VERSION}")
        db.executescript(_SCHEMA)
        db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        db.execute("SELECT run, stream, window, time_s, realised, predicted, trial, estimate FROM windows LIMIT 1")
    except sqlite3.Error:
        db.close()
        raise
    return db


def _move_aside(path: Path, reason: str) -> None:
    for number in range(1, 1000):
        target = path.with_name(f"{path.name}.corrupt-{number}")
        if not target.exists():
            break
    log.warning("history=moved_aside path=%s to=%s reason=%r estimates start afresh", path, target, reason)
    for suffix in ("", "-wal", "-shm"):
        with contextlib.suppress(OSError):
            path.with_name(path.name + suffix).rename(target.with_name(target.name + suffix))


def _decode(payload: bytes | None, kind: type[Payload]) -> Payload | None:
    if payload is None:
        return None
    try:
        return msgspec.msgpack.decode(payload, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, TypeError) as error:
        log.warning("history=row_skipped type=%s reason=%r", kind.__name__, error)
        return None
