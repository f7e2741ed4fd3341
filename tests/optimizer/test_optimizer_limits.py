"""Policies under latency limits, own windows, label budgets and with retraining in the cloud, against brute force."""

from __future__ import annotations

import pytest

from optimizer.objective import judge
from optimizer.policies.ladder import timeline_or_static
from optimizer.policies.milp import milp
from optimizer.policies.registry import get_policy
from protocol.errors import PlanError
from protocol.plan import Problem
from tests.optimizer.static_plans import best_static_plan, small_limited_problem

TOLERANCE = 2e-5  # the solver stops at a relative gap of 1e-5
BASELINES = ("thief", "thief:one-pass", "thief:fixed-config", "thief:fixed-shares", "uniform", "fair", "none")


def compared(problem: Problem, *, exact: bool) -> str:
    """Compare the static solver with brute force; returns what kind of outcome it was."""
    best = best_static_plan(problem)
    if best is None:
        if best_static_plan(problem, floors=False) is None:
            with pytest.raises(PlanError):
                milp(problem, 20.0)
            return "none"
        plan = milp(problem, 20.0)
        verdict = judge(problem, plan)
        assert verdict.only_floors_broken, verdict.violations
        assert not verdict.feasible
        assert plan.report.bound is None
        return "limits"
    plan = milp(problem, 20.0)
    verdict = judge(problem, plan)
    assert verdict.feasible, verdict.violations
    assert plan.report.bound is not None
    assert plan.report.bound >= best[0] - 1e-9
    assert verdict.value <= best[0] + TOLERANCE
    if exact or not any(stream.cloud for stream in problem.streams):
        assert verdict.value == pytest.approx(best[0], abs=TOLERANCE)
        return "equal"
    return "equal" if verdict.value >= best[0] - TOLERANCE else "below"


@pytest.mark.parametrize("first", range(0, 120, 20))
def test_brute_force_agrees_where_nothing_depends_on_the_order_of_transfers(first: int) -> None:
    outcomes = [
        compared(small_limited_problem(seed, equal_transfers=True), exact=True) for seed in range(first, first + 20)
    ]
    assert outcomes.count("equal") >= 10, outcomes


@pytest.mark.parametrize("first", range(200, 260, 20))
def test_transfers_of_all_sizes_leave_a_valid_bound_and_mostly_the_best_plan(first: int) -> None:
    outcomes = [compared(small_limited_problem(seed), exact=False) for seed in range(first, first + 20)]
    assert outcomes.count("equal") >= 8, outcomes
    assert outcomes.count("below") <= 3, outcomes


@pytest.mark.parametrize("seed", range(60))
def test_every_policy_keeps_the_limits_that_can_be_kept(seed: int) -> None:
    problem = small_limited_problem(seed)
    best = best_static_plan(problem)
    if best is None:
        return
    for name in BASELINES:
        try:
            plan = get_policy(name)(problem, 2.0)
        except PlanError:
            continue  # packing may fail where an exact placement exists
        verdict = judge(problem, plan)
        assert verdict.only_floors_broken, (name, verdict.violations)
        assert not verdict.feasible or verdict.value <= best[0] + TOLERANCE, name


@pytest.mark.parametrize("seed", range(0, 40, 3))
def test_the_time_indexed_policy_is_valid_and_not_below_the_static_one(seed: int) -> None:
    problem = small_limited_problem(seed)
    best = best_static_plan(problem)
    if best is None:
        return
    static, plan = milp(problem, 20.0), timeline_or_static(problem, 2.0)
    verdict = judge(problem, plan)
    assert verdict.feasible, verdict.violations
    assert verdict.value >= judge(problem, static).value - 1e-9
    if plan.report.bound is not None:
        assert plan.report.bound >= max(verdict.value, best[0]) - 1e-9
