"""The thief scheduler (Algorithms 1 and 2 of the paper) and its placement.

Algorithm 1: from a fair split of all GPUs over all jobs (one inference and one retraining job per
stream), every job in turn steals a quantum at a time from every other job for as long as the
estimated mean accuracy rises. Algorithm 2: after each theft a stream picks its configurations for its
shares: the most accurate inference configuration that the inference share sustains and the floor
allows, and the retraining configuration with the best window-averaged accuracy, or none.

A theft touches two streams at most, and what a stream makes of its two shares is independent of all
others: ``ShareTable`` holds that value for all pairs of shares, computed once, and a theft is a
look-up of two entries. GPUs are one pool until ``pack`` places the jobs; a retraining gets one GPU at
most. Links to a cloud are filled greedily afterwards (``cloud.with_cloud``).

``thief:one-pass`` is the algorithm to the letter. What one pass finds depends on the order of the
jobs, and with many streams it stops well short; ``thief`` repeats it until no theft pays, and takes
the better of the two plans: the estimate it steals by knows neither the placement nor what becomes of
freed share, so a higher estimate is not always a better plan.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from optimizer.execution import (
    asked_latency_s,
    capacity_quanta,
    needed_quanta,
    own_window_s,
    share_efficiency,
    share_of,
)
from optimizer.objective import ACCURACY_TOLERANCE, SECONDS_TOLERANCE, attainable_floor, judge
from optimizer.policies.cloud import with_cloud
from optimizer.policies.packing import Placed, Wish, pack, write_plan
from protocol.plan import Plan, Problem, SolveReport, StreamProfile
from protocol.schema import GpuSpec

BELOW_FLOOR = -1.0  # added to the value of a stream whose shares sustain nothing that keeps floor and latency
UNSERVED = -2.0
MAX_PASSES = 20


@dataclass(frozen=True, slots=True)
class ShareTable:
    """What one stream makes of its shares: ``value[i][r]`` for i quanta of inference and r of retraining.

    ``gamma[r]`` is the retraining configuration picked for r quanta, -1 for none.
    """

    value: NDArray[np.float64]
    gamma: list[int]


def share_table(
    problem: Problem,
    stream: StreamProfile,
    gpu: GpuSpec,
    pace: NDArray[np.float64],
    allowed: Sequence[int] | None = None,
) -> ShareTable:
    """Algorithm 2 for every pair of shares at once, on a GPU like ``gpu``.

    ``pace[r]`` is how long one GPU-second takes with r quanta (inf for none); ``allowed`` restricts the
    retraining configurations (indices), None allows all.
    """
    quanta, quantum = len(pace) - 1, problem.share_quantum
    choices = np.arange(len(stream.retrain)) if allowed is None else np.array(allowed, dtype=np.int64)
    cost_s = np.array([p.gpu_seconds for p in stream.retrain], dtype=np.float64)[choices]
    after = np.array([p.accuracy_after for p in stream.retrain], dtype=np.float64)[choices]
    swap = np.minimum(1.0, cost_s[:, None] * pace[None, :] / own_window_s(stream, problem.window_s))
    average = stream.accuracy_now * swap + after[:, None] * (1.0 - swap)
    # Row 0: no retraining. Ties go to it, and then to the configuration that comes first.
    average = np.vstack([np.full((1, quanta + 1), stream.accuracy_now), average])
    row_of = average.argmax(axis=0)
    best, gamma = average.max(axis=0), np.concatenate([[-1], choices])[row_of]
    floor = min(stream.min_accuracy, attainable_floor(stream, problem.gpus, quantum)) - ACCURACY_TOLERANCE
    latency_s = asked_latency_s(stream, problem.gpus, quantum) + SECONDS_TOLERANCE
    factor: NDArray[np.float64] = np.zeros(quanta + 1)
    penalty = np.full(quanta + 1, UNSERVED)
    for serving in stream.inference:
        below = stream.accuracy_now * serving.relative_accuracy < floor or serving.latency_s > latency_s
        level = BELOW_FLOOR if below else 0.0
        from_quanta = needed_quanta(serving, gpu, quantum)
        row = slice(from_quanta, None)
        better = (level > penalty[row]) | ((level == penalty[row]) & (serving.relative_accuracy > factor[row]))
        factor[row] = np.where(better, serving.relative_accuracy, factor[row])
        penalty[row] = np.where(better, level, penalty[row])
    value = stream.weight * (factor[:, None] * best[None, :] + penalty[:, None])
    return ShareTable(value, gamma.tolist())


@dataclass(slots=True)
class _Known:
    """The tables of the problem asked about last: several policies are asked, and tables are half of their work."""

    problem: Problem | None = None
    tables: Sequence[ShareTable] = ()


_known = _Known()


class Shares:
    """Shares of the jobs of all streams (quanta): inference job of stream v at 2 v, retraining job at 2 v + 1."""

    def __init__(self, problem: Problem, allowed: Sequence[Sequence[int] | None] | None = None) -> None:
        quantum = problem.share_quantum
        self.problem = problem
        capacity = [capacity_quanta(gpu, quantum) for gpu in problem.gpus]
        self.pool = sum(capacity)
        self.most = max(capacity)
        # One kind of GPU as far as the thief can see; the real speeds enter with the placement.
        speed = sum(gpu.speed * quanta for gpu, quanta in zip(problem.gpus, capacity, strict=True)) / max(1, self.pool)
        first = problem.gpus[0]
        self.gpu = GpuSpec(gpu_id=first.gpu_id, speed=speed or 1.0, share_efficiency=first.share_efficiency)
        shares = [share_of(r, quantum) for r in range(1, self.most + 1)]
        rates = [self.gpu.speed * share_efficiency(self.gpu, share) for share in shares]
        pace = np.array([math.inf, *(1.0 / rate if rate > 0.0 else math.inf for rate in rates)])
        self.tables = self._tables(pace, allowed)
        self.quanta = self.fair()
        self._values: list[list[list[float]]] | None = None  # the tables as lists, which a theft reads sooner

    def _tables(
        self, pace: NDArray[np.float64], allowed: Sequence[Sequence[int] | None] | None
    ) -> Sequence[ShareTable]:
        if allowed is None and _known.problem is self.problem:
            return _known.tables
        limits = allowed or [None] * len(self.problem.streams)
        tables = tuple(
            share_table(self.problem, stream, self.gpu, pace, limit)
            for stream, limit in zip(self.problem.streams, limits, strict=True)
        )
        if allowed is None:
            _known.problem, _known.tables = self.problem, tables
        return tables

    def fair(self) -> list[int]:
        """An equal split of the pool over all jobs; what is left over goes to inference first."""
        num_jobs = 2 * len(self.problem.streams)
        each, left = divmod(self.pool, num_jobs)
        order = [*range(0, num_jobs, 2), *range(1, num_jobs, 2)]
        quanta = [each] * num_jobs
        for job in order[:left]:
            quanta[job] += 1
        return quanta

    def steal(self, deadline_s: float, passes: int = MAX_PASSES) -> bool:
        """Algorithm 1, repeated until no theft pays. False when ``deadline_s`` (monotonic) came first."""
        for _ in range(passes):
            before = list(self.quanta)
            if not self._steal_once(deadline_s):
                return False
            if self.quanta == before:
                break
        return True

    def _steal_once(self, deadline_s: float) -> bool:
        quanta, most = self.quanta, self.most
        if self._values is None:
            self._values = [table.value.tolist() for table in self.tables]
        values = self._values

        def worth(v: int) -> float:
            return values[v][min(quanta[2 * v], most)][min(quanta[2 * v + 1], most)]

        for thief in range(len(quanta)):
            if time.monotonic() > deadline_s:
                return False
            for victim in range(len(quanta)):
                if thief == victim:
                    continue
                a, b = thief // 2, victim // 2
                now = worth(a) + worth(b)
                while quanta[victim] > 0 and quanta[thief] < most:
                    quanta[victim] -= 1
                    quanta[thief] += 1
                    then = worth(a) + worth(b)
                    if then <= now:
                        quanta[victim] += 1
                        quanta[thief] -= 1
                        break
                    now = then
        return True

    def wishes(self) -> list[Wish]:
        """The configurations picked for the present shares."""
        found = []
        for v, table in enumerate(self.tables):
            r = min(self.quanta[2 * v + 1], self.most)
            found.append(Wish(lam_quanta=min(self.quanta[2 * v], self.most), gamma=table.gamma[r], r=r))
        return found


def heuristic_plan(problem: Problem, placed: list[Placed], policy: str, started_s: float, detail: str = "") -> Plan:
    """The plan of a method without a bound, valued by the judge."""
    plan = write_plan(problem, placed, SolveReport(policy=policy, status="heuristic"))
    report = SolveReport(
        policy=policy,
        status="heuristic",
        value=judge(problem, plan).value,
        seconds=time.monotonic() - started_s,
        detail=detail,
    )
    return Plan(window_s=plan.window_s, assignments=plan.assignments, report=report)


def thief(problem: Problem, budget_s: float) -> Plan:
    """The thief's plan. Stops stealing after ``budget_s`` seconds; PlanError when the streams cannot be served."""
    return _thief(problem, budget_s, "thief", MAX_PASSES)


def thief_one_pass(problem: Problem, budget_s: float) -> Plan:
    """Algorithm 1 to the letter: every ordered pair of jobs has one turn."""
    return _thief(problem, budget_s, "thief:one-pass", 1)


def _thief(problem: Problem, budget_s: float, name: str, passes: int) -> Plan:
    started_s = time.monotonic()
    shares = Shares(problem)
    plans: list[Plan] = []
    for rounds in (1, passes - 1):
        done = rounds < 1 or shares.steal(started_s + budget_s, rounds)
        detail = "" if done else "stopped stealing at the deadline"
        if rounds >= 1:
            plans.append(
                heuristic_plan(problem, with_cloud(problem, pack(problem, shares.wishes())), name, started_s, detail)
            )
        if not done:
            break
    return max(plans, key=lambda plan: judge(problem, plan).rank)
