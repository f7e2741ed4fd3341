"""Plans of the time-indexed planner: feasible by the judge, below their bound, and safe in any order of events."""

from __future__ import annotations

import math

import msgspec
import numpy as np
import pytest

from optimizer.execution import capacity_quanta, quanta_of, retrain_seconds
from optimizer.objective import judge
from optimizer.policies.registry import get_policy
from optimizer.policies.timeline import timeline
from optimizer.problems import random_problem
from protocol.errors import PlanError
from protocol.plan import InferenceProfile, Plan, Problem, RetrainProfile, StreamProfile
from protocol.schema import GpuSpec


def mixed_problem(seed: int) -> Problem:
    """4 to 9 streams on 2 to 4 GPUs; speeds, memory, floors, weights, prices of changes and running jobs vary."""
    rng = np.random.default_rng(1000 + seed)
    num_streams, num_gpus = int(rng.integers(4, 10)), int(rng.integers(2, 5))
    limited, priced, running = (bool(rng.random() < p) for p in (0.5, 0.5, 0.4))
    gpus = tuple(
        GpuSpec(
            gpu_id=f"g{g}",
            speed=float(rng.choice([1.0, 0.5, 2.0])),
            memory_bytes=int(rng.integers(14, 30)) if limited else 0,
            reserved_share=float(rng.choice([0.0, 0.0, 0.1])),
            share_efficiency=((0.3, 0.45), (0.6, 0.75)) if rng.random() < 0.5 else (),
        )
        for g in range(num_gpus)
    )
    streams = []
    for v in range(num_streams):
        now = float(rng.uniform(0.3, 0.75))
        inference = tuple(
            InferenceProfile(inference_id=f"i{i}", gpu_share_needed=0.3 / (i + 1), relative_accuracy=1.0 - 0.15 * i)
            if not limited
            else InferenceProfile(
                inference_id=f"i{i}",
                gpu_share_needed=0.3 / (i + 1),
                relative_accuracy=1.0 - 0.15 * i,
                memory_bytes=4 - i,
            )
            for i in range(3)
        )
        retrain = tuple(
            RetrainProfile(
                retrain_id=f"r{k}",
                accuracy_after=min(1.0, now + float(rng.uniform(0.0, 0.4))),
                gpu_seconds=float(rng.uniform(3.0, 60.0)),
                memory_bytes=int(rng.integers(1, 6)),
                swap_bytes=int(rng.integers(0, 3)),
                accuracy_error=0.05,
                pinned_gpu=f"g{v % num_gpus}" if running and v < 2 and k == 0 else None,
            )
            for k in range(3)
        )
        streams.append(
            StreamProfile(
                stream_id=f"s{v}",
                accuracy_now=now,
                inference=inference,
                retrain=retrain,
                min_accuracy=float(rng.choice([0.0, 0.2, 0.3])),
                weight=float(rng.choice([1.0, 1.0, 3.0])),
                serving_gpu=f"g{int(rng.integers(num_gpus))}" if priced else None,
                serving_inference="i1" if priced else None,
            )
        )
    return Problem(
        window_s=100.0,
        gpus=gpus,
        streams=tuple(streams),
        num_slots=10,
        config_change_s=0.5 if priced else 0.0,
        migration_s=1.5 if priced else 0.0,
    )


def peaks_under(problem: Problem, plan: Plan, factors: dict[str, float]) -> dict[str, tuple[int, int]]:
    """Most quanta and bytes held on each GPU when every retraining takes ``factors`` times its predicted time.

    An executor in miniature: it knows events only. At an event whatever is due starts, and what a stream
    or a retraining held before is released at that instant.
    """
    gpus = {gpu.gpu_id: gpu for gpu in problem.gpus}
    streams = {stream.stream_id: stream for stream in problem.streams}
    ended: set[str] = set()
    running: dict[str, float] = {}
    at_step = dict.fromkeys(streams, -1)
    started: set[str] = set()
    now = 0.0
    peak = dict.fromkeys(gpus, (0, 0))
    while True:
        for assignment in plan.assignments:
            name = assignment.stream_id
            while at_step[name] + 1 < len(assignment.inference):
                if not set(assignment.inference[at_step[name] + 1].after) <= ended:
                    break
                at_step[name] += 1
            step = assignment.retrain
            if step is not None and name not in started and set(step.after) <= ended:
                started.add(name)
                profile = next(p for p in streams[name].retrain if p.retrain_id == step.retrain_id)
                running[name] = now + factors[name] * retrain_seconds(profile, gpus[step.gpu_id], step.share)
        held = {gpu_id: [0, 0] for gpu_id in gpus}
        for assignment in plan.assignments:
            name = assignment.stream_id
            serving = assignment.inference[at_step[name]]
            inference = next(p for p in streams[name].inference if p.inference_id == serving.inference_id)
            quanta = quanta_of(serving.share, problem.share_quantum)
            assert quanta is not None
            held[serving.gpu_id][0] += quanta
            held[serving.gpu_id][1] += inference.memory_bytes
            if assignment.retrain is not None:
                step = assignment.retrain
                profile = next(p for p in streams[name].retrain if p.retrain_id == step.retrain_id)
                if name not in ended:
                    held[serving.gpu_id][1] += profile.swap_bytes
                if name in running:
                    granted = quanta_of(step.share, problem.share_quantum)
                    assert granted is not None
                    held[step.gpu_id][0] += granted
                    held[step.gpu_id][1] += profile.memory_bytes
        for gpu_id, (quanta, num_bytes) in held.items():
            peak[gpu_id] = (max(peak[gpu_id][0], quanta), max(peak[gpu_id][1], num_bytes))
        if not running:
            return peak
        now = min(running.values())
        for name in [name for name, end_s in running.items() if end_s <= now]:
            del running[name]
            ended.add(name)


def assert_never_oversubscribed(problem: Problem, plan: Plan, seed: int) -> None:
    rng = np.random.default_rng(seed)
    for spread in (0.0, 0.3, 0.3, 0.3, 0.9, 0.9):
        factors = {s.stream_id: float(rng.uniform(1.0 - spread, 1.0 + spread)) for s in problem.streams}
        for gpu in problem.gpus:
            quanta, num_bytes = peaks_under(problem, plan, factors)[gpu.gpu_id]
            assert quanta <= capacity_quanta(gpu, problem.share_quantum)
            assert not gpu.memory_bytes or num_bytes <= gpu.memory_bytes


@pytest.mark.parametrize("seed", range(10))
def test_every_plan_is_feasible_below_its_bound_and_safe_in_any_order_of_events(seed: int) -> None:
    problem = mixed_problem(seed)
    plan = timeline(problem, 0.4, seed=seed)
    verdict = judge(problem, plan)
    assert verdict.only_floors_broken, verdict.violations
    assert plan.report.value == verdict.value
    assert plan.report.bound is not None
    assert verdict.value <= plan.report.bound + 1e-9
    assert_never_oversubscribed(problem, plan, seed)


def other_plans(problem: Problem) -> list[Plan]:
    """Plans of all other policies; a policy that has none in time adds nothing."""
    plans = []
    for name in ("thief", "uniform", "fair", "none", "milp", "uniform:high:0.5"):
        try:
            plans.append(get_policy(name)(problem, 0.5))
        except PlanError:
            continue
    return plans


@pytest.mark.parametrize("seed", range(10))
def test_the_bound_is_never_below_a_feasible_plan_of_another_policy(seed: int) -> None:
    problem = mixed_problem(seed) if seed % 2 else random_problem(5 + seed % 4, 2 + seed % 3, 6, seed)
    bound = timeline(problem, 0.3).report.bound
    assert bound is not None
    plans = other_plans(problem)
    assert plans
    for plan in plans:
        verdict = judge(problem, plan)
        if verdict.feasible:
            assert verdict.value <= bound + 1e-9, plan.report.policy


@pytest.mark.parametrize("seed", range(3))
def test_plans_are_at_least_as_good_as_those_of_the_thief(seed: int) -> None:
    problem = random_problem(8, 4, 12, seed)
    plan = timeline(problem, 1.0)
    other = judge(problem, get_policy("thief")(problem, 1.0))
    assert judge(problem, plan).value >= other.value


@pytest.mark.parametrize("seed", range(2))
def test_large_problems_are_placed_with_a_proven_gap_and_safe_events(seed: int) -> None:
    problem = msgspec.structs.replace(random_problem(160, 16, 6, seed), share_quantum=0.05)
    plan = timeline(problem, 2.0, target_gap=0.02)
    assert judge(problem, plan).feasible
    assert plan.report.gap is not None
    assert plan.report.gap < 0.05
    assert_never_oversubscribed(problem, plan, seed)


def test_a_stream_that_is_served_well_stays_where_it_is_when_moving_has_a_price() -> None:
    base = random_problem(3, 3, 1, 5)
    streams = tuple(
        msgspec.structs.replace(s, serving_gpu=f"gpu{2 - i}", serving_inference="every1", retrain=())
        for i, s in enumerate(base.streams)
    )
    problem = msgspec.structs.replace(base, streams=streams, migration_s=5.0, config_change_s=2.0)
    plan = timeline(problem, 1.0)
    assert [a.inference[0].gpu_id for a in plan.assignments] == ["gpu2", "gpu1", "gpu0"]
    assert [len(a.inference) for a in plan.assignments] == [1, 1, 1]
    assert plan.report.status == "optimal"


def test_a_running_retraining_goes_on_where_it_runs() -> None:
    base = random_problem(4, 2, 6, 2)
    first = base.streams[0]
    running = RetrainProfile(retrain_id="rest", accuracy_after=1.0, gpu_seconds=5.0, pinned_gpu="gpu1")
    streams = (msgspec.structs.replace(first, retrain=(*first.retrain, running)), *base.streams[1:])
    problem = msgspec.structs.replace(base, streams=streams)
    step = timeline(problem, 2.0).assignments[0].retrain
    assert step is not None
    assert (step.retrain_id, step.gpu_id, step.after) == ("rest", "gpu1", ())


def test_floors_that_cannot_all_be_kept_are_broken_for_as_few_streams_as_first_fit_manages() -> None:
    stream = StreamProfile(
        stream_id="s",
        accuracy_now=0.8,
        inference=(
            InferenceProfile(inference_id="full", gpu_share_needed=0.5, relative_accuracy=1.0),
            InferenceProfile(inference_id="thin", gpu_share_needed=0.1, relative_accuracy=0.5),
        ),
        min_accuracy=0.7,
    )
    streams = tuple(msgspec.structs.replace(stream, stream_id=f"s{i}") for i in range(4))
    problem = Problem(window_s=60.0, gpus=(GpuSpec(gpu_id="g"),), streams=streams)
    plan = timeline(problem, 1.0)
    verdict = judge(problem, plan)
    assert verdict.only_floors_broken
    assert len(verdict.violations) == 3
    assert "floor" in plan.report.detail
    assert plan.report.bound is not None
    assert plan.report.bound >= verdict.value


def test_more_streams_than_the_gpus_can_serve_get_a_fallback_that_says_so() -> None:
    problem = random_problem(30, 1, 3, 0)
    plan = timeline(problem, 1.0)
    assert plan.report.status == "fallback"
    assert "does not fit" in plan.report.detail
    assert [a.stream_id for a in plan.assignments] == [s.stream_id for s in problem.streams]


def test_a_budget_of_nothing_still_gives_a_feasible_plan() -> None:
    problem = random_problem(10, 8, 18, 1)
    plan = timeline(problem, 0.0)
    assert judge(problem, plan).feasible
    assert plan.report.bound is not None
    assert math.isfinite(plan.report.bound)
