"""The thief against a literal reading of Algorithms 1 and 2, and its placement."""

from __future__ import annotations

import math

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optimizer.objective import judge
from optimizer.policies.packing import Wish, pack
from optimizer.policies.registry import get_policy
from optimizer.policies.thief import Shares, thief
from optimizer.problems import random_problem
from protocol.errors import PlanError
from protocol.plan import Problem
from tests.optimizer.static_plans import small_problem


def literal_estimate(problem: Problem, quanta: list[int]) -> float:
    """PickConfigs (Algorithm 2), written out: mean over streams for shares of the jobs in quanta of one GPU."""
    total = 0.0
    for v, stream in enumerate(problem.streams):
        inference_share = min(10, quanta[2 * v]) * problem.share_quantum
        retrain_share = min(10, quanta[2 * v + 1]) * problem.share_quantum
        sustained = [
            p for p in stream.inference if math.ceil(p.gpu_share_needed / 0.1 - 1e-9) * 0.1 <= inference_share + 1e-9
        ]
        if not sustained:
            total += -2.0
            continue
        q = max(p.relative_accuracy for p in sustained)
        best = stream.accuracy_now
        for profile in stream.retrain if retrain_share > 0 else ():
            training_s = min(problem.window_s, profile.gpu_seconds / retrain_share)
            after_s = problem.window_s - training_s
            average = (stream.accuracy_now * training_s + profile.accuracy_after * after_s) / problem.window_s
            best = max(best, average)
        total += q * best
    return total


def literal_thief(problem: Problem) -> list[int]:
    """Algorithm 1, written out, for GPUs of one kind without reservations."""
    num_jobs, pool = 2 * len(problem.streams), 10 * len(problem.gpus)
    order = [*range(0, num_jobs, 2), *range(1, num_jobs, 2)]
    best = [pool // num_jobs] * num_jobs
    for job in order[: pool % num_jobs]:
        best[job] += 1
    best_value = literal_estimate(problem, best)
    for thief_job in range(num_jobs):
        for victim in range(num_jobs):
            if thief_job == victim:
                continue
            trial = list(best)
            while True:
                trial[victim] -= 1
                trial[thief_job] += 1
                if trial[victim] < 0:
                    break
                value = literal_estimate(problem, trial)
                if value <= best_value + 1e-12:
                    break
                best, best_value = list(trial), value
    return best


@pytest.mark.parametrize("seed", range(6))
def test_one_pass_steals_exactly_what_the_algorithm_says(seed: int) -> None:
    problem = random_problem(4, 2, 9, seed)
    shares = Shares(problem)
    assert shares.steal(math.inf, passes=1)
    mine = literal_estimate(problem, shares.quanta)
    assert mine == pytest.approx(literal_estimate(problem, literal_thief(problem)), abs=1e-9)


@pytest.mark.parametrize("seed", range(6))
def test_the_share_table_is_the_estimate_of_algorithm_2(seed: int) -> None:
    problem = random_problem(1, 1, 9, seed)
    table = Shares(problem).tables[0]
    for i in range(11):
        for r in range(11):
            assert table.value[i][r] == pytest.approx(literal_estimate(problem, [i, r]), abs=1e-9)


def test_thefts_never_create_or_lose_share() -> None:
    problem = random_problem(10, 8, 18, 2)
    shares = Shares(problem)
    before = sum(shares.quanta)
    shares.steal(math.inf)
    assert sum(shares.quanta) == before == 80
    assert min(shares.quanta) >= 0


def test_more_passes_are_never_worse_than_one() -> None:
    for seed in range(5):
        problem = random_problem(20, 8, 18, seed)
        assert thief(problem, 5.0).report.value >= get_policy("thief:one-pass")(problem, 5.0).report.value


def test_without_time_it_stops_at_the_fair_split_and_says_so() -> None:
    problem = random_problem(10, 8, 18, 2)
    plan = thief(problem, -1.0)
    assert "deadline" in plan.report.detail
    assert judge(problem, plan).feasible
    assert plan.report.value == pytest.approx(get_policy("fair")(problem, 1.0).report.value)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_its_plans_can_be_executed_on_any_site(seed: int) -> None:
    problem = small_problem(seed)
    try:
        plan = thief(problem, 5.0)
    except PlanError:
        return
    assert judge(problem, plan).only_floors_broken, judge(problem, plan).violations


def test_floors_are_kept_where_they_can_be_kept() -> None:
    problem = random_problem(4, 4, 9, 1)
    streams = tuple(msgspec.structs.replace(s, min_accuracy=s.accuracy_now) for s in problem.streams)
    problem = msgspec.structs.replace(problem, streams=streams)
    assert judge(problem, thief(problem, 5.0)).feasible


def test_packing_shrinks_retrainings_before_inference() -> None:
    problem = random_problem(2, 1, 9, 1)
    placed = pack(problem, [Wish(lam_quanta=3, gamma=0, r=10), Wish(lam_quanta=3, gamma=0, r=10)])
    assert [problem.streams[v].inference[p.lam].inference_id for v, p in enumerate(placed)] == ["every1", "every1"]
    assert sum(p.r for p in placed) == 4


def test_packing_gives_every_stream_something_when_wishes_are_too_big() -> None:
    problem = random_problem(9, 1, 9, 1)
    placed = pack(problem, [Wish(lam_quanta=3, lam=0) for _ in range(9)])
    assert len(placed) == 9
    with pytest.raises(PlanError, match="cannot be served"):
        pack(random_problem(11, 1, 9, 1), [Wish(lam_quanta=3, lam=0) for _ in range(11)])
