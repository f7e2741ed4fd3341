"""The time-indexed planner against brute force over schedules, and the parts of its bound against their definitions."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from itertools import combinations_with_replacement, pairwise, product

import numpy as np
import pytest

from optimizer.execution import capacity_quanta, gpu_classes, needed_quanta, retrain_seconds, share_of
from optimizer.objective import attainable_floor, judge
from optimizer.policies.timeline import timeline
from optimizer.policies.timeline_bound import descend, dual_of_few, dual_of_many, opening_grid, opening_prices
from optimizer.policies.timeline_model import build_model, size_functions
from optimizer.policies.timeline_pricing import Pricer, exact_bound
from optimizer.problems import random_problem
from protocol.plan import InferenceProfile, Problem, RetrainProfile, StreamProfile
from protocol.schema import GpuSpec


def small_problem(seed: int) -> Problem:
    """2 or 3 streams on 1 or 2 GPUs of unequal speed and, every other seed, little memory; no price for changes."""
    rng = np.random.default_rng(seed)
    num_streams, num_gpus = ((2, 1), (2, 2), (3, 1))[seed % 3]
    limited = bool(seed % 2)
    gpus = tuple(
        GpuSpec(
            gpu_id=f"g{g}",
            speed=float(rng.choice([1.0, 1.0, 0.5, 2.0])),
            memory_bytes=int(rng.integers(11, 16)) if limited else 0,
            share_efficiency=((0.5, 0.7),) if rng.random() < 0.4 else (),
        )
        for g in range(num_gpus)
    )
    streams = []
    for v in range(num_streams):
        now = float(rng.uniform(0.3, 0.7))
        inference = tuple(
            InferenceProfile(inference_id=f"i{i}", gpu_share_needed=d, relative_accuracy=q, memory_bytes=1 + i)
            for i, (d, q) in enumerate([(0.2, float(rng.uniform(0.5, 0.8))), (0.45, 1.0)])
        )
        retrain = tuple(
            RetrainProfile(
                retrain_id=f"r{k}",
                accuracy_after=min(1.0, now + float(rng.uniform(-0.05, 0.4))),
                gpu_seconds=float(rng.uniform(5.0, 45.0)),
                memory_bytes=int(rng.integers(2, 6)),
                swap_bytes=int(rng.integers(0, 3)),
            )
            for k in range(2 if num_streams == 2 else 1)
        )
        floor = float(rng.uniform(0.0, 0.35)) if rng.random() < 0.5 else 0.0
        streams.append(
            StreamProfile(
                stream_id=f"s{v}",
                accuracy_now=now,
                inference=inference,
                retrain=retrain,
                min_accuracy=floor,
                weight=float(rng.choice([1.0, 1.0, 2.5])),
            )
        )
    return Problem(window_s=100.0, gpus=gpus, streams=tuple(streams), share_quantum=0.25, num_slots=10)


def _orders(streams: list[int]) -> Iterator[dict[int, int]]:
    for waits in product(*([-1, *(u for u in streams if u != v)] for v in streams)):
        before = dict(zip(streams, waits, strict=True))
        chain_ends = all(_depth(before, v) <= len(streams) for v in streams)
        if chain_ends:
            yield before


def _depth(before: dict[int, int], v: int) -> int:
    depth = 0
    while v >= 0 and depth <= len(before) + 1:
        v, depth = before[v], depth + 1
    return depth


def _times(seconds: dict[int, float], before: dict[int, int]) -> dict[int, tuple[float, float]]:
    times: dict[int, tuple[float, float]] = {}
    while len(times) < len(seconds):
        for v, length_s in seconds.items():
            if v not in times and (before[v] < 0 or before[v] in times):
                start_s = 0.0 if before[v] < 0 else times[before[v]][1]
                times[v] = (start_s, start_s + length_s)
    return times


def brute_force(problem: Problem) -> float:
    """The best value of any plan: every retraining, GPU, share and order; every inference in every interval.

    Written from the execution model alone, in Python numbers, with no pruning. -inf where no plan is feasible.
    """
    quantum, window_s = problem.share_quantum, problem.window_s
    classes = [gpu for gpu, _ in gpu_classes(problem)]
    floors = [min(s.min_accuracy, attainable_floor(s, classes, quantum)) for s in problem.streams]
    total_weight = sum(s.weight for s in problem.streams)
    choices = []
    for stream in problem.streams:
        own: list[tuple[RetrainProfile | None, int, int, float]] = [(None, -1, 0, math.inf)]
        for profile in stream.retrain:
            for g, gpu in enumerate(problem.gpus):
                for r in range(1, capacity_quanta(gpu, quantum) + 1):
                    seconds = retrain_seconds(profile, gpu, share_of(r, quantum))
                    if seconds < window_s:
                        own.append((profile, g, r, seconds))
        choices.append(own)
    spots = [
        [
            (g, needed_quanta(p, gpu, quantum), p)
            for g, gpu in enumerate(problem.gpus)
            for p in stream.inference
            if needed_quanta(p, gpu, quantum) <= capacity_quanta(gpu, quantum)
        ]
        for stream in problem.streams
    ]
    best = -math.inf
    memo: dict[tuple[object, ...], float] = {}
    for picked in product(*choices):
        retrained = [v for v, (profile, _, _, _) in enumerate(picked) if profile is not None]
        for before in _orders(retrained):
            times = _times({v: picked[v][3] for v in retrained}, before)
            starts = {v: start_s for v, (start_s, _) in times.items()}
            ends = {v: end_s for v, (_, end_s) in times.items()}
            if any(end_s >= window_s for end_s in ends.values()):
                continue
            marks = sorted({0.0, window_s, *ends.values()})
            value = 0.0
            for a, b in pairwise(marks):
                running = tuple(starts[v] <= a < ends[v] if v in ends else False for v in range(len(picked)))
                swapped = tuple(v in ends and ends[v] <= a for v in range(len(picked)))
                key = (tuple((id(c[0]), c[1], c[2]) for c in picked), running, swapped)
                if key not in memo:
                    memo[key] = _best_moment(problem, picked, running, swapped, spots, floors)
                value += memo[key] * (b - a)
            best = max(best, value / window_s / total_weight)
    return best


def _best_moment(
    problem: Problem,
    picked: tuple[tuple[RetrainProfile | None, int, int, float], ...],
    running: tuple[bool, ...],
    swapped: tuple[bool, ...],
    spots: list[list[tuple[int, int, InferenceProfile]]],
    floors: list[float],
) -> float:
    best = -math.inf
    for served in product(*spots):
        share = [0] * len(problem.gpus)
        memory = [0] * len(problem.gpus)
        rate = 0.0
        for v, (g, quanta, inference) in enumerate(served):
            profile, h, r, _ = picked[v]
            stream = problem.streams[v]
            accuracy = profile.accuracy_after if profile is not None and swapped[v] else stream.accuracy_now
            if accuracy * inference.relative_accuracy < floors[v] - 1e-9:
                break
            share[g] += quanta
            memory[g] += inference.memory_bytes
            if profile is not None and not swapped[v]:
                memory[g] += profile.swap_bytes
            if profile is not None and running[v]:
                share[h] += r
                memory[h] += profile.memory_bytes
            rate += stream.weight * accuracy * inference.relative_accuracy
        else:
            enough = all(
                share[g] <= capacity_quanta(gpu, problem.share_quantum)
                and (not gpu.memory_bytes or memory[g] <= gpu.memory_bytes)
                for g, gpu in enumerate(problem.gpus)
            )
            if enough:
                best = max(best, rate)
    return best


def assert_solved_as_well_as(problem: Problem, best: float) -> None:
    """``best``: by brute force, -inf where no plan is feasible."""
    plan = timeline(problem, 20.0, target_gap=1e-9)
    verdict = judge(problem, plan)
    if best == -math.inf:
        assert not verdict.feasible
        return
    assert verdict.feasible, verdict.violations
    assert verdict.value == pytest.approx(best, abs=1e-7)
    assert plan.report.bound is not None
    assert plan.report.bound >= best - 1e-9


@pytest.mark.parametrize("seed", range(200))
def test_small_problems_are_solved_as_well_as_by_brute_force_over_schedules(seed: int) -> None:
    problem = small_problem(seed)
    assert_solved_as_well_as(problem, brute_force(problem))


@pytest.mark.parametrize("capacity", [4, 5, 7, 10])
@pytest.mark.parametrize("k", [1, 2, 3, 4, 6, 9])
def test_no_set_of_jobs_that_fits_on_a_gpu_takes_more_than_one_by_any_size_function(capacity: int, k: int) -> None:
    for table in size_functions(capacity, (k,)):
        for count in range(1, capacity + 1):
            for sizes in combinations_with_replacement(range(1, capacity + 1), count):
                if sum(sizes) <= capacity:
                    assert sum(table[s] for s in sizes) <= 1.0 + 1e-12


@pytest.mark.parametrize("seed", range(6))
def test_pricing_finds_the_best_start_in_continuous_time(seed: int) -> None:
    """Against a scan over many start times, with prices integrated exactly and inference chosen cell by cell."""
    rng = np.random.default_rng(seed)
    problem = random_problem(2, 1, 6, seed)
    model = build_model(problem, every_retraining=True)
    grid_s = np.sort(np.concatenate(([0.0, 200.0], rng.uniform(0.0, 200.0, 5))))
    pricer = Pricer(model, grid_s)
    prices = rng.uniform(0.0, 0.004, (model.num_rows, pricer.num_cells))
    priced = pricer.price(prices)
    lengths = np.diff(grid_s)

    def integral(density: np.ndarray[tuple[int], np.dtype[np.float64]], a: float, b: float) -> float:
        return float((density * np.clip(np.minimum(grid_s[1:], b) - np.maximum(grid_s[:-1], a), 0.0, None)).sum())

    for v, stream in enumerate(problem.streams):
        weight = 1.0 / len(problem.streams) / problem.window_s

        def inference(
            accuracy: float, v: int = v, weight: float = weight
        ) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
            rates = [
                weight * accuracy * p.relative_accuracy - needed_quanta(p, problem.gpus[0], 0.1) / 10 * prices[0]
                for p in problem.streams[v].inference
            ]
            return np.asarray(np.max(rates, axis=0))

        now = inference(stream.accuracy_now)
        best = integral(now, 0.0, 200.0)
        for profile in stream.retrain:
            after = inference(profile.accuracy_after)
            for r in range(1, 11):
                seconds = retrain_seconds(profile, problem.gpus[0], share_of(r, 0.1))
                kinks = [s for s in (*grid_s, *(grid_s - seconds)) if 0.0 <= s <= 200.0 - seconds]
                for start_s in (*kinks, *rng.uniform(0.0, max(1e-9, 200.0 - seconds), 10)):
                    end_s = float(start_s) + seconds
                    if end_s < 200.0:
                        rent = r / 10 * integral(prices[0], float(start_s), end_s)
                        best = max(best, integral(now, 0.0, end_s) + integral(after, end_s, 200.0) - rent)
        assert priced.worth[v] == pytest.approx(best, abs=1e-9)
    capacity = float((prices * model.capacities[:, None] * lengths).sum())
    assert priced.bound == pytest.approx(float(priced.worth.sum()) + capacity)
    assert exact_bound(model, grid_s, prices) == pytest.approx(priced.bound)


def test_the_bound_of_many_streams_agrees_with_the_bound_of_few() -> None:
    problem = random_problem(320, 50, 3, 3)
    grid_s = opening_grid(problem.window_s, 10)
    pricer = Pricer(build_model(problem), grid_s)
    many = dual_of_many(pricer.model, grid_s, time.monotonic() + 60.0)
    plain, _, _, _ = descend(pricer, opening_prices(pricer), time.monotonic() + 60.0, 60)
    assert many.bound == pytest.approx(plain, rel=0.01)
    assert exact_bound(pricer.model, grid_s, many.prices) == pytest.approx(many.bound)


def test_size_functions_tighten_the_bound_where_inference_does_not_pack() -> None:
    problem = random_problem(10, 8, 18, 1)
    grid_s = opening_grid(problem.window_s, 10)
    pricer = Pricer(build_model(problem), grid_s)
    plain, _, _, _ = descend(pricer, opening_prices(pricer), time.monotonic() + 60.0, 200)
    assert dual_of_few(pricer.model, grid_s, time.monotonic() + 60.0).bound < plain * (1.0 - 1e-4)
