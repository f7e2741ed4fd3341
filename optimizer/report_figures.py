"""The report's pictures as SVG text that lives inside a page: no file, no font, no address from outside.

Text and lines of the frame are drawn in marker colours that the page's style sheet replaces, so that one picture
suits a light and a dark screen.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle

from optimizer.report_data import Comparison, Report
from optimizer.report_series import AccuracyPoint, Block, accuracy_series, condition_marks, share_blocks, with_gaps
from protocol.events import TelemetryEvent

# Distinguishable on light and dark ground, and by people who see no red and green (after Okabe and Ito).
COLOURS = ("#3b82c4", "#e08a1e", "#2a9d72", "#c765a0", "#8a6fd1", "#c2a61d", "#2ea6bd", "#d0584f")
INK, FAINT, PAPER = "#010203", "#040506", "#070809"
_MARKERS = {INK: "var(--ink)", FAINT: "var(--faint)", PAPER: "var(--card)"}
HATCHES = {"inference": "", "retrain": "////", "trial": "xxxx", "label": "||||", "canary": "...."}
KIND_NAMES = {
    "inference": "inference",
    "retrain": "retraining",
    "trial": "micro-profiling",
    "label": "labelling",
    "canary": "canary",
}
WIDTH_IN = 11.0

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9.0,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "hatch.linewidth": 0.7,
}


def stream_colours(streams: Sequence[str]) -> dict[str, str]:
    """One colour per stream, the same in every picture of a report."""
    return {stream: COLOURS[i % len(COLOURS)] for i, stream in enumerate(streams)}


def accuracy_figure(report: Report, events: Sequence[TelemetryEvent]) -> str:
    """Accuracy over time, one panel per stream: drift, swaps, window boundaries, predicted window averages."""
    series = accuracy_series(events)
    streams = [stream for stream in report.streams if series.get(stream)]
    if not streams:
        return ""
    colours = stream_colours(report.streams)
    lowest = min(point.smooth for stream in streams for point in series[stream])
    floor = max(0.0, min(lowest - 0.05, 0.5))
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(WIDTH_IN, 0.75 + 1.45 * len(streams)), layout="constrained")
        panels = figure.subplots(len(streams), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
        for panel, stream in zip(panels, streams, strict=True):
            _accuracy_panel(panel, report, stream, series[stream], colours[stream])
            panel.set_ylim(floor, 1.02)
            panel.set_xlim(*_extent(report, series))
        for window in report.windows:
            panels[0].annotate(
                f"window {window.window}",
                (window.opens_s, 1.0),
                xycoords=("data", "axes fraction"),
                xytext=(3, 3),
                textcoords="offset points",
                fontsize=8,
            )
        panels[-1].set_xlabel("site time in s")
        handles = [
            Line2D([], [], color=INK, lw=1.8, label="live accuracy (running mean)"),
            Line2D([], [], color=INK, lw=1.2, ls=(0, (4, 2)), label="predicted window average"),
            Line2D([], [], color=INK, lw=0, marker="^", ms=7, label="retrained model swapped in"),
            Line2D([], [], color=INK, lw=1.0, ls=":", label="drift"),
        ]
        figure.legend(handles=handles, loc="outside upper center", ncols=4, fontsize=8.5)
        return _svg(figure, "accuracy", "Accuracy over time per stream")


def _accuracy_panel(axes: Axes, report: Report, stream: str, points: Sequence[AccuracyPoint], colour: str) -> None:
    axes.grid(axis="y")
    shown = with_gaps(points)
    times = [point.site_s for point in shown]
    axes.plot(times, [point.accuracy for point in shown], color=colour, lw=0.7, alpha=0.35)
    axes.plot(times, [point.smooth for point in shown], color=colour, lw=1.9, solid_capstyle="round")
    # A window's closing is told when its last counts are in, a little after the next one has opened.
    nexts = [*(w.opens_s for w in report.windows), math.inf][1:]
    ends = [
        min(following, w.closes_s if w.closes_s is not None else w.opens_s + report.window_s)
        for w, following in zip(report.windows, nexts, strict=True)
    ]
    for window, end in zip(report.windows, ends, strict=True):
        axes.axvline(window.opens_s, color=FAINT, lw=1.2)
        row = next((r for r in window.streams if r.stream_id == stream), None)
        if row is not None and row.predicted is not None:
            axes.plot([window.opens_s, end], [row.predicted] * 2, color=INK, lw=1.2, ls=(0, (4, 2)), alpha=0.8)
    for mark in condition_marks(report.conditions, stream):
        axes.axvline(mark.site_s, color=INK, lw=1.0, ls=":", alpha=0.75)
        axes.annotate(
            mark.text,
            (mark.site_s, 0.03),
            xycoords=("data", "axes fraction"),
            xytext=(3, 0),
            textcoords="offset points",
            fontsize=7.5,
            style="italic",
        )
    for swap in report.swaps:
        if swap.stream_id == stream:
            level = min(points, key=lambda p: abs(p.site_s - swap.site_s)).smooth
            axes.plot(swap.site_s, level, marker="^", ms=11, color=colour, mec=PAPER, mew=1.4, zorder=5)
    axes.set_ylabel(stream, color=colour, fontweight="bold")
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")


def share_figure(report: Report, events: Sequence[TelemetryEvent]) -> str:
    """GPU shares over time as a Gantt chart: one lane per GPU, jobs stacked by share."""
    blocks = share_blocks(events)
    gpus = sorted({block.gpu_id for block in blocks})
    if not gpus:
        return ""
    colours = stream_colours(report.streams)
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(WIDTH_IN, 0.8 + 1.75 * len(gpus)), layout="constrained")
        lanes = figure.subplots(len(gpus), 1, sharex=True, squeeze=False)[:, 0]
        for axes, gpu in zip(lanes, gpus, strict=True):
            mine = [block for block in blocks if block.gpu_id == gpu]
            for block in mine:
                _draw_block(axes, block, colours.get(block.stream_id, FAINT))
            for window in report.windows:
                axes.axvline(window.opens_s, color=INK, lw=1.0, alpha=0.7)
            axes.axhline(1.0, color=INK, lw=0.8)
            axes.set_ylim(0.0, max(1.05, max(block.bottom + block.share for block in mine) + 0.05))
            axes.set_xlim(min(b.from_s for b in blocks), max(b.to_s for b in blocks))
            axes.set_ylabel(gpu, fontweight="bold")
            axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
        for window in report.windows:
            lanes[0].annotate(
                f"window {window.window}",
                (window.opens_s, 1.0),
                xycoords=("data", "axes fraction"),
                xytext=(3, 3),
                textcoords="offset points",
                fontsize=8,
            )
        lanes[-1].set_xlabel("site time in s")
        kinds = [kind for kind in HATCHES if any(block.kind == kind for block in blocks)]
        handles = [
            Patch(facecolor=colours[s], label=s) for s in report.streams if any(b.stream_id == s for b in blocks)
        ]
        handles += [
            Patch(facecolor="none", edgecolor=INK, hatch=HATCHES[kind], lw=0.7, label=KIND_NAMES[kind])
            for kind in kinds
        ]
        figure.legend(handles=handles, loc="outside upper center", ncols=min(len(handles), 8), fontsize=8.5)
        return _svg(figure, "shares", "GPU shares over time")


def _draw_block(axes: Axes, block: Block, colour: str) -> None:
    axes.add_patch(
        Rectangle(
            (block.from_s, block.bottom),
            block.to_s - block.from_s,
            block.share,
            facecolor=colour,
            alpha=0.9 if block.kind == "inference" else 0.75,
            edgecolor=PAPER,
            hatch=HATCHES[block.kind],
            lw=0.4,
        )
    )


def scatter_figure(report: Report) -> str:
    """Predicted against realised window-averaged accuracy, a point per stream and window."""
    rows = [
        (w.window, r) for w in report.windows for r in w.streams if r.realised is not None and r.predicted is not None
    ]
    if not rows:
        return ""
    colours = stream_colours(report.streams)
    values = [v for _, r in rows for v in (r.realised, r.predicted) if v is not None]
    low, high = max(0.0, min(values) - 0.06), min(1.0, max(values) + 0.06)
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(4.6, 4.3), layout="constrained")
        axes = figure.subplots()
        axes.grid()
        axes.fill_between(
            [low, high], [low - 0.08, high - 0.08], [low + 0.08, high + 0.08], color=FAINT, alpha=0.6, lw=0
        )
        axes.plot([low, high], [low, high], color=INK, lw=0.9)
        for window, row in rows:
            axes.plot(
                row.predicted or 0.0, row.realised or 0.0, "o", ms=11, color=colours[row.stream_id], mec=PAPER, mew=0.8
            )
            axes.annotate(
                str(window),
                (row.predicted or 0.0, row.realised or 0.0),
                ha="center",
                va="center_baseline",
                fontsize=7,
                color="white",
            )
        axes.set_xlim(low, high)
        axes.set_ylim(low, high)
        axes.set_aspect("equal")
        axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
        axes.set_xlabel("predicted window average")
        axes.set_ylabel("realised window average")
        return _svg(figure, "scatter", "Predicted against realised accuracy")


def comparison_figure(comparison: Comparison) -> str:
    """Window-averaged accuracy per policy: bars with a point per window."""
    rows = [row for row in comparison.policies if row.mean_realised is not None]
    if not rows:
        return ""
    points = [value for row in rows for value in row.windows]
    low = max(0.0, math.floor(20.0 * min([*points, *(row.mean_realised or 0.0 for row in rows)]) - 1.0) / 20.0)
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(WIDTH_IN, 0.9 + 0.62 * len(rows)), layout="constrained")
        axes = figure.subplots()
        axes.grid(axis="x")
        axes.set_axisbelow(True)
        for place, row in enumerate(rows):
            mean = row.mean_realised or 0.0
            colour = COLOURS[place % len(COLOURS)]
            axes.barh(place, mean - low, left=low, height=0.62, color=colour, alpha=0.85)
            # Spread up and down in a fixed pattern, so that equal values stay visible.
            heights = [place + 0.2 * (((i * 5) % 7) / 3.0 - 1.0) for i in range(len(row.windows))]
            axes.plot(row.windows, heights, "o", ms=5, color=PAPER, mec=INK, mew=0.9)
            axes.annotate(
                f"{100 * mean:.1f} %",
                (max([mean, *row.windows]), place),
                xytext=(8, 0),
                textcoords="offset points",
                va="center",
                fontweight="bold",
            )
        axes.set_yticks(range(len(rows)), [row.policy for row in rows])
        axes.invert_yaxis()
        axes.set_xlim(low, min(1.0, max(points, default=1.0) + 0.04) + 0.04)
        axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
        begins = f"; the axis begins at {100 * low:.0f} %" if low > 0.0 else ""
        axes.set_xlabel(f"window-averaged inference accuracy (bars: mean, points: windows{begins})")
        return _svg(figure, "comparison", "Window-averaged accuracy per policy")


def _extent(report: Report, series: dict[str, tuple[AccuracyPoint, ...]]) -> tuple[float, float]:
    times = [point.site_s for points in series.values() for point in points]
    times += [window.opens_s for window in report.windows]
    times += [window.closes_s for window in report.windows if window.closes_s is not None]
    low, high = min(times), max(times)
    return low, high if high > low else low + 1.0


def _svg(figure: Figure, name: str, title: str) -> str:
    """The figure as an <svg> element: marker colours replaced, ids made unique to it, no outside reference."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        FigureCanvasSVG(figure).print_svg(  # type: ignore[no-untyped-call]
            buffer, metadata={"Date": None, "Creator": None, "Format": None, "Type": None}
        )
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\s+xmlns(:\w+)?="[^"]*"', "", text)
    text = re.sub(r'\b(id="|href="#|url\(#)', rf"\g<1>{name}-", text)
    for marker, variable in _MARKERS.items():
        text = text.replace(marker, variable)
    size = re.search(r'viewBox="[^"]*"', text)
    head = f'<svg class="figure" role="img" aria-label="{title}" {size.group(0) if size else ""} version="1.1">'
    return re.sub(r"<svg[^>]*>", lambda _: head, text, count=1)
