"""What every policy is asked instead of a problem, and what is said of its plan. The one place for planning quantiles.

A planning quantile below 0.5 lowers every uncertain gain to that quantile of its normal distribution,
gain - z * standard error, but never below 0: a retraining that was worth trying becomes at worst one
that changes nothing. Plans made so are judged, and reported, on what is expected.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from statistics import NormalDist
from typing import TypeVar

import msgspec

from optimizer.execution import asked_latency_s, fits, gpu_classes
from optimizer.objective import SECONDS_TOLERANCE, judge
from protocol.plan import CloudProfile, Plan, Problem, RetrainProfile, StreamProfile
from protocol.schema import GpuSpec

Choice = TypeVar("Choice", RetrainProfile, CloudProfile)
EXPECTED = 0.5  # the quantile that lowers nothing


def lowered(problem: Problem) -> Problem:
    """``problem`` with every gain at the planning quantile, and the quantile at 0.5; itself where it is so already."""
    if problem.planning_quantile == EXPECTED:
        return problem
    z = -NormalDist().inv_cdf(problem.planning_quantile)
    streams = tuple(
        msgspec.structs.replace(
            stream,
            retrain=tuple(_lowered(profile, stream, z) for profile in stream.retrain),
            cloud=tuple(_lowered(profile, stream, z) for profile in stream.cloud),
        )
        for stream in problem.streams
    )
    return msgspec.structs.replace(problem, streams=streams, planning_quantile=EXPECTED)


def _lowered(profile: Choice, stream: StreamProfile, z: float) -> Choice:
    error = profile.accuracy_error if profile.gain_error is None else profile.gain_error
    if error == 0.0 or profile.accuracy_after <= stream.accuracy_now:
        return profile
    return msgspec.structs.replace(profile, accuracy_after=max(stream.accuracy_now, profile.accuracy_after - z * error))


def planned_on_quantile(policy: Callable[..., Plan]) -> Callable[..., Plan]:
    """``policy`` asked at the problem's planning quantile; its report tells the value of what is expected."""

    @functools.wraps(policy)
    def planned(problem: Problem, budget_s: float, *rest: object) -> Plan:
        plan = policy(lowered(problem), budget_s, *rest)
        return plan if problem.planning_quantile == EXPECTED else restated(problem, plan)

    return planned


def restated(problem: Problem, plan: Plan) -> Plan:
    """A plan that was made at a quantile, with the value that is expected of it; its bound was on another measure."""
    report = plan.report
    report = msgspec.structs.replace(
        report,
        value=judge(problem, plan).value,
        bound=None,
        gap=None,
        status="heuristic" if report.status in ("optimal", "feasible") else report.status,
        planning_quantile=problem.planning_quantile,
    )
    return msgspec.structs.replace(plan, report=report)


# ---------------------------------------------------------------- for a policy that does not know latency limits


def without_slow_configurations(problem: Problem) -> Problem:
    """``problem`` without the inference configurations that break what is asked of the latency.

    Every plan of it keeps the limits, and every plan that keeps them is one of it.
    """
    if all(stream.max_latency_s is None for stream in problem.streams):
        return problem
    gpus = [gpu for gpu, _ in gpu_classes(problem)]
    return msgspec.structs.replace(problem, streams=tuple(_quick(stream, problem, gpus) for stream in problem.streams))


def _quick(stream: StreamProfile, problem: Problem, gpus: list[GpuSpec]) -> StreamProfile:
    if stream.max_latency_s is None:
        return stream
    quantum = problem.share_quantum
    latency_s = asked_latency_s(stream, gpus, quantum) + SECONDS_TOLERANCE
    quick = tuple(
        p for p in stream.inference if p.latency_s <= latency_s or not any(fits(p, gpu, quantum) for gpu in gpus)
    )
    return msgspec.structs.replace(stream, inference=quick or stream.inference, max_latency_s=None)
