"""The report's account of golden labels and drift: what was labelled, what it said of the models, what it cost."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from optimizer.report_data import LabelRow, LabelsRow, Report
from optimizer.report_figures import stream_colours
from optimizer.report_pieces import dot, seconds, strong, table
from optimizer.report_tables import percent
from protocol.events import DriftScored, LabelsCollected, LabelsSpent, ProfileEstimated, TelemetryEvent


def label_rows(events: Sequence[TelemetryEvent]) -> tuple[LabelRow, ...]:
    """One row per labelling, in order; the drift is the last score that was told of the stream's window before it.

    Where a trial job measured the model on the same labels and labelling did not, the trial's figure stands.
    """
    rows: list[LabelRow] = []
    drift: dict[str, DriftScored] = {}
    for event in events:
        match event:
            case DriftScored():
                drift[event.stream_id] = event
            case LabelsCollected():
                known = drift.get(event.stream_id)
                rows.append(
                    LabelRow(
                        site_s=event.site_s,
                        stream_id=event.stream_id,
                        window=event.window,
                        drift=known.score if known else None,
                        signal=known.signal if known else "",
                        num_frames=event.num_frames,
                        num_labels=sum(event.class_counts),
                        uniform_share=event.uniform_share,
                        golden_s=event.golden_s,
                        accuracy=event.agreement,
                        accuracy_low=event.agreement_low if event.agreement is not None else None,
                        accuracy_high=event.agreement_high if event.agreement is not None else None,
                    )
                )
            case ProfileEstimated():
                _fill_in(rows, event)
            case _:
                pass
    return tuple(rows)


def _fill_in(rows: list[LabelRow], event: ProfileEstimated) -> None:
    for number in range(len(rows) - 1, -1, -1):
        row = rows[number]
        if (row.stream_id, row.window) != (event.stream_id, event.window):
            continue
        if row.accuracy is None and (event.accuracy_low, event.accuracy_high) != (0.0, 1.0):
            rows[number] = LabelRow(
                **{name: getattr(row, name) for name in row.__struct_fields__ if not name.startswith("accuracy")},
                accuracy=event.accuracy_now,
                accuracy_low=event.accuracy_low,
                accuracy_high=event.accuracy_high,
            )
        return


def labels_rows(events: Sequence[TelemetryEvent]) -> tuple[LabelsRow, ...]:
    """One row per window: where the golden models' seconds went."""
    newest = {e.window: e for e in events if isinstance(e, LabelsSpent)}
    return tuple(
        LabelsRow(
            window=e.window,
            budget_gpu_s=e.budget_gpu_s,
            labels_s=e.labels_s,
            trials_s=e.trials_s,
            canary_s=e.canary_s,
        )
        for _, e in sorted(newest.items())
    )


def labels_text(report: Report) -> str:
    """Seconds of golden models per window, in a sentence each; "" when nothing is known."""
    parts = []
    for row in report.label_budget:
        spent_s = row.labels_s + row.trials_s + row.canary_s
        limit = f"{row.budget_gpu_s:.2f} s" if row.budget_gpu_s is not None else "no limit"
        parts.append(
            f"window {row.window}: {strong(f'{spent_s:.2f} s')} of {limit} (labels {row.labels_s:.2f}, clips of trials"
            f" {row.trials_s:.2f}, comparisons {row.canary_s:.2f})"
        )
    return f"<p>Busy seconds of golden models. {'; '.join(parts)}.</p>" if parts else ""


def labels_table(report: Report) -> str:
    """Every labelling; "" when there was none."""
    colours = stream_colours(report.streams)
    heads = (
        "at",
        "window",
        "stream",
        "drift",
        "signal",
        "frames",
        "evenly spread",
        "labels",
        "golden",
        "accuracy, 95 %",
    )
    rows = [
        (
            f"{row.site_s:.0f} s",
            str(row.window),
            dot(row.stream_id, colours),
            "–" if row.drift is None else f"{row.drift:.2f}",
            escape(row.signal) or "–",
            str(row.num_frames),
            f"{percent(row.uniform_share, 0)} %",
            str(row.num_labels),
            seconds(row.golden_s),
            _interval(row),
        )
        for row in report.labels
    ]
    return table(heads, rows) if rows else ""


def _interval(row: LabelRow) -> str:
    if row.accuracy is None:
        return "–"
    return f"{strong(percent(row.accuracy))} ({percent(row.accuracy_low, 0)} – {percent(row.accuracy_high, 0)})"
