"""Brute force over static plans, for tests: slow, obvious, and sharing nothing with the solvers but the judge."""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

import msgspec
import numpy as np

from optimizer.objective import Verdict, judge
from protocol.plan import (
    Assignment,
    CloudProfile,
    CloudStep,
    InferenceProfile,
    InferenceStep,
    Plan,
    Problem,
    RetrainProfile,
    RetrainStep,
    SolveReport,
    StreamProfile,
)
from protocol.schema import GpuSpec, LinkSpec

REPORT = SolveReport(policy="brute force", status="heuristic")


class Choice(NamedTuple):
    """One stream's assignment, its value, whether it keeps floor and latency, its peaks per GPU, and its labelling.

    The value of a retraining in the cloud is that with the link to itself.
    """

    assignment: Assignment
    value: float
    keeps_floor: bool
    quanta: tuple[int, ...]
    num_bytes: tuple[int, ...]
    labels_s: float


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
        for cloud in stream.cloud:
            away = Assignment(
                stream_id=stream.stream_id, inference=(start,), cloud=CloudStep(retrain_id=cloud.retrain_id)
            )
            found += choice(alone, away, {at: (u, first.memory_bytes + cloud.swap_bytes)}, cloud.label_seconds)
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
                held_by = {g: (quanta.get(g, 0), peaks.get(g, 0)) for g in {at, on, then}}
                found += choice(alone, whole, held_by, profile.label_seconds)
    return found


def step(
    profile: InferenceProfile, gpu: GpuSpec, quanta: int, quantum: float, after: tuple[str, ...] = ()
) -> InferenceStep:
    share = min(1.0, round(quanta * quantum, 9))
    return InferenceStep(inference_id=profile.inference_id, gpu_id=gpu.gpu_id, share=share, after=after)


def choice(
    alone: Problem, assignment: Assignment, peaks: dict[int, tuple[int, int]], labels_s: float = 0.0
) -> list[Choice]:
    """The choice if the stream could do it with the whole site for itself."""
    verdict: Verdict = judge(alone, Plan(window_s=alone.window_s, assignments=(assignment,), report=REPORT))
    if not verdict.only_floors_broken:
        return []
    quanta = tuple(peaks.get(g, (0, 0))[0] for g in range(len(alone.gpus)))
    num_bytes = tuple(peaks.get(g, (0, 0))[1] for g in range(len(alone.gpus)))
    return [Choice(assignment, verdict.value, verdict.feasible, quanta, num_bytes, labels_s)]


def best_static_plan(problem: Problem, floors: bool = True) -> tuple[float, Plan] | None:
    """The best plan that keeps every rule (without the floors where ``floors`` is false); None when there is none."""
    quantum = problem.share_quantum
    labels = math.inf if problem.label_budget_s is None else problem.label_budget_s
    free = tuple(math.floor((1.0 - gpu.reserved_share) / quantum + 1e-9) for gpu in problem.gpus)
    memory = tuple(gpu.memory_bytes or math.inf for gpu in problem.gpus)
    per_stream: list[list[Choice]] = []
    for index in range(len(problem.streams)):
        possible = [c for c in choices(problem, index) if c.keeps_floor or not floors]
        cheapest: dict[tuple[object, ...], Choice] = {}
        for c in possible:
            key = (c.quanta, c.num_bytes, c.labels_s, c.assignment.cloud)
            if key not in cheapest or cheapest[key].value < c.value:
                cheapest[key] = c
        per_stream.append(sorted(cheapest.values(), key=lambda c: -c.value))
    if not all(per_stream):
        return None
    weights = [stream.weight for stream in problem.streams]
    ceiling = [0.0] * (len(weights) + 1)
    for v in reversed(range(len(weights))):
        ceiling[v] = ceiling[v + 1] + weights[v] * per_stream[v][0].value
    best_value = -1.0
    best_choices: list[Choice] = []
    path: list[Choice] = []

    def search(v: int, value: float, quanta: tuple[float, ...], num_bytes: tuple[float, ...]) -> None:
        nonlocal best_value, best_choices
        if v == len(weights):
            if math.fsum(c.labels_s for c in path) > labels + 1e-9:
                return
            value, ordered = best_order(problem, path, value)
            if value > best_value:
                best_value, best_choices = value, ordered
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


def best_order(problem: Problem, path: list[Choice], value: float) -> tuple[float, list[Choice]]:
    """The weighted value with the best order of transfers; as it is where nothing is transferred."""
    sent = [v for v, c in enumerate(path) if c.assignment.cloud is not None]
    if not sent:
        return value, list(path)
    best, found = -1.0, list(path)
    for order in itertools.permutations(sent):
        ordered = list(path)
        for turn, v in enumerate(order):
            step = path[v].assignment.cloud
            assert step is not None
            cloud = msgspec.structs.replace(step, turn=turn)
            ordered[v] = path[v]._replace(assignment=msgspec.structs.replace(path[v].assignment, cloud=cloud))
        plan = Plan(window_s=problem.window_s, assignments=tuple(c.assignment for c in ordered), report=REPORT)
        verdict = judge(problem, plan)
        total = verdict.value * sum(stream.weight for stream in problem.streams)
        if verdict.only_floors_broken and total > best:
            best, found = total, ordered
    return best, found


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


def small_limited_problem(seed: int, *, equal_transfers: bool = False) -> Problem:
    """A small problem with some of: latency limits, own windows, a label budget, retraining in the cloud."""
    problem = small_problem(seed)
    rng = np.random.default_rng([seed, 7])
    has = {name: bool(rng.random() < 0.6) for name in ("latency", "windows", "labels", "cloud")}
    if not any(has.values()):
        has["cloud"] = True
    sizes = [(int(rng.integers(0, 200)), float(rng.uniform(0.0, 15.0)), int(rng.integers(0, 400))) for _ in range(9)]
    streams = []
    for v, plain in enumerate(problem.streams):
        changes: dict[str, Any] = {}
        if has["latency"]:
            inference = tuple(
                msgspec.structs.replace(p, latency_s=float(rng.uniform(0.05, 0.5))) for p in plain.inference
            )
            limit_s = float(rng.uniform(0.02, 0.5)) if rng.random() < 0.8 else None
            changes |= {"inference": inference, "max_latency_s": limit_s}
        if has["windows"] and rng.random() < 0.7:
            changes["window_s"] = float(rng.uniform(20.0, 120.0))
        if has["cloud"] and (equal_transfers or rng.random() < 0.8):
            num_choices = 1 if equal_transfers else int(rng.integers(1, 3))
            cloud = []
            for c in range(num_choices):
                up, wait_s, down = sizes[0] if equal_transfers else sizes[3 * c + v]
                cloud.append(
                    CloudProfile(
                        retrain_id=f"c{c}",
                        link_id="wan",
                        accuracy_after=min(1.0, plain.accuracy_now + float(rng.uniform(-0.05, 0.5))),
                        up_bytes=up,
                        cloud_seconds=wait_s,
                        down_bytes=down,
                        swap_bytes=int(rng.integers(0, 10)),
                        running=not equal_transfers and bool(rng.random() < 0.2),
                    )
                )
            changes["cloud"] = tuple(cloud)
        if has["labels"]:
            changes["retrain"] = tuple(
                msgspec.structs.replace(p, label_seconds=float(rng.choice([0.0, 2.0, 5.0]))) for p in plain.retrain
            )
            changes["cloud"] = tuple(
                msgspec.structs.replace(p, label_seconds=float(rng.choice([0.0, 3.0])))
                for p in changes.get("cloud", ())
            )
        streams.append(msgspec.structs.replace(plain, **changes))
    return msgspec.structs.replace(
        problem,
        streams=tuple(streams),
        links=(LinkSpec(link_id="wan", up_bytes_per_s=10.0, down_bytes_per_s=20.0),) if has["cloud"] else (),
        label_budget_s=float(rng.uniform(0.0, 9.0)) if has["labels"] else None,
    )
