"""Gap and time of the time-indexed planner: the sizes that matter, and how its time grows.

Run ``python benchmarks/bench_timeline.py``; ``--seeds N``, ``--sizes 10x8x18,...`` and ``--growth`` choose.
A line gives medians over the seeds: the placed plan's gap to its bound, seconds of wall time and of
processor time, and the peak memory of the process so far.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time
from dataclasses import dataclass

import msgspec

from optimizer.objective import judge
from optimizer.policies.timeline import timeline
from optimizer.problems import parse_size, random_problem, servable
from protocol.plan import Problem

SIZES = "2x1x18,10x8x18,20x8x18,100x16x18,1000x64x18"
GROWTH = (
    "5x8x18,10x8x18,20x8x18,40x8x18",
    "20x4x18,20x8x18,20x16x18,20x32x18",
)
BUDGETS_S = ((12, 2.0), (60, 4.0), (200, 6.0), (10_000, 20.0))


@dataclass(frozen=True, slots=True)
class Measured:
    gap: float
    wall_s: float
    busy_s: float


def problem_of(size: str, seed: int) -> Problem:
    """A random problem, with a finer quantum where its GPUs could not serve every stream."""
    return servable(random_problem(*parse_size(size), seed))


def measure(problem: Problem) -> Measured:
    count = len(problem.streams)
    budget_s = next(seconds for most, seconds in BUDGETS_S if count <= most)
    wall_s, busy_s = time.perf_counter(), time.process_time()
    plan = timeline(problem, budget_s)
    wall_s, busy_s = time.perf_counter() - wall_s, time.process_time() - busy_s
    verdict = judge(problem, plan)
    if not verdict.feasible or plan.report.bound is None:
        raise SystemExit(f"a plan is not feasible: {verdict.violations[:1]}")
    return Measured((plan.report.bound - verdict.value) / plan.report.bound, wall_s, busy_s)


def report(size: str, seeds: int, num_slots: int = 20) -> None:
    found = [measure(msgspec.structs.replace(problem_of(size, seed), num_slots=num_slots)) for seed in range(seeds)]
    memory_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    quantum = problem_of(size, 0).share_quantum
    gap, wall_s, busy_s = (
        statistics.median(getattr(one, name) for one in found) for name in ("gap", "wall_s", "busy_s")
    )
    print(
        f"{size:>12} {quantum:8.2f} {num_slots:6d} {100 * gap:9.3f} {wall_s:8.2f} {busy_s:8.2f} {memory_mb:8.0f}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--sizes", default=SIZES)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--growth", action="store_true", help="also: growth with streams, GPUs and slots")
    arguments = parser.parse_args()
    print(f"{'size':>12} {'quantum':>8} {'slots':>6} {'gap %':>9} {'wall s':>8} {'busy s':>8} {'peak MB':>8}")
    for size in arguments.sizes.split(","):
        report(size, arguments.seeds)
    if arguments.growth:
        for sizes in GROWTH:
            print()
            for size in sizes.split(","):
                report(size, arguments.seeds)
        print()
        for num_slots in (5, 10, 20, 40):
            report("20x8x18", arguments.seeds, num_slots)


if __name__ == "__main__":
    main()
