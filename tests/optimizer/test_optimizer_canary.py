"""Retrained models in the coordinator, in virtual time: on trial, live, kept, rolled back, after a restart."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import pytest

from optimizer.config import GateConfig
from optimizer.ports import Received
from optimizer.simulator import SimulatedExecutor
from optimizer.state import SiteState
from protocol import messages as m
from protocol.events import GateDecided, Notice, RetrainFinished
from tests.optimizer.coordinator_world import TestWorld, simulation, site

ONE = site(num_streams=1, gate=GateConfig(canary_s=40.0))


def decisions(events: Sequence[object]) -> list[tuple[str, str]]:
    return [(e.stage, e.decision) for e in events if isinstance(e, GateDecided)]


def serving_version(executor: SimulatedExecutor) -> int:
    return executor.serving["serve/s0"].checkpoint.version


def test_a_model_that_is_better_goes_live_and_is_kept_after_its_canary() -> None:
    run, world, profiler = simulation(ONE, num_windows=2)
    run.run(until_s=1000.0)
    found = decisions(run.events)
    assert found[:2] == [("gate", "promoted"), ("canary", "kept")]
    assert [(d.stage, d.decision) for d in profiler.gates] == found
    kept = next(e for e in run.events if isinstance(e, GateDecided) and e.stage == "canary")
    assert kept.confidence is not None
    assert kept.confidence > 0.95
    assert kept.paired.num_won > 0
    assert any("canary/s0/v2/canary" in job_id for job_id in world.started)
    assert run.peak_share <= 1.0 + 1e-9


def test_a_model_that_only_looked_better_is_rolled_back_by_itself_and_not_tried_again_at_once() -> None:
    run, world, _ = simulation(ONE, num_windows=4)
    world.fooled = {"s0": 1.0}
    run.run(until_s=2000.0)
    live = 0.0
    versions: list[int] = []
    for event in run.events:
        if isinstance(event, GateDecided) and event.stage == "canary":
            assert event.decision == "rolled_back"
            assert event.seconds <= ONE.gate.canary_s
            live = max(live, event.seconds)
            versions.append(event.version)
    assert versions
    assert live > 0.0
    state = run.coordinator.state.streams["s0"]
    assert state.checkpoint is not None
    assert state.checkpoint.version == 1
    assert any(isinstance(e, Notice) and "rolled back" in e.text for e in run.events)
    tried = [(e.window, e.retrain_id) for e in run.events if isinstance(e, RetrainFinished)]
    for window, name in tried:
        later = [w for w, n in tried if n == name and w > window]
        assert not later or min(later) > window + ONE.gate.penalty_windows


def test_a_stream_serves_exactly_one_model_all_the_time() -> None:
    run, world, _ = simulation(ONE, num_windows=3)
    world.fooled = {"s0": 0.6}
    began = False
    seen: list[int] = []
    while run.finish is None:
        run.run(until_s=run.now + 0.5)
        served = [e.serving["serve/s0"].checkpoint.version for e in run.executors.values() if "serve/s0" in e.serving]
        began = began or bool(served)
        assert not began or len(served) == 1 or run.finish is not None
        seen += served
    assert {1, 2} <= set(seen)
    assert seen[-1] == 1


def test_a_model_in_doubt_is_watched_in_the_shadow_first() -> None:
    doubtful = site(num_streams=1, gate=GateConfig(canary_s=40.0, confidence=0.999999999))
    world = TestWorld()
    run, _, _ = simulation(doubtful, num_windows=2, world=world)
    world.hide = 0.85  # held-out labels show a seventh of the gain only
    run.run(until_s=1000.0)
    found = decisions(run.events)
    assert found[0] == ("gate", "on_trial")
    assert ("shadow", "promoted") in found
    assert ("canary", "kept") in found
    assert any("canary/s0/v2/shadow" in job_id for job_id in world.started)


def test_a_model_on_trial_gives_way_to_a_newer_one_and_does_not_go_live_unwatched() -> None:
    unwatched = GateConfig(canary_s=1000.0, confidence=0.999999999, step_s=1e6)
    run, world, _ = simulation(site(num_streams=1, gate=unwatched), num_windows=3)
    world.hide = 0.85  # held-out labels show a seventh of the gain only
    run.run(until_s=1000.0)
    found = [(e.stage, e.decision, e.version) for e in run.events if isinstance(e, GateDecided)]
    assert found[:3] == [("gate", "on_trial", 2), ("shadow", "refused", 2), ("gate", "on_trial", 3)]
    superseded = next(e for e in run.events if isinstance(e, GateDecided) and e.stage == "shadow")
    assert superseded.reason == "there is a newer model"
    assert run.coordinator.state.streams["s0"].penalties == {}


def test_a_model_that_was_compared_with_one_rolled_back_since_is_compared_with_the_one_that_serves() -> None:
    patient = GateConfig(canary_s=1000.0, alarm=1e-300)
    run, world, _ = simulation(site(num_streams=1, gate=patient), num_windows=None)
    world.fooled = {"s0": 1.0}
    while ("canary", "rolled_back") not in decisions(run.events):
        run.run(until_s=run.now + 0.5)
    second = [e for e in run.events if isinstance(e, GateDecided)][-1]
    assert (second.stage, second.decision) == ("gate", "on_trial")
    assert second.previous_version == 1
    canary = run.coordinator.state.streams["s0"].canary
    assert canary is not None
    assert canary.held_out.num_objects == 0
    assert canary.previous.version == 1


@pytest.mark.parametrize("fooled", [0.0, 0.6])
def test_a_restarted_optimizer_resumes_the_canary_and_ends_it(fooled: float) -> None:
    run, world, _ = simulation(ONE, num_windows=None)
    world.fooled = {"s0": fooled}
    while run.coordinator.state.streams["s0"].canary is None:
        run.run(until_s=run.now + 0.5)
    run.run(until_s=run.now + 3.0)
    assert run.coordinator.state.streams["s0"].canary is not None
    old = msgspec.msgpack.decode(msgspec.msgpack.encode(run.coordinator.state), type=SiteState)
    executor = run.executors["gpu0"]
    old.term += 1
    again, _, _ = simulation(ONE, num_windows=None, state=old, world=world, adopt_until_s=run.now + 6.0, join=False)
    again.now = again._measured_s = run.now
    again.join(executor)
    ended: list[GateDecided] = []
    while not ended:
        again.run(until_s=again.now + 1.0)
        ended = [e for e in again.events if isinstance(e, GateDecided) and e.stage == "canary"]
    assert ended[0].decision == ("rolled_back" if fooled else "kept")
    assert ended[0].version == 2
    assert serving_version(executor) == (1 if fooled else 2)
    assert len(world.started) == len(set(world.started))


def test_a_lost_executor_takes_no_canary_with_it() -> None:
    run, world, _ = simulation(ONE, num_gpus=2, num_windows=None)
    while run.coordinator.state.streams["s0"].canary is None:
        run.run(until_s=run.now + 0.5)
    run.run(until_s=run.now + 5.2)
    run.leave(run.coordinator.state.streams["s0"].serving_executor)
    run.run(until_s=run.now + 60.0)
    assert ("canary", "kept") in decisions(run.events)
    assert len(world.started) >= 2


def test_a_model_that_the_worker_does_not_take_over_is_rolled_back() -> None:
    run, _, _ = simulation(ONE, num_windows=None)
    while run.coordinator.state.streams["s0"].canary is None:
        run.run(until_s=run.now + 0.5)
        executor = run.executors["gpu0"]
        stubborn = tuple(
            m.WorkerStatus(
                job_id="serve/s0",
                kind="inference",
                stream_id="s0",
                pid=1,
                state="ready",
                share_granted=0.5,
                share_achieved=0.5,
                progress=1,
                model_version=1,
            )
            for _ in executor.serving
        )
        beat = m.Heartbeat(executor_id="gpu0", incarnation="1", loop_count=1, held=executor.held, workers=stubborn)
        run.give(Received(executor_id="gpu0", message=beat))
    run.run(until_s=run.now + 30.0)
    last = [e for e in run.events if isinstance(e, GateDecided)][-1]
    assert last.decision == "rolled_back"
    assert "take it over" in last.reason
    assert serving_version(run.executors["gpu0"]) == 1


def test_a_configuration_whose_retraining_failed_is_not_tried_in_the_next_windows() -> None:
    run, _, _ = simulation(ONE, num_windows=None)
    while not run.coordinator.state.streams["s0"].running:
        run.run(until_s=run.now + 0.5)
    running = run.coordinator.state.streams["s0"].running
    assert running is not None
    failure = m.JobFailed(
        event_id=900,
        executor_id="gpu0",
        job_id=running.job.job_id,
        stream_id="s0",
        kind="retrain",
        reason="diverged: loss nan",
    )
    window = run.coordinator.state.window
    run.give(Received(executor_id="gpu0", message=failure))
    end = run.coordinator.window_end_s() + 250.0
    run.run(until_s=end)
    tried = [e for e in run.events if isinstance(e, RetrainFinished) and e.retrain_id == running.retrain_id]
    assert all(e.window > window + ONE.gate.penalty_windows for e in tried)
    assert [e for e in run.events if isinstance(e, RetrainFinished)], "another configuration was to be tried"


def test_without_room_for_a_comparison_the_streams_are_served_all_the_same() -> None:
    config = site(num_streams=2, gate=GateConfig(canary_s=40.0, share=0.9))
    run, _, _ = simulation(config, num_windows=3)
    run.run(until_s=1500.0)
    assert run.finish is not None
    assert not [e for e in run.events if isinstance(e, Notice) and "overloaded" in e.text]
    assert run.peak_share <= 1.0 + 1e-9
