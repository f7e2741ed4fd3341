"""A plan by the deadline, whatever happens to the solver.

Incumbents are made at once (the last plan repaired, fair shares, the thief) while an exact policy
works in a warm child process. When it answers, fails, or the deadline comes, the best plan *by the
judge* is handed out, and its ``SolveReport`` says which method made it and why no better one did. A
child that is late is killed, and a fresh one warms up for the next question.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec

from optimizer.objective import Verdict, judge, stamped
from optimizer.policies import baselines
from optimizer.policies.registry import PolicyEntry, get_policy, policy_entry
from optimizer.policies.thief import thief
from optimizer.problems import check_problem
from optimizer.solver_child import Answer
from optimizer.solver_process import ChildLostError, SolverProcess, child_command
from protocol.errors import InputError, PlanError, ProtocolError
from protocol.plan import Plan, Problem, SolveReport, SolveStatus

INCUMBENT_BUDGET_S = 0.05
ANSWER_MARGIN_S = 0.03  # of the deadline, kept for the way back and for judging
QUICK_DEATH_S = 5.0  # a child that ends sooner than this counts as unable to start
MAX_RESTART_WAIT_S = 60.0
_VALUE_TOLERANCE = 1e-6


@dataclass(frozen=True, slots=True)
class Candidate:
    """A plan that could be sent, and what the judge says of it."""

    method: str
    plan: Plan
    verdict: Verdict


@dataclass(slots=True)
class _Question:
    """The question under way."""

    problem: Problem
    started_s: float
    deadline_s: float
    incumbents: list[Candidate]
    notes: list[str]
    asked: bool = False


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
        self._command = list(command) if command is not None else child_command(policy_name)
        self._child: SolverProcess | None = None
        self._child_started_s = 0.0
        self._quick_deaths = 0
        self._restart_s = clock()
        self._question: _Question | None = None
        self._closed = False
        self._ensure_child()

    # ------------------------------------------------------------ for a poll loop

    def start(self, problem: Problem, last_plan: Plan | None = None) -> None:
        """Ask for a plan; a question under way is dropped. ``last_plan`` is what is being executed now."""
        self._begin(problem, last_plan, self.deadline_s)

    def fileno(self) -> int:
        """A descriptor that is readable when ``poll`` has something to do; -1 when there is none.

        Polling about ten times a second besides is needed for the deadline. It changes when the child is replaced.
        """
        return -1 if self._child is None else self._child.fileno()

    def poll(self, now: float) -> Plan | None:
        """The plan once it is decided, None before and after.

        Raises:
            PlanError: there is no plan that could be executed: the streams cannot all be served.
        """
        self._ensure_child()
        question = self._question
        if question is None:
            self._hear_idle_child()
            return None
        if not self._entry.solver:
            return self._decide(question, None)
        if self._child is None or not question.asked:
            return self._decide(question, None)
        try:
            answer = self._child.listen()
        except ChildLostError as error:
            question.notes.append(f"{self.policy_name}: the solver process {error}")
            self._lose_child()
            return self._decide(question, None)
        if answer is not None:
            self._quick_deaths = 0
            return self._decide(question, answer)
        if now >= question.deadline_s:
            limit_s = question.deadline_s - question.started_s
            cause = "" if self._child.ready else " (it was still starting)"
            question.notes.append(f"{self.policy_name}: no answer within {limit_s:g} s{cause}")
            self._replace_child()
            return self._decide(question, None)
        return None

    def close(self) -> None:
        """End the child. The planner cannot be used afterwards."""
        self._question = None
        self._closed = True
        if self._child is not None:
            self._child.kill()
            self._child = None

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
            self._ensure_child()
            self._hear_idle_child()
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
        if self._question is not None and self._question.asked:
            # The child is still busy with a problem that nobody asks about any more.
            self._replace_child()
        question = _Question(problem, now, now + budget_s, [], [])
        self._question = question
        try:
            check_problem(problem)
        except InputError as error:
            question.notes.append(str(error))
            return
        self._ensure_child()
        self._ask(question)
        question.incumbents = self._incumbents(question, last_plan)

    def _ask(self, question: _Question) -> None:
        if self._child is None:
            if self._entry.solver:
                question.notes.append(f"{self.policy_name}: its solver process keeps dying; next try later")
            return
        try:
            self._child.ask(question.problem, question.deadline_s - self._clock() - ANSWER_MARGIN_S)
            question.asked = True
        except ProtocolError as error:
            question.notes.append(f"{self.policy_name}: the problem cannot be sent to it ({error})")
        except ChildLostError as error:
            question.notes.append(f"{self.policy_name}: the solver process {error}")
            self._lose_child()

    def _incumbents(self, question: _Question, last_plan: Plan | None) -> list[Candidate]:
        """Plans at hand. For a policy that is sent as it is, only that policy's own plan."""
        problem = question.problem
        if not self._entry.exact and not self._entry.solver:
            policy = get_policy(self.policy_name)
            own = self._attempt(question, self.policy_name, lambda: policy(problem, self.deadline_s))
            if own and own[0].verdict.only_floors_broken:
                return own
        found: list[Candidate] = []
        if last_plan is not None:
            found += self._attempt(question, "last plan", lambda: _still(problem, last_plan))
            found += self._attempt(question, "last plan repaired", lambda: baselines.repaired(problem, last_plan))
        found += self._attempt(question, "fair", lambda: baselines.fair(problem, INCUMBENT_BUDGET_S))
        found += self._attempt(question, "thief", lambda: thief(problem, INCUMBENT_BUDGET_S))
        return found

    def _attempt(self, question: _Question, method: str, make: Callable[[], Plan]) -> list[Candidate]:
        try:
            plan = make()
            return [Candidate(method, plan, judge(question.problem, plan))]
        except Exception as error:
            # A fault in one method must not cost the plans of the others.
            reason = str(error) if isinstance(error, PlanError) else f"{type(error).__name__}: {error}"
            question.notes.append(f"{method}: {reason}")
            return []

    def _decide(self, question: _Question, answer: Answer | None) -> Plan:
        """Choose by the judge, write the report, and be ready for the next question."""
        self._question = None
        candidates = list(question.incumbents)
        wanted: Candidate | None = None
        if answer is not None and answer.plan is not None:
            wanted = Candidate(self.policy_name, answer.plan, judge(question.problem, answer.plan))
            if wanted.verdict.only_floors_broken:
                candidates.append(wanted)
            else:
                first = wanted.verdict.violations[0].text
                question.notes.append(f"{self.policy_name}: its plan cannot be executed ({first})")
                wanted = None
        elif answer is not None:
            question.notes.append(f"{self.policy_name}: {answer.reason or 'no plan'}")
        candidates = [candidate for candidate in candidates if candidate.verdict.only_floors_broken]
        if not candidates:
            raise PlanError("no plan can be executed; " + "; ".join(dict.fromkeys(question.notes)))
        # Among equals the policy that was asked for wins; it stands last.
        best = max(reversed(candidates), key=lambda candidate: candidate.verdict.rank)
        if wanted is not None and not self._entry.exact:
            best = wanted
        report = self._report(question, best, wanted)
        return msgspec.structs.replace(best.plan, report=report)

    def _report(self, question: _Question, best: Candidate, wanted: Candidate | None) -> SolveReport:
        value = best.verdict.value
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
        if broken:
            notes.append("below their floor: " + ", ".join(broken))
        gap: float | None = None
        if bound is not None and (not bound >= value - _VALUE_TOLERANCE or broken):
            notes.append(f"the bound {bound:.4f} does not hold for this plan")
            bound = None
        if bound is not None:
            bound = max(bound, value)
            gap = (bound - value) / bound if bound > 0.0 else 0.0
        return SolveReport(
            policy=best.method,
            status=_status(status, bound),
            value=value,
            bound=bound,
            gap=gap,
            seconds=max(0.0, self._clock() - question.started_s),
            detail="; ".join(notes),
        )

    # ------------------------------------------------------------ the child

    def _ensure_child(self) -> None:
        if self._closed or not self._entry.solver or self._child is not None or self._clock() < self._restart_s:
            return
        self._child_started_s = self._clock()
        try:
            self._child = SolverProcess(self._command)
        except OSError:
            self._wait_before_restart()

    def _hear_idle_child(self) -> None:
        """Notice that the child got warm, or that it died between two questions."""
        if self._child is None:
            return
        try:
            self._child.listen()
        except ChildLostError:
            self._lose_child()

    def _replace_child(self) -> None:
        if self._child is not None:
            self._child.kill()
            self._child = None
        self._ensure_child()

    def _lose_child(self) -> None:
        """The child ended by itself: clear it away; start another, later and later if it never lives long."""
        if self._child is not None:
            self._child.kill()
            self._child = None
        if self._clock() - self._child_started_s < QUICK_DEATH_S:
            self._wait_before_restart()
        self._ensure_child()

    def _wait_before_restart(self) -> None:
        self._quick_deaths += 1
        if self._quick_deaths > 1:
            self._restart_s = self._clock() + min(MAX_RESTART_WAIT_S, 0.25 * 2.0**self._quick_deaths)


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
