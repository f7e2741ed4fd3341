"""Live streams that are lost: their share goes to others within seconds, and comes back with them."""

from __future__ import annotations

import msgspec
import pytest

from optimizer.ports import Received, Tick
from optimizer.simulator import Simulation
from protocol import messages as m
from protocol.events import Notice, PlanSolved
from protocol.schema import LiveSource, StreamCondition
from tests.optimizer.coordinator_world import TestWorld, simulation, site


def running(until_s: float = 170.0, num_streams: int = 2) -> tuple[Simulation, TestWorld]:
    """A site in the middle of a window, its retrainings over."""
    run, world, _ = simulation(site(num_streams=num_streams), num_windows=None)
    run.run(until_s=until_s)
    return run, world


def beat(run: Simulation, conditions: dict[str, StreamCondition]) -> None:
    """Every executor's heartbeat at this moment; streams not named are well."""
    for executor_id, executor in run.executors.items():
        workers = tuple(
            m.WorkerStatus(
                job_id=job_id,
                kind="inference",
                stream_id=job.stream.stream_id,
                pid=1,
                state="ready",
                share_granted=job.share,
                share_achieved=None,
                progress=1,
                condition=conditions.get(job.stream.stream_id, "ok"),
            )
            for job_id, job in executor.serving.items()
        )
        message = m.Heartbeat(
            executor_id=executor_id, incarnation="1", loop_count=1, held=executor.held, workers=workers
        )
        run.give(Received(executor_id=executor_id, message=message))


def after(run: Simulation, seconds: float, conditions: dict[str, StreamCondition]) -> None:
    """Let time pass with a heartbeat every half second."""
    end = run.now + seconds
    while run.now < end:
        beat(run, conditions)
        run.run(until_s=run.now + 0.5)


def shares(run: Simulation) -> dict[str, float]:
    return {job.stream.stream_id: job.share for executor in run.executors.values() for job in executor.serving.values()}


def reasons(run: Simulation) -> list[str]:
    """Why plans were made so far."""
    return [event.reason for event in run.events if isinstance(event, PlanSolved)]


@pytest.mark.parametrize("condition", ["lost", "stalled", "garbage"])
def test_a_lost_streams_share_is_planned_anew_within_seconds_and_given_back(condition: StreamCondition) -> None:
    run, _ = running()
    before = shares(run)
    assert min(before.values()) > 0.1 + 1e-9, "there is something to give away"
    after(run, 3.0, {"s0": condition})
    lost = shares(run)
    assert lost["s0"] == pytest.approx(0.1), "one quantum keeps its worker"
    assert lost["s1"] >= before["s1"]
    assert any(f"stream s0 is {condition}" in reason for reason in reasons(run))
    after(run, 5.0, {"s0": condition})
    assert sum("stream s0" in reason for reason in reasons(run)) == 1, "it is lost once"
    after(run, 3.0, {})
    assert shares(run)["s0"] > 0.1 + 1e-9
    assert any("stream s0 is back" in reason for reason in reasons(run))


def test_a_hiccup_and_another_picture_size_upset_nobody() -> None:
    run, _ = running()
    after(run, 0.5, {"s0": "stalled"})
    after(run, 3.0, {"s1": "changed"})
    assert not any("stream s" in reason and ("is" in reason) for reason in reasons(run))


def test_a_lost_stream_is_neither_labelled_nor_retrained_in_the_next_window() -> None:
    run, world = running()
    window = run.coordinator.state.window
    world.started.clear()
    while run.coordinator.state.window == window or run.coordinator.state.phase != "executing":
        after(run, 1.0, {"s0": "lost"})
    assert any("/s1/" in job for job in world.started)
    new = [job for job in world.started if not job.startswith("canary/")]  # canaries of the window before may remain
    assert not any("/s0/" in job for job in new), new
    serving = shares(run)
    assert set(serving) == {"s0", "s1"}, "it is still waited for"
    world.started.clear()
    window = run.coordinator.state.window
    while run.coordinator.state.window == window or run.coordinator.state.phase != "executing":
        after(run, 1.0, {})
    assert any("/s0/" in job for job in world.started), "back, it takes part again"


def live_site(num_streams: int = 2):  # type: ignore[no-untyped-def]
    plain = site(num_streams=num_streams)
    streams = tuple(
        msgspec.structs.replace(spec, source=LiveSource(url=f"rtsp://camera/{spec.stream_id}"))
        for spec in plain.streams
    )
    return msgspec.structs.replace(plain, streams=streams)


def refuse(run: Simulation, stream_id: str) -> bool:
    """Let the first-labels job of a stream fail as one does whose camera cannot be reached; False: none runs."""
    for executor_id, job in list(run.coordinator.state.pipeline.items()):
        if job.stream.stream_id == stream_id and isinstance(job, m.LabelJob):
            assert job.record, "nobody has kept its pictures yet"
            run.executors[executor_id].running.pop(job.job_id, None)
            failed = m.JobFailed(
                event_id=99, executor_id=executor_id, job_id=job.job_id, stream_id=stream_id, kind="label",
                reason="input: stream: source.url: Connection refused",
            )  # fmt: skip
            run.give(Received(executor_id=executor_id, message=failed))
            return True
    return False


def test_a_camera_that_is_not_there_at_the_start_holds_up_no_other_and_is_tried_again() -> None:
    run, _, _ = simulation(live_site(), num_windows=None)
    for _ in range(400):
        run.run(until_s=run.now + 0.25)
        refuse(run, "s0")
        if run.coordinator.state.phase == "executing":
            break
    assert run.finish is None
    assert set(shares(run)) == {"s1"}
    notices = [e.text for e in run.events if isinstance(e, Notice)]
    assert any("Connection refused" in text and "next window" in text for text in notices)
    run.run(until_s=run.now + 220.0)
    assert run.coordinator.state.streams["s0"].checkpoint is not None
    assert set(shares(run)) == {"s0", "s1"}
    run.give(Tick())


def test_when_no_camera_is_there_the_run_ends_with_the_reason() -> None:
    run, _, _ = simulation(live_site(), num_windows=None)
    for _ in range(400):
        run.run(until_s=run.now + 0.25)
        refuse(run, "s0")
        refuse(run, "s1")
        if run.finish is not None:
            break
    assert run.finish is not None
    assert run.finish.exit_code == 2
    assert "Connection refused" in run.finish.reason
