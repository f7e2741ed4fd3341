"""The simulated study of docs/results.md: tables and plots over streams, GPUs, seeds, true and predicted profiles.

``python benchmarks/bench_results.py TRACE.csv TABLE.csv FOLDER [--minutes 5] [--tables]`` simulates what is not yet in
FOLDER/rows.json for about so many minutes, keeps it there, and prints what is left to do; call it again to go on. With
``--tables`` it prints the tables in Markdown and draws the plots from what is there.
"""

from __future__ import annotations

import argparse
import itertools
import time
from pathlib import Path

import msgspec
from matplotlib.figure import Figure

from optimizer.policies.baselines import INFERENCE_PARTS, LEVELS
from optimizer.trace_figures import line, outside_legend, write_figure
from optimizer.trace_study import Study, StudyRow, make_study
from optimizer.trace_world import StudyKnobs

STREAMS = (2, 4, 8, 12)
GPUS = (1, 2, 4, 8)
MORE_GPUS = (3, 6, 12, 16, 24, 32)  # baselines only, to find where they catch up
SEEDS = (0, 1, 2)
PLANNERS = ("timeline", "milp", "thief")
BASELINES = ("uniform", "fair", "none")
VARIANTS = tuple(f"uniform:{level}:{part:g}" for level in LEVELS for part in INFERENCE_PARTS)
BUDGET_S = 0.2
BEST_FIXED = "best fixed uniform"

Key = tuple[str, str, int, int, int]  # profiles, policy, streams, GPUs, seed


def wanted() -> list[Key]:
    """Everything to simulate, seed by seed, so that a study cut short still holds whole seeds."""
    found: list[Key] = []
    for seed in SEEDS:
        for kind in ("true", "predicted"):
            for streams, gpus in itertools.product(STREAMS, GPUS):
                found += [(kind, policy, streams, gpus, seed) for policy in (*PLANNERS, *BASELINES, *VARIANTS)]
        for streams, gpus in itertools.product(STREAMS, MORE_GPUS):
            found += [("true", policy, streams, gpus, seed) for policy in ("uniform", "none", *VARIANTS)]
    return found


def simulate(studies: dict[str, Study], rows: dict[Key, StudyRow], minutes: float, path: Path) -> int:
    """Add rows until time is up; how many are left."""
    end_s = time.monotonic() + 60.0 * minutes
    todo = [key for key in wanted() if key not in rows]
    for done, key in enumerate(todo):
        if time.monotonic() > end_s:
            return len(todo) - done
        kind, policy, streams, gpus, seed = key
        rows[key] = studies[kind].row(policy, streams, gpus, seed)
        if done % 50 == 0:
            save(rows, path)
    return 0


def save(rows: dict[Key, StudyRow], path: Path) -> None:
    path.write_bytes(msgspec.json.encode(list(rows.values())))


def load(path: Path) -> dict[Key, StudyRow]:
    if not path.exists():
        return {}
    found = msgspec.json.decode(path.read_bytes(), type=list[StudyRow])
    return {(row.profiles, row.policy, row.streams, row.gpus, row.seed): row for row in found}


class Table:
    """Means over the seeds that are complete."""

    def __init__(self, rows: dict[Key, StudyRow]) -> None:
        self.seeds = [s for s in SEEDS if all(key in rows for key in wanted() if key[4] == s)]
        self._rows = rows

    def mean(self, kind: str, policy: str, streams: int, gpus: int) -> float:
        if policy == BEST_FIXED:
            return max(self.mean(kind, name, streams, gpus) for name in VARIANTS)
        return sum(self._rows[kind, policy, streams, gpus, s].accuracy for s in self.seeds) / len(self.seeds)

    def longest_s(self, policy: str) -> float:
        return max(row.decision_seconds_max for key, row in self._rows.items() if key[1] == policy)

    def median_s(self, policy: str, streams: int, gpus: int) -> float:
        found = sorted(self._rows["true", policy, streams, gpus, s].decision_seconds_median for s in self.seeds)
        return found[len(found) // 2]


def head(*columns: str) -> None:
    print(f"\n| streams x GPUs | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")


def print_tables(table: Table) -> None:
    sizes = list(itertools.product(STREAMS, GPUS))
    policies = (*PLANNERS, "uniform", BEST_FIXED, "fair", "none")
    for kind in ("true", "predicted"):
        print(f"\n{kind} profiles, mean of seeds {', '.join(map(str, table.seeds))}")
        head(*policies)
        for s, g in sizes:
            print(f"| {s} x {g} | {' | '.join(f'{table.mean(kind, name, s, g):.3f}' for name in policies)} |")
    print("\nPoints of accuracy: gains with true profiles, and what predicted ones cost")
    pairs = ((BEST_FIXED, "timeline"), ("none", "timeline"), ("milp", "timeline"), ("thief", "milp"))
    head(
        *(f"{ours} over {theirs}" for theirs, ours in pairs),
        f"timeline over {BEST_FIXED}, predicted",
        *(f"cost of prediction: {name}" for name in PLANNERS),
    )
    averages: list[list[float]] = []
    for s, g in sizes:
        points = [table.mean("true", ours, s, g) - table.mean("true", theirs, s, g) for theirs, ours in pairs]
        points.append(table.mean("predicted", "timeline", s, g) - table.mean("predicted", BEST_FIXED, s, g))
        points += [table.mean("predicted", name, s, g) - table.mean("true", name, s, g) for name in PLANNERS]
        averages.append(points)
        print(f"| {s} x {g} | {' | '.join(f'{100.0 * value:+.1f}' for value in points)} |")
    means = [sum(column) / len(column) for column in zip(*averages, strict=True)]
    print(f"| mean | {' | '.join(f'{100.0 * value:+.1f}' for value in means)} |")
    print("\nGPUs that others need for the accuracy of timeline, true profiles; median and longest decision")
    head(BEST_FIXED, "uniform", "none", *(f"{name}, s" for name in PLANNERS))
    ladder = sorted({*GPUS, *MORE_GPUS})
    for s, g in sizes:
        cells = []
        for policy in (BEST_FIXED, "uniform", "none"):
            wanted_accuracy = table.mean("true", "timeline", s, g) - 1e-9
            enough = [more for more in ladder if more >= g and table.mean("true", policy, s, more) >= wanted_accuracy]
            cells.append(f"{enough[0]} ({enough[0] / g:.1f}x)" if enough else f"> {ladder[-1]}")
        cells += [f"{table.median_s(name, s, g):.3f}" for name in PLANNERS]
        print(f"| {s} x {g} | {' | '.join(cells)} |")
    print("longest: " + ", ".join(f"{policy} {table.longest_s(policy):.2f} s" for policy in PLANNERS))


def draw(table: Table, folder: Path) -> list[Path]:
    def panels(figure: Figure) -> None:
        grid = figure.subplots(2, len(STREAMS), sharey=True, squeeze=False)
        for row, kind in enumerate(("true", "predicted")):
            for column, streams in enumerate(STREAMS):
                panel = grid[row][column]
                panel.set_title(f"{streams} streams, {kind} profiles", fontsize=9)
                for index, policy in enumerate((*PLANNERS, "uniform", BEST_FIXED, "none")):
                    line(panel, GPUS, [table.mean(kind, policy, streams, g) for g in GPUS], index, policy)
                panel.set_xlabel("GPUs")
            grid[row][0].set_ylabel("accuracy (simulated)")
        outside_legend(figure, grid[0][-1])

    def by_streams(figure: Figure) -> None:
        grid = figure.subplots(1, len(GPUS), sharey=True, squeeze=False)[0]
        for panel, gpus in zip(grid, GPUS, strict=True):
            panel.set_title(f"{gpus} GPU" + ("s" if gpus > 1 else ""), fontsize=9)
            for index, policy in enumerate((*PLANNERS, "uniform", BEST_FIXED, "none")):
                line(panel, STREAMS, [table.mean("true", policy, s, gpus) for s in STREAMS], index, policy)
            panel.set_xlabel("streams")
        grid[0].set_ylabel("accuracy (simulated)")
        outside_legend(figure, grid[-1])

    written = write_figure(panels, (11.5, 5.2), folder / "study_by_gpus")
    return written + write_figure(by_streams, (11.5, 3.0), folder / "study_by_streams")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("trace", type=Path)
    parser.add_argument("table", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--tables", action="store_true")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    path = options.folder / "rows.json"
    rows = load(path)
    if not options.tables:
        studies = {
            kind: make_study(options.trace, options.table, StudyKnobs(predicted=kind == "predicted"), BUDGET_S)
            for kind in ("true", "predicted")
        }
        began_s, busy_s = time.monotonic(), time.process_time()
        left = simulate(studies, rows, options.minutes, path)
        save(rows, path)
        seconds, busy_s = time.monotonic() - began_s, time.process_time() - busy_s
        print(f"{len(rows)} rows, {left} left; {seconds:.0f} s, of them {busy_s:.0f} s of processor time")
        return
    table = Table(rows)
    if not table.seeds:
        raise SystemExit("no seed is complete yet: call without --tables first")
    print_tables(table)
    print("written: " + ", ".join(str(path) for path in draw(table, options.folder)))


if __name__ == "__main__":
    main()
