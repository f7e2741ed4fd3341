"""Small traces whose studies can be worked out on paper, and random ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from optimizer.trace_study import Study, make_study
from optimizer.trace_world import StudyKnobs
from optimizer.traces import COLUMNS

# city, window, config, epochs, before, after, GPU-s, after predicted, GPU-s predicted, micro-profiling s
Row = tuple[str, int, int, int, float, float, float, float, float, float]

# Frames may not be skipped at all: full rate or nothing.
ALL_OR_NOTHING = "subsampling,c1\n1,1\n1.01,0\n"


def row(
    city: str = "a",
    window: int = 1,
    *,
    config: int = 0,
    before: float = 0.5,
    after: float = 0.9,
    gpu_s: float = 20.0,
    told: float | None = None,
    told_s: float | None = None,
    profiling_s: float = 10.0,
) -> Row:
    predicted_s = gpu_s if told_s is None else told_s
    predicted = after if told is None else told
    return (city, window, config, 5, before, after, gpu_s, predicted, predicted_s, profiling_s)


def write_trace(path: Path, rows: Sequence[Row]) -> Path:
    lines = [",".join(COLUMNS), *(",".join(str(value) for value in one) for one in rows)]
    path.write_text("\n".join(lines) + "\n")
    return path


def random_rows(seed: int, num_cities: int = 6, num_windows: int = 2) -> list[Row]:
    rng = np.random.default_rng(seed)
    rows: list[Row] = []
    for city in range(num_cities):
        for window in range(1, num_windows + 1):
            before = round(float(rng.uniform(0.4, 0.8)), 3)
            for config in range(4):
                after = round(min(1.0, before + float(rng.uniform(-0.05, 0.3))), 3)
                told = round(min(1.0, max(0.0, after + float(rng.normal(0.0, 0.08)))), 3)
                cost = round(float(rng.uniform(3.0, 150.0)), 1)
                told_s = round(cost * float(rng.uniform(0.6, 1.6)), 1)
                rows.append((f"city{city}", window, config, 5, before, after, cost, told, told_s, 12.0))
    return rows


def study(
    folder: Path, rows: Sequence[Row], *, table: str = ALL_OR_NOTHING, budget_s: float = 2.0, **knobs: Any
) -> Study:
    plain: dict[str, Any] = {"num_windows": 1, "window_s": 100.0}
    inference = folder / "inference.csv"
    inference.write_text(table)
    return make_study(write_trace(folder / "trace.csv", rows), inference, StudyKnobs(**(plain | knobs)), budget_s)
