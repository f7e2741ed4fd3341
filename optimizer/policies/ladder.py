"""The exact policies as they are sent: never below what can be had more cheaply.

``static_plan``: the static MILP proves its own optimum where it comes to an end. Where it does not, with hundreds of
streams or little time, the best of what is quick is sent instead: shares by marginal worth, the thief, the best uniform
plan, no retraining.

``timeline_or_static``: never below the static one, and with the bound of both.

The timeline search prices schedules far beyond static plans, but it is a search; the static MILP proves its own
optimum. Both are run within the budget and the judge takes the better plan. The timeline's bound holds for every
plan, static ones included (docs/timeline.md), so that it is the one to report.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import msgspec

from optimizer.execution import quanta_per_gpu
from optimizer.objective import Verdict, judge
from optimizer.policies import timeline_cache
from optimizer.policies.baselines import none, thief_or_uniform
from optimizer.policies.marginal import marginal, serving_only
from optimizer.policies.milp import milp
from optimizer.policies.reductions import without_slow_configurations
from optimizer.policies.timeline import timeline
from protocol.errors import PlanError
from protocol.plan import Plan, Problem

# Of the budget, for the static plan; it needs much less where it can be had at all.
_STATIC_PART = 0.3
# Beyond so many streams the static MILP does not come back within what is left.
_MANY_STREAMS = 300
_LOADING_S = 30.0


# So many streams are planned by quick policies first: the MILP may have nothing in the end.
_QUICK_FIRST = 60
# Of what is left of the budget, for each quick policy that takes its time.
_THIEF_PART, _NONE_PART = 0.15, 0.2
# Seconds per stream and quantum of a GPU that the MILP takes to look at all options, on a quiet machine.
_OPTIONS_S = 3e-4
_CAUTION = 0.8


def static_plan(problem: Problem, budget_s: float, offer: Callable[[Plan], None] | None = None) -> Plan:
    """The best static plan within the budget, by the MILP where it can, never below the quick policies.

    ``offer`` is handed plans of many streams before the MILP is done.

    Raises:
        PlanError: there is none; the text says why not.
    """
    began = time.monotonic()
    quick = _Quick(problem, began + budget_s, offer)
    many = len(problem.streams) > _QUICK_FIRST
    if many:
        quick.run()
    left_s = budget_s - (time.monotonic() - began)
    reason, plan = "", None
    if many and not _has_time(problem, left_s):
        reason = "milp: left out, there are too many streams for the time"
    else:
        try:
            plan = milp(problem, left_s)
        except PlanError as error:
            reason = f"milp: {error}"
        if plan is not None and plan.report.status == "optimal":
            return plan
    if not many:
        quick.run()
    return quick.better(plan, reason, began)


def _has_time(problem: Problem, left_s: float) -> bool:
    """Whether the MILP can be expected to look at all options in ``left_s`` seconds."""
    needed_s = _OPTIONS_S * len(problem.streams) * quanta_per_gpu(problem.share_quantum)
    return needed_s <= _CAUTION * left_s


class _Quick:
    """The plans of the quick policies, the best one kept."""

    def __init__(self, problem: Problem, deadline: float, offer: Callable[[Plan], None] | None) -> None:
        self.problem, self.deadline, self.offer = problem, deadline, offer
        self.best: tuple[tuple[int, int, float], Plan] | None = None
        self.reasons: list[str] = []

    def run(self) -> None:
        """Try one after the other while there is time."""
        self._try(lambda left_s: marginal(self.problem, left_s))
        self._try(lambda _: serving_only(self.problem))
        self._try(lambda left_s: thief_or_uniform(self.problem, _THIEF_PART * left_s))
        self._try(lambda left_s: none(self.problem, _NONE_PART * left_s))

    def _try(self, policy: Callable[[float], Plan]) -> None:
        left_s = self.deadline - time.monotonic()
        if self.best is not None and left_s <= 0.0:
            return
        try:
            plan = policy(max(0.0, left_s))
        except PlanError as error:
            self.reasons.append(str(error))
            return
        rank = judge(self.problem, plan).rank
        if self.best is None or rank > self.best[0]:
            self.best = (rank, plan)
            if self.offer is not None and len(self.problem.streams) > _QUICK_FIRST:
                self.offer(_as_static(plan, "", plan.report.seconds))

    def better(self, plan: Plan | None, reason: str, began: float) -> Plan:
        """``plan`` of the MILP, or the best quick one where that is better or the only one."""
        if self.best is None:
            if plan is None:
                raise PlanError("; ".join(dict.fromkeys(filter(None, [reason, *self.reasons]))))
            return plan
        if plan is not None and judge(self.problem, plan).rank >= self.best[0]:
            return plan
        quick = self.best[1]
        if plan is None:
            return _as_static(quick, f"{reason}; this is the plan of {quick.report.policy}", time.monotonic() - began)
        report = plan.report
        text = f"the plan of {quick.report.policy} is better by {quick.report.value - report.value:.4f}"
        bound = None if report.bound is None else max(report.bound, quick.report.value)
        made = _as_static(quick, text, time.monotonic() - began)
        if bound is None:
            return made
        gap = (bound - quick.report.value) / bound if bound > 0.0 else 0.0
        return msgspec.structs.replace(
            made, report=msgspec.structs.replace(made.report, bound=bound, gap=gap, status="feasible")
        )


def _as_static(plan: Plan, text: str, seconds: float) -> Plan:
    """A plan of another policy as the answer of ``milp``; no bound is claimed."""
    detail = "; ".join(filter(None, [text, plan.report.detail]))
    report = msgspec.structs.replace(
        plan.report, policy="milp", status="heuristic", bound=None, gap=None, detail=detail, seconds=seconds
    )
    return msgspec.structs.replace(plan, report=report)


def warm() -> None:
    """Load the compiled search; where it has not been compiled yet, have that done by a process of its own."""
    timeline_cache.prepare(_LOADING_S)


def timeline_or_static(problem: Problem, budget_s: float, offer: Callable[[Plan], None] | None = None) -> Plan:
    """The better one of the time-indexed and the static plan. ``offer`` is handed the first one early.

    Raises:
        PlanError: neither has a plan.
    """
    began = time.monotonic()
    plans: list[Plan] = []
    reasons: list[str] = []
    many = len(problem.streams) > _MANY_STREAMS
    # Every plan that keeps the latency limits is one of this problem.
    known = without_slow_configurations(problem)
    # The static plan comes first, so that there is one to send if the search is cut short.
    static = milp if len(problem.streams) <= _QUICK_FIRST or _has_time(problem, _STATIC_PART * budget_s) else marginal
    for policy in (timeline,) if many else (static, timeline):
        left = budget_s * (_STATIC_PART if policy is static else 1.0) - (time.monotonic() - began)
        try:
            if policy is timeline:
                plans.insert(0, timeline(known, left, offer=offer))
            else:
                plans.append(static(problem, left))
                if offer is not None:
                    offer(plans[0])
        except PlanError as error:
            reasons.append(str(error))
    if not plans:
        raise PlanError("; ".join(reasons))
    verdicts = [judge(problem, plan) for plan in plans]
    best = max(range(len(plans)), key=lambda position: verdicts[position].rank)
    report = plans[best].report
    value, bound = verdicts[best].value, plans[0].report.bound if plans[0].report.policy == "timeline" else None
    if best:
        detail = f"the static plan was better than the time-indexed one by {value - verdicts[0].value:.4f}"
        report = msgspec.structs.replace(
            report, policy="timeline", detail="; ".join(filter(None, [report.detail, detail]))
        )
    if bound is not None and _late(verdicts[best]):
        bound = None  # it holds for plans that keep the latency limits
    if bound is not None:
        bound = max(bound, value)
        gap = (bound - value) / bound if bound > 0.0 else 0.0
        report = msgspec.structs.replace(report, value=value, bound=bound, gap=gap)
    else:
        status = "heuristic" if report.status in ("optimal", "feasible") else report.status
        report = msgspec.structs.replace(report, value=value, bound=None, gap=None, status=status)
    return msgspec.structs.replace(
        plans[best], report=msgspec.structs.replace(report, seconds=time.monotonic() - began)
    )


def _late(verdict: Verdict) -> bool:
    return any(violation.kind == "latency" for violation in verdict.violations)
