"""The report's tables of labels and trials, and of when retrainings were expected to end and did."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from html import escape

from optimizer.report_data import Report, RetrainRow, TrialsRow
from optimizer.report_figures import stream_colours
from optimizer.report_pieces import dot, seconds, table
from optimizer.report_tables import percent
from protocol.events import LabelsCollected, ProfileEstimated, RetrainFinished, TelemetryEvent, WindowOpened

# Half of an 80 % interval in standard errors.
_Z80 = statistics.NormalDist().inv_cdf(0.9)


def build_trials(events: Sequence[TelemetryEvent]) -> tuple[TrialsRow, ...]:
    """One row per stream and window that was labelled or profiled."""
    opened = {e.window: e.site_s for e in events if isinstance(e, WindowOpened)}
    labelled = {(e.window, e.stream_id): e for e in events if isinstance(e, LabelsCollected)}
    profiled: dict[tuple[int, str], list[ProfileEstimated]] = {}
    begun: dict[tuple[int, str], float] = {}
    for event in events:
        if isinstance(event, ProfileEstimated):
            profiled.setdefault((event.window, event.stream_id), []).append(event)
        elif isinstance(event, RetrainFinished) and event.elapsed_s is not None:
            key = (event.window, event.stream_id)
            begun[key] = min(begun.get(key, event.site_s), event.site_s - event.elapsed_s)
    return tuple(
        _row(key, opened[key[0]], labelled.get(key), profiled.get(key, []), begun.get(key))
        for key in sorted(labelled.keys() | profiled.keys())
        if key[0] in opened
    )


def _row(
    key: tuple[int, str],
    opens_s: float,
    labels: LabelsCollected | None,
    profiles: Sequence[ProfileEstimated],
    begun_s: float | None,
) -> TrialsRow:
    def took(stage: str) -> float | None:
        found = [e.seconds for e in profiles if e.stage == stage]
        return sum(found) if found else None

    known = [e.site_s for e in profiles if e.stage != "measure"]
    return TrialsRow(
        window=key[0],
        stream_id=key[1],
        labelled_at_s=labels.site_s - opens_s if labels is not None else None,
        looked_s=took("check"),
        tried_s=took("trial"),
        measured_s=took("measure"),
        known_at_s=max(known) - opens_s if known else None,
        retrain_at_s=begun_s - opens_s if begun_s is not None else None,
    )


def trials_table(report: Report) -> str:
    """Labels, trials and what waited for them; "" without any."""
    colours = stream_colours(report.streams)
    heads = ("window", "stream", "labelled at", "looked at", "tried for", "measured for", "known at", "retrained from")
    rows = [
        (
            str(row.window),
            dot(row.stream_id, colours),
            _at(row.labelled_at_s),
            seconds(row.looked_s),
            seconds(row.tried_s),
            seconds(row.measured_s),
            _at(row.known_at_s),
            _at(row.retrain_at_s),
        )
        for row in report.trials
    ]
    return table(heads, rows) if rows else ""


def end_errors(rows: Sequence[RetrainRow]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Relative errors of the ends expected at the start and half way, of retrainings that were trained whole."""
    whole = [row for row in rows if row.whole and row.elapsed_s]
    start = (_error(row.elapsed_predicted_s, row.elapsed_s) for row in whole)
    half = (_error(row.elapsed_half_s, row.elapsed_s) for row in whole)
    return tuple(e for e in start if e is not None), tuple(e for e in half if e is not None)


def held_out_errors(rows: Sequence[RetrainRow]) -> list[tuple[float, bool]]:
    """(|error|, whether the 80 % interval held it) of the held-out accuracies that whole retrainings were expected to
    reach."""
    off = [
        (abs(row.accuracy_after - row.held_out_predicted), row.held_out_error or 0.0)
        for row in rows
        if row.whole and row.held_out_predicted is not None
    ]
    return [(error, error <= _Z80 * standard_error) for error, standard_error in off]


def held_out_text(report: Report) -> str:
    """How well the held-out accuracies of retrainings were foreseen."""
    errors = held_out_errors(report.retrainings)
    if not errors:
        return ""
    off, held = 100 * statistics.median(error for error, _ in errors), sum(held for _, held in errors)
    return (
        f"Held-out accuracy at the end was off by {off:.1f} points in the median of {len(errors)} whole"
        f" retraining{'s' * (len(errors) != 1)}; {held} of {len(errors)} within their 80 % intervals."
    )


def expected_held_out(row: RetrainRow) -> str:
    """Held-out accuracy that was expected, with half of its 80 % interval."""
    if row.held_out_predicted is None:
        return "–"
    return f"{percent(row.held_out_predicted)} ± {percent(_Z80 * (row.held_out_error or 0.0))}"


def ends_text(report: Report) -> str:
    """How well the ends of retrainings were foreseen."""
    start, half = end_errors(report.retrainings)
    parts = [
        f"{when} the end was off by {100 * statistics.median(errors):.0f} % in the median"
        for when, errors in (("at the start", start), ("half way", half))
        if errors
    ]
    number = len(start)
    return f"{' and '.join(parts).capitalize()} ({number} whole retraining{'s' * (number != 1)})." if parts else ""


def ends_table(report: Report) -> str:
    """Predicted against true ends, seconds from the command to the report; "" without any."""
    colours = stream_colours(report.streams)
    heads = ("window", "stream", "configuration", "expected at the start", "half way", "true", "error", "half way")
    rows = [
        (
            str(row.window),
            dot(row.stream_id, colours),
            escape(row.retrain_id) + ("" if row.whole else " <small>cut short</small>"),
            seconds(row.elapsed_predicted_s),
            seconds(row.elapsed_half_s),
            seconds(row.elapsed_s),
            _percent(_error(row.elapsed_predicted_s, row.elapsed_s)),
            _percent(_error(row.elapsed_half_s, row.elapsed_s)),
        )
        for row in report.retrainings
        if row.elapsed_s
    ]
    return table(heads, rows) if rows else ""


def _error(expected_s: float | None, true_s: float | None) -> float | None:
    return abs(expected_s - true_s) / true_s if expected_s is not None and true_s else None


def _percent(error: float | None) -> str:
    return "–" if error is None else f"{100 * error:.0f} %"


def _at(value: float | None) -> str:
    return "–" if value is None else f"{value:+.1f} s"
