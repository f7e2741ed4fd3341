"""The planner: the best plan by the judge, in time, and never without saying why it is not a better one."""

from __future__ import annotations

import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import psutil
import pytest

from optimizer import solver_pool
from optimizer.objective import judge
from optimizer.planner import Planner
from optimizer.problems import random_problem
from protocol.errors import InputError, PlanError
from protocol.plan import Plan, Problem

CHILD = [sys.executable, str(Path(__file__).with_name("misbehaving_child.py"))]
PROBLEM = random_problem(5, 2, 9, 1)
HANG_BOUND_S = 30.0  # far above what anything here takes, far below a hang

pytestmark = pytest.mark.process


@pytest.fixture(scope="module")
def warm() -> Iterator[Planner]:
    with Planner("milp", 20.0) as planner:
        assert planner.wait_until_warm(60.0)
        yield planner


def misbehaving(how: str, monkeypatch: pytest.MonkeyPatch, deadline_s: float = 5.0, policy: str = "milp") -> Planner:
    monkeypatch.setenv("EKYA_TEST_CHILD", how)
    return Planner(policy, deadline_s, command=CHILD)


def ask(planner: Planner, problem: Problem = PROBLEM, last_plan: Plan | None = None) -> Plan:
    started_s = time.monotonic()
    plan = planner.solve(problem, last_plan=last_plan)
    assert time.monotonic() - started_s < HANG_BOUND_S
    assert judge(problem, plan).only_floors_broken
    assert plan.report.value == judge(problem, plan).value
    return plan


@pytest.fixture(scope="module")
def warm_none() -> Iterator[Planner]:
    with Planner("none", 20.0) as planner:
        yield planner


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("size", [(10, 8, 18), (20, 8, 18)])
def test_milp_is_at_least_the_thief_and_the_thief_at_least_the_best_uniform(
    warm: Planner, warm_none: Planner, size: tuple[int, int, int], seed: int
) -> None:
    problem = random_problem(*size, seed)
    exact = ask(warm, problem).report
    thief = ask(Planner("thief", 5.0), problem).report
    uniform = ask(Planner("uniform", 5.0), problem).report
    assert exact.value >= thief.value >= uniform.value
    assert exact.value > ask(warm_none, problem).report.value
    assert exact.bound is not None
    assert exact.bound >= exact.value


def test_the_report_says_what_was_proven(warm: Planner) -> None:
    report = ask(warm).report
    assert (report.policy, report.status, report.detail) == ("milp", "optimal", "")
    assert report.gap is not None
    assert report.gap <= 1e-3


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("crash", "was killed by signal 6"),
        ("dead", "exit code 3"),
        ("garbage", "garbage"),
        ("long", "garbage"),
        ("infeasible", "INFEASIBLE"),
        ("broken", "cannot be executed"),
    ],
)
def test_a_faulty_child_costs_quality_and_never_the_plan(
    how: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with misbehaving(how, monkeypatch, deadline_s=20.0) as planner:
        for _ in range(2):
            report = ask(planner).report
            assert report.status == "fallback"
            assert report.policy in ("thief", "fair")
            assert report.bound is None
            assert "milp" in report.detail
        assert reason in report.detail or "keeps dying" in report.detail


def test_a_child_that_is_still_starting_at_the_deadline_is_not_begun_again(monkeypatch: pytest.MonkeyPatch) -> None:
    with misbehaving("mute", monkeypatch, deadline_s=0.2) as planner:
        first = planner._child
        assert first is not None
        for _ in range(3):
            report = ask(planner).report
            assert report.status == "fallback"
            assert "still starting" in report.detail
            assert planner._child is first


@pytest.mark.parametrize("how", ["hang", "mute"])
def test_a_child_that_hangs_is_killed_at_the_deadline_and_replaced(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(solver_pool, "START_PATIENCE_S", 0.0)  # so that "mute" does not count as starting
    with misbehaving(how, monkeypatch, deadline_s=0.6) as planner:
        first = planner._child
        assert first is not None
        report = ask(planner).report
        assert report.status == "fallback"
        assert "no answer within 0.6 s" in report.detail
        assert 0.6 <= report.seconds < HANG_BOUND_S
        first.wait_gone()
        assert first.gone()
        monkeypatch.setenv("EKYA_TEST_CHILD", "honest")
        ask(planner)  # whatever child was started meanwhile
        planner.deadline_s = 20.0
        assert "no answer" not in ask(planner).report.detail


def test_a_worse_answer_loses_to_the_incumbent(monkeypatch: pytest.MonkeyPatch) -> None:
    with misbehaving("honest", monkeypatch, deadline_s=20.0) as planner:
        report = ask(planner).report
        assert report.policy == "thief"
        assert "better than milp" in report.detail


def test_a_bound_that_cannot_be_true_is_not_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    with misbehaving("lie", monkeypatch, deadline_s=20.0) as planner:
        report = ask(planner).report
        assert report.bound is None
        assert report.gap is None
        assert report.status != "optimal"
        assert "does not hold" in report.detail


def test_a_policy_that_is_sent_as_it_is_is_not_replaced_by_a_better_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    with misbehaving("honest", monkeypatch, deadline_s=20.0, policy="none") as planner:
        plan = ask(planner)
        assert plan.report.policy == "none"
        assert all(assignment.retrain is None for assignment in plan.assignments)


def test_the_last_plan_is_an_incumbent(monkeypatch: pytest.MonkeyPatch) -> None:
    with Planner("milp", 20.0) as planner:
        best = ask(planner)
    with misbehaving("crash", monkeypatch, deadline_s=20.0) as planner:
        report = ask(planner, last_plan=best).report
    assert report.value > ask(Planner("thief", 5.0)).report.value
    assert report.policy == "last plan"


def test_a_last_plan_that_no_longer_fits_is_repaired(monkeypatch: pytest.MonkeyPatch, warm: Planner) -> None:
    best = ask(warm)
    fewer = msgspec.structs.replace(PROBLEM, streams=PROBLEM.streams[1:], window_s=100.0)
    with misbehaving("crash", monkeypatch, deadline_s=20.0) as planner:
        planner.start(fewer, best)
        assert planner._question is not None
        repaired = {c.method: c for c in planner._question.incumbents}["last plan repaired"]
    assert repaired.verdict.feasible
    kept = {a.stream_id: a.inference[0].gpu_id for a in best.assignments}
    assert all(a.inference[0].gpu_id == kept[a.stream_id] for a in repaired.plan.assignments)


def test_it_runs_from_a_poll_loop_without_blocking_it(warm: Planner) -> None:
    warm.start(PROBLEM)
    started_s, plan = time.monotonic(), None
    while plan is None and time.monotonic() - started_s < HANG_BOUND_S:
        select.select([warm.fileno()], [], [], 0.1)
        plan = warm.poll(time.monotonic())
    assert plan is not None
    assert plan.report.policy == "milp"
    assert warm.poll(time.monotonic()) is None


def test_a_new_question_drops_the_one_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EKYA_TEST_DELAY", "0.3")
    with misbehaving("honest", monkeypatch, deadline_s=20.0) as planner:
        planner.start(PROBLEM)
        other = random_problem(3, 2, 9, 2)
        plan = ask(planner, other)
        assert len(plan.assignments) == 3


@pytest.mark.parametrize("policy", ["timeline", "milp"])
def test_a_warm_child_leaves_a_dropped_question_and_answers_the_next(policy: str) -> None:
    with Planner(policy, 60.0) as planner:
        assert planner.wait_until_warm(60.0)
        assert planner._child is not None
        pid = planner._child.pid
        for seed in range(3):
            planner.start(random_problem(300, 20, 18, seed))
            time.sleep(0.1)
        assert planner.solve(PROBLEM, 20.0).report.status in ("optimal", "feasible")
        assert planner._child.pid == pid


def test_a_child_that_does_not_leave_a_dropped_question_is_replaced_by_a_warm_spare(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with misbehaving("deaf", monkeypatch, deadline_s=8.0) as planner:
        assert planner.wait_until_warm(30.0)
        first = planner._child
        monkeypatch.setenv("EKYA_TEST_CHILD", "honest")
        until_s = time.monotonic() + 30.0
        while not planner._pool.spare_is_warm and time.monotonic() < until_s:
            planner.poll(time.monotonic())
            time.sleep(0.02)
        planner.start(PROBLEM)
        plan = ask(planner)
        assert planner._child is not first
        assert "no answer" not in plan.report.detail


def test_the_deadline_follows_the_given_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setenv("EKYA_TEST_CHILD", "hang")
    with Planner("milp", 5.0, clock=lambda: now, command=CHILD) as planner:
        planner.start(PROBLEM)
        assert planner.poll(now) is None
        now = 1004.9
        assert planner.poll(now) is None
        now = 1005.0
        plan = planner.poll(now)
        assert plan is not None
        assert plan.report.seconds == pytest.approx(5.0)


def test_streams_that_cannot_be_served_are_an_error_with_its_reasons(warm: Planner) -> None:
    with pytest.raises(PlanError, match="cannot be served"):
        warm.solve(random_problem(12, 1, 3, 0))
    assert ask(warm).report.policy == "milp"


def test_floors_that_cannot_all_be_met_still_give_a_plan(warm: Planner) -> None:
    crowded = random_problem(6, 1, 9, 0)
    streams = tuple(msgspec.structs.replace(s, min_accuracy=0.95 * s.accuracy_now) for s in crowded.streams)
    problem = msgspec.structs.replace(crowded, streams=streams)
    plan = ask(warm, problem)
    assert "below their floor" in plan.report.detail
    assert plan.report.bound is None


def test_a_problem_full_of_nonsense_is_an_error_and_the_planner_goes_on(warm: Planner) -> None:
    nan = msgspec.structs.replace(PROBLEM.streams[0], accuracy_now=float("nan"))
    infinite = msgspec.structs.replace(PROBLEM.streams[0].inference[0], gpu_share_needed=float("inf"))
    unservable = msgspec.structs.replace(PROBLEM.streams[0], inference=(infinite,))
    for stream in (nan, unservable):
        with pytest.raises(PlanError):
            warm.solve(msgspec.structs.replace(PROBLEM, streams=(stream, *PROBLEM.streams[1:])))
    assert ask(warm).report.policy == "milp"


def test_an_unknown_policy_is_an_input_error() -> None:
    with pytest.raises(InputError, match="there are milp, "):
        Planner("best", 1.0)


def test_the_child_dies_with_its_parent() -> None:
    code = (
        "import os, signal\n"
        "from optimizer.planner import Planner\n"
        "p = Planner('milp', 5.0)\n"
        "assert p.wait_until_warm(60.0)\n"
        "print(p._child.pid, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, timeout=90.0, check=False)
    assert result.returncode == -signal.SIGKILL
    pid = int(result.stdout)
    end_s = time.monotonic() + HANG_BOUND_S
    while psutil.pid_exists(pid) and time.monotonic() < end_s:
        if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            break
        time.sleep(0.05)
    assert time.monotonic() < end_s


def test_closing_ends_the_child() -> None:
    planner = Planner("milp", 5.0)
    assert planner._child is not None
    pid = planner._child.pid
    planner.close()
    assert not psutil.pid_exists(pid)
    assert planner.fileno() == -1
