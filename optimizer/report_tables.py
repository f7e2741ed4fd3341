"""Tables for the terminal."""

from __future__ import annotations

import statistics

from rich.table import Table

from optimizer.report_data import Report, StreamWindowRow


def percent(value: float | None, digits: int = 1) -> str:
    """A fraction as per cent, a dash when it is not known."""
    return "–" if value is None else f"{100.0 * value:.{digits}f}"


def final_table(report: Report) -> Table:
    """Realised against predicted window-averaged accuracy, one row per stream, one column per window."""
    table = Table(title="Window-averaged accuracy in %: realised (predicted)", title_justify="left")
    table.add_column("stream", no_wrap=True)
    for window in report.windows:
        table.add_column(f"window {window.window}", justify="right", no_wrap=True)
    table.add_column("mean", justify="right", no_wrap=True)
    table.add_column("|error|", justify="right", no_wrap=True)
    for stream_id in report.streams:
        found = [{row.stream_id: row for row in window.streams}.get(stream_id) for window in report.windows]
        if any(row is not None for row in found):
            table.add_row(stream_id, *(_cell(row) for row in found), *_sums([r for r in found if r is not None]))
    table.add_section()
    everything = [row for window in report.windows for row in window.streams]
    table.add_row(
        "all streams",
        *(f"{percent(window.realised)} ({percent(window.predicted)})" for window in report.windows),
        *_sums(everything),
        style="bold",
    )
    return table


def _cell(row: StreamWindowRow | None) -> str:
    return "–" if row is None else f"{percent(row.realised)} ({percent(row.predicted)})"


def _sums(rows: list[StreamWindowRow]) -> tuple[str, str]:
    realised = [row.realised for row in rows if row.realised is not None]
    predicted = [row.predicted for row in rows if row.predicted is not None]
    errors = [row.abs_error for row in rows if row.abs_error is not None]
    mean = f"{percent(_mean(realised))} ({percent(_mean(predicted))})"
    return mean, percent(_mean(errors))


def _mean(values: list[float]) -> float | None:
    return statistics.fmean(values) if values else None
