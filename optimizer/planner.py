"""A plan by the deadline, whatever happens to the solver.

Incumbents are made at once, the quickest first (the last plan repaired or everything served as cheaply as can be,
fair shares, shares by marginal worth with and without retraining, the thief), while an exact policy works in a warm
child process. When it answers, fails, or the deadline comes, the best plan *by the judge* is handed out, and its
``SolveReport`` says which method made it and why no better one did. A child that is late is killed; a spare one,
started in a quiet moment, takes over for the next question.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec

from optimizer.objective import SECONDS_TOLERANCE, Verdict, judge, stamped
from optimizer.policies import baselines
from optimizer.policies.marginal import marginal, serving_only
from optimizer.policies.reductions import lowered
from optimizer.policies.registry import PolicyEntry, get_policy, policy_entry
from optimizer.problems import check_problem
from optimizer.solver_child import Answer
from optimizer.solver_pool import SolverPool
from optimizer.solver_process import ChildLostError, SolverProcess, child_command
from protocol.errors import InputError, PlanError, ProtocolError
from protocol.plan import Plan, Problem, SolveReport, SolveStatus

INCUMBENT_BUDGET_S = 0.05
EPITAPH_S = 0.2
_VALUE_TOLERANCE = 1e-6
# Of the deadline, kept for the way back and for judging: seconds, and seconds per stream.
_ANSWER_MARGIN_S = (0.03, 6e-5)
_JUDGING_S = (0.005, 3e-5)
_PACKING_S = (0.0, 2e-4)  # what a policy takes to pack and judge its last plan, beyond the time that it is given
# Seconds per stream that an incumbent takes on a quiet machine, and seconds of any besides. What the first one took
# beyond that tells how busy the machine is.
_PACE_S = {
    "last plan repaired": 8e-5,
    "cheapest": 1.2e-4,
    "fair": 4e-4,
    "marginal": 5e-4,
    "serving only": 3e-4,
    "thief": 1.4e-3,
}
# The least that a policy takes that is asked in this process, seconds per stream, and of all others. The thief begins
# with uniform plans where time is short.
_LEAST_PACE_S = {"fair": 4e-4, "marginal": 4e-4, "uniform": 2.5e-4, "thief": 2.5e-4}
_OTHER_PACE_S = 7e-4
_LEAST_S = 2e-3
_PATIENCE = 0.25  # of the deadline, that a child has to leave a dropped question
_CAUTION = 1.5  # incumbents are begun if so many times their usual time is left
# More steps than any plan of ours has; judging a plan takes time in proportion to them.
_MOST_STEPS = (1000, 64)
_MOST_DETAIL = 2000  # characters of a report


@dataclass(frozen=True, slots=True)
class Candidate:
    """A plan that could be sent, and what the judge says of it."""

    method: str
    plan: Plan
    verdict: Verdict


@dataclass(slots=True)
class _Question:
    """The question under way. ``planned``: the problem at its planning quantile, which plans are made for and
    chosen by; what is reported is what is expected of them on ``problem``."""

    problem: Problem
    planned: Problem
    started_s: float
    deadline_s: float
    incumbents: list[Candidate]
    notes: list[str]
    asked: bool = False

    @property
    def has_plan(self) -> bool:
        """Whether some incumbent can be executed."""
        return any(candidate.verdict.only_floors_broken for candidate in self.incumbents)


class Planner:
    """Plans by one policy under a wall-clock deadline, from a poll loop or blocking.

    Args:
        policy_name: as in ``policies.registry``; InputError when there is no such policy.
        deadline_s: seconds from ``start`` until a plan is handed out at the latest.
        clock: monotonic seconds; ``poll`` is called with times of the same clock.
        command: starts the child process; for tests with children that misbehave.
    """

    def __init__(
        self,
        policy_name: str,
        deadline_s: float,
        clock: Callable[[], float] = time.monotonic,
        command: Sequence[str] | None = None,
    ) -> None:
        self.policy_name, self.deadline_s = policy_name, deadline_s
        self._entry: PolicyEntry = policy_entry(policy_name)
        self._clock = clock
        if self._entry.solver:
            self._pool = SolverPool(command or child_command(policy_name), clock)
        else:
            self._pool = SolverPool(None, clock)
        self._question: _Question | None = None
        self._pool.ensure()

    @property
    def _child(self) -> SolverProcess | None:
        return self._pool.child

    # ------------------------------------------------------------ for a poll loop

    def start(self, problem: Problem, last_plan: Plan | None = None) -> None:
        """Ask for a plan; a question under way is dropped. ``last_plan`` is what is being executed now."""
        self._begin(problem, last_plan, self.deadline_s)

    def fileno(self) -> int:
        """A descriptor that is readable when ``poll`` has something to do; -1 when there is none.

        It changes when the child is replaced. The deadline needs ``patience_s`` besides.
        """
        return -1 if self._child is None else self._child.fileno()

    def patience_s(self, now: float, most_s: float) -> float:
        """How long a poll loop may sleep before it calls ``poll`` again, at most ``most_s`` seconds."""
        question = self._question
        if question is None:
            return most_s
        if not question.asked or self._child is None:
            return 0.0
        wake_s = question.deadline_s
        if self._child.behind and self._pool.spare_is_warm:
            wake_s = min(wake_s, question.started_s + _PATIENCE * (wake_s - question.started_s))
        return min(most_s, max(0.0, wake_s - now))

    def poll(self, now: float) -> Plan | None:
        """The plan once it is decided, None before and after.

        Raises:
            PlanError: there is no plan that could be executed: the streams cannot all be served.
        """
        question = self._question
        if question is None:
            self._pool.rest()
            return None
        self._pool.bury()
        if self._child is None or not question.asked:
            return self._decide(question, None)
        left_s = question.deadline_s - now
        try:
            answer = self._child.listen(min(EPITAPH_S, left_s))
        except ChildLostError as error:
            question.notes.append(f"{self.policy_name}: the solver process {error}")
            early = self._child.offer
            self._pool.lose()
            return self._decide(question, early)
        if answer is None and left_s > 0.0:
            self._hurry(question, now)
            return None
        if answer is not None:
            self._pool.answered()
            return self._decide(question, answer if answer.plan is not None else self._child.offer or answer)
        limit_s = question.deadline_s - question.started_s
        cause = "" if self._child.ready else " (it was still starting)"
        early = self._child.offer
        cause += "; it had a plan before it was done" if early is not None else ""
        question.notes.append(f"{self.policy_name}: no answer within {limit_s:g} s{cause}")
        self._pool.late()
        return self._decide(question, early)

    def close(self) -> None:
        """End the child. The planner cannot be used afterwards."""
        self._question = None
        self._pool.close()

    # ------------------------------------------------------------ blocking

    def solve(self, problem: Problem, budget_s: float | None = None, last_plan: Plan | None = None) -> Plan:
        """A plan within ``budget_s`` seconds (``deadline_s`` where None). PlanError as for ``poll``."""
        self._begin(problem, last_plan, self.deadline_s if budget_s is None else budget_s)
        question = self._question
        while True:
            plan = self.poll(self._clock())
            if plan is not None:
                return plan
            if self._child is not None and question is not None:
                self._child.wait(min(0.05, question.deadline_s - self._clock()))

    def wait_until_warm(self, timeout_s: float) -> bool:
        """Wait until the child can answer at full speed. False when it does not get there in time."""
        end_s = time.monotonic() + timeout_s
        while self._entry.solver and time.monotonic() < end_s:
            self._pool.ensure()
            self._pool.hear_idle()
            if self._child is not None:
                if self._child.ready:
                    return True
                self._child.wait(0.05)
            else:
                time.sleep(0.05)
        return not self._entry.solver

    def __enter__(self) -> Planner:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ------------------------------------------------------------ a question

    def _begin(self, problem: Problem, last_plan: Plan | None, budget_s: float) -> None:
        now = self._clock()
        question = _Question(problem, problem, now, now + budget_s, [], [])
        dropped, self._question = self._question, question
        if dropped is not None and dropped.asked:
            self._drop()
        try:
            check_problem(problem)
        except InputError as error:
            question.notes.append(str(error))
            return
        question.planned = lowered(problem)
        self._pool.ensure()
        self._ask(question)
        self._make_incumbents(question, last_plan)

    def _drop(self) -> None:
        """The child is busy with a question that nobody asks about any more.

        A warm child is told to leave it. One that is still starting is replaced only by one that is not: a fresh one
        would take longer.
        """
        if self._child is not None and self._child.ready:
            self._child.drop()
        elif self._pool.spare_is_warm:
            self._pool.replace()

    def _hurry(self, question: _Question, now: float) -> None:
        """A child that does not leave a dropped question is replaced while a warm spare can still answer this one."""
        waited_s, limit_s = now - question.started_s, question.deadline_s - question.started_s
        behind = self._child is not None and self._child.behind
        if behind and self._pool.spare_is_warm and waited_s >= _PATIENCE * limit_s:
            self._pool.replace()
            self._ask(question)

    def _ask(self, question: _Question) -> None:
        if self._child is None:
            if self._entry.solver:
                question.notes.append(f"{self.policy_name}: its solver process keeps dying; next try later")
            return
        margin_s = _of(_ANSWER_MARGIN_S, question.problem)
        try:
            self._child.ask(question.planned, question.deadline_s - self._clock() - margin_s)
            question.asked = True
        except ProtocolError as error:
            question.notes.append(f"{self.policy_name}: the problem cannot be sent to it ({error})")
        except ChildLostError as error:
            question.notes.append(f"{self.policy_name}: the solver process {error}")
            self._pool.lose()

    def _make_incumbents(self, question: _Question, last_plan: Plan | None) -> None:
        """Plans at hand, the quickest first. For a policy that is sent as it is, only that policy's own plan."""
        problem = question.planned
        if not self._entry.exact and not self._entry.solver:
            policy = get_policy(self.policy_name)
            family = "uniform" if self.policy_name.startswith("uniform:") else self.policy_name
            least_s = _LEAST_S + _LEAST_PACE_S.get(family, _OTHER_PACE_S) * len(problem.streams)
            left_s = question.deadline_s - self._clock() - _of(_JUDGING_S, problem)
            if left_s >= least_s:
                self._attempt(question, self.policy_name, lambda: policy(problem, left_s - _of(_PACKING_S, problem)))
                if question.has_plan:
                    return
            else:
                question.notes.append(f"{self.policy_name}: left out, too slow for the deadline")
        busy = 1.0
        if last_plan is not None:
            self._attempt(question, "last plan", lambda: _still(problem, last_plan))
            busy = self._timed(question, "last plan repaired", lambda: baselines.repaired(problem, last_plan), busy)
        if not question.has_plan:
            busy = self._timed(question, "cheapest", lambda: baselines.cheapest(problem), busy)
        if self._entry.exact:
            busy = self._timed(question, "marginal", lambda: marginal(problem, INCUMBENT_BUDGET_S), busy)
        if self._entry.solver:
            busy = self._timed(question, "serving only", lambda: serving_only(problem), busy)
        busy = self._timed(question, "fair", lambda: baselines.fair(problem, INCUMBENT_BUDGET_S), busy)
        self._timed(question, "thief", lambda: baselines.thief_or_uniform(problem, INCUMBENT_BUDGET_S), busy)

    def _timed(self, question: _Question, method: str, make: Callable[[], Plan], busy: float) -> float:
        """Try a method if it can be expected to end before the deadline. ``busy``: how many times longer than usual
        things take just now; returns what it has become.
        """
        began_s = self._clock()
        usual_s = _LEAST_S + _PACE_S[method] * len(question.problem.streams)
        left_s = question.deadline_s - began_s - busy * _of(_JUDGING_S, question.problem)
        if question.has_plan and _CAUTION * busy * usual_s > left_s:
            question.notes.append(f"{method}: left out, too slow for the deadline")
            return busy
        self._attempt(question, method, make)
        return max(1.0, (self._clock() - began_s) / usual_s)

    def _attempt(self, question: _Question, method: str, make: Callable[[], Plan]) -> Candidate | None:
        try:
            plan = make()
            made = Candidate(method, plan, judge(question.planned, plan))
        except Exception as error:
            # A fault in one method must not cost the plans of the others.
            reason = str(error) if isinstance(error, PlanError) else f"{type(error).__name__}: {error}"
            question.notes.append(f"{method}: {reason[:_MOST_DETAIL]}")
            return None
        question.incumbents.append(made)
        return made

    def _decide(self, question: _Question, answer: Answer | None) -> Plan:
        """Choose by the judge, write the report, and be ready for the next question."""
        self._question = None
        wanted: Candidate | None = None
        if answer is not None and answer.plan is not None:
            plan = answer.plan
            if _has_endless_steps(plan, question.problem):
                question.notes.append(f"{self.policy_name}: its plan has more steps than any plan can have")
            else:
                wanted = self._attempt(question, self.policy_name, lambda: plan)
            if wanted is not None and not wanted.verdict.only_floors_broken:
                first = wanted.verdict.violations[0].text
                question.notes.append(f"{self.policy_name}: its plan cannot be executed ({first[:_MOST_DETAIL]})")
                wanted = None
        elif answer is not None:
            question.notes.append(f"{self.policy_name}: {answer.reason[:_MOST_DETAIL] or 'no plan'}")
        candidates = [candidate for candidate in question.incumbents if candidate.verdict.only_floors_broken]
        if not candidates:
            raise PlanError("no plan can be executed; " + "; ".join(dict.fromkeys(question.notes)))
        # Among equals the policy that was asked for wins; it stands last.
        best = max(reversed(candidates), key=lambda candidate: candidate.verdict.rank)
        if wanted is not None and not self._entry.exact:
            best = wanted
        report = self._report(question, best, wanted)
        return msgspec.structs.replace(best.plan, report=report)

    def _report(self, question: _Question, best: Candidate, wanted: Candidate | None) -> SolveReport:
        problem, value = question.problem, best.verdict.value
        made = best.plan.report
        notes = list(dict.fromkeys([*question.notes, *([made.detail] if made.detail else [])]))
        bound, status = made.bound, made.status
        if best.method != self.policy_name:
            bound, status = None, "fallback"
            if wanted is not None:
                bound = wanted.plan.report.bound
                status = "heuristic"
                notes.insert(0, f"{best.method} is better than {self.policy_name} ({wanted.verdict.value:.4f})")
        broken = [violation.subject for violation in best.verdict.violations]
        for kind, words in (("floor", "below their floor"), ("latency", "slower than their limit")):
            names = [violation.subject for violation in best.verdict.violations if violation.kind == kind]
            if names:
                notes.append(f"{words}: {', '.join(names)}")
        notes += _unattainable(problem, best.verdict)
        if question.planned is not problem:
            # Its bound is on the lowered gains, its value on what is expected.
            value, bound = judge(problem, best.plan).value, None
            notes.append(f"planned on the {problem.planning_quantile:.0%} quantile of the gains")
        gap: float | None = None
        if bound is not None and (not bound >= value - _VALUE_TOLERANCE or broken):
            notes.append(f"the bound {bound:.4f} does not hold for this plan")
            bound = None
        if bound is not None:
            bound = max(min(bound, 1.0), value)  # no accuracy is above 1, which not every relaxation knows
            gap = (bound - value) / bound if bound > 0.0 else 0.0
        return SolveReport(
            policy=best.method,
            status=_status(status, bound),
            value=value,
            bound=bound,
            gap=gap,
            seconds=max(0.0, self._clock() - question.started_s),
            detail="; ".join(notes)[: 4 * _MOST_DETAIL],
            planning_quantile=problem.planning_quantile,
        )


def _of(amount: tuple[float, float], problem: Problem) -> float:
    """(something, something per stream) for the streams of a problem."""
    return amount[0] + amount[1] * len(problem.streams)


def _unattainable(problem: Problem, verdict: Verdict) -> list[str]:
    """The streams whose latency limit no configuration keeps, with what they get."""
    found = [
        f"{one.stream_id} ({one.max_latency_s:g} s of {stream.max_latency_s:g} s)"
        for stream, one in zip(problem.streams, verdict.streams, strict=True)
        if stream.max_latency_s is not None and one.max_latency_s > stream.max_latency_s + SECONDS_TOLERANCE
    ]
    broken = {violation.subject for violation in verdict.violations if violation.kind == "latency"}
    found = [text for text in found if text.partition(" ")[0] not in broken]
    return [f"no configuration keeps the latency limit of {', '.join(found)}"] if found else []


def _has_endless_steps(plan: Plan, problem: Problem) -> bool:
    """Steps begin at ends of retrainings, so that no stream has more of them than there are streams, and one."""
    most = len(problem.streams) + 1
    return any(len(a.inference) > most for a in plan.assignments) or _steps(plan) > _of(_MOST_STEPS, problem)


def _steps(plan: Plan) -> int:
    """How much there is to judge in a plan."""
    return sum(
        1
        + sum(1 + len(step.after) for step in assignment.inference)
        + (len(assignment.retrain.after) if assignment.retrain is not None else 0)
        for assignment in plan.assignments
    )


def _still(problem: Problem, last_plan: Plan) -> Plan:
    """The last plan word for word; the judge will say whether it can still be executed."""
    report = SolveReport(policy="last plan", status="heuristic")
    return stamped(problem, msgspec.structs.replace(last_plan, window_s=problem.window_s, report=report))


def _status(status: SolveStatus, bound: float | None) -> SolveStatus:
    """A status that promises a bound needs one."""
    if status in ("optimal", "feasible") and bound is None:
        return "heuristic"
    if status == "heuristic" and bound is not None:
        return "feasible"
    return status
