"""The report as one self-contained page: no script, no outside reference, light and dark."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from datetime import UTC, datetime
from html import escape

from optimizer.report_data import Comparison, Report, StreamWindowRow
from optimizer.report_figures import (
    accuracy_figure,
    comparison_figure,
    scatter_figure,
    share_figure,
    stream_colours,
)
from optimizer.report_gates import gate_table
from optimizer.report_labels import labels_table, labels_text
from optimizer.report_pieces import count, dot, fold, seconds, strong, table
from optimizer.report_style import STYLE
from optimizer.report_tables import percent
from optimizer.report_trials import ends_table, ends_text, expected_held_out, held_out_text, trials_table
from protocol.events import TelemetryEvent


def report_page(report: Report, events: Sequence[TelemetryEvent]) -> str:
    """HTML of a run's report. ``events`` feed the time series."""
    when = datetime.fromtimestamp(report.started_s, UTC).strftime("%Y-%m-%d %H:%M UTC") if report.started_s else ""
    subtitle = " · ".join(
        part
        for part in (
            report.site,
            f"policy {report.policy}" if report.policy else "",
            count(len(report.streams), "stream"),
            f"{count(len(report.windows), 'window')} of {report.window_s:.0f} s",
            count(len(report.gpus), "GPU"),
            when,
        )
        if part
    )
    body = "".join(
        (
            _tiles(report),
            _section(
                "Accuracy over time",
                "Live accuracy of every stream. Dotted lines mark drift, triangles the instant a retrained model took"
                " over, dashes what the plan predicted for the window on average.",
                accuracy_figure(report, events),
            ),
            _section(
                "GPU shares over time",
                "One lane per GPU, the granted shares of its jobs stacked: colour tells the stream, hatching the kind"
                " of job.",
                share_figure(report, events),
            ),
            _section(
                "Predicted against realised",
                "Every point is a stream in a window (its number inside); the band is ±8 points.",
                f'<div class="split">{scatter_figure(report)}{_accuracy_table(report)}</div>' if report.windows else "",
            ),
            _section("Plans", _plan_text(report), _plan_table(report)),
            _section(
                "Labels, trials and the first retraining",
                "Seconds after the window opened, negative before it. A stream's retraining is chosen when it is known"
                " what its configurations are worth; measurements of inference configurations hold nothing up.",
                trials_table(report),
            ),
            _section("Is there anything to decide?", _contention_text(report), _contention_table(report)),
            _section(
                "Retrainings and the gate",
                "Accuracies on the same held-out labels, before and after, with what was expected of them and half of"
                f" its 80 % interval. Only a promoted model goes live. {held_out_text(report)}",
                _retrain_table(report),
            ),
            _section("When retrainings end", ends_text(report), ends_table(report)),
            _section(
                "Models on their way",
                "Every test of a retrained model: at the gate on held-out labels, in the shadow and as a canary on"
                " fresh labels of the live stream. One vote per road user; confidence that the new model is better.",
                gate_table(report),
            ),
            _section(
                "Drift and golden labels",
                "How far a stream was from what its model was made for, what was labelled then, and what the model that"
                " served got right on those labels.",
                labels_text(report) + labels_table(report),
            ),
            _section("Planner", _solve_text(report), _solve_table(report)),
            _section("Granted and achieved GPU shares", "Means over the reports of all jobs.", _share_table(report)),
            _section("Notices", "", _notices(report)),
        )
    )
    return _page("Ekya run report", subtitle, body)


def comparison_page(comparison: Comparison) -> str:
    """HTML of an experiment's comparison."""
    rows = [
        (
            strong(row.policy),
            percent(row.mean_realised),
            "–" if not row.windows else f"{percent(min(row.windows))} – {percent(max(row.windows))}",
            percent(row.mean_predicted),
            percent(row.mean_abs_error),
            f"{row.num_promoted} of {row.num_retrainings}",
            seconds(row.median_solve_s),
            str(row.num_runs),
        )
        for row in comparison.policies
    ]
    heads = (
        "policy",
        "realised %",
        "windows min – max",
        "predicted %",
        "mean |error|",
        "promoted",
        "median solve",
        "runs",
    )
    body = _section("Window-averaged accuracy per policy", "", comparison_figure(comparison))
    body += _section("Table", "", table(heads, rows))
    return _page("Ekya policy comparison", comparison.site, body)


# ---------------------------------------------------------------- sections


def _tiles(report: Report) -> str:
    solves = [solve for solve in report.solves if solve.phase != "profiling"]
    gaps = [solve.gap for solve in solves if solve.gap is not None]
    frames = sum(row.num_frames for window in report.windows for row in window.streams)
    dropped = sum(row.num_dropped for window in report.windows for row in window.streams)
    promoted = sum(row.promoted for row in report.retrainings)
    promoted += sum(row.decision == "promoted" and row.stage == "shadow" for row in report.gates)
    rolled_back = sum(row.decision == "rolled_back" for row in report.gates)
    contention = report.contention.best_share_of_machine
    tiles = [
        ("realised accuracy", f"{percent(report.mean_realised)} %", "window-averaged, mean over streams and windows"),
        ("predicted accuracy", f"{percent(report.mean_predicted)} %", "by the plans and the micro-profiler"),
        ("mean |error|", f"{percent(report.mean_abs_error)} pts", "realised against predicted"),
        (
            "models promoted",
            f"{promoted} of {len(report.retrainings)}",
            f"{count(len(report.swaps), 'hot swap')}, {count(rolled_back, 'roll-back')},"
            f" {count(len(report.conditions), 'drift event')}",
        ),
        (
            "median solve time",
            seconds(statistics.median(s.seconds for s in solves) if solves else None),
            f"median gap {100 * statistics.median(gaps):.2g} %" if gaps else "no bound proven",
        ),
        ("machine needed", f"{percent(contention, 0)} %", "to serve all at the best inference configuration"),
        ("frames dropped", f"{percent(dropped / frames if frames else None)} %", f"of {frames:,} frames"),
    ]
    if report.num_failed_workers or report.num_lost_executors:
        tiles.append(
            (
                "faults",
                str(report.num_failed_workers + report.num_lost_executors),
                f"{report.num_failed_workers} workers failed, {report.num_lost_executors} executors lost",
            )
        )
    return (
        '<div class="tiles">'
        + "".join(
            f'<div class="tile"><div class="label">{escape(label)}</div><div class="value">{escape(value)}</div>'
            f'<div class="note">{escape(note)}</div></div>'
            for label, value, note in tiles
        )
        + "</div>"
    )


def _accuracy_table(report: Report) -> str:
    colours = stream_colours(report.streams)
    heads = ("stream", *(f"window {w.window}" for w in report.windows), "mean |error|")
    rows = []
    for stream in report.streams:
        found = [next((r for r in w.streams if r.stream_id == stream), None) for w in report.windows]
        if any(found):
            errors = [r.abs_error for r in found if r is not None and r.abs_error is not None]
            mean = statistics.fmean(errors) if errors else None
            rows.append((dot(stream, colours), *(_accuracy_cell(r) for r in found), percent(mean)))
    rows.append(
        (
            strong("all streams"),
            *(f"{percent(w.realised)} <small>({percent(w.predicted)})</small>" for w in report.windows),
            strong(percent(report.mean_abs_error)),
        )
    )
    return f'<div class="grow">{table(heads, rows)}<p class="hint">realised % <small>(predicted)</small></p></div>'


def _accuracy_cell(row: StreamWindowRow | None) -> str:
    if row is None:
        return "–"
    mark = ' class="off"' if row.abs_error is not None and row.abs_error > 0.08 else ""
    return f"<span{mark}>{percent(row.realised)} <small>({percent(row.predicted)})</small></span>"


def _plan_text(report: Report) -> str:
    c = report.contention
    return (
        f"{count(c.num_distinct_plans, 'distinct choice')} of configurations. In {c.windows_with_different_plans} of"
        f" {count(len(report.windows), 'window')} streams are treated differently; for"
        f" {c.streams_with_changing_plans} of {count(len(report.streams), 'stream')} the choice changes from window"
        " to window. A cell: inference configuration (→ the one after the swap) with its share, below it the"
        " retraining."
    )


def _plan_table(report: Report) -> str:
    colours = stream_colours(report.streams)
    kinds = sorted({r.retrain_id for w in report.windows for r in w.streams if r.retrain_id})
    tints = {kind: (47 * i) % 360 for i, kind in enumerate(kinds)}
    rows = []
    for stream in report.streams:
        cells = []
        for window in report.windows:
            row = next((r for r in window.streams if r.stream_id == stream and r.inference_id), None)
            cells.append("–" if row is None else _plan_cell(row, tints))
        if any(cell != "–" for cell in cells):
            rows.append((dot(stream, colours), *cells))
    return table(("stream", *(f"window {w.window}" for w in report.windows)), rows, "plans") if rows else ""


def _plan_cell(row: StreamWindowRow, tints: dict[str, int]) -> str:
    after = f" → {escape(row.inference_id_after)}" if row.inference_id_after not in ("", row.inference_id) else ""
    first = (
        f"<b>{escape(row.inference_id)}</b>{after} <small>{100 * row.inference_share:.0f} % of"
        f" {escape(row.inference_gpu)}</small>"
    )
    if not row.retrain_id:
        return f'{first}<div class="chip none">no retraining</div>'
    return (
        f'{first}<div class="chip" style="--hue:{tints[row.retrain_id]}">{escape(row.retrain_id)} <small>'
        f"{100 * row.retrain_share:.0f} % of {escape(row.retrain_gpu)}, {_seconds(row.retrain_start_s)}–"
        f"{_seconds(row.retrain_end_s)} s</small></div>"
    )


def _seconds(value: float) -> str:
    return f"{value:.1f}" if value < 9.95 else f"{value:.0f}"


def _contention_text(report: Report) -> str:
    c = report.contention
    if c.best_share_of_machine is None:
        return "No profile was estimated in this run."
    ratio = f"at least {c.cost_ratio:.0f}×" if c.cost_ratio is not None else "an unknown factor"
    return (
        "Serving all streams at their most accurate inference configuration takes"
        f" {percent(c.best_share_of_machine, 0)} % of {count(c.num_gpus, 'GPU')}; within every stream and window"
        f" retraining configurations differ by {ratio} in cost."
    )


def _contention_table(report: Report) -> str:
    colours = stream_colours(report.streams)
    rows = [
        (
            str(p.window),
            dot(p.stream_id, colours),
            escape(p.best_inference_id),
            f"{100 * p.best_inference_share:.0f} %",
            str(p.num_retrain),
            seconds(p.cheapest_s),
            seconds(p.dearest_s),
            f"{p.dearest_s / p.cheapest_s:.0f}×" if p.cheapest_s and p.dearest_s else "–",
        )
        for p in report.contention.profiles
    ]
    heads = ("window", "stream", "best inference", "its share", "retrainings", "cheapest", "dearest", "ratio")
    return fold(table(heads, rows), f"{len(rows)} estimated profiles") if rows else ""


def _retrain_table(report: Report) -> str:
    colours = stream_colours(report.streams)
    detectors = any(r.map_after is not None for r in report.retrainings)
    rows = [
        (
            str(r.window),
            dot(r.stream_id, colours),
            escape(r.retrain_id),
            f"{percent(r.accuracy_before)} → {strong(percent(r.accuracy_after))}",
            expected_held_out(r),
            percent(r.accuracy_predicted),
            seconds(r.seconds),
            seconds(r.seconds_predicted),
            *((f"{percent(r.map_before)} → {percent(r.map_after)}",) if detectors else ()),
            '<span class="yes">promoted</span>' if r.promoted else '<span class="no">refused</span>',
            escape(r.reason),
        )
        for r in report.retrainings
    ]
    heads = (
        "window",
        "stream",
        "configuration",
        "before → after %",
        "expected",
        "live, predicted %",
        "took",
        "predicted",
        *(("mAP %",) if detectors else ()),
        "gate",
        "reason",
    )
    return table(heads, rows) if rows else ""


def _solve_text(report: Report) -> str:
    replans = sum(s.phase == "replan" for s in report.solves)
    fallbacks = sum(s.status == "fallback" for s in report.solves)
    return (
        f"{count(len(report.solves), 'plan')}, {replans} of them re-plans of a running window, {fallbacks} made by a"
        " fallback."
    )


def _solve_table(report: Report) -> str:
    rows = [
        (
            f"{s.window}.{s.revision}",
            f"{s.site_s:.0f} s",
            escape(s.phase),
            escape(s.reason),
            escape(s.policy),
            escape(s.status),
            percent(s.predicted),
            percent(s.bound),
            "–" if s.gap is None else f"{100 * s.gap:.2f} %",
            seconds(s.seconds),
            escape(s.detail),
        )
        for s in report.solves
    ]
    heads = ("plan", "at", "phase", "why", "policy", "status", "value %", "bound %", "gap", "took", "detail")
    return fold(table(heads, rows), f"{len(rows)} plans") if rows else ""


def _share_table(report: Report) -> str:
    rows = [
        (
            escape(s.gpu_id),
            escape(s.kind),
            f"{100 * s.granted:.1f} %",
            f"{100 * s.achieved:.1f} %",
            f"{s.achieved / s.granted:.2f}" if s.granted > 0 else "–",
            str(s.num_reports),
        )
        for s in report.shares
    ]
    return table(("GPU", "kind of job", "granted", "achieved", "achieved / granted", "reports"), rows) if rows else ""


def _notices(report: Report) -> str:
    return "<ul>" + "".join(f"<li>{escape(n)}</li>" for n in report.notices) + "</ul>" if report.notices else ""


# ---------------------------------------------------------------- pieces


def _page(title: str, subtitle: str, body: str) -> str:
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body><main>"
        f'<header><h1>{escape(title)}</h1><p class="sub">{escape(subtitle)}</p></header>{body}</main></body></html>\n'
    )


def _section(title: str, text: str, content: str) -> str:
    if not content:
        content = '<p class="hint">Nothing was recorded.</p>'
    lead = f'<p class="lead">{escape(text)}</p>' if text else ""
    return f"<section><h2>{escape(title)}</h2>{lead}{content}</section>"
