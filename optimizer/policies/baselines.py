"""What the planner is measured against; the same signature as every policy: (problem, budget in seconds) -> plan.

- ``fair``: an equal split over all jobs, the best configurations for it (the thief before its first theft).
- ``uniform``: one retraining configuration for all streams, an equal split over the streams, a fixed
  part of it for inference (paper, section 6.1). Without parameters: its best variant by the judge.
- ``thief_fixed_config``: thefts, but one retraining configuration for all streams (paper, factor analysis).
- ``none``: no retraining; the inference configurations that make the most of the GPUs.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from typing import Literal, get_args

import msgspec

from optimizer.execution import capacity_quanta
from optimizer.objective import judge
from optimizer.policies.cloud import with_cloud
from optimizer.policies.marginal import serving_only
from optimizer.policies.milp import milp
from optimizer.policies.packing import Placed, Wish, pack
from optimizer.policies.thief import Shares, heuristic_plan, thief
from protocol.errors import PlanError
from protocol.plan import Plan, Problem

Level = Literal["low", "middle", "high"]
LEVELS: tuple[Level, ...] = get_args(Level)
INFERENCE_PARTS = (0.3, 0.5, 0.7, 0.9)
_RESERVE_S = 5e-4  # seconds per stream, kept for the plan by marginal worth
_STEALING_S = 2.5e-5  # seconds per pair of streams that all thefts take at the least


def fair(problem: Problem, budget_s: float) -> Plan:
    """An equal split over all jobs. PlanError when the streams cannot be served at all."""
    started_s = time.monotonic()
    return heuristic_plan(problem, pack(problem, Shares(problem).wishes()), "fair", started_s)


def retrain_at_level(problem: Problem, level: Level) -> list[int]:
    """Per stream the index of one retraining configuration for all, -1 where a stream does not have it.

    The configuration is taken from the Pareto front of mean cost against mean accuracy after
    retraining over all streams: its cheapest ("low"), its most expensive ("high") or its middle member.
    A retraining that already runs goes on, whatever its configuration.
    """
    costs: dict[str, list[float]] = defaultdict(list)
    reached: dict[str, list[float]] = defaultdict(list)
    for stream in problem.streams:
        for profile in stream.retrain:
            if profile.pinned_gpu is None:
                costs[profile.retrain_id].append(profile.gpu_seconds)
                reached[profile.retrain_id].append(profile.accuracy_after - stream.accuracy_now)
    common = max((len(found) for found in costs.values()), default=0)
    means = sorted(
        (sum(costs[name]) / common, -sum(reached[name]) / common, name) for name in costs if len(costs[name]) == common
    )
    front: list[str] = []
    best = float("inf")
    for _, loss, name in means:
        if loss < best:
            front.append(name)
            best = loss
    chosen = front[{"low": 0, "middle": len(front) // 2, "high": -1}[level]] if front else None
    return [
        next((i for i, p in enumerate(stream.retrain) if p.pinned_gpu is not None or p.retrain_id == chosen), -1)
        for stream in problem.streams
    ]


def uniform_variant(level: Level, inference_part: float) -> Callable[[Problem, float], Plan]:
    """The uniform policy with one retraining configuration and a fixed part of each stream's share for inference."""
    name = f"uniform:{level}:{inference_part:g}"

    def policy(problem: Problem, budget_s: float) -> Plan:
        started_s = time.monotonic()
        pool = sum(capacity_quanta(gpu, problem.share_quantum) for gpu in problem.gpus)
        each = max(1, pool // len(problem.streams))
        lam_quanta = max(1, round(inference_part * each))
        # A stream that does not retrain has its whole part for inference, as after a swap.
        wishes = [
            Wish(lam_quanta=lam_quanta, gamma=gamma, r=each - lam_quanta) if gamma >= 0 else Wish(lam_quanta=each)
            for gamma in retrain_at_level(problem, level)
        ]
        return heuristic_plan(problem, pack(problem, wishes), name, started_s)

    return policy


def uniform(problem: Problem, budget_s: float) -> Plan:
    """The best uniform variant by the judge; the report says which one it was."""
    started_s = time.monotonic()
    variants = [(level, part) for level in LEVELS for part in INFERENCE_PARTS]
    plans: list[Plan] = []
    for level, part in variants:
        # With thousands of streams there may not be time for all of them: not if the next takes as long as the last.
        spent_s = time.monotonic() - started_s
        if plans and spent_s * (len(plans) + 1) / len(plans) > budget_s:
            break
        plans.append(uniform_variant(level, part)(problem, budget_s))
    best = max(plans, key=lambda plan: judge(problem, plan).rank)
    detail = best.report.policy
    if len(plans) < len(variants):
        detail += f" (the best of {len(plans)} of {len(variants)} variants, then time was up)"
    report = msgspec.structs.replace(best.report, policy="uniform", detail=detail, seconds=time.monotonic() - started_s)
    return msgspec.structs.replace(best, report=report)


def thief_or_uniform(problem: Problem, budget_s: float) -> Plan:
    """The thief's plan, or the best uniform one where that is better by the judge (few streams on one GPU).

    Where there are too many streams for the thief to come to an end the uniform plans are made first.
    """
    started_s = time.monotonic()
    if _STEALING_S * len(problem.streams) ** 2 > budget_s:
        other = uniform(problem, budget_s)
        left_s = budget_s - (time.monotonic() - started_s)
        if left_s <= 0.0:
            return _as_thief(other, f"{other.report.detail}; no time for thefts", started_s)
        plan = thief(problem, left_s)
    else:
        plan = thief(problem, budget_s)
        left_s = budget_s - (time.monotonic() - started_s)
        if left_s <= 0.0:
            return plan
        other = uniform(problem, left_s)
    if judge(problem, other).rank <= judge(problem, plan).rank:
        return plan
    detail = "; ".join(filter(None, [plan.report.detail, f"{other.report.detail} is better"]))
    return _as_thief(other, detail, started_s)


def _as_thief(plan: Plan, detail: str, started_s: float) -> Plan:
    report = msgspec.structs.replace(plan.report, policy="thief", detail=detail, seconds=time.monotonic() - started_s)
    return msgspec.structs.replace(plan, report=report)


def thief_fixed_config(problem: Problem, budget_s: float) -> Plan:
    """Thefts with one retraining configuration for all streams: the best of the three levels by the judge."""
    started_s = time.monotonic()
    plans = []
    for level in LEVELS:
        allowed = [[gamma] if gamma >= 0 else [] for gamma in retrain_at_level(problem, level)]
        shares = Shares(problem, allowed)
        shares.steal(started_s + budget_s)
        plans.append(heuristic_plan(problem, pack(problem, shares.wishes()), "thief:fixed-config", started_s, level))
    return max(plans, key=lambda plan: judge(problem, plan).rank)


def none(problem: Problem, budget_s: float) -> Plan:
    """No retraining: a multiple-choice knapsack over inference configurations, solved by ``milp``.

    Where that does not come to an end in time: by marginal worth.
    """
    started_s = time.monotonic()
    streams = tuple(msgspec.structs.replace(stream, retrain=(), cloud=()) for stream in problem.streams)
    without = msgspec.structs.replace(problem, streams=streams)
    # Its bound holds for plans without retraining only, so it is no bound on this problem.
    detail = ""
    try:
        plan = milp(without, budget_s - _RESERVE_S * len(problem.streams))
    except PlanError as error:
        plan = serving_only(without)
        detail = f"milp: {error}; this is by marginal worth"
    report = msgspec.structs.replace(
        plan.report,
        policy="none",
        status="heuristic",
        bound=None,
        gap=None,
        detail="; ".join(filter(None, [plan.report.detail, detail])),
        seconds=time.monotonic() - started_s,
    )
    return msgspec.structs.replace(plan, report=report)


def repaired(problem: Problem, last: Plan) -> Plan:
    """What ``last`` still says, as far as it can be done on ``problem``: a start when nothing else can be had.

    Streams keep what they are served with, retrainings go on or start as planned; new streams get one quantum.
    """
    started_s = time.monotonic()
    previous = {assignment.stream_id: assignment for assignment in last.assignments}
    gpus = {gpu.gpu_id: index for index, gpu in enumerate(problem.gpus)}
    wishes: list[Wish] = []
    sent: set[tuple[int, int]] = set()
    for v, stream in enumerate(problem.streams):
        assignment = previous.get(stream.stream_id)
        names = {profile.inference_id: index for index, profile in enumerate(stream.inference)}
        held = stream.serving_inference or (assignment.inference[0].inference_id if assignment else "")
        lam = names.get(held)
        gamma, r = -1, 0
        gpu = gpus.get(stream.serving_gpu or (assignment.inference[0].gpu_id if assignment else ""), -1)
        retrain_gpu = -1
        if assignment is not None and assignment.retrain is not None:
            step = assignment.retrain
            running = [i for i, p in enumerate(stream.retrain) if p.pinned_gpu is not None]
            same = [i for i, p in enumerate(stream.retrain) if p.retrain_id == step.retrain_id]
            gamma = next(iter(running + same), -1)
            r = max(1, round(step.share / problem.share_quantum))
            retrain_gpu = gpus.get(step.gpu_id, -1)
        planned = assignment.cloud.retrain_id if assignment is not None and assignment.cloud is not None else None
        sent |= {(v, c) for c, p in enumerate(stream.cloud) if p.running or p.retrain_id == planned}
        lam_quanta = 1
        if lam is not None:
            lam_quanta = max(1, round(stream.inference[lam].gpu_share_needed / problem.share_quantum))
        wishes.append(Wish(lam_quanta=lam_quanta, lam=lam, gamma=gamma, r=r, gpu=gpu, retrain_gpu=retrain_gpu))
    placed = with_cloud(problem, pack(problem, wishes), sent)
    return heuristic_plan(problem, placed, "last plan repaired", started_s)


def cheapest(problem: Problem) -> Plan:
    """Every stream served as cheaply as can be and nothing retrained. PlanError when even that is impossible."""
    started_s = time.monotonic()
    placed: list[Placed] = pack(problem, [Wish(lam_quanta=1) for _ in problem.streams])
    if not placed:
        raise PlanError("there is no stream to serve")
    return heuristic_plan(problem, placed, "cheapest", started_s)
