"""The time-indexed policy as it is sent: never below the static one, and with the bound of both.

The timeline search prices schedules far beyond static plans, but it is a search; the static MILP proves its own
optimum. Both are run within the budget and the judge takes the better plan. The timeline's bound holds for every
plan, static ones included (docs/timeline.md), so that it is the one to report.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import msgspec

from optimizer.objective import Verdict, judge
from optimizer.policies import timeline_cache
from optimizer.policies.baselines import thief_or_uniform
from optimizer.policies.milp import milp
from optimizer.policies.reductions import labels_are_short, plain, with_cloud_steps
from optimizer.policies.timeline import timeline
from protocol.errors import PlanError
from protocol.plan import Plan, Problem

# Of the budget, for the static plan; it needs much less where it can be had at all.
_STATIC_PART = 0.3
# Beyond so many streams the static MILP does not come back within what is left.
_MANY_STREAMS = 300
_LOADING_S = 30.0


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
    # Links and labels: the time-indexed plan spends and sends what the static one does.
    short = labels_are_short(problem) or any(stream.cloud for stream in problem.streams)
    static = thief_or_uniform if many else milp
    # The static plan comes first, so that there is one to send if the search is cut short.
    for policy in (timeline,) if many and not short and not problem.links else (static, timeline):
        left = budget_s * (_STATIC_PART if policy is static else 1.0) - (time.monotonic() - began)
        try:
            if policy is timeline:
                plans.insert(0, _in_plain_words(problem, left, plans[0] if plans else None, offer))
            else:
                plans.append(policy(problem, left))
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


def _in_plain_words(
    problem: Problem, budget_s: float, static: Plan | None, offer: Callable[[Plan], None] | None
) -> Plan:
    """The time-indexed plan of a problem that may ask for more than the search knows; no bound is claimed then."""
    known, exact = plain(problem, static)

    def worded(plan: Plan) -> Plan:
        plan = with_cloud_steps(plan, static)
        if exact:
            return plan
        report = msgspec.structs.replace(plan.report, status="heuristic", bound=None, gap=None)
        return msgspec.structs.replace(plan, report=report)

    return worded(timeline(known, budget_s, offer=None if offer is None else lambda plan: offer(worded(plan))))
