"""One plot of a plan: what runs on every GPU when, and what a GPU is worth at that time."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from optimizer.execution import capacity_quanta
from optimizer.explain_words import Explained
from optimizer.report_figures import COLOURS, HATCHES
from protocol.errors import InputError

MAX_GPUS = 12
_STYLE: dict[Any, Any] = {
    "font.size": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "hatch.linewidth": 0.6,
    "svg.hashsalt": "ekya",
}


@dataclass(frozen=True, slots=True)
class Bar:
    """A job on one GPU. ``rows``: the quanta of the GPU that it is drawn in."""

    stream_id: str
    kind: str
    start_s: float
    end_s: float
    rows: tuple[int, ...]


def bars(explained: Explained, gpu_id: str) -> list[Bar]:
    """The jobs of one GPU, each with rows that are free for all of its time."""
    problem = explained.problem
    jobs: list[tuple[float, float, int, str, str]] = []
    for stream_id, assignment in explained.assignments.items():
        verdict = explained.verdicts[stream_id]
        starts = [*verdict.step_starts_s, problem.window_s]
        for step, start_s, next_s in zip(assignment.inference, starts, starts[1:], strict=False):
            if step.gpu_id == gpu_id and start_s < min(next_s, problem.window_s):
                quanta = round(step.share / problem.share_quantum)
                jobs.append((start_s, min(next_s, problem.window_s), quanta, stream_id, "inference"))
        retrain = assignment.retrain
        if retrain is not None and retrain.gpu_id == gpu_id:
            start, end = verdict.retrain_start_s, verdict.retrain_end_s
            if start is not None and end is not None and start < problem.window_s:
                quanta = round(retrain.share / problem.share_quantum)
                jobs.append((start, min(end, problem.window_s), quanta, stream_id, "retrain"))
    free_from: list[float] = []
    found: list[Bar] = []
    for start_s, end_s, quanta, stream_id, kind in sorted(jobs):
        free_rows = [row for row, free_s in enumerate(free_from) if free_s <= start_s + 1e-6]
        while len(free_rows) < quanta:
            free_rows.append(len(free_from))
            free_from.append(0.0)
        blocks = [free_rows[i : i + quanta] for i in range(len(free_rows) - quanta + 1)]
        rows = next((block for block in blocks if block[-1] - block[0] == quanta - 1), free_rows[:quanta])
        for row in rows:
            free_from[row] = end_s
        found.append(Bar(stream_id, kind, start_s, end_s, tuple(rows)))
    return found


def draw_plan(explained: Explained, stream_id: str | None, path: Path) -> None:
    """Draw GPUs over time with the prices below; ``stream_id`` is picked out in colour, all streams where None.

    Raises:
        InputError: the file cannot be written, or its ending is none that plots are written in.
    """
    problem = explained.problem
    gpus = list(problem.gpus)
    if len(gpus) > MAX_GPUS:
        used = _gpus_of(explained, stream_id)
        gpus = sorted(gpus, key=lambda gpu: gpu.gpu_id not in used)[:MAX_GPUS]
    with rc_context(_STYLE):
        figure = Figure(figsize=(9.0, 1.6 + 0.75 * len(gpus) + 1.2), layout="constrained")
        FigureCanvasAgg(figure)
        ratios = [1.0] * len(gpus) + [1.6]
        panels = figure.subplots(len(gpus) + 1, 1, sharex=True, squeeze=False, height_ratios=ratios)[:, 0]
        colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(explained.profiles)}
        for panel, gpu in zip(panels, gpus, strict=False):
            capacity = capacity_quanta(gpu, problem.share_quantum)
            _gpu_panel(panel, bars(explained, gpu.gpu_id), capacity, colours, stream_id)
            panel.set_ylabel(gpu.gpu_id, rotation=0, ha="right", va="center")
        _price_panel(panels[-1], explained)
        panels[-1].set_xlabel("seconds of the window")
        panels[-1].set_xlim(0.0, problem.window_s)
        shown = [stream_id] if stream_id is not None else list(explained.profiles)[:16]
        handles = [Patch(color=colours[name], label=name) for name in shown]
        handles.append(Patch(facecolor="none", edgecolor="#666666", hatch=HATCHES["retrain"], label="retraining"))
        figure.legend(handles=handles, loc="outside right upper", fontsize=8)
        try:
            figure.savefig(path, dpi=110, metadata={"Date": None} if path.suffix == ".svg" else None)
        except (OSError, ValueError) as error:
            raise InputError(f"--out {path}: cannot be written: {error}") from None


def _gpus_of(explained: Explained, stream_id: str | None) -> set[str]:
    if stream_id is None:
        return set()
    assignment = explained.assignments[stream_id]
    used = {step.gpu_id for step in assignment.inference}
    return used | ({assignment.retrain.gpu_id} if assignment.retrain is not None else set())


def _blocks(rows: tuple[int, ...]) -> list[tuple[int, int]]:
    """(first row, number of rows) of the stretches without a hole."""
    found: list[tuple[int, int]] = []
    for row in rows:
        if found and row == found[-1][0] + found[-1][1]:
            found[-1] = (found[-1][0], found[-1][1] + 1)
        else:
            found.append((row, 1))
    return found


def _gpu_panel(panel: Axes, found: list[Bar], capacity: int, colours: dict[str, str], stream_id: str | None) -> None:
    for bar in found:
        picked = stream_id is None or bar.stream_id == stream_id
        for row, height in _blocks(bar.rows):
            panel.add_patch(
                Rectangle(
                    (bar.start_s, row),
                    bar.end_s - bar.start_s,
                    height,
                    facecolor=colours[bar.stream_id] if picked else "#c9ced6",
                    edgecolor="white",
                    linewidth=0.4,
                    hatch=HATCHES[bar.kind],
                )
            )
    panel.set_ylim(0, max([capacity, *(row + 1 for bar in found for row in bar.rows)]))
    panel.set_yticks([])


def _price_panel(panel: Axes, explained: Explained) -> None:
    kinds: dict[tuple[str, ...], tuple[list[float], list[float]]] = {}
    for slot in explained.prices.slots:
        edges, values = kinds.setdefault(slot.gpus, ([slot.start_s], []))
        edges.append(slot.end_s)
        values.append(slot.points / (slot.end_s - slot.start_s))
    for index, (names, (edges, values)) in enumerate(kinds.items()):
        label = names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} alike"
        panel.stairs(values, edges, color=COLOURS[index % len(COLOURS)], linewidth=1.4, label=label)
    panel.set_ylim(bottom=0.0)
    panel.set_ylabel("price of a GPU\npoints per s", fontsize=8)
    panel.legend(fontsize=7, loc="upper right")
