"""What serving was seen to need corrects what profiling measured."""

from __future__ import annotations

import msgspec
import pytest

from optimizer import demands
from optimizer.ports import Measured, Received
from optimizer.state import StreamState
from protocol import messages as m
from protocol.events import PlanSolved, StreamAccuracy
from protocol.plan import InferenceProfile, StreamProfile
from tests.optimizer.coordinator_world import simulation, site


def report(num_dropped: int = 0, inference_id: str = "every1", num_frames: int = 20) -> StreamAccuracy:
    return StreamAccuracy(
        time_s=0.0,
        site_s=0.0,
        stream_id="s0",
        window=0,
        accuracy=0.8,
        accuracy_sum=0.8 * num_frames,
        num_scored=num_frames,
        num_frames=num_frames,
        num_analysed=num_frames - num_dropped,
        num_dropped=num_dropped,
        num_objects=50,
        fps=float(num_frames - num_dropped),
        latency_ms_p50=0.0,
        model_version=1,
        inference_id=inference_id,
    )


def worker(granted: float, achieved: float | None) -> m.WorkerStatus:
    return m.WorkerStatus(
        job_id="serve/s0",
        kind="inference",
        stream_id="s0",
        pid=1,
        state="ready",
        share_granted=granted,
        share_achieved=achieved,
        progress=1,
    )


def stream(needed: float = 0.2) -> StreamState:
    profile = StreamProfile(
        stream_id="s0",
        accuracy_now=0.8,
        inference=(InferenceProfile(inference_id="every1", gpu_share_needed=needed, relative_accuracy=1.0),),
    )
    return StreamState(stream_id="s0", profile=profile)


def tell(
    state: StreamState, times: int, event: StreamAccuracy, status: m.WorkerStatus | None, speed: float = 1.0
) -> None:
    for _ in range(times):
        demands.remember(state, event, status, speed)


def test_a_stream_that_keeps_up_needs_what_it_uses() -> None:
    state = stream(needed=0.2)
    tell(state, 20, report(), worker(0.3, 0.25))
    assert demands.besides(state, "every1") == pytest.approx(0.05)
    assert not demands.newly_short(state)


def test_a_stream_that_drops_frames_needs_more_by_the_part_that_it_drops() -> None:
    state = stream(needed=0.2)
    tell(state, 20, report(num_dropped=5), worker(0.2, 0.2))
    assert demands.besides(state, "every1") == pytest.approx(0.2 * 20 / 15 - 0.2)
    assert demands.newly_short(state)
    assert not demands.newly_short(state)  # said once


def test_a_configuration_that_was_never_served_is_reckoned_to_need_as_much_besides_as_the_one_that_is() -> None:
    state = stream(needed=0.2)
    tell(state, 20, report(), worker(0.3, 0.25))
    assert demands.besides(state, "every5") == pytest.approx(0.05)


def two_configurations(full: float, fifth: float) -> StreamState:
    state = stream(needed=full)
    assert state.profile is not None
    fifth_of = InferenceProfile(inference_id="every5", gpu_share_needed=fifth, relative_accuracy=0.8)
    return msgspec.structs.replace(
        state, profile=msgspec.structs.replace(state.profile, inference=(*state.profile.inference, fifth_of))
    )


def test_it_is_reckoned_to_need_as_much_more_in_proportion_as_it_does_for_other_streams() -> None:
    first, second = two_configurations(0.2, 0.05), two_configurations(0.1, 0.02)
    tell(first, 20, report(inference_id="every5"), worker(0.2, 0.11))
    tell(second, 20, report(), worker(0.2, 0.11))
    others = demands.of_site([first, second])
    assert demands.besides(second, "every5") == pytest.approx(0.01)  # nobody else is asked: as what it is served with
    assert demands.besides(second, "every5", others) == pytest.approx(0.02 * 0.06 / 0.05)
    # What it is served with is known from itself.
    tell(first, 20, report(), worker(0.4, 0.4))
    assert demands.besides(second, "every1", demands.of_site([first, second])) == pytest.approx(0.01)
    demands.plan_with([first, second])
    assert second.demand_planned["every5"] == pytest.approx(0.024)


def test_short_visits_to_a_configuration_add_up_over_windows() -> None:
    state = two_configurations(0.2, 0.05)
    for _ in range(3):
        tell(state, 6, report(inference_id="every5"), worker(0.2, 0.11))
        tell(state, 6, report(), worker(0.2, 0.2))
        demands.forget_old(state)
    assert demands.besides(state, "every5") == pytest.approx(0.06)


def test_the_speed_of_the_gpu_counts() -> None:
    state = stream(needed=0.2)
    tell(state, 20, report(), worker(0.3, 0.15), speed=2.0)
    assert demands.besides(state, "every1") == pytest.approx(0.1)


def test_a_quiet_time_does_not_take_the_head_room_for_bursts_away() -> None:
    state = stream(needed=0.2)
    tell(state, 20, report(), worker(0.3, 0.1))
    assert demands.besides(state, "every1") == 0.0


def test_no_report_is_taken_at_its_word_beyond_the_profile_again() -> None:
    state = stream(needed=0.2)
    tell(state, 20, report(num_dropped=19), worker(0.3, 0.3))
    assert demands.besides(state, "every1") == pytest.approx(0.2)


def test_the_first_reports_after_a_change_say_nothing() -> None:
    state = stream()
    tell(state, 2, report(num_dropped=10), worker(0.2, 0.2))
    tell(state, 1, report(inference_id="every5"), worker(0.2, 0.1))
    tell(state, 2, report(num_dropped=10), worker(0.2, 0.2))
    tell(state, 2, report(num_dropped=10), None)  # it moves
    tell(state, 2, report(num_dropped=10), worker(0.2, 0.2))
    assert state.demands == {}


def test_an_executor_that_cannot_say_what_is_used_is_believed_only_when_frames_are_dropped() -> None:
    state = stream(needed=0.2)
    tell(state, 20, report(), worker(0.3, None))
    assert state.demands == {}
    tell(state, 20, report(num_dropped=4), worker(0.2, None))
    assert demands.besides(state, "every1") == pytest.approx(0.05)


def test_a_stream_that_drops_frames_is_planned_anew_with_the_share_it_needs() -> None:
    run, _, _ = simulation(site(num_streams=1, retrain=()), num_windows=None)
    run.run(until_s=170.0)
    state = run.coordinator.state.streams["s0"]
    assert state.serving_config is not None
    assert run.coordinator.state.phase == "executing"
    before = state.serving_share
    status = worker(before, before)
    held = run.executors[state.serving_executor].held
    beat = m.Heartbeat(executor_id=state.serving_executor, incarnation="1", loop_count=1, held=held, workers=(status,))
    event = report(num_dropped=6, inference_id=state.serving_config.config_id)
    for _ in range(12):
        run.give(Received(executor_id=state.serving_executor, message=beat))
        run.give(Measured(event=event))
    run.run(until_s=run.now + 2.0)
    replans = [e.reason for e in run.events if isinstance(e, PlanSolved) and "drops frames" in e.reason]
    assert len(replans) == 1
    planned = state.demand_planned[event.inference_id]
    assert planned > 0.02
    assert f"needs {planned:.0%} of a GPU more" in replans[0]
    assert state.serving_share > before
