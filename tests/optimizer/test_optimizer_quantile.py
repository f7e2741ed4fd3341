"""Planning on a quantile: one place lowers the gains for every policy, and plans are valued on what is expected."""

from __future__ import annotations

import msgspec
import pytest

from optimizer.objective import judge
from optimizer.planner import Planner
from optimizer.policies.reductions import lowered
from optimizer.policies.registry import POLICIES, get_policy
from optimizer.problems import random_problem
from protocol.plan import Problem, RetrainProfile
from protocol.schema import GpuSpec
from tests.optimizer.test_optimizer_objective import stream

RISKY = RetrainProfile(retrain_id="risky", accuracy_after=0.9, gpu_seconds=20.0, accuracy_error=0.3)
SURE = RetrainProfile(retrain_id="sure", accuracy_after=0.8, gpu_seconds=20.0, accuracy_error=0.02)
HOPELESS = RetrainProfile(retrain_id="hopeless", accuracy_after=0.4, gpu_seconds=20.0, accuracy_error=0.2)


def problem(quantile: float, *retrain: RetrainProfile) -> Problem:
    return Problem(
        window_s=100.0,
        gpus=(GpuSpec(gpu_id="g0"),),
        streams=(stream("a", retrain=retrain or (RISKY, SURE, HOPELESS)),),
        planning_quantile=quantile,
    )


def test_a_gain_is_lowered_to_its_quantile_but_never_below_no_gain() -> None:
    low = lowered(problem(0.1)).streams[0].retrain
    assert low[0].accuracy_after == pytest.approx(0.9 - 1.2815516 * 0.3)
    assert low[1].accuracy_after == pytest.approx(0.8 - 1.2815516 * 0.02)
    assert low[2].accuracy_after == 0.4  # no gain to be lowered
    assert lowered(problem(0.01)).streams[0].retrain[0].accuracy_after == 0.5
    assert lowered(problem(0.1)).planning_quantile == 0.5


def test_the_error_of_the_gain_counts_where_it_is_known() -> None:
    paired = msgspec.structs.replace(RISKY, gain_error=0.1)
    assert lowered(problem(0.1, paired)).streams[0].retrain[0].accuracy_after == pytest.approx(0.9 - 0.12815516)


def test_half_is_what_is_expected() -> None:
    expected = problem(0.5)
    assert lowered(expected) is expected


@pytest.mark.parametrize("name", [name for name in POLICIES if name not in ("none", "uniform", "thief:fixed-config")])
def test_every_policy_prefers_the_sure_gain_at_a_low_quantile(name: str) -> None:
    def chosen(quantile: float) -> str:
        plan = get_policy(name)(problem(quantile), 2.0)
        retrain = plan.assignments[0].retrain
        assert plan.report.value == pytest.approx(judge(problem(0.5), plan).value)
        assert plan.report.planning_quantile == quantile
        assert quantile == 0.5 or plan.report.bound is None
        return "" if retrain is None else retrain.retrain_id

    assert chosen(0.5) == "risky"
    assert chosen(0.1) == "sure"


def test_a_gain_that_may_be_none_is_not_trained_for() -> None:
    plan = get_policy("milp")(problem(0.01, RISKY), 2.0)
    assert plan.assignments[0].retrain is None


@pytest.mark.parametrize("name", ["thief", "milp", "timeline"])
def test_the_planner_chooses_by_the_quantile_and_says_so(name: str) -> None:
    with Planner(name, 5.0) as planner:
        planner.wait_until_warm(60.0)
        plan = planner.solve(problem(0.1))
        retrain = plan.assignments[0].retrain
        assert retrain is not None
        assert retrain.retrain_id == "sure"
        assert plan.report.value == pytest.approx(judge(problem(0.5), plan).value)
        assert plan.report.planning_quantile == 0.1
        assert plan.report.bound is None
        assert "10% quantile" in plan.report.detail


def test_problems_without_errors_are_planned_the_same_at_every_quantile() -> None:
    plain = random_problem(4, 2, 9, 1)
    low = get_policy("milp")(msgspec.structs.replace(plain, planning_quantile=0.05), 10.0)
    assert low.assignments == get_policy("milp")(plain, 10.0).assignments
