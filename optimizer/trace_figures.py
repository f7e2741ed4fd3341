"""Plots of trace-driven studies, as SVG and PNG files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from optimizer.report_figures import COLOURS
from optimizer.trace_study import StudyRow
from protocol.errors import InputError

_MARKS = "osD^vPX*"
_STYLE: dict[Any, Any] = {
    "font.size": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.linewidth": 0.4,
    "legend.frameon": False,
    "svg.hashsalt": "ekya",
}


def write_simulate_figures(rows: Sequence[StudyRow], policies: Sequence[str], folder: Path) -> list[Path]:
    """Accuracy against streams (one panel per number of GPUs) and against GPUs, where there are several of them."""
    found: list[Path] = []
    streams, gpus = sorted({row.streams for row in rows}), sorted({row.gpus for row in rows})
    if len(streams) > 1:
        found += _panels(rows, policies, gpus, ("gpus", "GPUs"), ("streams", "streams"), folder / "accuracy_by_streams")
    if len(gpus) > 1:
        found += _panels(rows, policies, streams, ("streams", "streams"), ("gpus", "GPUs"), folder / "accuracy_by_gpus")
    return found


def _panels(
    rows: Sequence[StudyRow],
    policies: Sequence[str],
    values: Sequence[int],
    fixed: tuple[str, str],
    along: tuple[str, str],
    path: Path,
) -> list[Path]:
    def draw(figure: Figure) -> None:
        panels = figure.subplots(1, len(values), sharey=True, squeeze=False)[0]
        for panel, value in zip(panels, values, strict=True):
            chosen = [row for row in rows if getattr(row, fixed[0]) == value]
            panel.set_title(f"{value} {fixed[1]}")
            panel.set_xlabel(along[1])
            for index, policy in enumerate(policies):
                own = [row for row in chosen if row.policy == policy]
                xs = sorted({int(getattr(row, along[0])) for row in own})
                means = []
                for x in xs:
                    found = [row.accuracy for row in own if getattr(row, along[0]) == x]
                    means.append(sum(found) / len(found))
                line(panel, xs, means, index, policy)
        panels[0].set_ylabel("window-averaged accuracy (simulated)")
        outside_legend(figure, panels[-1])

    return write_figure(draw, (2.6 + 2.6 * len(values), 3.4), path)


def line(panel: Axes, xs: Sequence[float], ys: Sequence[float], index: int, label: str) -> None:
    """One policy's line, always in the same colour and mark for the same position."""
    colour, mark = COLOURS[index % len(COLOURS)], _MARKS[index % len(_MARKS)]
    panel.plot(xs, ys, color=colour, marker=mark, markersize=4, linewidth=1.4, label=label)
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))


def outside_legend(figure: Figure, panel: Axes) -> None:
    """The legend of ``panel`` beside the panels, where it hides no line."""
    figure.legend(*panel.get_legend_handles_labels(), loc="outside right upper", fontsize=8)


def write_figure(draw: Callable[[Figure], None], size_in: tuple[float, float], path: Path) -> list[Path]:
    """Draw a figure and write it as ``path`` .svg and .png. InputError when it cannot be written."""
    with rc_context(_STYLE):
        figure = Figure(figsize=size_in, layout="constrained")
        FigureCanvasAgg(figure)
        draw(figure)
        written: list[Path] = []
        for suffix in (".svg", ".png"):
            target = path.with_name(path.name + suffix)
            try:
                figure.savefig(target, dpi=110, metadata={"Date": None} if suffix == ".svg" else None)
            except OSError as error:
                raise InputError(f"{target}: cannot be written: {error.strerror or error}") from None
            written.append(target)
        return written
