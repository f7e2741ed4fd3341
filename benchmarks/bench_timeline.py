"""Gap and time of the time-indexed planner: the sizes that matter, and how its time grows.

Run ``python benchmarks/bench_timeline.py``; ``--seeds N``, ``--sizes 10x8x18,...`` and ``--growth`` choose.
A line gives medians over the seeds and the largest values: the placed plan's gap to its bound, seconds of wall time
and of processor time ("busy"; few streams are searched by two threads), and the peak memory of the process so far.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time
from dataclasses import dataclass

import msgspec

from optimizer.objective import judge
from optimizer.policies import timeline_cache
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
    cells = []
    for name, factor, digits in (("gap", 100.0, 3), ("wall_s", 1.0, 2), ("busy_s", 1.0, 2)):
        values = [factor * getattr(one, name) for one in found]
        cells += [f"{statistics.median(values):8.{digits}f}", f"{max(values):8.{digits}f}"]
    print(f"{size:>12} {quantum:8.2f} {num_slots:6d} {seeds:6d} {' '.join(cells)} {memory_mb:8.0f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--sizes", default=SIZES)
    parser.add_argument("--seeds", type=int, default=10, help="at most; 5 above 60 streams, 3 above 300")
    parser.add_argument("--growth", action="store_true", help="also: growth with streams, GPUs and slots")
    arguments = parser.parse_args()
    timeline_cache.wait_compiled(120.0)
    timeline_cache.prepare(60.0)
    heads = ("gap %", "max", "wall s", "max", "busy s", "max", "peak MB")
    print(f"{'size':>12} {'quantum':>8} {'slots':>6} {'seeds':>6} {' '.join(f'{head:>8}' for head in heads)}")
    for size in arguments.sizes.split(","):
        most = 3 if parse_size(size)[0] > 300 else 5 if parse_size(size)[0] > 60 else arguments.seeds
        report(size, min(most, arguments.seeds))
    if arguments.growth:
        for sizes in GROWTH:
            print()
            for size in sizes.split(","):
                report(size, min(3, arguments.seeds))
        print()
        for num_slots in (5, 10, 20, 40):
            report("20x8x18", min(3, arguments.seeds), num_slots)


if __name__ == "__main__":
    main()
