"""The baselines do what their names say."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optimizer.objective import judge
from optimizer.policies.baselines import INFERENCE_PARTS, LEVELS, cheapest, repaired, retrain_at_level
from optimizer.policies.registry import POLICIES, get_policy
from optimizer.problems import random_problem
from protocol.errors import InputError, PlanError
from tests.optimizer.static_plans import best_static_plan, small_problem


def test_uniform_is_the_best_of_its_variants() -> None:
    problem = random_problem(10, 8, 18, 1)
    values = [
        get_policy(f"uniform:{level}:{part}")(problem, 1.0).report.value for level in LEVELS for part in INFERENCE_PARTS
    ]
    plan = get_policy("uniform")(problem, 1.0)
    assert plan.report.value == max(values)
    assert plan.report.policy == "uniform"
    assert plan.report.detail.startswith("uniform:")


def test_a_uniform_variant_retrains_all_streams_alike() -> None:
    problem = random_problem(8, 8, 18, 1)
    plan = get_policy("uniform:low:0.5")(problem, 1.0)
    retrainings = {(a.retrain.retrain_id, a.retrain.share) for a in plan.assignments if a.retrain is not None}
    assert len(retrainings) == 1
    assert all(a.retrain is not None for a in plan.assignments)


def test_levels_lie_on_the_front_of_cost_and_accuracy() -> None:
    problem = random_problem(8, 8, 18, 1)
    low, middle, high = (retrain_at_level(problem, level)[0] for level in LEVELS)
    costs = [p.gpu_seconds for p in problem.streams[0].retrain]
    assert costs[low] == min(costs)
    assert costs[low] < costs[middle] < costs[high]


def test_none_retrains_nothing_and_serves_as_well_as_can_be() -> None:
    problem = small_problem(4)
    plan = get_policy("none")(problem, 5.0)
    assert all(a.retrain is None for a in plan.assignments)
    assert plan.report.bound is None
    without = type(problem)(
        **{f: getattr(problem, f) for f in problem.__struct_fields__ if f != "streams"},
        streams=tuple(
            type(s)(**{f: getattr(s, f) for f in s.__struct_fields__ if f != "retrain"}) for s in problem.streams
        ),
    )
    best = best_static_plan(without)
    assert best is not None
    assert plan.report.value == pytest.approx(best[0], abs=2e-5)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), name=st.sampled_from(["fair", "uniform", "thief:fixed-config", "uniform:high:0.9"]))
def test_baseline_plans_can_be_executed_on_any_site(seed: int, name: str) -> None:
    problem = small_problem(seed)
    try:
        plan = get_policy(name)(problem, 5.0)
    except PlanError:
        return
    verdict = judge(problem, plan)
    assert verdict.only_floors_broken, verdict.violations
    assert plan.report.value == verdict.value


def test_fixing_the_configuration_costs_the_thief_accuracy() -> None:
    for seed in range(3):
        problem = random_problem(10, 8, 18, seed)
        fixed = get_policy("thief:fixed-config")(problem, 5.0).report.value
        assert fixed < get_policy("thief")(problem, 5.0).report.value


def test_a_plan_repaired_for_its_own_problem_keeps_its_places() -> None:
    problem = random_problem(6, 3, 9, 1)
    plan = get_policy("thief")(problem, 5.0)
    again = repaired(problem, plan)
    for a, b in zip(plan.assignments, again.assignments, strict=True):
        assert a.inference[0] == b.inference[0]
        assert a.retrain == b.retrain


def test_the_cheapest_plan_serves_everybody() -> None:
    problem = random_problem(9, 1, 9, 1)
    assert judge(problem, cheapest(problem)).feasible


def test_an_unknown_policy_lists_what_there_is() -> None:
    for name in ("best", "uniform:low", "uniform:huge:0.5", "uniform:low:x", "uniform:low:0", "uniform:low:nan"):
        with pytest.raises(InputError, match="there are milp, "):
            get_policy(name)


def test_the_thief_works_without_loading_a_solver() -> None:
    code = (
        "import sys\n"
        "from optimizer.policies.registry import get_policy\n"
        "from optimizer.problems import random_problem\n"
        "for name in ('thief', 'uniform', 'fair'):\n"
        "    get_policy(name)(random_problem(3, 2, 3, 0), 1.0)\n"
        "print([m for m in sys.modules if m.split('.')[0] in ('ortools', 'highspy', 'torch', 'scipy')])\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("name", POLICIES)
def test_policies_serve_streams_that_have_nothing_to_retrain(name: str) -> None:
    problem = random_problem(3, 1, 0, 0)
    plan = get_policy(name)(problem, 5.0)
    assert judge(problem, plan).feasible
