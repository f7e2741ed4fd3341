"""Streams with windows of their own, latency limits and quantiles, from the site file to the planning problem."""

from __future__ import annotations

import math

import msgspec
import pytest

from optimizer.config import SiteConfig
from optimizer.coordinator import Coordinator
from optimizer.ports import Measured, Tick
from optimizer.questions import make_problem
from optimizer.simulator import Simulation
from optimizer.windows import opens, own_left_s
from protocol.events import PlanSolved, RetrainFinished, StreamAccuracy, WindowClosed
from tests.optimizer.coordinator_world import simulation, site


def slow_site(every: int, num_streams: int = 2, **changes: object) -> SiteConfig:
    """The last stream is retrained only in every so many windows."""
    plain = site(num_streams, **changes)
    last = msgspec.structs.replace(plain.streams[-1], retrain_every=every)
    return msgspec.structs.replace(plain, streams=(*plain.streams[:-1], last))


def test_own_windows_begin_with_windows_of_the_site() -> None:
    spec = slow_site(3).streams[-1]
    assert [opens(spec, window) for window in range(7)] == [True, False, False, True, False, False, True]
    assert [own_left_s(spec, window, 40.0, 100.0) for window in range(4)] == [240.0, 140.0, 40.0, 240.0]
    assert own_left_s(spec, -1, 100.0, 100.0) == 300.0
    assert own_left_s(slow_site(3).streams[0], 1, 40.0, 100.0) == 40.0


def test_a_stream_is_profiled_and_retrained_only_in_its_own_windows() -> None:
    run, world, _ = simulation(slow_site(3), num_windows=7)
    run.run(until_s=2000.0)
    assert run.finish is not None
    assert run.finish.exit_code == 0
    assert len([e for e in run.events if isinstance(e, WindowClosed)]) == 7
    trials = {name for name in world.started if name.startswith("trial/s1/w")}
    assert trials == {"trial/s1/w3", "trial/s1/w6"}
    assert {name for name in world.started if name.startswith("trial/s0/w")} == {f"trial/s0/w{k}" for k in range(1, 7)}
    retrained = [e.window for e in run.events if isinstance(e, RetrainFinished) and e.stream_id == "s1"]
    assert set(retrained) <= {0, 3, 6}
    assert retrained


def test_a_plan_looks_to_the_end_of_the_longest_own_window() -> None:
    run, _, _ = simulation(slow_site(3), num_windows=4)
    run.run(until_s=2000.0)
    origin_s = run.coordinator.state.origin_s
    assert origin_s is not None
    for decision in run.decisions:
        if decision.window < 0 or decision.phase == "profiling":
            continue
        problem = decision.problem
        rest = 2 - decision.window % 3
        assert rest * 100.0 < problem.window_s <= (rest + 1) * 100.0
        left = {s.stream_id: s.window_s for s in problem.streams}
        if rest:
            assert left["s0"] == pytest.approx(problem.window_s - rest * 100.0)
        assert left["s1"] is None


def test_a_long_retraining_goes_on_over_the_windows_of_the_site(monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.optimizer import coordinator_world

    costs = {"cheap": 45.0, "dear": 45.0, "bootstrap": 5.0}
    monkeypatch.setattr(coordinator_world, "COSTS", costs)
    monkeypatch.setattr(coordinator_world, "REACHED", {"cheap": 0.75, "dear": 0.9, "bootstrap": 0.3})
    run, world, profiler = simulation(slow_site(3), num_windows=3)
    run.run(until_s=2000.0)
    starts = [name for name in world.started if name.startswith("retrain/s1/")]
    assert len(starts) == 1, starts
    assert starts[0].startswith("retrain/s1/w0/")
    ended = [e for e in run.events if isinstance(e, RetrainFinished) and e.stream_id == "s1"]
    assert [e.promoted for e in ended] == [True]
    assert ended[0].site_s > 100.0
    assert ("s1", True) in profiler.outcomes
    assert run.peak_share <= 1.0 + 1e-9


def test_what_is_predicted_for_a_window_is_about_that_window() -> None:
    run, _, _ = simulation(slow_site(3), num_windows=6)
    run.run(until_s=2000.0)
    for event in run.events:
        if isinstance(event, WindowClosed):
            for stream in event.streams:
                assert stream.realised is not None
                assert stream.predicted is not None
                # The world loses accuracy with every site window, which a model of an open own window cannot know.
                if stream.stream_id == "s0" or event.window % 3 == 0:
                    assert stream.realised > stream.predicted - 0.03


def test_a_window_in_which_nobody_is_profiled_is_planned_at_once() -> None:
    run, world, _ = simulation(slow_site(2, num_streams=1), num_windows=4)
    run.run(until_s=2000.0)
    assert {name for name in world.started if name.startswith("trial/s0/w")} == {"trial/s0/w2"}
    plans = [e for e in run.events if isinstance(e, PlanSolved) and e.window == 1]
    assert plans
    assert plans[0].phase == "plan"


# ---------------------------------------------------------------- latency


def started(limit_s: float | None) -> Simulation:
    plain = site(1)
    config = msgspec.structs.replace(
        plain, streams=(msgspec.structs.replace(plain.streams[0], max_latency_s=limit_s),), planning_quantile=0.2
    )
    run, _, _ = simulation(config, num_windows=2)
    run.run(until_s=30.0)
    assert run.coordinator.state.phase == "executing"
    return run


def report_latency(coordinator: Coordinator, inference_id: str, latency_ms: float, now: float) -> None:
    event = StreamAccuracy(
        site_s=now,
        stream_id="s0",
        window=0,
        accuracy=0.8,
        accuracy_sum=8.0,
        num_scored=10,
        num_frames=10,
        num_analysed=10,
        num_dropped=0,
        num_objects=10,
        fps=10.0,
        latency_ms_p50=latency_ms,
        model_version=1,
        inference_id=inference_id,
    )
    coordinator.handle(Measured(event=event), now)


def test_a_configuration_that_is_measured_to_be_too_slow_is_replaced_at_once() -> None:
    run = started(0.3)
    state = run.coordinator.state.streams["s0"]
    assert state.serving_config is not None
    before = state.serving_config.config_id
    report_latency(run.coordinator, before, 900.0, run.now)
    report_latency(run.coordinator, before, 100.0, run.now)
    assert not state.late  # too few reports
    report_latency(run.coordinator, before, 900.0, run.now)
    assert state.late
    run.give(Tick())
    run.run(until_s=run.now + 1.0)
    asked = run.decisions[-1].problem.streams[0]
    assert asked.max_latency_s == 0.3
    assert {p.inference_id: p.latency_s for p in asked.inference}[before] == pytest.approx(0.9)
    assert state.serving_config is not None
    assert state.serving_config.config_id != before
    questions = len(run.decisions)
    report_latency(run.coordinator, state.serving_config.config_id, 900.0, run.now)
    run.run(until_s=run.now + 1.0)
    assert len(run.decisions) == questions  # told once in a window


def test_an_estimated_latency_is_that_at_the_share_which_would_be_granted() -> None:
    run = started(None)
    state = run.coordinator.state.streams["s0"]
    assert state.profile is not None
    estimates = tuple(msgspec.structs.replace(p, latency_s=0.5) for p in state.profile.inference)
    state.profile = msgspec.structs.replace(state.profile, inference=estimates)
    problem = make_problem(
        run.coordinator.state,
        run.coordinator.site,
        run.coordinator.executors,
        now=run.now,
        left_s=50.0,
        with_retraining=True,
    )
    assert problem is not None
    # 0.05 of a GPU are needed and 0.1 granted; the others get what they need.
    found = {p.inference_id: p.latency_s for p in problem.streams[0].inference}
    assert found == {"full": pytest.approx(0.5), "half": pytest.approx(0.5), "tenth": pytest.approx(0.25)}


def test_without_a_limit_latency_is_known_and_changes_nothing() -> None:
    run = started(None)
    config = run.coordinator.state.streams["s0"].serving_config
    assert config is not None
    questions = len(run.decisions)
    for _ in range(5):
        report_latency(run.coordinator, config.config_id, 5000.0, run.now)
    run.run(until_s=run.now + 2.0)
    assert len(run.decisions) == questions


def test_measurements_of_a_configuration_out_of_use_are_forgotten_with_the_window() -> None:
    run = started(0.3)
    for name in ("full", "half", "tenth"):
        for _ in range(3):
            report_latency(run.coordinator, name, 50.0, run.now)
    run.run(until_s=math.inf)
    assert len(run.coordinator.state.streams["s0"].latencies) == 1


def test_the_sites_quantile_is_that_of_its_problems() -> None:
    assert all(decision.problem.planning_quantile == 0.2 for decision in started(None).decisions)
