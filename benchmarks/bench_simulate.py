"""Trace-driven studies: how long they take, and what they find beside published figures.

``pytest benchmarks/bench_simulate.py`` times a study on a made-up trace. ``python benchmarks/bench_simulate.py
TRACE.csv TABLE.csv [SEEDS]`` prints the table of docs/studies.md: our figures beside those that were measured with the
published simulator on the published trace (936 retrainings of 18 cities; the part at hand may be smaller).
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from optimizer.policies.baselines import INFERENCE_PARTS, LEVELS
from optimizer.trace_study import Study, make_study
from optimizer.trace_world import StudyKnobs
from tests.optimizer.tiny_trace import random_rows, study

SIZES = ((4, 1), (8, 2), (10, 4), (10, 8), (20, 8))
# Window-averaged accuracy, published simulator and trace; None = not measured.
PUBLISHED: dict[str, tuple[float | None, ...]] = {
    "no retraining": (0.783, 0.789, 0.794, 0.794, 0.794),
    "best fixed uniform": (0.750, 0.677, 0.803, 0.843, 0.784),
    "thief, true": (0.814, 0.817, 0.870, 0.890, 0.870),
    "exact, fixed shares, true": (0.794, 0.800, 0.865, 0.884, 0.869),
    "time-indexed, true": (0.804, 0.813, 0.881, 0.897, 0.886),
    "thief, predicted": (0.796, 0.791, 0.840, 0.842, None),
}
TABLE = "subsampling,c1,c2\n1,1,1\n2,0.8,0.75\n5,0.5,0.45\n10,0.2,0.15\n20,0.1,0.05\n"


@pytest.mark.parametrize("policy", ["milp", "timeline", "thief", "uniform", "none"])
def test_time_of_a_study_of_10_streams_on_8_gpus_over_3_windows(
    benchmark: BenchmarkFixture, tmp_path: Path, policy: str
) -> None:
    rows = random_rows(0, num_cities=12, num_windows=3)
    found = []

    def simulate() -> None:
        made = study(tmp_path, rows, table=TABLE, budget_s=0.3, num_windows=3, window_s=200.0)
        found.append(made.row(policy, 10, 8, 0))

    simulate()  # loads the solver
    pedantic: Any = benchmark.pedantic
    pedantic(simulate, rounds=2)
    benchmark.extra_info["accuracy"] = round(found[-1].accuracy, 4)
    benchmark.extra_info["decisions"] = found[-1].decisions
    # The longest that its decisions may take; what the simulation adds is far below that.
    assert found[-1].decision_seconds_max < 30.0


def mean(made: Study, policy: str, size: tuple[int, int], seeds: range) -> float:
    return sum(made.row(policy, *size, seed).accuracy for seed in seeds) / len(seeds)


def main(trace: Path, table: Path, num_seeds: int) -> None:
    """Print the table."""
    seeds = range(num_seeds)
    true = make_study(trace, table, StudyKnobs(), 0.3)
    predicted = make_study(trace, table, StudyKnobs(predicted=True), 0.3)
    blind = make_study(trace, table, StudyKnobs(predicted=True, gate=False), 0.3)
    ours = {
        "no retraining": (true, "none"),
        "uniform, best per window": (true, "uniform"),
        "fair shares": (true, "fair"),
        "thief, fixed shares": (true, "thief:fixed-shares"),
        "thief, fixed configuration": (true, "thief:fixed-config"),
        "thief, true": (true, "thief"),
        "exact, fixed shares, true": (true, "milp"),
        "time-indexed, true": (true, "timeline"),
        "thief, predicted": (predicted, "thief"),
        "exact, fixed shares, predicted": (predicted, "milp"),
        "time-indexed, predicted": (predicted, "timeline"),
        "thief, predicted, no gate": (blind, "thief"),
        "time-indexed, predicted, no gate": (blind, "timeline"),
    }
    sizes = " | ".join(f"{streams} x {gpus}" for streams, gpus in SIZES)
    print(f"| streams x GPUs | {sizes} |\n|---|{'---|' * len(SIZES)}", flush=True)
    variants = [f"uniform:{level}:{part:g}" for level in LEVELS for part in INFERENCE_PARTS]
    best = [max((mean(true, name, size, seeds), name) for name in variants) for size in SIZES]
    _line("best fixed uniform", [value for value, _ in best])
    print(f"  (best fixed uniform: {', '.join(name for _, name in best)})", file=sys.stderr)
    for name, (made, policy) in ours.items():
        _line(name, [mean(made, policy, size, seeds) for size in SIZES])
        longest = [max(made.row(policy, *size, seed).decision_seconds_max for seed in seeds) for size in SIZES]
        print(f"  ({name}: longest decision {', '.join(f'{s:.3f}' for s in longest)} s)", file=sys.stderr)


def _line(name: str, values: list[float]) -> None:
    published = PUBLISHED.get(name, (None,) * len(SIZES))
    cells = [
        f"{value:.3f}" + (f" ({other:.3f})" if other is not None else "")
        for value, other in zip(values, published, strict=True)
    ]
    print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 3)
