"""The report's tables of labels, trials and ends of retrainings, on a run in virtual time and on made-up rows."""

from __future__ import annotations

import msgspec
import pytest

from optimizer.config import ProfilingConfig
from optimizer.ports import Progressed
from optimizer.report import build_report
from optimizer.report_html import report_page
from optimizer.report_trials import end_errors, ends_text, expected_held_out, held_out_text
from protocol.events import RetrainFinished, RetrainProgress
from protocol.plan import StreamProfile
from protocol.schema import DatasetRef, EpochResult, StreamSpec, TrialResult
from tests.optimizer.coordinator_world import simulation, site


def test_a_report_shows_labels_made_ahead_trials_and_what_waited_for_them() -> None:
    run, _, _ = simulation(site(num_streams=2, profiling=ProfilingConfig(share=0.3)), num_windows=3)
    run.run(until_s=1000.0)
    report = build_report(run.events)
    rows = {(row.window, row.stream_id): row for row in report.trials if row.window}
    assert set(rows) == {(w, s) for w in (1, 2) for s in ("s0", "s1")}
    assert any(row.labelled_at_s is not None and row.labelled_at_s < 0.0 for row in rows.values())
    for row in rows.values():
        assert row.looked_s == pytest.approx(0.3)
        assert row.tried_s == pytest.approx(1.3)
        assert row.known_at_s is not None
        assert row.retrain_at_s is not None
        assert row.retrain_at_s >= row.known_at_s - 1e-6
    page = report_page(report, run.events)
    assert "Labels, trials and the first retraining" in page
    assert "When retrainings end" in page


def test_an_end_in_virtual_time_is_where_it_was_expected_whatever_becomes_of_its_share() -> None:
    run, _, _ = simulation(site(num_streams=3), num_gpus=2, num_windows=3)
    run.run(until_s=1000.0)
    ended = [e for e in run.events if isinstance(e, RetrainFinished) and e.elapsed_s is not None]
    assert ended
    for event in ended:
        assert event.elapsed_predicted_s == pytest.approx(event.elapsed_s, rel=1e-3)


def test_half_way_the_end_is_told_from_the_clock_of_the_epochs() -> None:
    run, _, _ = simulation(site(num_streams=1), num_windows=None)
    stream = run.coordinator.state.streams["s0"]
    while stream.running is None:
        run.run(until_s=run.now + 0.5)
    begun, job = run.now, stream.running.job
    epochs = job.config.epochs
    assert epochs >= 4
    run.executors["gpu0"].running[job.job_id].left_s = 1e9  # its epochs tell
    per_epoch_s = 2.0
    for epoch in range(epochs // 2 + 2):
        run.run(until_s=begun + 1.0 + epoch * per_epoch_s)
        result = EpochResult(epoch=epoch, accuracy=0.5 + 0.01 * epoch, loss=1.0, busy_s=0.1 + 0.4 * bool(epoch))
        event = RetrainProgress(job_id=job.job_id, stream_id="s0", window=job.window, config=job.config, epoch=result)
        run.give(Progressed(event=event))
    running = stream.running
    assert running is not None
    # 1 s until the first is heard of, two for each, and the last validation at the pace of the epochs.
    wall_s = 1.0 + epochs * per_epoch_s + 0.1 * 4.0
    assert running.half_work_s / running.share == pytest.approx(wall_s, rel=0.03)


def test_held_out_accuracy_is_told_beside_what_was_expected_of_it() -> None:
    run, _, profiler = simulation(site(num_streams=1), num_windows=2)
    made = profiler.estimate

    def said(spec: StreamSpec, trial: TrialResult, dataset: DatasetRef) -> StreamProfile:
        profile = made(spec, trial, dataset)
        rows = tuple(msgspec.structs.replace(r, held_out=0.7, held_out_error=0.05) for r in profile.retrain)
        return msgspec.structs.replace(profile, retrain=rows)

    profiler.estimate = said  # type: ignore[method-assign]
    run.run(until_s=1000.0)
    report = build_report(run.events)
    assert {(row.held_out_predicted, row.held_out_error) for row in report.retrainings} == {(0.7, 0.05)}
    (row, *_) = report.retrainings
    rows = [
        msgspec.structs.replace(row, accuracy_after=0.75, whole=True),
        msgspec.structs.replace(row, accuracy_after=0.6, whole=True),
        msgspec.structs.replace(row, accuracy_after=0.1, whole=False),
        msgspec.structs.replace(row, held_out_predicted=None, whole=True),
    ]
    text = held_out_text(msgspec.structs.replace(report, retrainings=tuple(rows)))
    assert text == (
        "Held-out accuracy at the end was off by 7.5 points in the median of 2 whole retrainings; 1 of 2 within their"
        " 80 % intervals."
    )
    assert [expected_held_out(r) for r in (rows[0], rows[3])] == ["70.0 ± 6.4", "–"]
    assert held_out_text(msgspec.structs.replace(report, retrainings=())) == ""


def test_errors_of_ends_count_whole_retrainings_only() -> None:
    run, _, _ = simulation(site(num_streams=1), num_windows=2)
    run.run(until_s=1000.0)
    (row, *_) = build_report(run.events).retrainings
    rows = [
        msgspec.structs.replace(row, elapsed_s=10.0, elapsed_predicted_s=8.0, elapsed_half_s=10.5, whole=True),
        msgspec.structs.replace(row, elapsed_s=2.0, elapsed_predicted_s=8.0, elapsed_half_s=None, whole=False),
        msgspec.structs.replace(row, elapsed_s=10.0, elapsed_predicted_s=11.0, elapsed_half_s=None, whole=True),
    ]
    start, half = end_errors(rows)
    assert start == pytest.approx((0.2, 0.1))
    assert half == pytest.approx((0.05,))
    report = msgspec.structs.replace(build_report(run.events), retrainings=tuple(rows))
    assert ends_text(report).startswith("At the start the end was off by 15 % in the median and half way")
