"""Gap and time of the time-indexed planner: the sizes that matter, and how its time grows.

Run ``python benchmarks/bench_timeline.py``; ``--seeds N``, ``--sizes 10x8x18,...`` and ``--growth`` choose, ``--kinds``
adds problems with what the compiled search does not know (GPUs of two kinds, little memory, prices of changes) and with
own windows, short labels and a link.
A line gives medians over the seeds and the largest values: the placed plan's gap to its bound, seconds of wall time
and of processor time ("busy"; few streams are searched by two threads), and the peak memory of the process so far.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from optimizer.objective import judge
from optimizer.policies import timeline_cache
from optimizer.policies.timeline import timeline
from optimizer.problems import parse_size, random_problem, servable, with_limits
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


def measure(problem: Problem, patience: float) -> Measured:
    count = len(problem.streams)
    budget_s = patience * next(seconds for most, seconds in BUDGETS_S if count <= most)
    wall_s, busy_s = time.perf_counter(), time.process_time()
    plan = timeline(problem, budget_s)
    wall_s, busy_s = time.perf_counter() - wall_s, time.process_time() - busy_s
    verdict = judge(problem, plan)
    if not verdict.feasible or plan.report.bound is None:
        raise SystemExit(f"a plan is not feasible: {verdict.violations[:1]}")
    return Measured((plan.report.bound - verdict.value) / plan.report.bound, wall_s, busy_s)


def two_kinds(problem: Problem, seed: int) -> Problem:
    """Every second GPU is half as fast."""
    gpus = tuple(msgspec.structs.replace(gpu, speed=1.0 if g % 2 else 0.5) for g, gpu in enumerate(problem.gpus))
    return msgspec.structs.replace(problem, gpus=gpus)


def little_memory(problem: Problem, seed: int) -> Problem:
    """A GPU holds its part of the models that serve, one of them twice for a swap, and a retraining and a half."""
    each = -(-len(problem.streams) // len(problem.gpus))
    streams = tuple(
        msgspec.structs.replace(
            s,
            inference=tuple(msgspec.structs.replace(p, memory_bytes=2) for p in s.inference),
            retrain=tuple(msgspec.structs.replace(p, memory_bytes=4, swap_bytes=2) for p in s.retrain),
        )
        for s in problem.streams
    )
    gpus = tuple(msgspec.structs.replace(gpu, memory_bytes=2 * each + 8) for gpu in problem.gpus)
    return msgspec.structs.replace(problem, streams=streams, gpus=gpus)


def priced_changes(problem: Problem, seed: int) -> Problem:
    """Every stream is served already; another configuration costs half a second, another GPU two."""
    streams = tuple(
        msgspec.structs.replace(
            s, serving_gpu=problem.gpus[v % len(problem.gpus)].gpu_id, serving_inference=s.inference[3].inference_id
        )
        for v, s in enumerate(problem.streams)
    )
    return msgspec.structs.replace(problem, streams=streams, config_change_s=0.5, migration_s=2.0)


def limited(problem: Problem, seed: int) -> Problem:
    """Own windows, a third of the labels, a link for three streams in five (`optimizer.problems.with_limits`)."""
    found = with_limits(problem, seed)
    streams = tuple(msgspec.structs.replace(s, max_latency_s=None) for s in found.streams)
    return msgspec.structs.replace(found, streams=streams, planning_quantile=0.5)


KINDS: dict[str, Callable[[Problem, int], Problem]] = {
    "two kinds": two_kinds,
    "memory": little_memory,
    "changes": priced_changes,
    "limits": limited,
}


def report(size: str, seeds: int, num_slots: int = 20, kind: str = "", patience: float = 1.0) -> None:
    problems = [msgspec.structs.replace(problem_of(size, seed), num_slots=num_slots) for seed in range(seeds)]
    if kind:
        problems = [KINDS[kind](problem, seed) for seed, problem in enumerate(problems)]
    found = [measure(problem, patience) for problem in problems]
    memory_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    quantum = problem_of(size, 0).share_quantum
    cells = []
    for name, factor, digits in (("gap", 100.0, 3), ("wall_s", 1.0, 2), ("busy_s", 1.0, 2)):
        values = [factor * getattr(one, name) for one in found]
        cells += [f"{statistics.median(values):8.{digits}f}", f"{max(values):8.{digits}f}"]
    print(f"{size:>12} {quantum:8.2f} {num_slots:6d} {seeds:6d} {' '.join(cells)} {memory_mb:8.0f} {kind}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--sizes", default=SIZES)
    parser.add_argument("--seeds", type=int, default=10, help="at most; 5 above 60 streams, 3 above 300")
    parser.add_argument("--growth", action="store_true", help="also: growth with streams, GPUs and slots")
    parser.add_argument(
        "--kinds", action="store_true", help="also: GPUs of two kinds, memory, prices of changes, limits"
    )
    parser.add_argument("--patience", type=float, default=1.0, help="so many times the usual budgets: a busy machine")
    arguments = parser.parse_args()
    patience = arguments.patience
    timeline_cache.wait_compiled(120.0)
    timeline_cache.prepare(60.0)
    heads = ("gap %", "max", "wall s", "max", "busy s", "max", "peak MB")
    print(f"{'size':>12} {'quantum':>8} {'slots':>6} {'seeds':>6} {' '.join(f'{head:>8}' for head in heads)}")
    for size in arguments.sizes.split(","):
        most = 3 if parse_size(size)[0] > 300 else 5 if parse_size(size)[0] > 60 else arguments.seeds
        report(size, min(most, arguments.seeds), patience=patience)
    if arguments.kinds:
        for kind in KINDS:
            print()
            for size in ("10x8x18", "100x16x18"):
                report(size, min(5 if size.startswith("10x") else 3, arguments.seeds), kind=kind, patience=patience)
    if arguments.growth:
        for sizes in GROWTH:
            print()
            for size in sizes.split(","):
                report(size, min(3, arguments.seeds), patience=patience)
        print()
        for num_slots in (5, 10, 20, 40):
            report("20x8x18", min(3, arguments.seeds), num_slots, patience=patience)


if __name__ == "__main__":
    main()
