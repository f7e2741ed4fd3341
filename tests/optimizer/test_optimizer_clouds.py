"""Retraining in the cloud: transfers step by step, the coordinator with links in virtual time, and studies."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from optimizer.clouds import advance, arrived, first_arrival_s, what_is_left
from optimizer.coordinator import Coordinator
from optimizer.execution import transfer_times
from optimizer.policies.registry import get_policy
from optimizer.simulator import SimulatedCloud, SimulatedExecutor, Simulation
from optimizer.state import SiteState, Transfer
from optimizer.trace_study import make_study
from optimizer.trace_world import StudyKnobs
from protocol.errors import InputError
from protocol.events import PlanSolved, RetrainFinished, WindowClosed
from protocol.messages import RetrainJob
from protocol.plan import CloudProfile, Plan, Problem, StreamProfile
from protocol.schema import CitySource, DatasetRef, GpuSpec, LinkSpec, RetrainConfig, StreamSpec, TrialResult
from tests.optimizer.coordinator_world import RETRAIN, TestProfiler, TestWorld, site
from tests.optimizer.tiny_trace import row, write_trace

LINK = LinkSpec(link_id="wan", up_bytes_per_s=10.0, down_bytes_per_s=20.0)


def transfer(profile: CloudProfile, turn: int) -> Transfer:
    spec = StreamSpec(stream_id=f"s{turn}", source=CitySource(seed=0), classes=("car", "bus"))
    dataset = DatasetRef(path="d", stream_id="s", window=0, num_train=1, num_validation=1, class_counts=(1, 1))
    job = RetrainJob(
        job_id=f"j{turn}",
        stream=spec,
        share=1.0,
        window=0,
        dataset=dataset,
        checkpoint=None,
        config=RetrainConfig(config_id="c", epochs=1),
        next_version=1,
    )
    return Transfer(
        job=job,
        retrain_id="c",
        link_id="wan",
        turn=turn,
        up_bytes=float(profile.up_bytes),
        cloud_s=profile.cloud_seconds,
        down_bytes=float(profile.down_bytes),
        accuracy_predicted=0.5,
    )


def drawn(seed: int) -> list[CloudProfile]:
    rng = np.random.default_rng(seed)
    return [
        CloudProfile(
            retrain_id="c",
            link_id="wan",
            accuracy_after=0.5,
            up_bytes=int(rng.integers(-40, 200).clip(0)),
            cloud_seconds=max(0.0, float(rng.uniform(-5.0, 15.0))),
            down_bytes=int(rng.integers(-40, 400).clip(0)),
        )
        for _ in range(int(rng.integers(1, 6)))
    ]


@pytest.mark.parametrize("seed", range(40))
def test_transfers_arrive_step_by_step_when_the_rule_says(seed: int) -> None:
    profiles = drawn(seed)
    queue = [transfer(profile, turn) for turn, profile in enumerate(profiles)]
    expected = [end for _, end in transfer_times(LINK, profiles)]
    rng = np.random.default_rng(seed + 1000)
    seen: dict[int, float] = dict.fromkeys(range(len(arrived(queue))), 0.0)
    now = 0.0
    while len(seen) < len(queue):
        ahead_s = first_arrival_s(queue, LINK)
        assert now + ahead_s == pytest.approx(expected[len(arrived(queue))], abs=1e-6), seed
        step_s = min(float(rng.uniform(0.01, 5.0)), max(ahead_s, 1e-9))
        advance(queue, LINK, step_s)
        now += step_s
        # What is left of each, asked anew, arrives when it was to arrive.
        left = [what_is_left(p, one) for p, one in zip(profiles, queue, strict=True)]
        ends = [end for _, end in transfer_times(LINK, left)]
        for i in range(len(queue)):
            if i < len(arrived(queue)):
                seen.setdefault(i, now)
            else:
                assert now + ends[i] == pytest.approx(expected[i], abs=0.2), seed  # bytes are whole
    assert all(when == pytest.approx(expected[i], abs=5.0) for i, when in seen.items())
    assert all(when >= expected[i] - 1e-6 for i, when in seen.items())


class CloudProfiler(TestProfiler):
    """Every stream may also be retrained in the cloud, as well as at its best."""

    __test__ = False

    def estimate(self, spec: StreamSpec, trial: TrialResult, dataset: DatasetRef) -> StreamProfile:
        plain = super().estimate(spec, trial, dataset)
        cloud = CloudProfile(
            retrain_id="cloud.dear",
            link_id="wan",
            accuracy_after=0.9,
            up_bytes=100,
            cloud_seconds=5.0,
            down_bytes=100,
            config=RETRAIN[1],
        )
        return msgspec.structs.replace(plain, cloud=(cloud,))


def run_with_cloud(num_streams: int, policy: str, links: tuple[LinkSpec, ...] = (LINK,), **changes: Any) -> Simulation:
    world = TestWorld()

    def solve(problem: Problem, last: Plan | None) -> Plan:
        return get_policy(policy)(problem, 2.0)

    coordinator = Coordinator(site(num_streams, **changes), CloudProfiler(), SiteState(site="t"), 3, links=links)
    run = Simulation(coordinator, [], world, solve, cloud=SimulatedCloud(links, world))
    run.join(SimulatedExecutor(GpuSpec(gpu_id="gpu0"), world))
    run.run(until_s=1000.0)
    assert run.finish is not None
    assert run.finish.exit_code == 0
    return run


@pytest.mark.parametrize("policy", ["milp", "thief", "timeline"])
def test_a_plan_with_the_cloud_is_carried_out_and_keeps_its_promise(policy: str) -> None:
    run = run_with_cloud(3, policy)
    ended = [e for e in run.events if isinstance(e, RetrainFinished)]
    in_cloud = {
        (event.window, stream.stream_id)
        for event in run.events
        if isinstance(event, PlanSolved)
        for stream in event.streams
        if stream.retrain_id == "cloud.dear"
    }
    assert in_cloud
    assert any(e.promoted and (e.window, e.stream_id) in in_cloud for e in ended)
    for event in run.events:
        if isinstance(event, WindowClosed):
            assert event.predicted is not None
            # A new plan of the thief may be worse than what was left of the old one.
            assert event.realised > event.predicted - (0.1 if policy == "thief" else 0.03)
    assert run.peak_share <= 1.0 + 1e-9


def test_a_transfer_that_has_begun_goes_on_through_new_plans() -> None:
    run = run_with_cloud(3, "milp")
    problems = [d.problem for d in run.decisions]
    running = [
        (one.up_bytes, one.cloud_seconds, one.down_bytes)
        for problem in problems
        for stream in problem.streams
        for one in stream.cloud
        if one.running
    ]
    assert running
    assert all(up < 100 for up, _, _ in running)
    versions = [e.window for e in run.events if isinstance(e, RetrainFinished)]
    assert len(versions) <= 9  # nobody is retrained twice in a window


def test_without_links_nothing_goes_to_the_cloud() -> None:
    run = run_with_cloud(2, "milp", links=())
    assert all(not stream.cloud for d in run.decisions for stream in d.problem.streams)
    assert all(d.problem.links == () for d in run.decisions)


def test_what_the_window_ends_is_given_up() -> None:
    slow = LinkSpec(link_id="wan", up_bytes_per_s=1.2, down_bytes_per_s=20.0)
    run = run_with_cloud(2, "milp", links=(slow,), window_s=80.0)
    assert run.finish is not None
    assert math.isfinite(run.now)


def test_a_study_with_a_link_is_at_least_as_good_as_without(tmp_path: Path) -> None:
    rows = [row(city=city, window=w, gpu_s=900.0) for city, w in itertools.product(("a", "b"), (1, 2))]
    trace = write_trace(tmp_path / "trace.csv", rows)
    knobs = StudyKnobs(num_windows=2)
    without = make_study(trace, None, knobs, 2.0).row("milp", 2, 1, 0)
    with_it = make_study(trace, None, msgspec.structs.replace(knobs, link="cloud:cellular"), 2.0).row("milp", 2, 1, 0)
    assert with_it.accuracy > without.accuracy + 0.01
    assert with_it.promoted > without.promoted
    with pytest.raises(InputError, match="--link"):
        make_study(trace, None, msgspec.structs.replace(knobs, link="cloud:pigeon"), 2.0)
    with pytest.raises(InputError, match="--planning-quantile"):
        make_study(trace, None, msgspec.structs.replace(knobs, planning_quantile=0.9), 2.0)
