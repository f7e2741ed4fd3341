"""Plans are there in time, valid and explained, whatever is injected into the real solver child."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import msgspec
import pytest

from optimizer.objective import judge
from optimizer.planner import Planner
from optimizer.problems import random_problem
from optimizer.solver_child import Answer, question_frame, take_question
from optimizer.solver_child import Question as SolverQuestion
from protocol.errors import PlanError
from protocol.plan import Plan, Problem
from tests.optimizer.faulty_solver import FAULTS, with_fault

CHILD = [sys.executable, str(Path(__file__).with_name("faulty_solver.py")), "thief"]  # which starts quickly
LATE_S = 10.0  # far above what anything here takes on a busy machine, far below a hang

pytestmark = pytest.mark.process


def warm(planner: Planner) -> None:
    end_s = time.monotonic() + 60.0
    while time.monotonic() < end_s and not (planner._child is not None and planner._child.ready):
        planner.poll(time.monotonic())
        time.sleep(0.01)


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_costs_quality_and_never_the_plan_and_is_told(fault: str) -> None:
    problem = with_fault(random_problem(6, 2, 9, 3), fault)
    with Planner("milp", 1.0, command=CHILD) as planner:
        warm(planner)
        began_s = time.monotonic()
        plan = planner.solve(problem)
        assert time.monotonic() - began_s < 1.0 + LATE_S
        assert judge(problem, plan).only_floors_broken
        assert plan.report.value == judge(problem, plan).value
        assert plan.report.bound is None or plan.report.bound >= plan.report.value
        # A machine that is very busy may turn any fault into a child that is late.
        words = (*FAULTS[fault], "no answer within")
        assert not FAULTS[fault] or any(word in plan.report.detail for word in words), plan.report.detail
        # And the next question is answered as if nothing had been.
        warm(planner)
        again = planner.solve(with_fault(problem, "none"), 20.0)
        assert again.report.policy == "milp"


def test_a_question_that_a_starting_child_never_saw_is_not_what_the_next_report_is_about() -> None:
    problem = random_problem(6, 2, 9, 3)
    with Planner("milp", 0.01, command=CHILD) as planner:
        report = planner.solve(with_fault(problem, "crash")).report
        assert "it was still starting" in report.detail
        warm(planner)
        report = planner.solve(with_fault(problem, "none"), 20.0).report
    assert report.policy == "milp"
    assert "solver process" not in report.detail


def test_no_stream_has_more_steps_than_there_are_retrainings_to_wait_for() -> None:
    problem = with_fault(msgspec.structs.replace(random_problem(800, 64, 3, 1), share_quantum=0.02), "endless")
    with Planner("milp", 20.0, command=CHILD) as planner:
        warm(planner)
        report = planner.solve(problem).report
    assert any(word in report.detail for word in (*FAULTS["endless"], "no answer within")), report.detail


def test_a_plan_offered_early_outlives_its_child() -> None:
    problem = with_fault(random_problem(6, 2, 9, 3), "early")
    with Planner("milp", 2.0, command=CHILD) as planner:
        warm(planner)
        report = planner.solve(problem).report
    assert report.policy == "milp"
    assert "it had a plan before it was done" in report.detail


def test_a_warm_spare_takes_over_at_once() -> None:
    problem = random_problem(6, 2, 9, 3)
    with Planner("milp", 0.3, command=CHILD) as planner:
        end_s = time.monotonic() + 60.0
        while not planner._pool.spare_is_warm and time.monotonic() < end_s:
            planner.poll(time.monotonic())
            time.sleep(0.01)
        assert planner._pool.spare_is_warm
        assert "no answer" in planner.solve(with_fault(problem, "hang")).report.detail
        assert planner._child is not None
        assert planner._child.ready
        assert planner.solve(with_fault(problem, "none"), 20.0).report.policy == "milp"


def test_the_planner_can_be_asked_while_two_children_in_a_row_are_lost() -> None:
    problem = random_problem(6, 2, 9, 3)
    with Planner("milp", 0.2, command=CHILD) as planner:
        for fault in ("hang", "hang", "crash", "crash", "crash", "hang"):
            plan = planner.solve(with_fault(problem, fault))
            assert judge(problem, _named(plan)).only_floors_broken
            assert plan.report.status in ("fallback", "heuristic", "feasible")


def _named(plan: Plan) -> Plan:
    """The plan with the fault taken out of the GPU's name."""
    data = msgspec.json.encode(plan)
    for fault in FAULTS:
        data = data.replace(f'"gpu0-{fault}"'.encode(), b'"gpu0"')
    return msgspec.json.decode(data, type=Plan)


def test_a_last_plan_that_cannot_be_executed_any_more_is_no_reason_to_do_without_one() -> None:
    last = Planner("fair", 5.0).solve(random_problem(3, 1, 9, 1))
    problem = with_fault(random_problem(200, 32, 18, 1), "hang")
    with Planner("milp", 0.01, command=CHILD) as planner:
        plan = planner.solve(problem, last_plan=last)
    assert judge(problem, plan).only_floors_broken


@pytest.mark.parametrize("policy", ["milp", "timeline", "thief", "uniform", "fair"])
def test_a_deadline_too_short_for_anything_good_still_has_a_plan(policy: str) -> None:
    problem = msgspec.structs.replace(random_problem(300, 32, 18, 1), share_quantum=0.05)
    with Planner(policy, 0.02) as planner:
        plan = planner.solve(problem)
    assert judge(problem, plan).only_floors_broken
    if policy in ("milp", "timeline"):
        assert "left out, too slow for the deadline" in plan.report.detail


def test_a_large_problem_reaches_the_child_before_the_incumbents_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = with_fault(random_problem(400, 64, 18, 1), "infeasible")
    assert len(question_frame(SolverQuestion(serial=1, deadline_s=0.0, problem=problem))) > 2_000_000
    with Planner("milp", 20.0, command=CHILD) as planner:
        warm(planner)
        assert planner._child is not None
        sent = []
        make = planner._make_incumbents

        def watched(*arguments: object) -> None:
            assert planner._child is not None
            sent.append(not planner._child._outgoing)
            make(*arguments)  # type: ignore[arg-type]

        monkeypatch.setattr(planner, "_make_incumbents", watched)
        planner.solve(problem)
    assert sent == [True]


def test_a_problem_that_cannot_be_served_ends_in_time_and_says_why() -> None:
    problem = random_problem(25, 2, 9, 1)
    with Planner("milp", 0.5, command=CHILD) as planner, pytest.raises(PlanError, match="cannot be served"):
        planner.solve(with_fault(problem, "hang"))


def test_questions_keep_their_form_on_the_way() -> None:
    problem: Problem = random_problem(3, 2, 4, 5)
    question = SolverQuestion(serial=7, deadline_s=1.5, problem=problem)
    data = bytearray(question_frame(question) + question_frame(question)[:9])
    assert take_question(data) == question
    assert take_question(data) is None
    assert Answer(serial=1).final
