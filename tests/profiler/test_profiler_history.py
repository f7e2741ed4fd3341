"""The history file: survives restarts, repetitions, corruption and a full disk."""

from __future__ import annotations

import logging
import math
import sqlite3
from pathlib import Path

import msgspec
import pytest

from profiler.history import History
from profiler.records import Outcome
from protocol.schema import (
    CheckpointRef,
    EpochResult,
    InferenceConfig,
    InferenceTrial,
    RetrainConfig,
    RetrainResult,
    RetrainTrial,
    TrialResult,
)

CONFIG = RetrainConfig(config_id="r8", epochs=8)


def trial(window: int, accuracy_now: float = 0.6, loss: float = 0.5) -> TrialResult:
    return TrialResult(
        stream_id="north",
        window=window,
        accuracy_now=accuracy_now,
        retrain=(
            RetrainTrial(
                config=CONFIG,
                num_samples=48,
                total_samples=300,
                startup_s=0.1,
                epochs=(EpochResult(epoch=0, accuracy=accuracy_now, loss=loss, busy_s=0.02),),
            ),
        ),
        inference=(
            InferenceTrial(
                config=InferenceConfig(config_id="full"), busy_s_per_frame=0.01, accuracy=0.7, num_frames=50
            ),
        ),
        seconds=1.0,
    )


def outcome(window: int, after: float = 0.8) -> Outcome:
    return Outcome(
        result=RetrainResult(
            stream_id="north",
            window=window,
            config=CONFIG,
            checkpoint=CheckpointRef(path="north/2.safetensors", sha256="0" * 64, stream_id="north", version=2),
            accuracy_before=0.6,
            accuracy_after=after,
            num_validation=60,
            epochs=(),
            busy_s=3.0,
            seconds=6.0,
        ),
        accuracy_predicted=0.78,
        seconds_predicted=5.0,
        promoted=True,
    )


def fill(history: History, window: int) -> None:
    history.record_trial(trial(window), time_s=100.0 + window)
    history.record_outcome(outcome(window), time_s=110.0 + window)
    history.record_window("north", window, realised=0.7, predicted=0.72, time_s=120.0 + window)


def test_everything_recorded_is_there_after_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "store" / "history.sqlite"
    with History(path, run="a") as history:
        fill(history, 0)
        fill(history, 1)
        before = history.view("north")
    with History(path, run="a") as history:
        assert history.view("north") == before
        assert history.streams() == ("north",)
    assert [w.window for w in before.windows] == [0, 1]
    assert before.windows[1].trial == trial(1)
    assert before.windows[1].outcomes == (outcome(1),)
    assert (before.windows[0].realised, before.windows[0].predicted) == (0.7, 0.72)


def test_recording_the_same_thing_twice_changes_nothing(tmp_path: Path) -> None:
    with History(tmp_path / "h.sqlite") as history:
        fill(history, 3)
        before = history.view("north")
        fill(history, 3)
        assert history.view("north") == before


def test_a_later_run_with_the_same_window_numbers_comes_behind_the_earlier_one(tmp_path: Path) -> None:
    path = tmp_path / "h.sqlite"
    with History(path, run="monday") as history:
        fill(history, 0)
    with History(path, run="tuesday") as history:
        history.record_trial(trial(0, accuracy_now=0.9), time_s=500.0)
        view = history.view("north")
    assert [w.trial.accuracy_now for w in view.windows if w.trial] == [0.6, 0.9]


def test_only_the_newest_windows_are_in_the_view(tmp_path: Path) -> None:
    with History(tmp_path / "h.sqlite") as history:
        for window in range(6):
            fill(history, window)
        assert [w.window for w in history.view("north", max_windows=3).windows] == [3, 4, 5]
        assert history.view("unknown").windows == ()


def test_a_diverged_trial_keeps_its_loss(tmp_path: Path) -> None:
    with History(tmp_path / "h.sqlite") as history:
        history.record_trial(trial(0, loss=math.nan), time_s=0.0)
        kept = history.view("north").windows[0].trial
    assert kept is not None
    assert math.isnan(kept.retrain[0].epochs[0].loss)


@pytest.mark.parametrize("damage", ["garbage", "torn page", "other schema", "directory"])
def test_a_damaged_file_is_moved_aside_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    path = tmp_path / "h.sqlite"
    if damage == "garbage":
        path.write_bytes(b"not a database" * 1000)
    elif damage == "directory":
        path.mkdir()
    else:
        with History(path) as history:
            for window in range(30):
                fill(history, window)
        with sqlite3.connect(path) as db:
            if damage == "other schema":
                db.execute("PRAGMA user_version = 99")
            db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        db.close()
        if damage == "torn page":
            data = bytearray(path.read_bytes())
            data[4096 : len(data)] = b"\xa5" * (len(data) - 4096)
            path.write_bytes(data)
    with caplog.at_level(logging.WARNING), History(path) as history:
        fill(history, 7)
        assert [w.window for w in history.view("north").windows] == [7]
    assert any("history=moved_aside" in record.message for record in caplog.records)
    assert (tmp_path / "h.sqlite.corrupt-1").exists()


def test_an_unreadable_row_is_skipped_and_the_others_stay(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "h.sqlite"
    with History(path) as history:
        fill(history, 0)
        fill(history, 1)
    with sqlite3.connect(path) as db:
        db.execute("UPDATE windows SET trial = ? WHERE window = 0", (msgspec.msgpack.encode({"odd": 1}),))
    db.close()
    with caplog.at_level(logging.WARNING), History(path) as history:
        view = history.view("north")
    assert view.windows[0].trial is None
    assert view.windows[0].outcomes == (outcome(0),)
    assert view.windows[1].trial == trial(1)
    assert any("row_skipped" in record.message for record in caplog.records)


def test_a_failed_write_is_counted_and_told_but_never_raised(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "h.sqlite"
    with History(path) as history:
        fill(history, 0)
        with sqlite3.connect(path) as other:
            other.execute("DROP TABLE outcomes")
        other.close()
        with caplog.at_level(logging.WARNING):
            history.record_outcome(outcome(1), time_s=0.0)
        assert history.num_failed_writes == 1
        assert history.view("north").windows == ()
    assert any("write_failed" in record.message for record in caplog.records)


def test_an_unwritable_place_costs_the_memory_not_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("a file where a folder is needed")
    with caplog.at_level(logging.WARNING), History(blocked / "h.sqlite") as history:
        fill(history, 0)
        assert len(history.view("north").windows) == 1
    assert any("history=unavailable" in record.message for record in caplog.records)
    assert blocked.read_text().startswith("a file")
