"""Further baselines of studies; the same signature as every policy: (problem, budget in seconds) -> plan.

``thief:fixed-shares`` is one half of the paper's factor analysis (``thief:fixed-config`` is the other):
configurations are picked per stream with the profiles at hand, but shares do not move.
"""

from __future__ import annotations

import time

from optimizer.execution import capacity_quanta
from optimizer.objective import judge
from optimizer.policies.baselines import INFERENCE_PARTS
from optimizer.policies.packing import Wish, pack
from optimizer.policies.thief import Shares, heuristic_plan
from protocol.plan import Plan, Problem


def thief_fixed_shares(problem: Problem, budget_s: float) -> Plan:
    """An equal split over the streams, one fixed part of it for inference, the best configurations for that.

    The part is the best of 30, 50, 70 and 90 % by the judge; the report says which. A stream without
    a retraining that pays has its whole part for inference.

    Raises:
        PlanError: the streams cannot all be served.
    """
    started_s = time.monotonic()
    pool = sum(capacity_quanta(gpu, problem.share_quantum) for gpu in problem.gpus)
    each = max(1, pool // len(problem.streams))
    shares = Shares(problem)
    plans: list[Plan] = []
    for part in INFERENCE_PARTS:
        lam_quanta = max(1, round(part * each))
        r = min(each - lam_quanta, shares.most)
        wishes = []
        for table in shares.tables:
            gamma = table.gamma[r]
            if gamma < 0:
                wishes.append(Wish(lam_quanta=min(each, shares.most)))
            else:
                wishes.append(Wish(lam_quanta=min(lam_quanta, shares.most), gamma=gamma, r=r))
        placed = pack(problem, wishes)
        plans.append(heuristic_plan(problem, placed, "thief:fixed-shares", started_s, f"inference part {part:g}"))
    return max(plans, key=lambda plan: judge(problem, plan).rank)
