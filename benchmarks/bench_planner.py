"""How long a caller of a warm planner waits for a plan, and what is proven of it.

Run with ``pytest benchmarks/bench_planner.py``. One round is one problem of its own seed, so the
median is over problems; the extra columns are medians over the same problems.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator
from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from optimizer.objective import judge
from optimizer.planner import Planner
from optimizer.policies.registry import get_policy
from optimizer.problems import parse_size, random_problem
from protocol.plan import Plan, Problem

SIZES = {"10x8x18": 10, "20x8x18": 10, "100x16x18": 5}  # problems per size


@pytest.fixture(scope="module")
def planners() -> Iterator[dict[str, Planner]]:
    made = {name: Planner(name, 30.0) for name in ("milp", "thief")}
    for planner in made.values():
        assert planner.wait_until_warm(60.0)
    yield made
    for planner in made.values():
        planner.close()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("policy", ["milp", "thief"])
def test_time_to_a_plan(benchmark: BenchmarkFixture, planners: dict[str, Planner], policy: str, size: str) -> None:
    seeds = itertools.count(1)
    solved: list[tuple[Problem, Plan]] = []

    def next_problem() -> tuple[tuple[Problem], dict[str, object]]:
        return (random_problem(*parse_size(size), next(seeds)),), {}

    def solve(problem: Problem) -> None:
        solved.append((problem, planners[policy].solve(problem)))

    pedantic: Any = benchmark.pedantic
    pedantic(solve, setup=next_problem, rounds=SIZES[size])
    verdicts = [judge(problem, plan) for problem, plan in solved]
    assert all(verdict.feasible for verdict in verdicts)
    benchmark.extra_info["accuracy"] = round(statistics.median(verdict.value for verdict in verdicts), 4)
    gaps = [plan.report.gap for _, plan in solved if plan.report.gap is not None]
    if policy == "milp":
        assert len(gaps) == len(solved)
        benchmark.extra_info["gap"] = statistics.median(gaps)
    stats = benchmark.stats
    if stats is not None:  # None with --benchmark-disable
        print(f"\n{size} {policy}: median {stats['median'] * 1e3:.0f} ms {benchmark.extra_info}")


@pytest.mark.parametrize("size", ["10x8x18", "1000x200x18"])
def test_time_of_a_judgement(benchmark: BenchmarkFixture, size: str) -> None:
    problem = random_problem(*parse_size(size), 1)
    plan = get_policy("fair")(problem, 5.0)
    verdict = benchmark(judge, problem, plan)
    assert verdict.feasible
