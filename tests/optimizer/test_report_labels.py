"""The report shows drift, golden labels, the interval of what they say, and where their seconds went."""

from __future__ import annotations

from optimizer.report import build_report
from optimizer.report_html import report_page
from protocol.events import DriftScored, LabelsCollected, LabelsSpent, ProfileEstimated, TelemetryEvent


def events(agreement: float | None) -> tuple[TelemetryEvent, ...]:
    return (
        DriftScored(site_s=40.0, stream_id="cam", window=0, score=0.62, signal="look 1", alarm=False),
        LabelsSpent(site_s=40.0, window=0, budget_gpu_s=None, labels_s=0.0, trials_s=0.0, canary_s=0.5),
        LabelsCollected(
            site_s=43.0,
            stream_id="cam",
            window=1,
            num_frames=20,
            num_train=80,
            num_validation=25,
            class_counts=(60, 40),
            seconds=1.0,
            golden_s=0.4,
            uniform_share=0.4,
            agreement=agreement,
            agreement_low=0.41,
            agreement_high=0.77,
        ),
        ProfileEstimated(
            site_s=45.0,
            stream_id="cam",
            window=1,
            accuracy_now=0.58,
            inference=(),
            retrain=(),
            accuracy_low=0.4,
            accuracy_high=0.75,
        ),
        LabelsSpent(site_s=80.0, window=1, budget_gpu_s=2.0, labels_s=0.4, trials_s=0.2, canary_s=0.3),
    )


def test_a_labelling_is_reported_with_the_drift_before_it_and_the_interval_of_what_it_says() -> None:
    report = build_report(events(0.6))
    (row,) = report.labels
    assert (row.drift, row.signal, row.num_frames, row.num_labels) == (0.62, "look 1", 20, 100)
    assert (row.accuracy, row.accuracy_low, row.accuracy_high) == (0.6, 0.41, 0.77)
    assert [r.budget_gpu_s for r in report.label_budget] == [None, 2.0]
    page = report_page(report, events(0.6))
    for text in ("<b>60.0</b> (41 – 77)", "0.62", "look 1", "<b>0.90 s</b> of 2.00 s", "<b>0.50 s</b> of no limit"):
        assert text in page


def test_where_labelling_did_not_measure_the_model_the_trials_figure_stands() -> None:
    (row,) = build_report(events(None)).labels
    assert (row.accuracy, row.accuracy_low, row.accuracy_high) == (0.58, 0.4, 0.75)


def test_without_labels_there_is_no_account() -> None:
    report = build_report(())
    assert report.labels == ()
    assert report.label_budget == ()
    assert "Drift and golden labels" in report_page(report, ())
