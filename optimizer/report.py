"""A run's report from its event log: what was planned, what happened, and how far the two are apart.

``read_events`` -> ``build_report`` -> ``write_report``; only the last one touches matplotlib and the disk.
"""

from __future__ import annotations

import logging
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec
from rich.table import Table

from optimizer.report_comparison import build_comparison, comparison_table, write_comparison
from optimizer.report_contention import build_contention
from optimizer.report_data import (
    ConditionRow,
    GateRow,
    Report,
    RetrainRow,
    ShareRow,
    SolveRow,
    StreamWindowRow,
    SwapRow,
    WindowRow,
)
from optimizer.report_html import report_page
from optimizer.report_labels import label_rows, labels_rows
from optimizer.report_tables import final_table
from optimizer.report_trials import build_trials
from protocol.errors import InputError
from protocol.events import (
    ExecutorChanged,
    GateDecided,
    JobShare,
    Notice,
    PlannedStream,
    PlanSolved,
    ProfileEstimated,
    RetrainFinished,
    StreamAccuracy,
    StreamWindow,
    TelemetryEvent,
    WindowClosed,
    WindowOpened,
    WorkerChanged,
)

__all__ = [
    "Table",
    "build_comparison",
    "build_report",
    "comparison_table",
    "final_table",
    "read_events",
    "write_comparison",
    "write_report",
]

log = logging.getLogger("ekya.report")

_DECODER: msgspec.json.Decoder[TelemetryEvent] = msgspec.json.Decoder(TelemetryEvent)


def read_events(path: Path) -> tuple[TelemetryEvent, ...]:
    """All events of an ``events.jsonl``, in file order.

    A line that cannot be read is skipped with a warning: the last one may be torn by a crash, and a loss that is
    not a number does not survive JSON. Raises InputError when the file cannot be opened, or when it has lines but
    not one event.
    """
    events: list[TelemetryEvent] = []
    skipped = 0
    try:
        with path.open("rb") as file:
            for line in file:
                if not line.strip():
                    continue
                try:
                    events.append(_DECODER.decode(line))
                except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
                    skipped += 1
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); give the events.jsonl of a run") from None
    if skipped and not events:
        raise InputError(f"{path}: none of its {skipped} lines is a telemetry event; give the events.jsonl of a run")
    if skipped:
        log.warning("events=skipped path=%s lines=%d", path, skipped)
    return tuple(events)


def build_report(events: Sequence[TelemetryEvent], *, site: str = "") -> Report:
    """Sum up a run. Any subset of its events gives a report; what cannot be known is None or empty."""
    opened = {e.window: e for e in events if isinstance(e, WindowOpened)}
    closed = {e.window: e for e in events if isinstance(e, WindowClosed)}
    solves = [e for e in events if isinstance(e, PlanSolved)]
    windows = tuple(_window_row(number, opened, closed, solves) for number in sorted(opened | closed))
    rows = [row for window in windows for row in window.streams]
    streams = tuple(sorted({s for e in events if (s := getattr(e, "stream_id", ""))} | {r.stream_id for r in rows}))
    gpus = _gpus(events)
    return Report(
        site=site,
        policy=next((e.policy for e in opened.values()), next((e.policy for e in solves), "")),
        started_s=min((e.time_s for e in events if e.time_s > 0.0), default=0.0),
        duration_s=max((e.site_s for e in events), default=0.0) - min((e.site_s for e in events), default=0.0),
        window_s=statistics.median([e.window_s for e in opened.values()] or [0.0]),
        streams=streams,
        gpus=gpus,
        mean_realised=_mean(row.realised for row in rows),
        mean_predicted=_mean(row.predicted for row in rows),
        mean_abs_error=_mean(row.abs_error for row in rows),
        windows=windows,
        solves=tuple(_solve_row(e) for e in solves),
        retrainings=tuple(_retrain_row(e) for e in events if isinstance(e, RetrainFinished)),
        trials=build_trials(events),
        gates=tuple(_gate_row(e) for e in events if isinstance(e, GateDecided)),
        labels=label_rows(events),
        label_budget=labels_rows(events),
        swaps=tuple(
            SwapRow(site_s=e.site_s, stream_id=e.stream_id, gap_ms=e.gap_ms)
            for e in events
            if isinstance(e, WorkerChanged) and e.change == "swapped"
        ),
        conditions=_conditions(events),
        shares=_shares(events),
        contention=build_contention([e for e in events if isinstance(e, ProfileEstimated)], windows, len(gpus)),
        num_failed_workers=sum(isinstance(e, WorkerChanged) and e.change == "failed" for e in events),
        num_lost_executors=sum(isinstance(e, ExecutorChanged) and e.change == "lost" for e in events),
        notices=tuple(f"{e.level}: {e.text}" for e in events if isinstance(e, Notice)),
    )


def write_report(report: Report, events: Sequence[TelemetryEvent], out_dir: Path) -> tuple[Path, Path]:
    """Write ``report.json`` and the self-contained ``report.html``; their paths. Raises InputError when it cannot."""
    json_path, html_path = out_dir / "report.json", out_dir / "report.html"
    page = report_page(report, events)
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        json_path.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=1))
        html_path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise InputError(f"{out_dir}: the report cannot be written ({error.strerror}); choose another folder") from None
    return json_path, html_path


# ---------------------------------------------------------------- rows


def _window_row(
    number: int, opened: dict[int, WindowOpened], closed: dict[int, WindowClosed], solves: Sequence[PlanSolved]
) -> WindowRow:
    mine = [e for e in solves if e.window == number]
    # The window's own plan tells the choices; a re-plan only continues it, and a window may never get that far.
    plan = next((e for e in mine if e.phase == "plan"), mine[-1] if mine else None)
    planned = {row.stream_id: row for row in plan.streams} if plan is not None else {}
    for replan in (e for e in mine if e.phase == "replan"):
        for row in replan.streams:
            # A retraining that only a re-plan begins is a choice of the window all the same.
            if row.retrain_id and row.stream_id in planned and not planned[row.stream_id].retrain_id:
                planned[row.stream_id] = row
    end = closed.get(number)
    result = {row.stream_id: row for row in end.streams} if end is not None else {}
    opening = opened.get(number)
    return WindowRow(
        window=number,
        opens_s=opening.site_s if opening is not None else 0.0,
        closes_s=end.site_s if end is not None else None,
        realised=end.realised if end is not None else None,
        predicted=end.predicted if end is not None else None,
        streams=tuple(_stream_row(s, planned.get(s), result.get(s)) for s in sorted(planned.keys() | result.keys())),
        num_solves=len(mine),
    )


def _stream_row(stream_id: str, planned: PlannedStream | None, result: StreamWindow | None) -> StreamWindowRow:
    realised = result.realised if result is not None else None
    predicted = result.predicted if result is not None else (planned.predicted if planned is not None else None)
    both = realised is not None and predicted is not None
    row = StreamWindowRow(
        stream_id=stream_id,
        realised=realised,
        predicted=predicted,
        abs_error=abs(realised - predicted) if both and realised is not None and predicted is not None else None,
    )
    if planned is not None:
        row = msgspec.structs.replace(
            row,
            inference_id=planned.inference_id,
            inference_share=planned.inference_share,
            inference_gpu=planned.inference_gpu,
            retrain_id=planned.retrain_id,
            retrain_share=planned.retrain_share,
            retrain_gpu=planned.retrain_gpu,
            retrain_start_s=planned.retrain_start_s,
            retrain_end_s=planned.retrain_end_s,
            inference_id_after=planned.inference_id_after,
        )
    if result is not None:
        row = msgspec.structs.replace(
            row,
            swapped=result.swapped,
            num_frames=result.num_frames,
            num_analysed=result.num_analysed,
            num_dropped=result.num_dropped,
            num_objects=result.num_objects,
        )
    return row


def _solve_row(e: PlanSolved) -> SolveRow:
    return SolveRow(
        site_s=e.site_s,
        window=e.window,
        revision=e.revision,
        phase=e.phase,
        reason=e.reason,
        policy=e.policy,
        status=e.status,
        predicted=e.predicted,
        bound=e.bound,
        gap=e.gap,
        seconds=e.seconds,
        detail=e.detail,
    )


def _retrain_row(e: RetrainFinished) -> RetrainRow:
    return RetrainRow(
        site_s=e.site_s,
        stream_id=e.stream_id,
        window=e.window,
        retrain_id=e.retrain_id,
        accuracy_before=e.accuracy_before,
        accuracy_after=e.accuracy_after,
        map_before=e.map_before,
        map_after=e.map_after,
        elapsed_s=e.elapsed_s,
        elapsed_predicted_s=e.elapsed_predicted_s,
        elapsed_half_s=e.elapsed_half_s,
        whole=e.whole,
        held_out_predicted=e.held_out_predicted,
        held_out_error=e.held_out_error,
        accuracy_predicted=e.accuracy_predicted,
        seconds=e.seconds,
        seconds_predicted=e.seconds_predicted,
        promoted=e.promoted,
        reason=e.reason,
    )


def _gate_row(e: GateDecided) -> GateRow:
    return GateRow(
        site_s=e.site_s,
        stream_id=e.stream_id,
        window=e.window,
        stage=e.stage,
        decision=e.decision,
        retrain_id=e.retrain_id,
        version=e.version,
        previous_version=e.previous_version,
        accuracy_candidate=e.accuracy_candidate,
        accuracy_previous=e.accuracy_previous,
        num_objects=e.paired.num_objects,
        num_won=e.paired.num_won,
        num_lost=e.paired.num_lost,
        confidence=e.confidence,
        seconds=e.seconds,
        reason=e.reason,
    )


def _conditions(events: Sequence[TelemetryEvent]) -> tuple[ConditionRow, ...]:
    last: dict[str, str] = {}
    rows = []
    for e in events:
        if not isinstance(e, StreamAccuracy) or not e.conditions:
            continue
        before = last.get(e.stream_id)
        if before is not None and before != e.conditions:
            rows.append(ConditionRow(site_s=e.site_s, stream_id=e.stream_id, before=before, after=e.conditions))
        last[e.stream_id] = e.conditions
    return tuple(rows)


def _shares(events: Sequence[TelemetryEvent]) -> tuple[ShareRow, ...]:
    groups: dict[tuple[str, str], list[JobShare]] = {}
    for e in events:
        if isinstance(e, JobShare) and e.share_achieved is not None:
            groups.setdefault((e.gpu_id, e.kind), []).append(e)
    return tuple(
        ShareRow(
            gpu_id=gpu_id,
            kind=rows[0].kind,
            granted=statistics.fmean(e.share_granted for e in rows),
            achieved=statistics.fmean(e.share_achieved or 0.0 for e in rows),
            num_reports=len(rows),
        )
        for (gpu_id, _), rows in sorted(groups.items())
    )


def _gpus(events: Sequence[TelemetryEvent]) -> tuple[str, ...]:
    found = {e.gpu_id for e in events if isinstance(e, JobShare | WorkerChanged | ExecutorChanged)}
    for e in events:
        if isinstance(e, PlanSolved):
            found |= {row.inference_gpu for row in e.streams} | {row.retrain_gpu for row in e.streams}
    return tuple(sorted(found - {""}))


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None
