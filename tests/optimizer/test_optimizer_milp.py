"""The exact static policy against brute force, and what its bound promises."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from optimizer.objective import judge, upper_bound_trivial
from optimizer.policies.milp import milp
from optimizer.policies.registry import get_policy
from optimizer.problems import load_problem, random_problem
from protocol.errors import PlanError
from protocol.plan import Problem
from tests.optimizer.static_plans import best_static_plan, small_problem

TOLERANCE = 2e-5  # the solver stops at a relative gap of 1e-5


def check_against_brute_force(problem: Problem) -> str:
    """Compare the solver with brute force; returns what kind of outcome it was."""
    best = best_static_plan(problem)
    if best is not None:
        plan = milp(problem, 20.0)
        verdict = judge(problem, plan)
        assert verdict.feasible, verdict.violations
        assert verdict.value == pytest.approx(best[0], abs=TOLERANCE)
        assert plan.report.bound is not None
        assert plan.report.bound >= best[0] - 1e-9
        assert plan.report.value == verdict.value
        return "feasible"
    if best_static_plan(problem, floors=False) is not None:
        plan = milp(problem, 20.0)
        verdict = judge(problem, plan)
        assert verdict.only_floors_broken
        assert not verdict.feasible
        assert plan.report.bound is None
        return "floors"
    with pytest.raises(PlanError):
        milp(problem, 20.0)
    return "none"


@pytest.mark.parametrize("first", range(0, 200, 20))
def test_brute_force_agrees_on_seeded_instances(first: int) -> None:
    outcomes = [check_against_brute_force(small_problem(seed)) for seed in range(first, first + 20)]
    assert outcomes.count("feasible") >= 12, outcomes


@pytest.mark.parametrize("seed", [161, 175, 12])
def test_bound_and_plan_enclose_the_optimum_when_moving_is_cheaper_than_staying(seed: int) -> None:
    problem = msgspec.structs.replace(small_problem(seed), config_change_s=4.0, migration_s=0.0)
    best = best_static_plan(problem)
    assert best is not None
    report = milp(problem, 20.0).report
    assert report.bound is not None
    assert report.value - 1e-9 <= best[0] <= report.bound + 1e-9


@pytest.mark.parametrize("seed", range(3))
def test_ten_streams_on_eight_gpus_are_placed_without_a_gap(seed: int) -> None:
    problem = random_problem(10, 8, 18, seed)
    plan = milp(problem, 20.0)
    assert judge(problem, plan).feasible
    assert plan.report.status == "optimal"
    assert plan.report.gap is not None
    assert plan.report.gap <= 1e-3


def test_a_hundred_streams_are_placed_within_a_fifth_of_a_percent() -> None:
    problem = random_problem(100, 16, 18, 1)
    plan = milp(problem, 60.0)
    assert judge(problem, plan).feasible
    assert plan.report.gap is not None
    assert plan.report.gap <= 2e-3


@pytest.mark.parametrize("seed", range(4))
def test_no_static_plan_is_above_the_bound(seed: int) -> None:
    problem = random_problem(6, 3, 9, seed)
    bound = milp(problem, 20.0).report.bound
    assert bound is not None
    assert bound <= upper_bound_trivial(problem) + 1e-9
    for name in ("thief", "uniform", "fair", "none", "thief:fixed-config"):
        plan = get_policy(name)(problem, 5.0)
        verdict = judge(problem, plan)
        assert verdict.feasible
        assert verdict.value <= bound + 1e-9, name


def test_every_kind_of_plan_is_used() -> None:
    problem = random_problem(20, 8, 18, 1)
    plan = milp(problem, 20.0)
    assert any(len(a.inference) == 2 for a in plan.assignments), "freed share is used again"
    assert any(a.retrain is None for a in plan.assignments)
    assert len({a.retrain.retrain_id for a in plan.assignments if a.retrain is not None}) > 2


def test_a_fine_quantum_is_planned_without_patterns() -> None:
    problem = msgspec.structs.replace(random_problem(4, 2, 9, 3), share_quantum=0.02)
    coarse = milp(random_problem(4, 2, 9, 3), 20.0)
    fine = milp(problem, 10.0)
    verdict = judge(problem, fine)
    assert verdict.feasible
    assert fine.report.bound is not None
    assert verdict.value >= coarse.report.value - 1e-3


def test_streams_stay_where_they_are_served_when_moving_costs_nothing_but_gains_nothing() -> None:
    problem = random_problem(6, 3, 9, 5)
    first = milp(problem, 20.0)
    streams = tuple(
        msgspec.structs.replace(
            stream, serving_gpu=a.inference[0].gpu_id, serving_inference=a.inference[0].inference_id
        )
        for stream, a in zip(problem.streams, first.assignments, strict=True)
    )
    again = milp(msgspec.structs.replace(problem, streams=streams), 20.0)
    stayed = [
        a.inference[0].gpu_id == b.inference[0].gpu_id
        for a, b in zip(first.assignments, again.assignments, strict=True)
    ]
    assert sum(stayed) >= 4


def test_a_running_retraining_goes_on_where_it_runs() -> None:
    problem = random_problem(4, 2, 9, 2)
    stream = problem.streams[0]
    running = msgspec.structs.replace(
        stream.retrain[-1], retrain_id="running", gpu_seconds=2.0, accuracy_after=0.99, pinned_gpu="gpu1"
    )
    changed = msgspec.structs.replace(stream, retrain=(*stream.retrain, running))
    problem = msgspec.structs.replace(problem, streams=(changed, *problem.streams[1:]))
    retrain = milp(problem, 20.0).assignments[0].retrain
    assert retrain is not None
    assert (retrain.retrain_id, retrain.gpu_id) == ("running", "gpu1")


def test_the_worked_example_comes_out_as_by_hand() -> None:
    """Table 1 of the paper, window 1, three GPUs: both streams at full inference, B retrains for 50 s on the third."""
    problem = load_problem(Path(__file__).parents[2] / "examples" / "worked_example.json")
    plan = milp(problem, 20.0)
    by_hand = (0.65 + (50.0 * 0.50 + 70.0 * 0.85) / 120.0) / 2.0
    assert by_hand == pytest.approx(0.677, abs=5e-4)
    assert judge(problem, plan).value == pytest.approx(by_hand)
    a, b = plan.assignments
    assert a.retrain is None
    assert b.retrain is not None
    assert (b.retrain.retrain_id, b.retrain.share) == ("to85", 1.0)
    assert [step.share for step in (*a.inference, *b.inference)] == [1.0, 1.0]


def test_too_many_streams_are_an_error_not_a_plan() -> None:
    with pytest.raises(PlanError):
        milp(random_problem(12, 1, 3, 0), 5.0)
