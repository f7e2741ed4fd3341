"""Worker reports as telemetry."""

from __future__ import annotations

import pytest

from executor.links import Progress, Ready, StreamStats
from executor.roster_entry import Worker
from executor.telemetry import numbers_of
from protocol.events import JobShare, StreamAccuracy
from tests.executor import optimizer_model as model

WORKER = Worker(worker_id=1, job=model.inference("cam", 0.4))


def stats(accuracy_sum: float, num_scored: int) -> StreamStats:
    return StreamStats(
        interval_s=2.0,
        num_frames=20,
        num_analysed=10,
        num_dropped=1,
        num_objects=30,
        accuracy_sum=accuracy_sum,
        num_scored=num_scored,
        latency_ms_p50=4.0,
        model_version=3,
        inference_id="half",
    )


@pytest.mark.parametrize(("total", "scored", "accuracy"), [(6.0, 8, 0.75), (0.0, 0, None), (8.0000001, 8, 1.0)])
def test_accuracy_is_the_mean_over_scored_frames(total: float, scored: int, accuracy: float | None) -> None:
    (event,) = numbers_of(WORKER, stats(total, scored), "g1", "pacing", 7)
    assert isinstance(event, StreamAccuracy)
    assert (event.stream_id, event.window, event.accuracy, event.fps) == ("cam", 7, accuracy, 5.0)
    assert (event.num_frames, event.num_analysed, event.num_dropped, event.model_version) == (20, 10, 1, 3)


def test_progress_tells_the_granted_and_the_achieved_share() -> None:
    (event,) = numbers_of(WORKER, Progress(count=5, share_achieved=0.38), "g1", "pacing", 7)
    assert event == JobShare(
        job_id="inference/cam",
        kind="inference",
        stream_id="cam",
        gpu_id="g1",
        share_granted=0.4,
        share_achieved=0.38,
        backend="pacing",
    )
    assert numbers_of(WORKER, Ready(pid=1, startup_s=0.1), "g1", "pacing", 7) == ()
