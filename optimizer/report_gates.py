"""The report's table of gate decisions."""

from __future__ import annotations

from html import escape

from optimizer.report_data import GateRow, Report
from optimizer.report_figures import stream_colours
from optimizer.report_pieces import dot, seconds, strong, table
from optimizer.report_tables import percent

_GOOD = ("promoted", "kept")
_WORDS = {"on_trial": "on trial", "rolled_back": "rolled back"}


def gate_table(report: Report) -> str:
    """Every decision about a retrained model, in order; "" when there was none."""
    colours = stream_colours(report.streams)
    heads = (
        "at",
        "stream",
        "model",
        "configuration",
        "test",
        "old → new %",
        "votes won : lost",
        "of road users",
        "confidence",
        "took",
        "decision",
        "evidence",
    )
    rows = [
        (
            f"{row.site_s:.0f} s",
            dot(row.stream_id, colours),
            f"{row.previous_version} → {row.version}",
            escape(row.retrain_id),
            escape(row.stage),
            f"{percent(row.accuracy_previous)} → {strong(percent(row.accuracy_candidate))}",
            f"{row.num_won} : {row.num_lost}",
            str(row.num_objects),
            f"{percent(row.confidence, 0)} %",
            seconds(row.seconds) if row.stage != "gate" else "–",
            _decision(row),
            escape(row.reason),
        )
        for row in report.gates
    ]
    return table(heads, rows) if rows else ""


def _decision(row: GateRow) -> str:
    word = escape(_WORDS.get(row.decision, row.decision))
    if row.decision == "on_trial":
        return word
    return f'<span class="{"yes" if row.decision in _GOOD else "no"}">{word}</span>'
