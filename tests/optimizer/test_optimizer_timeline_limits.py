"""Own windows, label budgets and links in the time-indexed planner: against brute force, the judge and definitions."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise, permutations, product
from typing import NamedTuple

import msgspec
import numpy as np
import pytest

from optimizer.execution import (
    capacity_quanta,
    gpu_classes,
    needed_quanta,
    own_window_s,
    retrain_seconds,
    share_of,
    transfer_times,
)
from optimizer.objective import attainable_floor, judge
from optimizer.policies.ladder import timeline_or_static
from optimizer.policies.milp import milp
from optimizer.policies.timeline_bound import descend, opening_grid, opening_prices
from optimizer.policies.timeline_model import build_model
from optimizer.policies.timeline_pricing import Pricer
from optimizer.problems import random_problem, with_limits
from protocol.plan import CloudProfile, Problem, RetrainProfile
from protocol.schema import LinkSpec
from tests.optimizer.test_optimizer_timeline_exact import _orders, assert_solved_as_well_as, small_problem


class Picked(NamedTuple):
    """What one stream does: nothing, a retraining on a GPU (``seconds``), or one in the cloud."""

    profile: RetrainProfile | CloudProfile | None = None
    gpu: int = -1
    quanta: int = 0
    seconds: float = math.inf


def limited_problem(seed: int) -> Problem:
    """``small_problem`` with some of own windows, labels that are short, and a link of two transfers at most."""
    problem = small_problem(seed)
    rng = np.random.default_rng([seed, 3])
    windows, labels, cloud = (bool(rng.random() < 0.7) for _ in range(3))
    streams = []
    for stream in problem.streams:
        sent = CloudProfile(
            retrain_id="sent",
            link_id="wan",
            accuracy_after=min(1.0, stream.accuracy_now + float(rng.uniform(-0.05, 0.4))),
            up_bytes=int(rng.integers(0, 300)),
            cloud_seconds=float(rng.uniform(0.0, 15.0)),
            down_bytes=int(rng.integers(0, 500)),
            swap_bytes=int(rng.integers(0, 3)),
            label_seconds=float(rng.choice([0.0, 3.0])),
            running=bool(rng.random() < 0.2),
        )
        streams.append(
            msgspec.structs.replace(
                stream,
                window_s=float(rng.uniform(20.0, 110.0)) if windows and rng.random() < 0.8 else None,
                retrain=tuple(
                    msgspec.structs.replace(p, label_seconds=float(rng.choice([0.0, 2.0, 5.0]))) for p in stream.retrain
                ),
                cloud=(sent,) if cloud and rng.random() < 0.8 else (),
            )
        )
    return msgspec.structs.replace(
        problem,
        streams=tuple(streams),
        links=(LinkSpec(link_id="wan", up_bytes_per_s=10.0, down_bytes_per_s=20.0),) if cloud else (),
        label_budget_s=float(rng.uniform(0.0, 8.0)) if labels else None,
    )


def _choices(problem: Problem, v: int) -> list[Picked]:
    stream = problem.streams[v]
    found = [Picked(), *(Picked(profile) for profile in stream.cloud)]
    for profile in stream.retrain:
        for g, gpu in enumerate(problem.gpus):
            for r in range(1, capacity_quanta(gpu, problem.share_quantum) + 1):
                seconds = retrain_seconds(profile, gpu, share_of(r, problem.share_quantum))
                if seconds < problem.window_s:
                    found.append(Picked(profile, g, r, seconds))
    return found


def _all_times(problem: Problem, picked: tuple[Picked, ...]) -> Iterator[dict[int, tuple[float, float]]]:
    """(start, end) of all retrainings, for every order of transfers and every way to wait for one another."""
    sent = [v for v, one in enumerate(picked) if isinstance(one.profile, CloudProfile)]
    local = [v for v, one in enumerate(picked) if isinstance(one.profile, RetrainProfile)]
    for order in permutations(sent):
        profiles = [p for p in (picked[v].profile for v in order) if isinstance(p, CloudProfile)]
        if [p.running for p in profiles] != sorted((p.running for p in profiles), reverse=True):
            continue
        arrived = dict(zip(order, transfer_times(problem.links[0], profiles), strict=True)) if sent else {}
        for before in _orders([*local, *sent]):
            if any(before[v] >= 0 for v in sent):
                continue
            times = dict(arrived)
            while len(times) < len(before):
                for v in local:
                    if v not in times and (before[v] < 0 or before[v] in times):
                        start_s = 0.0 if before[v] < 0 else times[before[v]][1]
                        times[v] = (start_s, start_s + picked[v].seconds)
            yield times


def brute_force(problem: Problem) -> float:
    """The best value of any plan: every retraining, place, share and order; every inference in every interval."""
    window_s, quantum = problem.window_s, problem.share_quantum
    classes = [gpu for gpu, _ in gpu_classes(problem)]
    floors = [min(s.min_accuracy, attainable_floor(s, classes, quantum)) for s in problem.streams]
    owns = [own_window_s(s, window_s) for s in problem.streams]
    budget_s = math.inf if problem.label_budget_s is None else problem.label_budget_s
    spots = [
        [(g, needed_quanta(p, gpu, quantum), p) for g, gpu in enumerate(problem.gpus) for p in stream.inference]
        for stream in problem.streams
    ]
    memo: dict[tuple[object, ...], float] = {}

    def moment(picked: tuple[Picked, ...], running: tuple[bool, ...], ended: tuple[bool, ...], new: tuple[bool, ...],
               parts: tuple[float, ...]) -> float:  # fmt: skip
        best = -math.inf
        for served in product(*spots):
            share, memory, rate = [0] * len(problem.gpus), [0] * len(problem.gpus), 0.0
            for v, (g, quanta, inference) in enumerate(served):
                stream, one = problem.streams[v], picked[v]
                accuracy = one.profile.accuracy_after if one.profile is not None and new[v] else stream.accuracy_now
                share[g] += quanta
                memory[g] += inference.memory_bytes
                if one.profile is not None and not ended[v]:
                    memory[g] += one.profile.swap_bytes
                if isinstance(one.profile, RetrainProfile) and running[v]:
                    share[one.gpu] += one.quanta
                    memory[one.gpu] += one.profile.memory_bytes
                kept = accuracy * inference.relative_accuracy >= floors[v] - 1e-9
                rate += stream.weight / owns[v] * accuracy * inference.relative_accuracy * parts[v] if kept else -1e9
            fits = all(
                share[g] <= capacity_quanta(gpu, quantum) and (not gpu.memory_bytes or memory[g] <= gpu.memory_bytes)
                for g, gpu in enumerate(problem.gpus)
            )
            best = max(best, rate) if fits and rate > -1e8 else best
        return best

    most = -math.inf
    for picked in product(*(_choices(problem, v) for v in range(len(problem.streams)))):
        if math.fsum(one.profile.label_seconds for one in picked if one.profile is not None) > budget_s + 1e-9:
            continue
        for times in _all_times(problem, picked):
            if any(end_s >= window_s for _, end_s in times.values()):
                continue
            value = 0.0
            for a, b in pairwise(sorted({0.0, window_s, *(end_s for _, end_s in times.values())})):
                running = tuple(v in times and times[v][0] <= a < times[v][1] for v in range(len(picked)))
                ended = tuple(v in times and times[v][1] <= a for v in range(len(picked)))
                new = tuple(done and times[v][1] < owns[v] for v, done in enumerate(ended))
                parts = tuple(min(1.0, max(0.0, (own - a) / (b - a))) for own in owns)
                key = (tuple((id(c.profile), c.gpu, c.quanta) for c in picked), running, ended, new, parts)
                if key not in memo:
                    memo[key] = moment(picked, running, ended, new, parts)
                value += memo[key] * (b - a)
            most = max(most, value)
    return most / sum(s.weight for s in problem.streams)


@pytest.mark.parametrize("seed", range(48))
def test_small_problems_with_limits_are_solved_as_well_as_by_brute_force_over_schedules(seed: int) -> None:
    problem = limited_problem(seed)
    assert_solved_as_well_as(problem, brute_force(problem))


@pytest.mark.parametrize("seed", range(6))
def test_pricing_with_own_windows_and_labels_finds_the_best_start_in_continuous_time(seed: int) -> None:
    rng = np.random.default_rng(seed)
    base = random_problem(2, 1, 6, seed)
    own = (float(rng.uniform(30.0, 190.0)), None)
    streams = tuple(
        msgspec.structs.replace(
            s,
            window_s=own_s,
            retrain=tuple(msgspec.structs.replace(p, label_seconds=float(k % 3)) for k, p in enumerate(s.retrain)),
        )
        for s, own_s in zip(base.streams, own, strict=True)
    )
    problem = msgspec.structs.replace(base, streams=streams, label_budget_s=2.5)
    model = build_model(problem)
    grid_s = np.sort(np.concatenate(([0.0, 200.0], rng.uniform(0.0, 200.0, 5))))
    pricer = Pricer(model, grid_s)
    prices = rng.uniform(0.0, 0.004, (model.num_rows, pricer.num_cells))
    priced = pricer.price(prices)
    assert model.num_rows == model.first_once + 1
    each_s = prices[model.first_once, 0] * 200.0 / (2.5 * (1.0 + 1e-6))  # price of a second of labelling

    def integral(density: list[float], a: float, b: float) -> float:
        overlap = np.clip(np.minimum(grid_s[1:], b) - np.maximum(grid_s[:-1], a), 0.0, None)
        return float((np.array(density) * overlap).sum())

    for v, stream in enumerate(problem.streams):
        own_s = own_window_s(stream, 200.0)

        def served(accuracy: float, v: int = v, own_s: float = own_s) -> list[float]:
            costs = [needed_quanta(p, problem.gpus[0], 0.1) / 10 * prices[0] for p in problem.streams[v].inference]
            worth = [accuracy * p.relative_accuracy / own_s / 2.0 for p in problem.streams[v].inference]
            best_of = np.max([w - c for w, c in zip(worth, costs, strict=True)], axis=0)
            return [float(one) for one in best_of]

        now, idle = served(stream.accuracy_now), served(0.0)
        best = integral(now, 0.0, own_s) + integral(idle, own_s, 200.0)
        for profile in stream.retrain:
            after = served(profile.accuracy_after)
            for r in range(1, 11):
                seconds = retrain_seconds(profile, problem.gpus[0], share_of(r, 0.1))
                latest_s = own_s - seconds
                if latest_s <= 0.0:
                    continue
                kinks = [s for s in (*grid_s, *(grid_s - seconds)) if 0.0 <= s <= latest_s]
                for start_s in (*kinks, latest_s, *rng.uniform(0.0, latest_s, 10)):
                    end_s = float(start_s) + seconds
                    paid = r / 10 * integral(prices[0].tolist(), float(start_s), end_s)
                    paid += each_s * profile.label_seconds
                    worth = integral(now, 0.0, end_s) + integral(after, end_s, own_s) + integral(idle, own_s, 200.0)
                    best = max(best, worth - paid)
        assert priced.worth[v] == pytest.approx(best, abs=1e-9)


@pytest.mark.parametrize("seed", range(6))
def test_plans_with_all_limits_have_a_bound_and_are_never_below_the_static_plan(seed: int) -> None:
    size = ((6, 2, 9), (10, 4, 9), (12, 8, 18))[seed % 3]
    problem = msgspec.structs.replace(with_limits(random_problem(*size, seed), seed), planning_quantile=0.5)
    plan = timeline_or_static(problem, 10.0)
    verdict = judge(problem, plan)
    assert verdict.feasible, verdict.violations
    assert verdict.value >= judge(problem, milp(problem, 20.0)).value - 1e-9
    assert plan.report.bound is not None
    assert plan.report.bound >= verdict.value - 1e-12
    assert plan.report.gap is not None
    assert plan.report.gap < 0.05


@pytest.mark.parametrize("seed", range(4))
def test_a_price_for_labels_and_turns_lowers_the_bound_of_those_who_want_too_much(seed: int) -> None:
    problem = with_limits(random_problem(10, 8, 9, seed), seed)
    streams = tuple(msgspec.structs.replace(s, window_s=None, max_latency_s=None) for s in problem.streams)
    limited = msgspec.structs.replace(problem, streams=streams, label_budget_s=6.0)
    free = msgspec.structs.replace(limited, label_budget_s=None)
    bounds = []
    for one in (limited, free):
        pricer = Pricer(build_model(one), opening_grid(one.window_s, 10))
        bounds.append(descend(pricer, opening_prices(pricer), math.inf, 120)[0])
    assert bounds[0] < bounds[1] * (1.0 - 1e-3)
