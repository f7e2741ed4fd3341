"""Is a freer policy ever worse? ``python benchmarks/bench_order.py --problems 500``.

Mixed random problems go through the planner as in production (child process, deadline, the best by the judge
wins). Counts how often the order timeline >= milp >= thief >= best uniform, or milp >= none, is broken, and bounds
that are below a plan. ``--limits``: with own windows, latency limits, a label budget and a link to a cloud besides.
Every line names its seed.
"""

from __future__ import annotations

import argparse
import statistics

import msgspec
import numpy as np

from optimizer.objective import judge
from optimizer.planner import Planner
from optimizer.policies import timeline_cache
from optimizer.problems import random_problem, with_limits
from protocol.plan import Problem

ORDER = ("timeline", "milp", "thief", "uniform", "none")
PAIRS = (("timeline", "milp"), ("milp", "thief"), ("thief", "uniform"), ("milp", "none"))
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
    parser.add_argument(
        "--limits", action="store_true", help="problems with everything that a plan may have to keep to"
    )
    options = parser.parse_args()
    timeline_cache.wait_compiled(60.0)
    planners = {name: Planner(name, options.budget) for name in ORDER}
    broken = dict.fromkeys((*(f"{high}>={low}" for high, low in PAIRS), "bound"), 0)
    gaps: list[float] = []
    try:
        for planner in planners.values():
            planner.wait_until_warm(30.0)
        for seed in range(options.first, options.first + options.problems):
            problem = mixed(seed)
            if options.limits:
                problem = msgspec.structs.replace(with_limits(problem, seed), planning_quantile=0.5)
            plans = {name: planner.solve(problem) for name, planner in planners.items()}
            verdicts = {name: judge(problem, plan) for name, plan in plans.items()}
            values = {name: verdict.value for name, verdict in verdicts.items()}
            for high, low in PAIRS:
                # Plans that break fewer limits come first, whatever they are worth.
                if len(verdicts[high].violations) < len(verdicts[low].violations):
                    continue
                if values[high] < values[low] - TOLERANCE:
                    broken[f"{high}>={low}"] += 1
                    why = plans[high].report.detail
                    print(f"seed {seed}: {high} {values[high]:.5f} < {low} {values[low]:.5f}; {why}", flush=True)
            bound = plans["timeline"].report.bound
            if bound is not None:
                gaps.append(100 * (bound - values["timeline"]) / bound)
                if max((v.value for v in verdicts.values() if v.feasible), default=0.0) > bound + TOLERANCE:
                    broken["bound"] += 1
                    print(f"seed {seed}: bound {bound:.5f} below one of {values}")
    finally:
        for planner in planners.values():
            planner.close()
    middle = f"{statistics.median(gaps):.3f} %" if gaps else "none proven"
    print(f"{options.problems} problems, {options.budget:g} s each: {broken}; median gap {middle}")
    return int(any(broken.values()))


if __name__ == "__main__":
    raise SystemExit(main())
