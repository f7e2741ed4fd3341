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

from optimizer.execution import asked_latency_s, fits, gpu_classes, most_label_seconds, own_window_s
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


# ---------------------------------------------------------------- for a policy that does not know everything


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


def plain(problem: Problem, static: Plan | None) -> tuple[Problem, bool]:
    """``problem`` in the words of a policy that knows GPUs only, and whether a bound on it is one on ``problem``.

    Latency limits are kept by leaving out what breaks them. Own windows are forgotten (the plan may retrain a
    stream for nothing). What ``static`` sends to the cloud stays there: such a stream has no other retraining, and
    the mean accuracy of its models (`with_cloud_steps` puts the retrainings back). Of the retrainings that need
    labels, while these are short, only those stay that cost no more than what ``static`` spends on the stream.
    """
    known = without_slow_configurations(problem)
    longer = [s.window_s is not None and s.window_s < problem.window_s for s in known.streams]
    spent = _labels_spent(problem, static)
    sent = _means_with_cloud(problem, static)
    streams = tuple(
        msgspec.structs.replace(
            stream,
            window_s=None,
            cloud=(),
            accuracy_now=stream.accuracy_now
            if stream.min_accuracy
            else sent.get(stream.stream_id, stream.accuracy_now),
            retrain=_affordable(stream, sent, spent),
        )
        for stream in known.streams
    )
    exact = spent is None and not any(longer) and not any(stream.cloud for stream in problem.streams)
    return msgspec.structs.replace(known, streams=streams, links=(), label_budget_s=None), exact


def with_cloud_steps(plan: Plan, static: Plan | None) -> Plan:
    """``plan`` with the retrainings in the cloud of ``static``."""
    sent = {a.stream_id: a.cloud for a in static.assignments if a.cloud is not None} if static is not None else {}
    assignments = tuple(msgspec.structs.replace(a, cloud=sent.get(a.stream_id)) for a in plan.assignments)
    return msgspec.structs.replace(plan, assignments=assignments)


def _affordable(
    stream: StreamProfile, sent: dict[str, float], spent: dict[str, float] | None
) -> tuple[RetrainProfile, ...]:
    if stream.stream_id in sent:
        return ()
    if spent is None:
        return stream.retrain
    return tuple(p for p in stream.retrain if p.label_seconds <= spent.get(stream.stream_id, 0.0))


def _means_with_cloud(problem: Problem, static: Plan | None) -> dict[str, float]:
    """Of the streams that ``static`` retrains in the cloud: the mean accuracy of their models over their windows."""
    means: dict[str, float] = {}
    if static is None or not problem.links:
        return means
    ends = {verdict.stream_id: verdict.retrain_end_s for verdict in judge(problem, static).streams}
    for stream, assignment in zip(problem.streams, static.assignments, strict=True):
        if assignment.cloud is not None:
            means[stream.stream_id] = stream.accuracy_now
            if stream.min_accuracy > 0.0:
                continue  # its floor is on the model that serves now
            after = next(p.accuracy_after for p in stream.cloud if p.retrain_id == assignment.cloud.retrain_id)
            own_s = own_window_s(stream, problem.window_s)
            part = min(1.0, (ends[stream.stream_id] or 0.0) / own_s)
            means[stream.stream_id] = stream.accuracy_now * part + after * (1.0 - part)
    return means


def labels_are_short(problem: Problem) -> bool:
    """Whether the streams could want more labels than the budget has."""
    if problem.label_budget_s is None:
        return False
    return sum(most_label_seconds(stream) for stream in problem.streams) > problem.label_budget_s


def _labels_spent(problem: Problem, static: Plan | None) -> dict[str, float] | None:
    """Label seconds per stream in the plan ``static``; None where the budget is enough for everything."""
    if not labels_are_short(problem):
        return None
    spent: dict[str, float] = {}
    for assignment in static.assignments if static is not None else ():
        stream = next(s for s in problem.streams if s.stream_id == assignment.stream_id)
        if assignment.retrain is not None:
            step = assignment.retrain
            spent[stream.stream_id] = next(p.label_seconds for p in stream.retrain if p.retrain_id == step.retrain_id)
    return spent
