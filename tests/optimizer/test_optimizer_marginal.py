"""Shares by marginal worth, and the order of planners where the static program does not come to its end."""

from __future__ import annotations

import itertools

import msgspec
import numpy as np
import pytest

from optimizer.objective import judge
from optimizer.policies.ladder import static_plan
from optimizer.policies.marginal import _granted, _worth_of_quanta, marginal, serving_only
from optimizer.policies.milp import milp
from optimizer.policies.registry import get_policy
from optimizer.policies.thief import Shares
from optimizer.problems import random_problem, servable
from protocol.plan import Plan


@pytest.mark.parametrize("seed", range(12))
def test_quanta_are_dealt_as_well_as_any_deal_but_for_one_step(seed: int) -> None:
    problem = msgspec.structs.replace(random_problem(3, 2, 6, seed), share_quantum=0.25)
    shares = Shares(problem)
    values = np.stack([table.value for table in shares.tables])
    worth = _worth_of_quanta(values, shares.pool)
    quanta = range(1, shares.pool + 1)
    best = max(
        sum(worth[v, n] for v, n in enumerate(deal))
        for deal in itertools.product(quanta, repeat=3)
        if sum(deal) <= shares.pool
    )
    granted = _granted(worth, shares.pool)
    assert sum(granted) <= shares.pool
    dealt = sum(worth[v, n] for v, n in enumerate(granted))
    largest = max(float(np.diff(row[1:]).max()) for row in worth)
    assert best - 2.0 * largest <= dealt <= best + 1e-12


@pytest.mark.parametrize("seed", range(4))
def test_the_plan_is_feasible_near_the_best_static_one_and_not_above_its_bound(seed: int) -> None:
    problem = random_problem(12, 6, 9, seed)
    exact = milp(problem, 20.0)
    plan, served = marginal(problem, 1.0), serving_only(problem)
    assert exact.report.bound is not None
    for made in (plan, served):
        assert judge(problem, made).feasible
        assert judge(problem, made).value <= exact.report.bound + 1e-9
    assert all(a.retrain is None for a in served.assignments)
    assert plan.report.value >= 0.9 * exact.report.value


@pytest.mark.parametrize("budget_s", [0.2, 1.0])
def test_a_static_plan_of_many_streams_in_little_time_is_never_below_the_quick_ones(budget_s: float) -> None:
    problem = servable(random_problem(200, 16, 18, 5))
    offered: list[Plan] = []
    plan = static_plan(problem, budget_s, offered.append)
    value = judge(problem, plan).value
    assert plan.report.policy == "milp"
    assert plan.report.value == value
    for name in ("fair", "thief", "uniform"):
        assert value >= judge(problem, get_policy(name)(problem, budget_s)).value - 1e-9, name
    for other in (marginal(problem, 1.0), serving_only(problem), *offered):
        assert value >= judge(problem, other).value - 1e-9
    assert offered


def test_the_plan_without_retraining_is_there_without_time_for_the_program() -> None:
    problem = servable(random_problem(200, 16, 6, 2))
    plan = get_policy("none")(problem, 0.0)
    assert judge(problem, plan).feasible
    assert plan.report.policy == "none"
    assert "by marginal worth" in plan.report.detail
    assert all(a.retrain is None for a in plan.assignments)
