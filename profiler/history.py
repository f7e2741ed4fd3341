"""Durable memory of the profiler: trials, estimates, outcomes, realised accuracy, in one SQLite file.

The file is an aid, not a necessity: a corrupt or unwritable one costs the system its experience, never its
run. Such a file is moved aside with a warning and a fresh one is begun.
"""

from __future__ import annotations

import contextlib
import json
import logging
import sqlite3
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from profiler.costs import CostModel, GroupKey
from profiler.priors import Observation
from profiler.records import Estimate, GateRow, LiveAccuracy, Outcome, StreamHistory, WindowHistory
from profiler.shares import ShareCurve
from profiler.targets import SiteWindow, observations
from protocol.schema import DatasetRef, TrialResult

log = logging.getLogger("ekya.profiler")

SCHEMA_VERSION = 4
MAX_WINDOWS = 20
MAX_OUTCOMES = 400
_NEWEST_WEIGHT = 0.25
_COST = "startup_s, seconds_per_sample, validation_s, prepare_s, finish_s, num_train"

_SCHEMA = """
CREATE TABLE IF NOT EXISTS windows (
    id INTEGER PRIMARY KEY AUTOINCREMENT, run TEXT NOT NULL, stream TEXT NOT NULL, window INTEGER NOT NULL,
    time_s REAL NOT NULL, realised REAL, predicted REAL, trial BLOB, estimate BLOB, UNIQUE (run, stream, window));
CREATE TABLE IF NOT EXISTS outcomes (
    window_id INTEGER NOT NULL REFERENCES windows (id), config TEXT NOT NULL, time_s REAL NOT NULL,
    accuracy_predicted REAL, accuracy_after REAL, seconds_predicted REAL, busy_s REAL, promoted INTEGER NOT NULL,
    payload BLOB NOT NULL, PRIMARY KEY (window_id, config));
CREATE INDEX IF NOT EXISTS windows_by_stream ON windows (stream, id);
CREATE TABLE IF NOT EXISTS gates (
    window_id INTEGER NOT NULL REFERENCES windows (id), stage TEXT NOT NULL, version INTEGER NOT NULL,
    decision TEXT NOT NULL, retrain_id TEXT NOT NULL, confidence REAL, reason TEXT NOT NULL, time_s REAL NOT NULL,
    evidence TEXT NOT NULL, PRIMARY KEY (window_id, stage, version, decision));
CREATE TABLE IF NOT EXISTS live (
    window_id INTEGER NOT NULL REFERENCES windows (id), version INTEGER NOT NULL, accuracy REAL NOT NULL,
    num_frames INTEGER NOT NULL, PRIMARY KEY (window_id, version));
CREATE TABLE IF NOT EXISTS datasets (
    run TEXT NOT NULL, stream TEXT NOT NULL, window INTEGER NOT NULL, payload BLOB NOT NULL,
    PRIMARY KEY (run, stream, window));
CREATE TABLE IF NOT EXISTS costs (
    config_group TEXT NOT NULL, device TEXT NOT NULL, startup_s REAL NOT NULL, seconds_per_sample REAL NOT NULL,
    validation_s REAL NOT NULL, prepare_s REAL NOT NULL, finish_s REAL NOT NULL, num_train INTEGER NOT NULL,
    num INTEGER NOT NULL, time_s REAL NOT NULL, PRIMARY KEY (config_group, device));
CREATE TABLE IF NOT EXISTS share_curves (
    device TEXT NOT NULL PRIMARY KEY, points TEXT NOT NULL, exponent REAL NOT NULL, error REAL NOT NULL,
    num INTEGER NOT NULL, time_s REAL NOT NULL);
"""
# What has to be done to a file of an older schema before _SCHEMA is run on it. The tables of version 2 are all new;
# versions 3 and 4 have costs with a preparation and a finish, which the next trials measure again.
_MIGRATIONS: dict[int, str] = {1: "", 2: "DROP TABLE IF EXISTS costs;", 3: "DROP TABLE IF EXISTS costs;"}

Payload = TypeVar("Payload", TrialResult, Estimate, Outcome, DatasetRef)


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

    def record_gate(self, row: GateRow, *, time_s: float) -> None:
        """Keep what was decided about a retrained model and why; the same decision again changes nothing."""
        with self._guard() as db:
            db.execute(
                "INSERT OR REPLACE INTO gates VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    self._window_id(db, row.stream_id, row.window, time_s),
                    row.stage,
                    row.version,
                    row.decision,
                    row.retrain_id,
                    row.confidence,
                    row.reason,
                    time_s,
                    row.evidence,
                ),
            )

    def record_live(self, stream_id: str, window: int, live: Sequence[LiveAccuracy], *, time_s: float) -> None:
        """Keep what each model that served in a window reached on live frames."""
        with self._guard() as db:
            row_id = self._window_id(db, stream_id, window, time_s)
            db.executemany(
                "INSERT OR REPLACE INTO live VALUES (?, ?, ?, ?)",
                [(row_id, row.version, row.accuracy, row.num_frames) for row in live],
            )

    def record_dataset(self, dataset: DatasetRef) -> None:
        """Keep what a window's labels hold; the file that they lie in may be gone by the time it is read."""
        with self._guard() as db:
            db.execute(
                "INSERT OR IGNORE INTO datasets VALUES (?, ?, ?, ?)",
                (self.run, dataset.stream_id, dataset.window, msgspec.msgpack.encode(dataset)),
            )

    def record_cost(self, key: GroupKey, device: str, cost: CostModel, *, time_s: float) -> None:
        """Keep a measured cost; the mean with what was known, the newest counting for at least a quarter."""
        with self._guard() as db:
            text = json.dumps(key)
            row = db.execute(
                f"SELECT {_COST}, num FROM costs WHERE config_group = ? AND device = ?", (text, device)
            ).fetchone()
            new, num = _cost_row(cost), 0
            if row is not None:
                num = int(row[-1])
                weight = max(1.0 / (num + 1), _NEWEST_WEIGHT)
                known = _cost_row(_cost(row[:-1]).at(cost.num_train))
                new = (*(k + weight * (n - k) for k, n in zip(known[:-1], new[:-1], strict=True)), cost.num_train)
            db.execute(
                "INSERT OR REPLACE INTO costs VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (text, device, *new, num + 1, time_s),
            )

    def record_share_curve(self, device: str, curve: ShareCurve, *, time_s: float) -> None:
        """Keep the throughput over share of a kind of device."""
        with self._guard() as db:
            db.execute(
                "INSERT OR REPLACE INTO share_curves VALUES (?, ?, ?, ?, ?, ?)",
                (device, json.dumps(curve.points), curve.exponent, curve.error, curve.num, time_s),
            )

    # ------------------------------------------------------------ reading

    def gates(self, stream_id: str) -> tuple[GateRow, ...]:
        """All decisions about retrained models of a stream, oldest first."""
        rows = self._rows(
            "SELECT window, stage, decision, retrain_id, version, confidence, reason, evidence FROM gates "
            "JOIN windows ON id = window_id WHERE stream = ? ORDER BY id, gates.time_s, gates.rowid",
            stream_id,
        )
        return tuple(
            GateRow(
                stream_id=stream_id,
                window=window,
                stage=stage,
                decision=decision,
                retrain_id=retrain_id,
                version=version,
                confidence=confidence,
                reason=reason,
                evidence=evidence,
            )
            for window, stage, decision, retrain_id, version, confidence, reason, evidence in rows
        )

    def last_mix(self, stream_id: str, window: int) -> tuple[int, ...]:
        """Crops per class of a stream's newest labels before those of ``window``; empty when there were none."""
        for (payload,) in self._rows(
            "SELECT payload FROM datasets WHERE stream = ? AND NOT (run = ? AND window = ?) "
            "ORDER BY rowid DESC LIMIT 1",
            stream_id,
            self.run,
            window,
        ):
            dataset = _decode(payload, DatasetRef)
            return dataset.class_counts if dataset is not None else ()
        return ()

    def costs(self, device: str = "") -> dict[GroupKey, CostModel]:
        """Costs known at the site by group of configurations, of one kind of device."""
        found: dict[GroupKey, CostModel] = {}
        for text, *values in self._rows(f"SELECT config_group, {_COST} FROM costs WHERE device = ?", device):
            batch_size, trained_fraction, head_width, learning_rate = json.loads(text)
            found[batch_size, trained_fraction, head_width, learning_rate] = _cost(values)
        return found

    def share_curve(self, device: str) -> ShareCurve | None:
        """The throughput over share of a kind of device, None when it was not measured yet."""
        for points, exponent, error, num in self._rows(
            "SELECT points, exponent, error, num FROM share_curves WHERE device = ?", device
        ):
            pairs = tuple((float(share), float(phi)) for share, phi in json.loads(points))
            return ShareCurve(points=pairs, exponent=exponent, error=error, num=num)
        return None

    def outcomes(self, *, max_rows: int = MAX_OUTCOMES) -> tuple[Outcome, ...]:
        """The newest outcomes of all streams, oldest first."""
        rows = self._rows("SELECT payload FROM outcomes ORDER BY time_s DESC, rowid DESC LIMIT ?", max_rows)
        decoded = [_decode(payload, Outcome) for (payload,) in reversed(rows)]
        return tuple(outcome for outcome in decoded if outcome is not None)

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
                live = db.execute(
                    "SELECT version, accuracy, num_frames FROM live WHERE window_id = ? ORDER BY version", (row_id,)
                ).fetchall()
                windows.append(
                    WindowHistory(
                        window=window,
                        trial=_decode(trial, TrialResult),
                        estimate=_decode(estimate, Estimate),
                        outcomes=tuple(outcome for outcome in decoded if outcome is not None),
                        realised=realised,
                        predicted=predicted,
                        live=tuple(LiveAccuracy(version=v, accuracy=a, num_frames=n) for v, a, n in live),
                    )
                )
        except sqlite3.DatabaseError as error:
            log.warning("history=unreadable path=%s stream=%s reason=%r", self.path, stream_id, error)
            return StreamHistory(stream_id=stream_id)
        return StreamHistory(stream_id=stream_id, windows=tuple(windows))

    def site_windows(self, *, max_windows: int = MAX_WINDOWS) -> tuple[SiteWindow, ...]:
        """The newest windows of all streams in which a model was retrained or measured, oldest first.

        Windows are numbered anew, 0 the oldest, so that they are in order over several runs. Trials are left out.
        """
        rows = self._rows("SELECT id, run, stream, window, realised, predicted, estimate FROM windows ORDER BY id")
        newest = list(dict.fromkeys((run, window) for _, run, _, window, *_ in rows))[-max_windows:]
        order = {key: place for place, key in enumerate(newest)}
        outcomes: dict[int, list[Outcome]] = {}
        for row_id, payload in self._rows("SELECT window_id, payload FROM outcomes ORDER BY window_id, time_s, rowid"):
            outcome = _decode(payload, Outcome)
            if outcome is not None:
                outcomes.setdefault(row_id, []).append(outcome)
        live: dict[int, list[LiveAccuracy]] = {}
        for row_id, version, accuracy, num in self._rows("SELECT * FROM live ORDER BY window_id, version"):
            live.setdefault(row_id, []).append(LiveAccuracy(version=version, accuracy=accuracy, num_frames=num))
        return tuple(
            SiteWindow(
                order=order[run, window],
                stream_id=stream,
                history=WindowHistory(
                    window=window,
                    estimate=_decode(estimate, Estimate),
                    outcomes=tuple(outcomes.get(row_id, ())),
                    realised=realised,
                    predicted=predicted,
                    live=tuple(live.get(row_id, ())),
                ),
            )
            for row_id, run, stream, window, realised, predicted, estimate in rows
            if (run, window) in order and (row_id in outcomes or row_id in live)
        )

    def observations(self, *, max_windows: int = MAX_WINDOWS) -> tuple[Observation, ...]:
        """Retrainings of all streams whose results say something about their configurations, held-out accuracies."""
        return observations(self.site_windows(max_windows=max_windows), None)

    def streams(self) -> tuple[str, ...]:
        """Ids of all streams remembered, sorted."""
        try:
            rows = self._connection().execute("SELECT DISTINCT stream FROM windows ORDER BY stream").fetchall()
        except sqlite3.DatabaseError as error:
            log.warning("history=unreadable path=%s reason=%r", self.path, error)
            return ()
        return tuple(str(row[0]) for row in rows)

    # ------------------------------------------------------------ inside

    def _rows(self, query: str, *values: str | int) -> list[tuple[Any, ...]]:
        try:
            return self._connection().execute(query, values).fetchall()
        except sqlite3.ProgrammingError:
            raise
        except sqlite3.DatabaseError as error:
            log.warning("history=unreadable path=%s reason=%r", self.path, error)
            return []

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


def _cost_row(cost: CostModel) -> tuple[float, ...]:
    """The values of the columns ``_COST``."""
    return (
        cost.startup_s,
        cost.seconds_per_sample,
        cost.validation_s,
        cost.prepare_s_per_sample,
        cost.finish_s,
        cost.num_train,
    )


def _cost(row: Sequence[float]) -> CostModel:
    startup_s, seconds_per_sample, validation_s, prepare_s, finish_s, num_train = row
    return CostModel(
        startup_s=startup_s,
        seconds_per_sample=seconds_per_sample,
        validation_s=validation_s,
        prepare_s_per_sample=prepare_s,
        finish_s=finish_s,
        num_train=round(num_train),
    )


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
        if version not in (0, *_MIGRATIONS, SCHEMA_VERSION):
            raise sqlite3.DatabaseError(f"schema version {version}, this release reads 1 to {SCHEMA_VERSION}")
        for older in range(version or SCHEMA_VERSION, SCHEMA_VERSION):
            log.info("history=migrated path=%s from=%d to=%d", path, older, older + 1)
            db.executescript(_MIGRATIONS[older])
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
