"""Measured retrainings and inference tables from CSV files, checked strictly, and the streams drawn from them.

A trace has one row per measured retraining: ``city`` (stands for one camera), ``window`` (1, 2, ...),
``config``, ``epochs``, ``accuracy_before``, ``accuracy_after``, ``gpu_seconds`` on a whole GPU,
``accuracy_after_predicted`` and ``gpu_seconds_predicted`` (what micro-profiling estimated), and
``microprofile_seconds``. Other columns are ignored, columns may stand in any order. Accuracies are fractions. The
last three columns may be missing: then there are no predictions to plan on, or no cost of micro-profiling.

Rows of one city and window may state different ``accuracy_before`` (they come from students of
different size). A stream has one serving model: its accuracy is the mean over the rows of the window.
What a retraining reaches is taken as measured.
"""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from protocol.errors import InputError
from protocol.schema import Record

MEASURED = ("accuracy_before", "accuracy_after", "gpu_seconds")
PREDICTED = ("accuracy_after_predicted", "gpu_seconds_predicted")
PROFILING = "microprofile_seconds"
REQUIRED = ("city", "window", "config", "epochs", *MEASURED)
COLUMNS = (*REQUIRED, *PREDICTED, PROFILING)
MAX_BYTES = 64 << 20


class TracedRetraining(Record, frozen=True, kw_only=True):
    """One measured retraining: what it cost (GPU-seconds on a whole GPU) and reached, and what was predicted.

    Predictions are None where the trace has none.
    """

    retrain_id: str
    epochs: int
    accuracy_after: float
    gpu_seconds: float
    accuracy_after_predicted: float | None
    gpu_seconds_predicted: float | None


class TracedWindow(Record, frozen=True, kw_only=True):
    """One window of one city. ``accuracy_now``: of the model serving at its start, nothing retrained.

    ``number``: what the trace calls it. ``microprofile_s`` is None where the trace does not say.
    """

    number: int
    accuracy_now: float
    microprofile_s: float | None
    retrainings: tuple[TracedRetraining, ...]


class Trace(Record, frozen=True, kw_only=True):
    """Windows per city in the trace's order."""

    source: str
    cities: dict[str, tuple[TracedWindow, ...]]
    missing: tuple[str, ...] = ()  # optional columns that it does not have

    def need(self, columns: tuple[str, ...], option: str) -> None:
        """InputError when a column that ``option`` needs is missing."""
        lacking = [name for name in columns if name in self.missing]
        if lacking:
            raise InputError(f"{option}: {self.source} has no column {lacking[0]}; add it, or leave {option} out")


class InferenceTable(Record, frozen=True, kw_only=True):
    """What analysing one frame in N keeps of the full-rate accuracy, one curve per camera.

    ``subsampling`` ascends from 1; ``curves[c][i]`` belongs to ``subsampling[i]``.
    """

    source: str
    subsampling: tuple[float, ...]
    curves: tuple[tuple[float, ...], ...]

    def relative_accuracy(self, camera: int, subsampling: float) -> float:
        """Linear between the rows, 0 beyond the last one."""
        if subsampling > self.subsampling[-1]:
            return 0.0
        return float(np.interp(subsampling, self.subsampling, self.curves[camera]))


# Falls like published measurements of street scenes: nearly exponential in the frame interval.
BUILT_IN_TABLE = InferenceTable(
    source="built-in table exp(-0.22 (N - 1)^0.85)",
    subsampling=(1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 15.0, 20.0),
    curves=(
        tuple(
            round(math.exp(-0.22 * (n - 1.0) ** 0.85), 4)
            for n in (1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 15.0, 20.0)
        ),
    ),
)


class DrawnStream(Record, frozen=True, kw_only=True):
    """A stream of a study: a city of the trace and a curve of the inference table."""

    stream_id: str
    city: str
    camera: int


# ---------------------------------------------------------------- reading


def load_trace(path: str | Path) -> Trace:
    """Read a trace.

    Raises:
        InputError: names the file, the line and the column, and what is wrong there.
    """
    groups: dict[tuple[str, int], list[dict[str, float]]] = {}
    seen: dict[tuple[str, int, int, int], int] = {}
    reader = Rows(Path(path), REQUIRED)
    present = [name for name in COLUMNS if name in reader.header]
    numeric = [name for name in present if name not in ("city", "window", "config", "epochs")]
    for row in reader:
        city = row.text("city")
        window, config = row.whole("window", 1), row.whole("config", 0)
        epochs = row.whole("epochs", 1)
        key = (city, window, config, epochs)
        if key in seen:
            raise row.wrong("config", f"repeats line {seen[key]} (same city, window, config and epochs)")
        seen[key] = row.line
        numbers = {"config": float(config), "epochs": float(epochs)}
        for name in numeric:
            if name.startswith("accuracy"):
                numbers[name] = row.number(name, 0.0, 1.0)
            else:
                numbers[name] = row.number(name, 0.0, 1e9, above=name.startswith("gpu_seconds"))
        groups.setdefault((city, window), []).append(numbers)
    if not groups:
        raise InputError(f"{path}: holds no retrainings, only the line of column names")
    cities: dict[str, list[TracedWindow]] = {}
    for city, window in sorted(groups, key=lambda key: key[1]):
        cities.setdefault(city, []).append(_window(window, groups[city, window]))
    order = dict.fromkeys(city for city, _ in groups)
    missing = tuple(name for name in COLUMNS if name not in present)
    return Trace(source=str(path), cities={city: tuple(cities[city]) for city in order}, missing=missing)


def _window(number: int, rows: list[dict[str, float]]) -> TracedWindow:
    return TracedWindow(
        number=number,
        accuracy_now=sum(row["accuracy_before"] for row in rows) / len(rows),
        microprofile_s=max(row[PROFILING] for row in rows) if PROFILING in rows[0] else None,
        retrainings=tuple(
            TracedRetraining(
                retrain_id=f"c{int(row['config'])}e{int(row['epochs'])}",
                epochs=int(row["epochs"]),
                accuracy_after=row["accuracy_after"],
                gpu_seconds=row["gpu_seconds"],
                accuracy_after_predicted=row.get("accuracy_after_predicted"),
                gpu_seconds_predicted=row.get("gpu_seconds_predicted"),
            )
            for row in rows
        ),
    )


def load_inference_table(path: str | Path) -> InferenceTable:
    """Read an inference table: a column ``subsampling`` (N = one frame in N is analysed) and one per camera.

    Raises:
        InputError: names the file, the line and the column, and what is wrong there.
    """
    reader = Rows(Path(path), ("subsampling",))
    cameras = [name for name in reader.header if name != "subsampling"]
    if not cameras:
        raise InputError(f"{path}: line 1: there is no column besides subsampling; add one per camera")
    intervals: list[float] = []
    curves: list[list[float]] = [[] for _ in cameras]
    for row in reader:
        interval = row.number("subsampling", 1.0, 1e6)
        if not intervals and interval != 1.0:
            raise row.wrong("subsampling", f"is {interval:g}; the first row must be 1, every frame analysed")
        if intervals and interval <= intervals[-1]:
            raise row.wrong("subsampling", f"is {interval:g} after {intervals[-1]:g}; rows must ascend")
        intervals.append(interval)
        for curve, name in zip(curves, cameras, strict=True):
            curve.append(row.number(name, 0.0, 1.0))
    if not intervals:
        raise InputError(f"{path}: holds no rows, only the line of column names")
    return InferenceTable(source=str(path), subsampling=tuple(intervals), curves=tuple(tuple(c) for c in curves))


class Row:
    """One line of a CSV file; every access checks."""

    def __init__(self, path: Path, line: int, cells: dict[str, str]) -> None:
        self.path, self.line, self._cells = path, line, cells

    def wrong(self, column: str, what: str) -> InputError:
        return InputError(f"{self.path}: line {self.line}, column {column}: {what}")

    def text(self, column: str) -> str:
        value = self._cells[column].strip()
        if not value:
            raise self.wrong(column, "is empty")
        return value

    def number(self, column: str, least: float, most: float, *, above: bool = False) -> float:
        text = self.text(column)
        try:
            value = float(text)
        except ValueError:
            raise self.wrong(column, f"{text[:40]!r} is not a number") from None
        if not math.isfinite(value):
            raise self.wrong(column, f"{text[:40]!r} is not a finite number")
        if not least <= value <= most or (above and value <= least):
            allowed = f"above {least:g} and at most {most:g}" if above else f"{least:g} to {most:g}"
            raise self.wrong(column, f"{value:g} is out of range; allowed: {allowed}")
        return value

    def whole(self, column: str, least: int) -> int:
        value = self.number(column, float(least), 1e6)
        if value != int(value):
            raise self.wrong(column, f"{value:g} is not a whole number")
        return int(value)


class Rows:
    """The rows of a CSV file with a line of column names, which must hold ``required``.

    UTF-8, with or without a byte-order mark, lines ended in any way, fields quoted or not.
    """

    def __init__(self, path: Path, required: tuple[str, ...]) -> None:
        self.path = path
        try:
            if path.stat().st_size > MAX_BYTES:
                raise InputError(f"{path}: larger than {MAX_BYTES >> 20} MiB")
            text = path.read_text(encoding="utf-8-sig")
        except OSError as error:
            raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None
        except UnicodeDecodeError:
            raise InputError(f"{path}: is not UTF-8 text; a CSV file is wanted") from None
        self._reader = csv.reader(io.StringIO(text, newline=""), strict=True)
        self.header = [name.strip() for name in next(self._next(), [])]
        missing = [name for name in required if name not in self.header]
        if missing:
            raise InputError(f"{path}: line 1: column {missing[0]} is missing; needed: {', '.join(required)}")
        doubled = [name for name in self.header if self.header.count(name) > 1]
        if doubled:
            raise InputError(f"{path}: line 1: column {doubled[0]} appears more than once")

    def _next(self) -> Iterator[list[str]]:
        try:
            yield from self._reader
        except csv.Error as error:
            raise InputError(f"{self.path}: line {self._reader.line_num}: not CSV: {error}") from None

    def __iter__(self) -> Iterator[Row]:
        for cells in self._next():
            if not any(cell.strip() for cell in cells):
                continue
            line = self._reader.line_num
            if len(cells) != len(self.header):
                raise InputError(f"{self.path}: line {line}: {len(cells)} values where {len(self.header)} are due")
            yield Row(self.path, line, dict(zip(self.header, cells, strict=True)))


# ---------------------------------------------------------------- drawing


def draw_streams(trace: Trace, table: InferenceTable, count: int, seed: int) -> tuple[DrawnStream, ...]:
    """``count`` streams: the cities in an order drawn by ``seed``, beyond their number drawn with replacement.

    The first n of a larger draw are the draw of n, so that studies over the number of streams add streams.
    """
    rng = np.random.default_rng([seed, 1])
    names = list(trace.cities)
    chosen = [names[int(i)] for i in rng.permutation(len(names))]
    cameras = np.random.default_rng([seed, 2])
    rest = np.random.default_rng([seed, 3])
    drawn: list[DrawnStream] = []
    for index in range(count):
        city = chosen[index] if index < len(chosen) else names[int(rest.integers(len(names)))]
        camera = int(cameras.integers(len(table.curves)))
        safe = re.sub(r"[^A-Za-z0-9._-]+", "_", city)[:40]
        drawn.append(DrawnStream(stream_id=f"s{index:02d}-{safe}", city=city, camera=camera))
    return tuple(drawn)


def parse_list(text: str, option: str, convert: Callable[[str], int], what: str = "whole numbers") -> tuple[int, ...]:
    """The distinct values of a list like ``2,4,8``, ascending; InputError naming the option."""
    try:
        values = [convert(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"{option} {text}: write {what}, separated by commas, like 2,4,8") from None
    return tuple(sorted(set(values)))
