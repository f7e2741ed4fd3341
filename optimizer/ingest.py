"""`ekya-optimizer ingest`: what is in a data set, how it drifts, and what is wrong with it.

Pictures and annotation files are read by the executor's readers, the very ones that play them as a stream; they run in
a process of their own (executor/streams/ingest.py), because this package does not import the executor.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import msgspec
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from protocol.datasets import DataSummary
from protocol.errors import EkyaError, InputError

_SHOWN = 20


def ingest(
    path: Path,
    *,
    images: str,
    form: str,
    split: str,
    windows: int,
    as_json: bool,
    out: Path | None,
    console: Console,
) -> int:
    """Check a data set and say what is in it; the exit code: 0, or 2 when something is wrong with it.

    Raises:
        InputError: it cannot be read at all, or ``out`` cannot be written.
    """
    if windows < 1:
        raise InputError(f"--windows {windows}: at least 1 is needed")
    summary = summarise(path, images=images, form=form, split=split, windows=windows)
    if out is not None:
        _write(summary, out)
    if as_json:
        sys.stdout.write(msgspec.json.format(msgspec.json.encode(summary), indent=2).decode() + "\n")
    else:
        _show(summary, console)
        if out is not None:
            console.print(f"written: {out / 'summary.json'}, {out / 'drift.png'}", highlight=False, soft_wrap=True)
    for text in summary.problems[: None if as_json else _SHOWN]:
        print(f"ekya-optimizer: {text}", file=sys.stderr)
    if summary.num_problems > _SHOWN and not as_json:
        print(f"ekya-optimizer: ... and {summary.num_problems - _SHOWN} more (--json shows them)", file=sys.stderr)
    return 2 if summary.num_problems else 0


def summarise(path: Path, *, images: str = "", form: str = "auto", split: str = "", windows: int = 8) -> DataSummary:
    """What is in a data set. Raises InputError when it cannot be read at all."""
    command = [sys.executable, "-m", "executor.streams.ingest", str(path), "--windows", str(windows)]
    command += [f"--images={images}", f"--format={form}", f"--split={split}"]
    done = subprocess.run(command, capture_output=True, check=False)
    words = done.stderr.decode(errors="replace").strip().splitlines()
    if done.returncode == 2:
        raise InputError(words[-1] if words else f"{path}: cannot be read")
    if done.returncode:
        raise EkyaError(f"reading {path} ended with exit code {done.returncode}: {words[-1] if words else 'no reason'}")
    return msgspec.json.decode(done.stdout, type=DataSummary)


def _show(summary: DataSummary, console: Console) -> None:
    sizes = ", ".join(f"{size} ({count})" for size, count in summary.sizes.items()) or "none readable"
    console.print(
        f"{summary.path}: {summary.format}, {summary.num_frames} frames ({summary.num_empty} without a box), "
        f"{summary.num_objects} boxes; pictures {sizes}",
        highlight=False,
        soft_wrap=True,
    )
    names = list(summary.classes)
    table = Table(box=None, header_style="bold")
    for head in ("frames", "boxes", "a frame", "edge px", "drift"):
        table.add_column(head, justify="right")
    for name in names:
        table.add_column(name, justify="right")
    for window in summary.windows:
        last = window.first_frame + window.num_frames - 1
        table.add_row(
            f"{window.first_frame}-{last}",
            str(window.num_objects),
            f"{window.objects_per_frame:.1f}",
            f"{window.box_edge:.0f}",
            "-" if window.drift is None else f"{window.drift:.2f}",
            *(str(window.classes.get(name, 0)) for name in names),
        )
    console.print(table)
    console.print(
        "drift: how far a stretch's mix of classes is from the first one's, 0 = same, 1 = nothing in common",
        highlight=False,
    )


def _write(summary: DataSummary, out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "summary.json").write_bytes(msgspec.json.format(msgspec.json.encode(summary), indent=2))
        figure = drift_figure(summary)
        FigureCanvasAgg(figure)
        figure.savefig(out / "drift.png", dpi=110)
    except OSError as error:
        raise InputError(f"--out {out}: cannot be written: {error.strerror or error}") from error


def drift_figure(summary: DataSummary) -> Figure:
    """Mix of classes and drift over the data set, and how many and how large the objects are."""
    figure = Figure(figsize=(9.0, 6.0), layout="constrained")
    mix, size = figure.subplots(2, 1, sharex=True)
    edges = [window.first_frame for window in summary.windows]
    widths = [window.num_frames for window in summary.windows]
    floor = [0.0] * len(edges)
    for name in summary.classes:
        share = [w.classes.get(name, 0) / max(1, w.num_objects) for w in summary.windows]
        mix.bar(edges, share, widths, bottom=floor, align="edge", label=name, edgecolor="white", linewidth=0.5)
        floor = [low + part for low, part in zip(floor, share, strict=True)]
    middle = [edge + width / 2 for edge, width in zip(edges, widths, strict=True)]
    drift = [float("nan") if w.drift is None else w.drift for w in summary.windows]
    mix.plot(middle, drift, "k.-", label="drift from the first")
    mix.set(ylabel="share of boxes", ylim=(0.0, 1.0), title=f"{Path(summary.path).name}: {summary.num_frames} frames")
    mix.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize="small")
    size.plot(middle, [w.objects_per_frame for w in summary.windows], "o-", label="boxes a frame")
    size.set(xlabel="frame", ylabel="boxes a frame", ylim=(0.0, None))
    edge = size.twinx()
    edge.plot(middle, [w.box_edge for w in summary.windows], "s--", color="tab:red", label="edge")
    edge.set(ylabel="mean edge, px", ylim=(0.0, None))
    edge.yaxis.label.set_color("tab:red")
    return figure
