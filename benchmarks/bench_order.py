"""Is a freer policy ever worse? ``python benchmarks/bench_order.py --problems 500``.

Mixed random problems go through the planner as in production (child process, deadline, the best by the judge
wins). Counts how often the order timeline >= milp >= thief >= best uniform is broken, and bounds that are below a
plan. Every line names its seed.
"""

from __future__ import annotations

import argparse
import itertools
import statistics

import numpy as np

from optimizer.objective import judge
from optimizer.planner import Planner
from optimizer.policies import timeline_cache
from optimizer.problems import random_problem
from protocol.plan import Problem

ORDER = ("timeline", "milp", "thief", "uniform")
TOLERANCE = 1e-9


def mixed(seed: int) -> Problem:
    """A random problem of a random size: 2 to 24 streams on 1 to 10 GPUs."""
    draw = np.random.default_rng(seed)
    num_gpus = int(draw.integers(1, 11))
    num_streams = int(draw.integers(2, min(24, 4 * num_gpus) + 1))
    return random_problem(num_streams, num_gpus, int(draw.choice([6, 9, 18])), seed=seed)


def main() -> int:
    """Print the counts; 1 when the order was broken."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--problems", type=int, default=100)
    parser.add_argument("--first", type=int, default=0, help="seed of the first problem")
    parser.add_argument("--budget", type=float, default=1.0, help="seconds per plan")
    options = parser.parse_args()
    timeline_cache.wait_compiled(60.0)
    planners = {name: Planner(name, options.budget) for name in ORDER}
    broken = dict.fromkeys(("timeline>=milp", "milp>=thief", "thief>=uniform", "bound"), 0)
    gaps: list[float] = []
    try:
        for planner in planners.values():
            planner.wait_until_warm(30.0)
        for seed in range(options.first, options.first + options.problems):
            problem = mixed(seed)
            plans = {name: planner.solve(problem) for name, planner in planners.items()}
            values = {name: judge(problem, plan).value for name, plan in plans.items()}
            for high, low in itertools.pairwise(ORDER):
                if values[high] < values[low] - TOLERANCE:
                    broken[f"{high}>={low}"] += 1
                    why = plans[high].report.detail
                    print(f"seed {seed}: {high} {values[high]:.5f} < {low} {values[low]:.5f}; {why}", flush=True)
            bound = plans["timeline"].report.bound
            if bound is not None:
                gaps.append(100 * (bound - values["timeline"]) / bound)
                if max(values.values()) > bound + TOLERANCE:
                    broken["bound"] += 1
                    print(f"seed {seed}: bound {bound:.5f} below {max(values.values()):.5f}")
    finally:
        for planner in planners.values():
            planner.close()
    middle = f"{statistics.median(gaps):.3f} %" if gaps else "none proven"
    print(f"{options.problems} problems, {options.budget:g} s each: {broken}; median gap {middle}")
    return int(any(broken.values()))


if __name__ == "__main__":
    raise SystemExit(main())
