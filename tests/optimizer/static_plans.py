"""Brute force over static plans, for tests: slow, obvious, and sharing nothing with the solvers but the judge."""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import msgspec
import numpy as np

from optimizer.objective import Verdict, judge
from protocol.plan import (
    Assignment,
    InferenceProfile,
    InferenceStep,
    Plan,
    Problem,
    RetrainProfile,
    RetrainStep,
    SolveReport,
    StreamProfile,
)
from protocol.schema import GpuSpec

REPORT = SolveReport(policy="brute force", status="heuristic")


class Choice(NamedTuple):
    """One stream's assignment, its value and whether it keeps the floor, and its peaks per GPU."""

    assignment: Assignment
    value: float
    keeps_floor: bool
    quanta: tuple[int, ...]
    num_bytes: tuple[int, ...]


def need(profile: InferenceProfile, gpu: GpuSpec, quantum: float) -> int:
    return math.ceil(profile.gpu_share_needed / gpu.speed / quantum - 1e-9)


def choices(problem: Problem, index: int) -> list[Choice]:
    """Everything stream ``index`` could do in a static plan, one job order at a time."""
    stream, quantum = problem.streams[index], problem.share_quantum
    alone = msgspec.structs.replace(problem, streams=(stream,))
    found: list[Choice] = []
    for first, at in itertools.product(stream.inference, range(len(problem.gpus))):
        u = need(first, problem.gpus[at], quantum)
        start = step(first, problem.gpus[at], u, quantum)
        plain = Assignment(stream_id=stream.stream_id, inference=(start,))
        found += choice(alone, plain, {at: (u, first.memory_bytes)})
        for profile, on, second in itertools.product(stream.retrain, range(len(problem.gpus)), stream.inference):
            if profile.pinned_gpu not in (None, problem.gpus[on].gpu_id):
                continue
            for r, then in itertools.product(range(1, round(1 / quantum) + 1), {at, on}):
                u2 = need(second, problem.gpus[then], quantum)
                held = u + r if at == on else (u if then == at else r)
                if u2 > held:
                    continue
                retrain = RetrainStep(
                    retrain_id=profile.retrain_id, gpu_id=problem.gpus[on].gpu_id, share=round(r * quantum, 9)
                )
                steps = (start, step(second, problem.gpus[then], u2, quantum, (stream.stream_id,)))
                whole = Assignment(stream_id=stream.stream_id, inference=steps, retrain=retrain)
                before = {at: first.memory_bytes + profile.swap_bytes}
                before[on] = before.get(on, 0) + profile.memory_bytes
                peaks = dict(before)
                peaks[then] = max(before.get(then, 0), second.memory_bytes)
                quanta = {at: u}
                quanta[on] = quanta.get(on, 0) + r
                found += choice(alone, whole, {g: (quanta.get(g, 0), peaks.get(g, 0)) for g in {at, on, then}})
    return found


def step(
    profile: InferenceProfile, gpu: GpuSpec, quanta: int, quantum: float, after: tuple[str, ...] = ()
) -> InferenceStep:
    share = min(1.0, round(quanta * quantum, 9))
    return InferenceStep(inference_id=profile.inference_id, gpu_id=gpu.gpu_id, share=share, after=after)


def choice(alone: Problem, assignment: Assignment, peaks: dict[int, tuple[int, int]]) -> list[Choice]:
    """The choice if the stream could do it with the whole site for itself."""
    verdict: Verdict = judge(alone, Plan(window_s=alone.window_s, assignments=(assignment,), report=REPORT))
    if not verdict.only_floors_broken:
        return []
    quanta = tuple(peaks.get(g, (0, 0))[0] for g in range(len(alone.gpus)))
    num_bytes = tuple(peaks.get(g, (0, 0))[1] for g in range(len(alone.gpus)))
    return [Choice(assignment, verdict.value, verdict.feasible, quanta, num_bytes)]


def best_static_plan(problem: Problem, floors: bool = True) -> tuple[float, Plan] | None:
    """The best plan that keeps every rule (without the floors where ``floors`` is false); None when there is none."""
    quantum = problem.share_quantum
    free = tuple(math.floor((1.0 - gpu.reserved_share) / quantum + 1e-9) for gpu in problem.gpus)
    memory = tuple(gpu.memory_bytes or math.inf for gpu in problem.gpus)
    per_stream: list[list[Choice]] = []
    for index in range(len(problem.streams)):
        possible = [c for c in choices(problem, index) if c.keeps_floor or not floors]
        cheapest: dict[tuple[tuple[int, ...], tuple[int, ...]], Choice] = {}
        for c in possible:
            key = (c.quanta, c.num_bytes)
            if key not in cheapest or cheapest[key].value < c.value:
                cheapest[key] = c
        per_stream.append(sorted(cheapest.values(), key=lambda c: -c.value))
    if not all(per_stream):
        return None
    weights = [stream.weight for stream in problem.streams]
    ceiling = [0.0] * (len(weights) + 1)
    for v in reversed(range(len(weights))):
        ceiling[v] = ceiling[v + 1] + weights[v] * per_stream[v][0].value
    best_value, best_choices = -1.0, []
    path: list[Choice] = []

    def search(v: int, value: float, quanta: tuple[float, ...], num_bytes: tuple[float, ...]) -> None:
        nonlocal best_value, best_choices
        if v == len(weights):
            if value > best_value:
                best_value, best_choices = value, list(path)
            return
        for c in per_stream[v]:
            if value + weights[v] * c.value + ceiling[v + 1] <= best_value:
                return
            left = tuple(a - b for a, b in zip(quanta, c.quanta, strict=True))
            bytes_left = tuple(a - b for a, b in zip(num_bytes, c.num_bytes, strict=True))
            if min(left) < 0 or min(bytes_left) < 0:
                continue
            path.append(c)
            search(v + 1, value + weights[v] * c.value, left, bytes_left)
            path.pop()

    search(0, 0.0, free, memory)
    if best_value < 0.0:
        return None
    plan = Plan(window_s=problem.window_s, assignments=tuple(c.assignment for c in best_choices), report=REPORT)
    return best_value / sum(weights), plan


def small_problem(seed: int) -> Problem:
    """A small contended problem; the seed decides which complications it has."""
    rng = np.random.default_rng(seed)
    has = {name: bool(rng.random() < 0.4) for name in ("speeds", "memory", "floors", "reserved", "pins", "home")}
    num_streams, num_gpus = ((2, 1), (2, 2), (2, 3), (3, 1), (3, 2))[int(rng.integers(5))]
    quantum = float(rng.choice([0.25, 0.2])) if num_streams * num_gpus < 6 else 1.0 / 3.0
    gpus = tuple(
        GpuSpec(
            gpu_id=f"g{g}",
            speed=float(rng.choice([0.5, 1.0, 2.0])) if has["speeds"] else 1.0,
            memory_bytes=int(rng.integers(60, 160)) if has["memory"] else 0,
            reserved_share=float(rng.choice([0.0, 0.25])) if has["reserved"] else 0.0,
            share_efficiency=((0.5, 0.7), (1.0, 1.0)) if rng.random() < 0.3 else (),
        )
        for g in range(num_gpus)
    )
    streams = tuple(_small_stream(f"s{v}", gpus, has, rng) for v in range(num_streams))
    prices = ((0.0, 0.0), (3.0, 3.0), (0.0, 8.0), (3.0, 8.0))[int(rng.integers(4))] if has["home"] else (0.0, 0.0)
    return Problem(
        window_s=100.0,
        gpus=gpus,
        streams=streams,
        share_quantum=quantum,
        config_change_s=prices[0],
        migration_s=prices[1],
    )


def _small_stream(
    stream_id: str, gpus: tuple[GpuSpec, ...], has: dict[str, bool], rng: np.random.Generator
) -> StreamProfile:
    factors = (1.0, float(rng.uniform(0.5, 0.9)), float(rng.uniform(0.2, 0.5)))
    shares = (float(rng.uniform(0.3, 0.6)), float(rng.uniform(0.15, 0.3)), float(rng.uniform(0.05, 0.15)))
    num_bytes = [int(rng.integers(10, 40)) if has["memory"] else 0 for _ in range(8)]
    inference = tuple(
        InferenceProfile(inference_id=f"i{i}", gpu_share_needed=d, relative_accuracy=q, memory_bytes=num_bytes[i])
        for i, (d, q) in enumerate(zip(shares, factors, strict=True))
    )
    now = float(rng.uniform(0.3, 0.75))
    retrain = [
        RetrainProfile(
            retrain_id=f"r{i}",
            accuracy_after=min(1.0, now + float(rng.uniform(-0.05, 0.5))),
            gpu_seconds=float(rng.uniform(3.0, 80.0)),
            memory_bytes=num_bytes[3 + i],
            swap_bytes=num_bytes[5 + i] // 4,
        )
        for i in range(2)
    ]
    if has["pins"] and rng.random() < 0.6:
        pinned = gpus[int(rng.integers(len(gpus)))].gpu_id
        retrain[1] = msgspec.structs.replace(retrain[1], pinned_gpu=pinned)
    home = gpus[int(rng.integers(len(gpus)))].gpu_id if has["home"] and rng.random() < 0.8 else None
    return StreamProfile(
        stream_id=stream_id,
        accuracy_now=now,
        inference=inference,
        retrain=tuple(retrain),
        min_accuracy=float(rng.uniform(0.1, 0.6)) if has["floors"] else 0.0,
        weight=float(rng.choice([1.0, 1.0, 2.5])),
        serving_gpu=home,
        serving_inference=None if home is None else f"i{int(rng.integers(3))}",
    )
