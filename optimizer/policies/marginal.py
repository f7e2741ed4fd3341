"""Shares by marginal worth: a static plan in a fraction of a second, for any number of streams.

With all GPUs pooled a static plan is a multiple-choice knapsack: stream v with Q quanta is worth at most

    F_v(Q) = max over a + r <= Q of the share table's value (a quanta for inference, r for a retraining; ``thief.py``).

Steps of the concave envelopes of all F_v are taken in the order of their worth per quantum until the quanta are gone
(Sinha and Zoltners, Operations Research 27, 1979). That is the optimum of the pooled problem but for less than one
step, in the time of a sort; floors and latency limits come first, and ``pack`` then places the jobs. Where nothing
may be retrained, F_v(Q) has r = 0.
"""

from __future__ import annotations

import time
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from optimizer.policies.cloud import with_cloud
from optimizer.policies.packing import Wish, pack
from optimizer.policies.thief import Shares, heuristic_plan
from protocol.plan import Plan, Problem

Floats = NDArray[np.float64]
POLICY = "marginal"
_LEAST_STEP = 1e-12  # a step is worth more than this


def marginal(problem: Problem, budget_s: float) -> Plan:
    """The plan of shares by marginal worth. PlanError when the streams cannot all be served."""
    return _planned(problem, retraining=True)


def serving_only(problem: Problem) -> Plan:
    """The same without any retraining. PlanError when the streams cannot all be served."""
    return _planned(problem, retraining=False)


def _planned(problem: Problem, *, retraining: bool) -> Plan:
    started_s = time.monotonic()
    shares = Shares(problem)
    values = np.stack([table.value for table in shares.tables])  # V x a x r
    if not retraining:
        values = values[:, :, :1]
    worth = _worth_of_quanta(values, shares.pool)
    granted = _granted(worth, shares.pool)
    wishes: list[Wish] = []
    for v, quanta in enumerate(granted):
        a, r = _split(values[v], quanta)
        wishes.append(Wish(lam_quanta=a, gamma=shares.tables[v].gamma[r], r=r))
    placed = pack(problem, wishes)
    return heuristic_plan(problem, with_cloud(problem, placed) if retraining else placed, POLICY, started_s)


def _worth_of_quanta(values: Floats, pool: int) -> Floats:
    """F_v(Q) for Q from 0 up; shape (V, Q + 1)."""
    count, inference, retraining = values.shape
    most = min(pool, inference + retraining - 2)
    worth = np.full((count, most + 1), -np.inf)
    for r in range(min(retraining, most + 1)):
        last = min(inference, most + 1 - r)
        np.maximum(worth[:, r : r + last], values[:, :last, r], out=worth[:, r : r + last])
    return np.asarray(np.maximum.accumulate(worth, axis=1))


def _granted(worth: Floats, pool: int) -> list[int]:
    """Quanta of every stream: the best envelope steps first. The step that does not fit ends its stream's turn.

    First every stream gets what keeps its floor and its latency limit (its worth is negative below), as many as can.
    """
    granted = [1] * len(worth)
    left = pool - len(worth)
    least = np.where((worth >= 0.0).any(axis=1), (worth >= 0.0).argmax(axis=1), 1)
    for v in np.argsort(least, kind="stable").tolist():
        more = max(0, int(least[v]) - 1)
        if more <= left:
            granted[v] += more
            left -= more
    steps: list[tuple[float, int, int]] = []
    for v, row in enumerate(worth.tolist()):
        steps += [(slope, v, quanta) for slope, quanta in _envelope(row, granted[v])]
    steps.sort(key=lambda step: (-step[0], step[1]))
    closed: set[int] = set()
    for _, v, quanta in steps:
        if v in closed or quanta > left:
            closed.add(v)
            continue
        granted[v] += quanta
        left -= quanta
    return granted


def _envelope(row: list[float], first: int) -> list[tuple[float, int]]:
    """(worth per quantum, quanta) of the steps of the concave envelope of ``row`` from ``first`` quanta on."""
    hull = [first] if len(row) > first else []
    for quanta in range(first + 1, len(row)):
        if row[quanta] - row[hull[-1]] <= _LEAST_STEP:
            continue
        while len(hull) > 1:
            a, b = hull[-2], hull[-1]
            if (row[b] - row[a]) * (quanta - b) > (row[quanta] - row[b]) * (b - a):
                break
            hull.pop()
        hull.append(quanta)
    return [((row[b] - row[a]) / (b - a), b - a) for a, b in pairwise(hull)]


def _split(value: Floats, quanta: int) -> tuple[int, int]:
    """(inference, retraining) quanta, ``quanta`` in all at most, with the most worth; no retraining among equals."""
    best, found = -np.inf, (1, 0)
    for r in range(min(value.shape[1], quanta)):
        a = min(quanta - r, value.shape[0] - 1)
        if value[a, r] > best + 1e-12:
            best, found = float(value[a, r]), (a, r)
    return found
