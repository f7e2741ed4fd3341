"""What serving costs is measured while serving, and moves the estimates of a stream whose scene has changed."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from profiler.serving import Served, rescaled, served
from protocol.events import StreamAccuracy
from tests.profiler.profiler_world import INFERENCE, RETRAIN, SPEC, World
from tests.profiler.test_profiler_memory import profiler


def second(inference_id: str, busy_s_per_frame: float, frames: int = 10, dropped: int = 0) -> StreamAccuracy:
    return StreamAccuracy(
        stream_id="north",
        window=0,
        accuracy=0.7,
        accuracy_sum=7.0,
        num_scored=10,
        num_frames=frames,
        num_analysed=frames - dropped,
        num_dropped=dropped,
        num_objects=50,
        fps=10.0,
        latency_ms_p50=5.0,
        model_version=1,
        inference_id=inference_id,
        busy_s=busy_s_per_frame * (frames - dropped),
    )


def after(*events: StreamAccuracy) -> Served | None:
    known = None
    for event in events:
        known = served(known, event)
    return known


def test_the_latest_frames_count_and_those_that_were_given_up_do_not() -> None:
    known = after(*[second("a", 0.01)] * 60, *[second("a", 0.03, dropped=7)] * 40)
    assert known is not None
    assert known.busy_s_per_frame == pytest.approx(0.03, rel=0.15)
    known = after(*[second("a", 0.01)] * 60, second("b", 0.04))
    assert known is not None
    assert (known.inference_id, known.num_frames) == ("b", 10.0)
    assert known.busy_s_per_frame == pytest.approx(0.04)


def test_an_interval_without_a_frame_or_without_a_measurement_says_nothing() -> None:
    assert after(second("a", 0.01, frames=0), second("a", 0.0), second("a", 0.01, frames=5, dropped=5)) is None


def test_all_configurations_move_with_the_one_that_serves_within_limits() -> None:
    busy = {config: 0.01 * (number + 1) for number, config in enumerate(INFERENCE)}
    serving = INFERENCE[1].config_id
    assert rescaled(busy, None) == busy
    assert rescaled(busy, Served(inference_id="gone", busy_s_per_frame=1.0, num_frames=50)) == busy
    assert rescaled(busy, Served(inference_id=serving, busy_s_per_frame=1.0, num_frames=3)) == busy, "too few frames"
    doubled = rescaled(busy, Served(inference_id=serving, busy_s_per_frame=0.04, num_frames=50))
    assert list(doubled.values()) == pytest.approx([2.0 * value for value in busy.values()])
    most = rescaled(busy, Served(inference_id=serving, busy_s_per_frame=5.0, num_frames=50))
    assert list(most.values()) == pytest.approx([4.0 * value for value in busy.values()])


def test_windows_are_planned_on_what_serving_costs(tmp_path: Path) -> None:
    site, world = profiler(tmp_path / "h.sqlite"), World(1)
    first = site.estimate(SPEC, world.trial(0, (RETRAIN[4],)), world.dataset(0))
    serving = first.inference[0]
    cost = serving.gpu_share_needed / SPEC.fps
    for _ in range(30):
        site.measured(second(serving.inference_id, 2.0 * cost))
    blind = msgspec.structs.replace(world.trial(1, (RETRAIN[4],)), inference=())
    then = site.estimate(SPEC, blind, world.dataset(1))
    safety = then.inference[0].gpu_share_needed / serving.gpu_share_needed / 2.0
    for before, now in zip(first.inference, then.inference, strict=True):
        assert now.gpu_share_needed == pytest.approx(2.0 * safety * before.gpu_share_needed)
    assert 1.0 <= safety <= 1.5, "the head-room comes on top"
    seen = site.estimate(SPEC, world.trial(2, (RETRAIN[4],)), world.dataset(2))
    assert seen.inference[0].gpu_share_needed == pytest.approx(then.inference[0].gpu_share_needed, rel=0.3)
