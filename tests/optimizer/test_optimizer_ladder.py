"""Policies in order: what plans more freely is never worse, and no plan is above a bound that holds for it."""

from __future__ import annotations

import pytest

from optimizer.objective import judge
from optimizer.policies.ladder import timeline_or_static
from optimizer.policies.milp import milp
from optimizer.policies.registry import get_policy
from optimizer.problems import random_problem

SIZES = ((3, 1, 6), (4, 2, 6), (6, 2, 9), (5, 4, 18))


@pytest.mark.parametrize("seed", range(8))
def test_the_time_indexed_policy_is_never_below_the_static_one(seed: int) -> None:
    problem = random_problem(*SIZES[seed % len(SIZES)], seed=seed)
    static, best = milp(problem, 2.0), timeline_or_static(problem, 2.0)
    verdict = judge(problem, best)
    assert verdict.feasible
    assert verdict.value >= judge(problem, static).value - 1e-9
    assert best.report.policy == "timeline"
    assert best.report.bound is not None
    for name in ("thief", "uniform", "none"):
        other = judge(problem, get_policy(name)(problem, 2.0))
        assert not other.feasible or other.value <= best.report.bound + 1e-9, name
