"""The coordinator in virtual time: windows, plans, retrainings, losses and restarts."""

from __future__ import annotations

import msgspec
import pytest

from optimizer import questions
from optimizer.config import ProfilingConfig
from optimizer.ports import Received, Tick
from optimizer.simulator import SimulatedExecutor
from optimizer.state import Leaving, SiteState
from protocol import messages as m
from protocol.events import ExecutorChanged, Notice, PlanSolved, RetrainFinished, WindowClosed
from protocol.schema import GpuSpec
from tests.optimizer.coordinator_world import TestWorld, simulation, site


def test_a_site_bootstraps_serves_retrains_and_finishes() -> None:
    run, _, profiler = simulation(site(), num_windows=3)
    run.run(until_s=1000.0)
    assert run.finish is not None
    assert run.finish.exit_code == 0
    closed = [e for e in run.events if isinstance(e, WindowClosed)]
    assert [e.window for e in closed] == [0, 1, 2]
    assert len(profiler.windows) == 6
    assert any(promoted for _, promoted in profiler.outcomes)
    assert run.peak_share <= 1.0 + 1e-9


def test_the_realised_accuracy_is_what_the_plan_promised_when_estimates_are_exact() -> None:
    run, _, _ = simulation(site(), num_windows=3)
    run.run(until_s=1000.0)
    for event in run.events:
        if isinstance(event, WindowClosed):
            for stream in event.streams:
                assert stream.realised is not None
                assert stream.predicted is not None
                # Re-planning when a retraining ends may only add to what was promised.
                assert stream.realised > stream.predicted - 0.03


def test_a_model_that_is_not_better_never_goes_live() -> None:
    run, world, profiler = simulation(site(), num_windows=3)
    world.worse = {"s0"}
    run.run(until_s=1000.0)
    assert all(stream != "s0" or not promoted for stream, promoted in profiler.outcomes)
    checkpoint = run.coordinator.state.streams["s0"].checkpoint
    assert checkpoint is not None
    assert checkpoint.version == 1
    refusals = [e for e in run.events if isinstance(e, RetrainFinished) and e.stream_id == "s0"]
    assert refusals
    assert not any(e.promoted for e in refusals)


def test_the_rest_of_the_window_is_planned_anew_when_a_retraining_ends() -> None:
    run, _, _ = simulation(site(), num_windows=2)
    run.run(until_s=1000.0)
    phases = [(e.phase, e.reason) for e in run.events if isinstance(e, PlanSolved)]
    assert any(phase == "replan" and "ended" in reason for phase, reason in phases)


def test_nothing_is_sent_while_nothing_changes() -> None:
    run, _, _ = simulation(site(retrain=()), num_windows=None)
    run.run(until_s=150.0)
    revision = run.coordinator.state.revision
    window = run.coordinator.state.window
    end = run.coordinator.window_end_s()
    run.run(until_s=end - 40.0)
    before = run.coordinator.state.revision
    run.run(until_s=end - 21.0)  # then the next window's labels begin
    assert run.coordinator.state.window == window
    assert run.coordinator.state.revision == before >= revision


def test_streams_of_a_lost_executor_are_served_by_the_others_at_once() -> None:
    run, _, _ = simulation(site(num_streams=3), num_gpus=2, num_windows=None)
    run.run(until_s=150.0)
    run.leave("gpu1")
    run.run(until_s=run.now + 1.0)
    assert {job.stream.stream_id for job in run.executors["gpu0"].serving.values()} == {"s0", "s1", "s2"}
    lost = [e for e in run.events if isinstance(e, ExecutorChanged) and e.change == "lost"]
    assert [e.executor_id for e in lost] == ["gpu1"]


def test_an_executor_that_joins_gets_work_in_the_same_window() -> None:
    run, world, _ = simulation(site(num_streams=3), num_gpus=1, num_windows=None)
    run.run(until_s=150.0)
    run.join(SimulatedExecutor(GpuSpec(gpu_id="gpu9"), world))
    run.run(until_s=run.now + 1.0)
    assert run.executors["gpu9"].serving or run.executors["gpu9"].running


@pytest.mark.parametrize("stop_at", [8.0, 20.0, 21.0, 25.0, 31.0, 60.0, 119.9, 124.0, 131.0, 133.0])
def test_a_restarted_optimizer_adopts_what_runs_and_retrains_nothing_twice(stop_at: float) -> None:
    run, world, _ = simulation(site(), num_gpus=2, num_windows=None)
    run.run(until_s=stop_at)
    old = msgspec.msgpack.decode(msgspec.msgpack.encode(run.coordinator.state), type=SiteState)
    executors = list(run.executors.values())
    running_before = {job_id for e in executors for job_id in e.running}
    old.term += 1
    again, _, _ = simulation(site(), num_windows=None, state=old, world=world, adopt_until_s=stop_at + 6.0, join=False)
    again.now = again._measured_s = stop_at
    again.run(until_s=stop_at + 1.0)
    for executor in executors:
        again.join(executor)
    running_after = {job_id for e in executors for job_id in e.running}
    assert running_before <= running_after | {j for e in executors for j in e.finished}
    again.run(until_s=stop_at + 300.0)
    assert len(world.started) == len(set(world.started))
    versions = [e.held for e in executors]
    assert all(v is not None and v.term == old.term for v in versions)
    closed = [e.window for e in again.events if isinstance(e, WindowClosed)]
    assert len(closed) >= 2
    assert closed == sorted(set(closed))


def test_after_a_restart_executors_that_do_not_come_back_are_planned_around() -> None:
    run, world, _ = simulation(site(num_streams=3), num_gpus=2, num_windows=None)
    run.run(until_s=150.0)
    old = msgspec.msgpack.decode(msgspec.msgpack.encode(run.coordinator.state), type=SiteState)
    old.term += 1
    again, _, _ = simulation(
        site(num_streams=3), num_windows=None, state=old, world=world, adopt_until_s=156.0, join=False
    )
    again.now = again._measured_s = 150.0
    again.join(run.executors["gpu0"])
    again.run(until_s=158.0)
    assert {j.stream.stream_id for j in run.executors["gpu0"].serving.values()} == {"s0", "s1", "s2"}


def test_a_repeated_result_changes_nothing() -> None:
    run, _, profiler = simulation(site(), num_windows=None)
    seen: list[m.Up] = []
    executor = run.executors["gpu0"]
    take = executor.take_ended

    def keep(now: float) -> list[m.Up]:
        ended = take(now)
        seen.extend(ended)
        return ended

    executor.take_ended = keep  # type: ignore[method-assign]
    run.run(until_s=200.0)
    state = msgspec.msgpack.encode(run.coordinator.state)
    outcomes = list(profiler.outcomes)
    for message in seen:
        run.give(Received(executor_id="gpu0", message=message))
    assert msgspec.msgpack.encode(run.coordinator.state) == state
    assert profiler.outcomes == outcomes


def test_a_failed_retraining_leaves_the_model_and_frees_its_share() -> None:
    run, _, _ = simulation(site(num_streams=1), num_windows=None)
    run.run(until_s=115.0)
    while not any(s.running for s in run.coordinator.state.streams.values()):
        run.run(until_s=run.now + 1.0)
    job = next(s.running.job for s in run.coordinator.state.streams.values() if s.running)
    serving = run.executors["gpu0"].serving["serve/s0"].checkpoint
    failure = m.JobFailed(
        event_id=900, executor_id="gpu0", job_id=job.job_id, stream_id="s0", kind="retrain", reason="diverged (NaN)"
    )
    run.give(Received(executor_id="gpu0", message=failure))
    run.run(until_s=run.now + 1.0)
    assert job.job_id not in run.executors["gpu0"].running
    assert run.executors["gpu0"].serving["serve/s0"].checkpoint == serving
    assert any(isinstance(e, Notice) and "diverged" in e.text for e in run.events)


def test_a_stream_that_cannot_be_started_ends_the_run_with_exit_code_2() -> None:
    run, _, _ = simulation(site(num_streams=1), num_windows=None)
    (job,) = run.coordinator.state.pipeline.values()
    failure = m.JobFailed(
        event_id=1, executor_id="gpu0", job_id=job.job_id, stream_id="s0", kind="label", reason="clip.mp4: no such file"
    )
    run.give(Received(executor_id="gpu0", message=failure))
    assert run.finish is not None
    assert run.finish.exit_code == 2
    assert "clip.mp4" in run.finish.reason


def test_an_unacknowledged_plan_is_sent_again_unchanged() -> None:
    run, _, _ = simulation(site(retrain=()), num_windows=None)
    run.run(until_s=150.0)
    run.run(until_s=run.coordinator.window_end_s() - 10.0)
    executor = run.coordinator.executors["gpu0"]
    sent = executor.sent
    executor.applied = None
    run.run(until_s=run.now + 3.0)
    assert run.executors["gpu0"].held == sent
    assert executor.applied == sent


def test_worlds_do_not_share_state() -> None:
    assert TestWorld().models == {}


def test_a_stream_that_moves_is_served_at_the_old_place_until_the_new_one_is_ready() -> None:
    run, _, _ = simulation(site(num_streams=1, retrain=()), num_gpus=2, num_windows=None)
    run.run(until_s=170.0)
    stream = run.coordinator.state.streams["s0"]
    new, old = stream.serving_executor, "gpu1" if stream.serving_executor == "gpu0" else "gpu0"
    assert stream.serving_config is not None
    stream.leaving = Leaving(executor_id=old, config=stream.serving_config, share=0.4, since_s=run.now)
    run.give(Tick())
    assert "serve/s0" in run.executors[old].serving
    assert "serve/s0" in run.executors[new].serving
    worker = m.WorkerStatus(
        job_id="serve/s0",
        kind="inference",
        stream_id="s0",
        pid=1,
        state="ready",
        share_granted=0.4,
        share_achieved=None,
        progress=1,
    )
    held = run.executors[new].held
    beat = m.Heartbeat(executor_id=new, incarnation="1", loop_count=1, held=held, workers=(worker,))
    run.give(Received(executor_id=new, message=beat))
    assert "serve/s0" not in run.executors[old].serving
    assert "serve/s0" in run.executors[new].serving


def test_an_old_place_is_not_kept_for_ever() -> None:
    run, _, _ = simulation(site(num_streams=1, retrain=()), num_gpus=2, num_windows=None)
    run.run(until_s=170.0)
    stream = run.coordinator.state.streams["s0"]
    old = "gpu1" if stream.serving_executor == "gpu0" else "gpu0"
    assert stream.serving_config is not None
    stream.leaving = Leaving(executor_id=old, config=stream.serving_config, share=0.4, since_s=run.now)
    run.run(until_s=run.now + 10.0)
    assert "serve/s0" in run.executors[old].serving
    run.run(until_s=run.now + 22.0)
    assert "serve/s0" not in run.executors[old].serving


def test_no_window_at_all_only_makes_the_first_models() -> None:
    run, world, _ = simulation(site(), num_windows=0)
    run.run(until_s=1000.0)
    assert run.finish is not None
    assert run.finish.exit_code == 0
    assert not any(isinstance(e, WindowClosed) for e in run.events)
    assert len(world.models) == 2


def test_an_old_place_is_given_up_at_once_where_the_new_plan_needs_its_share() -> None:
    run, _, _ = simulation(site(num_streams=4), num_gpus=2, num_windows=None)
    run.run(until_s=150.0)
    state = run.coordinator.state
    stream = state.streams["s0"]
    other = "gpu1" if stream.serving_executor == "gpu0" else "gpu0"
    assert stream.serving_config is not None
    stream.leaving = Leaving(executor_id=other, config=stream.serving_config, share=1.0, since_s=run.now)
    run.run(until_s=run.now + 0.6)
    assert stream.leaving is None
    assert run.peak_share <= 1.0 + 1e-9


def test_a_refused_plan_is_not_sent_again_and_again() -> None:
    run, _, _ = simulation(site(retrain=()), num_windows=None)
    run.run(until_s=200.0)
    held = run.executors["gpu0"].held
    assert held is not None
    before = run.coordinator.state.revision
    refusal = m.PlanRefused(executor_id="gpu0", version=held, held=held, reason="not executable")
    run.give(Received(executor_id="gpu0", message=refusal))
    assert run.coordinator.state.revision == before
    run.run(until_s=run.now + 2.0)
    assert run.coordinator.state.revision == before + 1
    assert run.executors["gpu0"].held is not None
    assert run.executors["gpu0"].held > held


def test_streams_that_do_not_fit_are_named_and_the_others_served() -> None:
    run, _, _ = simulation(site(num_streams=3, share_quantum=0.5), num_gpus=1, num_windows=None)
    run.run(until_s=200.0)
    assert len(run.executors["gpu0"].serving) == 2
    told = [e.text for e in run.events if isinstance(e, Notice) and "overloaded" in e.text]
    assert told
    assert run.peak_share <= 1.0 + 1e-9


def test_a_stream_that_was_given_up_is_served_as_soon_as_an_executor_joins() -> None:
    run, world, _ = simulation(site(num_streams=3, share_quantum=0.5), num_gpus=1, num_windows=None)
    run.run(until_s=200.0)
    run.join(SimulatedExecutor(GpuSpec(gpu_id="gpu9"), world))
    run.run(until_s=run.now + 2.0)
    served = {job.stream.stream_id for e in run.executors.values() for job in e.serving.values()}
    assert served == {"s0", "s1", "s2"}


def test_profiling_does_with_less_where_serving_needs_the_room() -> None:
    tight = site(num_streams=2, share_quantum=0.25, profiling=ProfilingConfig(share=0.75))
    run, world, _ = simulation(tight, num_gpus=1, num_windows=2)
    run.run(until_s=1000.0)
    assert run.finish is not None
    assert run.finish.exit_code == 0
    assert any(job.startswith("trial/s0/w1") for job in world.started)
    assert run.peak_share <= 1.0 + 1e-9


def test_the_profiler_is_told_where_and_how_long_a_retraining_ran() -> None:
    run, _, profiler = simulation(site(), num_windows=3)
    run.run(until_s=1000.0)
    runs = [ran for ran in profiler.runs if ran is not None]
    assert runs
    for ran in runs:
        assert ran.elapsed_s > 0.0
        assert 0.0 < ran.work_s <= ran.elapsed_s + 1e-6  # a share of one GPU of speed 1
        if ran.share is not None:
            assert ran.work_s == pytest.approx(ran.share * ran.elapsed_s)


def test_a_measured_share_curve_is_part_of_the_planning_problem() -> None:
    curve = ((0.5, 0.7), (1.0, 1.0))
    run, _, profiler = simulation(site(), num_windows=2)
    executors = run.coordinator.executors
    profiler.efficiency = {questions.device_kind(e): curve for e in executors.values()}
    run.run(until_s=1000.0)
    assert executors
    assert all(e.gpu.share_efficiency == curve for e in executors.values())
